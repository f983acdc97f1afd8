"""The blocks of a causal Wan transformer: attention through a cache, modulation per group of tokens."""

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTransformerBlock,
    _get_added_kv_projections,
    _get_qkv_projections,
)

from wan_autoregressive.cache import LaneBlock, WanKVBlockCache
from wan_autoregressive.cache.rotary import RotaryEmbedding, apply_rotary_emb, rotate_pairs
from wan_autoregressive.models.conditions import BlockTextConditions
from wan_autoregressive.models.sequence_parallel import SequenceParallel


class CausalWanAttnProcessor(WanAttnProcessor):
    """Self-attention over the chunk and what the cache holds of the past.

    No mask: causality between chunks comes from the cache holding only the past, so every attention backend works.
    With `key_rotary_emb` the cache holds keys without rotary embedding, which are rotated when they are used.
    """

    parallel: SequenceParallel | None = None
    """With it hidden states are this rank's tokens, and the cache holds its heads."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: RotaryEmbedding | None = None,
        kv_cache: WanKVBlockCache | LaneBlock | None = None,
        key_rotary_emb: RotaryEmbedding | None = None,
        keys_values_only: bool = False,
    ) -> torch.Tensor:
        """As upstream's, `hidden_states` being `(batch, tokens, dim)`; nothing but the write to the cache, and
        `hidden_states` as they were, with `keys_values_only`."""
        if keys_values_only and not attn.fused_projections:
            query, key, value = None, attn.to_k(hidden_states), attn.to_v(hidden_states)
        else:
            query, key, value = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        # Without a cache as upstream, to the bit.
        rotate = rotate_pairs if kv_cache is None else self.rotate_own
        key = attn.norm_k(key).unflatten(2, (attn.heads, -1))  # (batch, tokens, heads, head_dim)
        value = value.unflatten(2, (attn.heads, -1))
        query = None if keys_values_only else attn.norm_q(query).unflatten(2, (attn.heads, -1))
        if self.parallel is not None and rotary_emb is not None:  # whose tables are of the whole chunk
            num_tokens = rotary_emb[0].shape[1]
            if query is None:
                key, value = self.parallel.to_heads(num_tokens, key, value)
            else:
                key, value, query = self.parallel.to_heads(num_tokens, key, value, query)
        if rotary_emb is not None and key_rotary_emb is None:
            key = rotate(key, *rotary_emb)
        if query is None:
            assert isinstance(kv_cache, WanKVBlockCache)
            kv_cache.put(key, value)
            return hidden_states
        if rotary_emb is not None:
            query = rotate(query, *rotary_emb)
        if kv_cache is not None:
            key, value = kv_cache.write(key, value)  # (batch, cached tokens, heads, head_dim)
        if key_rotary_emb is not None:
            key = self.rotate(key, *key_rotary_emb)
        return _project(attn, _attend(self, query, key, value, attention_mask, self.parallel))

    def rotate(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotated keys of the cache `(batch, tokens, heads, head_dim)`: new memory."""
        return apply_rotary_emb(hidden_states, cos, sin)

    def rotate_own(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotated queries or keys of the chunk, which may be written over."""
        return apply_rotary_emb(hidden_states, cos, sin, in_place=True)


class CausalWanCrossAttnProcessor(WanAttnProcessor):
    """Cross-attention to a prompt whose keys and values are computed once and kept in `text`."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: RotaryEmbedding | None = None,
        text: BlockTextConditions | None = None,
    ) -> torch.Tensor:
        """`encoder_hidden_states` `(batch, tokens, dim)`, those of an image first, may be `None` once `text` is
        filled. Lanes, one behind the other in the batch, read the same text."""
        if text is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        if not text.is_filled:
            assert encoder_hidden_states is not None
            _fill(text, attn, encoder_hidden_states)
        lanes = len(query) // len(text.key)
        if lanes > 1:
            query = query.unflatten(0, (lanes, -1)).transpose(0, 1).flatten(1, 2)  # (batch, lanes * tokens, ...)
        attended = _attend(self, query, text.key, text.value, attention_mask)
        if text.image is not None:
            attended = attended + _attend(self, query, text.image.key, text.image.value, None)
        if lanes > 1:
            attended = attended.unflatten(1, (lanes, -1)).transpose(0, 1).flatten(0, 1)
        return _project(attn, attended)


def _fill(text: BlockTextConditions, attn: WanAttention, embedded: torch.Tensor) -> None:
    """Compute the keys and values of a prompt, and of the image beside it where they are missing."""
    image = text.image
    if image is not None:
        tokens = image.key.shape[1]
        if not image.is_filled:
            key, value = _get_added_kv_projections(attn, embedded[:, :tokens])
            image.fill(attn.norm_added_k(key).unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1)))
        embedded = embedded[:, tokens:]
    if attn.fused_projections:
        key, value = attn.to_kv(embedded).chunk(2, dim=-1)
    else:
        key, value = attn.to_k(embedded), attn.to_v(embedded)
    text.fill(attn.norm_k(key).unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1)))


def _attend(
    processor: WanAttnProcessor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    parallel: SequenceParallel | None = None,
) -> torch.Tensor:
    """Attention with the processor's backend, heads joined: `(batch, tokens, dim)`."""
    hidden_states = dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=0.0,
        is_causal=False,
        backend=processor._attention_backend,
    )
    if parallel is not None:
        hidden_states = parallel.to_tokens(hidden_states)
    return hidden_states.flatten(2, 3).type_as(query)


def _project(attn: WanAttention, hidden_states: torch.Tensor) -> torch.Tensor:
    return attn.to_out[1](attn.to_out[0](hidden_states))


class CausalWanTransformerBlock(WanTransformerBlock):
    """Upstream's block, with modulation per group of tokens and a cache for self-attention.

    Outputs of attention and feed-forward are written over through a cache; a forward hook that keeps one clones it.
    """

    def forward(
        self,
        hidden_states: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None,
        temb: torch.Tensor | None = None,
        rotary_emb: RotaryEmbedding | None = None,
        kv_cache: WanKVBlockCache | LaneBlock | None = None,
        key_rotary_emb: RotaryEmbedding | None = None,
        text: BlockTextConditions | None = None,
        keys_values_only: bool = False,
    ) -> torch.Tensor | None:
        """`hidden_states` is `(batch, tokens, dim)`; `temb` `(batch, groups, 6, dim)`, each group being
        `tokens / groups` consecutive tokens: the whole input, a frame, or a token. With `keys_values_only` the block
        ends once they are in the cache; what it returns then means nothing. Without `hidden_states` it only reads the
        prompt, `encoder_hidden_states` `(batch, text_tokens, dim)`, into `text`."""
        if hidden_states is None or temb is None:
            assert text is not None
            assert encoder_hidden_states is not None
            _fill(text, self.attn2, encoder_hidden_states)
            return None
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (self.scale_shift_table.unsqueeze(0) + temb.float()).unbind(
            dim=2
        )  # 6 x (batch, groups, dim)

        # Without a cache upstream's operations: its hooks may keep what a layer returns.
        is_cached = kv_cache is not None
        norm = self.norm_and_modulate if is_cached else norm_then_modulate
        add = self.add_gated if is_cached else add_gated

        # 1. Self-attention
        norm_hidden_states = norm(self.norm1, hidden_states, scale, shift)
        attn_output = self.attn1(
            norm_hidden_states,
            None,
            None,
            rotary_emb,
            kv_cache=kv_cache,
            key_rotary_emb=key_rotary_emb,
            keys_values_only=keys_values_only,
        )
        if keys_values_only:
            return attn_output
        hidden_states = add(hidden_states, attn_output, gate)

        # 2. Cross-attention
        norm_hidden_states = self.norm2(hidden_states.float()).type_as(hidden_states)
        attn_output = self.attn2(norm_hidden_states, encoder_hidden_states, None, None, text=text)
        in_place = is_cached and attn_output.dtype == hidden_states.dtype
        hidden_states = attn_output.add_(hidden_states) if in_place else hidden_states + attn_output

        # 3. Feed-forward
        norm_hidden_states = norm(self.norm3, hidden_states, ff_scale, ff_shift)
        return add(hidden_states, self.ffn(norm_hidden_states), ff_gate)

    def norm_and_modulate(
        self, norm: torch.nn.LayerNorm, hidden_states: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
    ) -> torch.Tensor:
        """Of a cached forward, see the function."""
        return norm_and_modulate(norm, hidden_states, scale, shift)

    def add_gated(self, hidden_states: torch.Tensor, output: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Of a cached forward, see the function; `output` may be written over."""
        return add_gated(hidden_states, output, gate, in_place=True)


def norm_then_modulate(
    norm: torch.nn.LayerNorm, hidden_states: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """As upstream, to the bit."""
    return modulate(norm(hidden_states.float()), scale, shift).type_as(hidden_states)


def norm_and_modulate(
    norm: torch.nn.LayerNorm, hidden_states: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """In a single pass over memory where one modulation holds for all tokens; the last bit is rounded differently."""
    if scale.shape[:2] != (1, 1) or norm.elementwise_affine:
        return norm_then_modulate(norm, hidden_states, scale, shift)
    weight, bias = 1 + scale[0, 0], shift[0, 0]
    return F.layer_norm(hidden_states.float(), norm.normalized_shape, weight, bias, norm.eps).type_as(hidden_states)


def modulate(normed: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`normed * (1 + scale) + shift`: `(batch, tokens, dim)` with `(batch, groups, dim)`, no copy per token."""
    grouped = normed.unflatten(1, (scale.shape[1], -1))  # (batch, groups, tokens / groups, dim)
    return (grouped * (1 + scale.unsqueeze(2))).add_(shift.unsqueeze(2)).flatten(1, 2)


def add_gated(
    hidden_states: torch.Tensor, output: torch.Tensor, gate: torch.Tensor, in_place: bool = False
) -> torch.Tensor:
    """`hidden_states + output * gate`: `(batch, tokens, dim)` with a float32 gate `(batch, groups, dim)`; `in_place`
    in the memory of `output` if that is float32 as well."""
    output, gate = output.unflatten(1, (gate.shape[1], -1)), gate.unsqueeze(2)
    gated = output.mul_(gate) if in_place and output.dtype == gate.dtype else output * gate
    return gated.flatten(1, 2).add_(hidden_states).type_as(hidden_states)
