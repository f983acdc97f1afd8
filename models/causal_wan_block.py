"""The blocks of a causal Wan transformer: attention through a cache, modulation per group of tokens."""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTransformerBlock,
    _get_qkv_projections,
)

from wan_autoregressive.cache import WanKVBlockCache
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
        kv_cache: WanKVBlockCache | None = None,
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
        rotate = rotate_pairs if kv_cache is None else partial(apply_rotary_emb, in_place=True)
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
            assert kv_cache is not None
            kv_cache.write(key, value)
            return hidden_states
        if rotary_emb is not None:
            query = rotate(query, *rotary_emb)
        if kv_cache is not None:
            key, value = kv_cache.write(key, value)  # (batch, cached tokens, heads, head_dim)
        if key_rotary_emb is not None:
            key = apply_rotary_emb(key, *key_rotary_emb)
        return _attend(self, attn, query, key, value, attention_mask, self.parallel)


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
        """`encoder_hidden_states` `(batch, text_tokens, dim)` may be `None` once `text` is filled."""
        if text is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        if not text.is_filled:
            if attn.fused_projections:
                key, value = attn.to_kv(encoder_hidden_states).chunk(2, dim=-1)
            else:
                key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
            text.fill(attn.norm_k(key).unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1)))
        return _attend(self, attn, query, text.key, text.value, attention_mask)


def _attend(
    processor: WanAttnProcessor,
    attn: WanAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    parallel: SequenceParallel | None = None,
) -> torch.Tensor:
    """Attention with the processor's backend, heads joined and projected: `(batch, tokens, dim)`."""
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
    hidden_states = hidden_states.flatten(2, 3).type_as(query)
    return attn.to_out[1](attn.to_out[0](hidden_states))


class CausalWanTransformerBlock(WanTransformerBlock):
    """Upstream's block, with modulation per group of tokens and a cache for self-attention.

    Outputs of attention and feed-forward are written over through a cache; a forward hook that keeps one clones it.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        temb: torch.Tensor,
        rotary_emb: RotaryEmbedding,
        kv_cache: WanKVBlockCache | None = None,
        key_rotary_emb: RotaryEmbedding | None = None,
        text: BlockTextConditions | None = None,
        keys_values_only: bool = False,
    ) -> torch.Tensor:
        """`hidden_states` is `(batch, tokens, dim)`; `temb` `(batch, groups, 6, dim)`, each group being
        `tokens / groups` consecutive tokens: the whole input, a frame, or a token. With `keys_values_only` the block
        ends once they are in the cache; what it returns then means nothing."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (self.scale_shift_table.unsqueeze(0) + temb.float()).unbind(
            dim=2
        )  # 6 x (batch, groups, dim)

        # Without a cache upstream's operations: its hooks may keep what a layer returns.
        is_cached = kv_cache is not None
        norm = norm_and_modulate if is_cached else norm_then_modulate

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
        hidden_states = add_gated(hidden_states, attn_output, gate, in_place=is_cached)

        # 2. Cross-attention
        norm_hidden_states = self.norm2(hidden_states.float()).type_as(hidden_states)
        attn_output = self.attn2(norm_hidden_states, encoder_hidden_states, None, None, text=text)
        in_place = is_cached and attn_output.dtype == hidden_states.dtype
        hidden_states = attn_output.add_(hidden_states) if in_place else hidden_states + attn_output

        # 3. Feed-forward
        norm_hidden_states = norm(self.norm3, hidden_states, ff_scale, ff_shift)
        return add_gated(hidden_states, self.ffn(norm_hidden_states), ff_gate, in_place=is_cached)


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
