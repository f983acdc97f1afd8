"""Wan's transformer with a KV cache, a frame offset and per-frame timesteps, as a subclass of diffusers' own.

Only what must differ is written again here; parameters, loading, LoRA, offload and attention backends are upstream's.
Without a cache the output is bitwise equal to upstream's (`tests/integration/test_causal_wan_transformer.py`).
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers looks the base class up in this module
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanRotaryPosEmbed,
    WanTransformer3DModel,
    WanTransformerBlock,
    _get_qkv_projections,
)
from diffusers.utils import apply_lora_scale

from wan_autoregressive.cache import WanKVBlockCache, WanKVCache
from wan_autoregressive.cache.rotary import RotaryEmbedding, apply_rotary_emb


class CausalWanRotaryPosEmbed(WanRotaryPosEmbed):
    """Rotary tables for frames that start at `frame_offset` instead of 0."""

    def forward(self, hidden_states: torch.Tensor, frame_offset: int = 0) -> RotaryEmbedding:
        """cos and sin, each `(1, frames * height * width, 1, head_dim)` after patching.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, channels, frames, height, width)`): For its shape.
            frame_offset (`int`): Position of the first frame, counted after patching.

        Raises:
            ValueError: a position outside the table (`rope_max_seq_len` of the config).
        """
        frames, height, width = (n // p for n, p in zip(hidden_states.shape[2:], self.patch_size, strict=True))
        return self.at([(frame_offset, frame_offset + frames)], height, width)

    def at(self, positions: Sequence[tuple[int, int]], height: int, width: int) -> RotaryEmbedding:
        """cos and sin of frames at the given runs of temporal positions `[start, stop)`, `height` x `width` each."""
        for start, stop in positions:
            if start < 0 or stop > self.max_seq_len:
                raise ValueError(
                    f"frames {start} to {stop - 1} leave the rotary table of {self.max_seq_len} positions "
                    "(rope_max_seq_len). Absolute positions end there; relative ones do not"
                )
        return (
            self._lay_out(self.freqs_cos, positions, height, width),
            self._lay_out(self.freqs_sin, positions, height, width),
        )

    def rotation(self, frames: int) -> RotaryEmbedding:
        """cos and sin that move keys by some frames in time, forward or back."""
        cos, sin = self.at([(abs(frames), abs(frames) + 1)], 1, 1)
        return cos, sin if frames >= 0 else -sin

    def _lay_out(
        self, table: torch.Tensor, positions: Sequence[tuple[int, int]], height: int, width: int
    ) -> torch.Tensor:
        time, row, column = table.split([self.t_dim, self.h_dim, self.w_dim], dim=1)
        time = torch.cat([time[start:stop] for start, stop in positions])  # (frames, t_dim)
        frames = time.shape[0]
        grid = (frames, height, width, -1)
        time = time.view(frames, 1, 1, -1).expand(grid)
        row = row[:height].view(1, height, 1, -1).expand(grid)
        column = column[:width].view(1, 1, width, -1).expand(grid)
        return torch.cat([time, row, column], dim=-1).reshape(1, frames * height * width, 1, -1)


class CausalWanTimesteps(Timesteps):
    """Sinusoidal timestep embedding with a choice of precision.

    diffusers computes it in float32; the original Wan code in float64, which brings latents from 1.2e-5 to 2e-6 of
    the original's.
    """

    sinusoid_dtype = torch.float32

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        if self.sinusoid_dtype == torch.float32:
            return super().forward(timesteps)
        half = self.num_channels // 2
        exponent = torch.arange(half, dtype=self.sinusoid_dtype, device=timesteps.device) / half
        angles = timesteps[:, None].to(self.sinusoid_dtype) * torch.pow(10000, -exponent)  # (timesteps, half)
        return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


class CausalWanAttnProcessor(WanAttnProcessor):
    """Self-attention over the chunk and what the cache holds of the past.

    No mask: causality between chunks comes from the cache holding only the past, so every attention backend works.
    With `key_rotary_emb` the cache holds keys without rotary embedding, which are rotated when they are used.
    """

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: RotaryEmbedding | None = None,
        kv_cache: WanKVBlockCache | None = None,
        key_rotary_emb: RotaryEmbedding | None = None,
    ) -> torch.Tensor:
        query, key, value = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query = attn.norm_q(query).unflatten(2, (attn.heads, -1))  # (batch, tokens, heads, head_dim)
        key = attn.norm_k(key).unflatten(2, (attn.heads, -1))
        value = value.unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            query = apply_rotary_emb(query, *rotary_emb)
            if key_rotary_emb is None:
                key = apply_rotary_emb(key, *rotary_emb)
        if kv_cache is not None:
            key, value = kv_cache.write(key, value)  # (batch, cached tokens, heads, head_dim)
        if key_rotary_emb is not None:
            key = apply_rotary_emb(key, *key_rotary_emb)

        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        hidden_states = hidden_states.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](hidden_states))


class CausalWanTransformerBlock(WanTransformerBlock):
    """Upstream's block, with modulation per group of tokens and a cache for self-attention."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary_emb: RotaryEmbedding,
        kv_cache: WanKVBlockCache | None = None,
        key_rotary_emb: RotaryEmbedding | None = None,
    ) -> torch.Tensor:
        """`hidden_states` is `(batch, tokens, dim)`; `temb` `(batch, groups, 6, dim)`, each group being
        `tokens / groups` consecutive tokens: the whole input, a frame, or a token."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (self.scale_shift_table.unsqueeze(0) + temb.float()).unbind(
            dim=2
        )  # 6 x (batch, groups, dim)

        # 1. Self-attention
        norm_hidden_states = modulate(self.norm1(hidden_states.float()), scale, shift).type_as(hidden_states)
        attn_output = self.attn1(
            norm_hidden_states, None, None, rotary_emb, kv_cache=kv_cache, key_rotary_emb=key_rotary_emb
        )
        hidden_states = (hidden_states.float() + apply_gate(attn_output, gate)).type_as(hidden_states)

        # 2. Cross-attention
        norm_hidden_states = self.norm2(hidden_states.float()).type_as(hidden_states)
        hidden_states = hidden_states + self.attn2(norm_hidden_states, encoder_hidden_states, None, None)

        # 3. Feed-forward
        norm_hidden_states = modulate(self.norm3(hidden_states.float()), ff_scale, ff_shift).type_as(hidden_states)
        ff_output = self.ffn(norm_hidden_states)
        return (hidden_states.float() + apply_gate(ff_output.float(), ff_gate)).type_as(hidden_states)


def modulate(normed: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`normed * (1 + scale) + shift`: `(batch, tokens, dim)` with `(batch, groups, dim)`, no copy per token."""
    grouped = normed.unflatten(1, (scale.shape[1], -1))  # (batch, groups, tokens / groups, dim)
    return (grouped * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2)


def apply_gate(hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return (hidden_states.unflatten(1, (gate.shape[1], -1)) * gate.unsqueeze(2)).flatten(1, 2)


class CausalWanTransformer3DModel(WanTransformer3DModel):
    """`WanTransformer3DModel` that generates a video chunk by chunk; loads the same checkpoints."""

    _no_split_modules = ["CausalWanTransformerBlock"]  # noqa: RUF012 - read by diffusers under these names
    _repeated_blocks = ["CausalWanTransformerBlock"]  # noqa: RUF012
    # Offload hooks must neither copy nor move the cache.
    _skip_keys = ["kv_cache", "attention_kwargs"]  # noqa: RUF012

    # diffusers reads the config's keys off this signature.
    @functools.wraps(WanTransformer3DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _make_causal(self)

    @classmethod
    def from_wan(cls, transformer: WanTransformer3DModel) -> "CausalWanTransformer3DModel":
        """Turn a loaded `WanTransformer3DModel` into a causal one in place: no parameter, LoRA or hook is touched."""
        transformer.__class__ = cls
        _make_causal(transformer)
        return transformer

    def set_sinusoid_dtype(self, dtype: torch.dtype) -> None:
        """Precision of the sinusoidal timestep embedding: float32 as diffusers (default), float64 as the original."""
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the sinusoid can be torch.float32 or torch.float64, got {dtype}")
        self.condition_embedder.timesteps_proj.sinusoid_dtype = dtype

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        frame_offset: int = 0,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the flow of one chunk.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, channels, frames, height, width)`): Noisy latents.
            timestep (`torch.Tensor`): `(batch,)`, or `(batch, n)` with n = 1, one per frame, or one per token
                (counted after patching).
            encoder_hidden_states (`torch.Tensor` of shape `(batch, text_tokens, text_dim)`): Prompt embeddings. Zero
                padding is attended to, as in Wan.
            attention_kwargs (`dict`, *optional*): `kv_cache` is the [`WanKVCache`] to attend through and to write,
                in its current mode; `scale` the LoRA scale.
            frame_offset (`int`, defaults to 0): Position of the chunk's first frame in the video, in latent frames
                after patching. A cache with relative positions makes its own.

        Returns:
            [`~models.modeling_outputs.Transformer2DModelOutput`] or a tuple with the flow, shaped as `hidden_states`.

        Raises:
            ValueError: a timestep of another shape, a position past the rotary table, a chunk that the cache refuses,
                or a cache together with diffusers' block-skipping caches.
        """
        kv_cache: WanKVCache | None = (attention_kwargs or {}).get("kv_cache")
        if kv_cache is not None:
            self._check_kv_cache(kv_cache)
        batch_size, _, num_frames, height, width = hidden_states.shape
        p_t, p_h, p_w = self.config.patch_size
        frames, rows, columns = num_frames // p_t, height // p_h, width // p_w  # after patching
        timestep = self._grouped_timestep(timestep, batch_size, frames, frames * rows * columns)

        # 1. Positions and patches
        block_caches: list[Any] = [None] * len(self.blocks)
        if kv_cache is not None:
            block_caches = kv_cache.begin_forward(num_tokens=frames * rows * columns)
        rotary_emb, key_rotary_emb = self._rotary_embeddings(hidden_states, frame_offset, kv_cache)
        hidden_states = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()

        # 2. Conditions: temb (batch, groups, dim), timestep_proj (batch, groups, 6, dim)
        temb, timestep_proj, encoder_hidden_states, encoder_hidden_states_image = self.condition_embedder(
            timestep.flatten(),
            encoder_hidden_states,
            encoder_hidden_states_image,
            timestep_seq_len=timestep.shape[1],
        )
        timestep_proj = timestep_proj.unflatten(2, (6, -1))
        if encoder_hidden_states_image is not None:
            encoder_hidden_states = torch.concat([encoder_hidden_states_image, encoder_hidden_states], dim=1)

        # 3. Blocks, each with its own part of the cache
        for block, block_cache in zip(self.blocks, block_caches, strict=True):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    block, hidden_states, encoder_hidden_states, timestep_proj, rotary_emb, block_cache, key_rotary_emb
                )
            else:
                hidden_states = block(
                    hidden_states, encoder_hidden_states, timestep_proj, rotary_emb, block_cache, key_rotary_emb
                )
        if kv_cache is not None:
            kv_cache.end_forward()

        # 4. Output norm, projection and unpatchify
        shift, scale = (self.scale_shift_table.unsqueeze(0).to(temb.device) + temb.unsqueeze(2)).unbind(dim=2)
        shift, scale = shift.to(hidden_states.device), scale.to(hidden_states.device)
        hidden_states = modulate(self.norm_out(hidden_states.float()), scale, shift).type_as(hidden_states)
        hidden_states = self.proj_out(hidden_states)
        hidden_states = hidden_states.reshape(batch_size, frames, rows, columns, p_t, p_h, p_w, -1)
        hidden_states = hidden_states.permute(0, 7, 1, 4, 2, 5, 3, 6)
        sample = hidden_states.flatten(6, 7).flatten(4, 5).flatten(2, 3)  # (batch, channels, frames, height, width)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _rotary_embeddings(
        self, hidden_states: torch.Tensor, frame_offset: int, kv_cache: WanKVCache | None
    ) -> tuple[RotaryEmbedding, RotaryEmbedding | None]:
        """Tables for the chunk, and for all cached keys if they are rotated when used."""
        if kv_cache is None or kv_cache.position_mode == "absolute":
            return self.rope(hidden_states, frame_offset), None
        frames, height, width = (n // p for n, p in zip(hidden_states.shape[2:], self.config.patch_size, strict=True))
        tokens_per_frame = height * width
        if kv_cache.position_mode == "sink_relative":
            offset = kv_cache.slide(frame_offset, frames, tokens_per_frame, self.rope.max_seq_len, self.rope.rotation)
            return self.rope(hidden_states, offset), None
        positions = kv_cache.planned_frame_positions(tokens_per_frame)
        newest = max(stop for _, stop in positions)
        return self.rope(hidden_states, newest - frames), self.rope.at(positions, height, width)

    def kv_cache_bytes(self, num_tokens: int, batch_size: int = 1) -> int:
        """Bytes that keys and values of `num_tokens` tokens take over all blocks, in this model's dtype."""
        cache = WanKVCache(num_blocks=self.config.num_layers)
        heads, head_dim = self.config.num_attention_heads, self.config.attention_head_dim
        return cache.expected_bytes(batch_size, heads, head_dim, self.dtype, num_tokens)

    def _check_kv_cache(self, kv_cache: WanKVCache) -> None:
        if kv_cache.num_blocks != len(self.blocks):
            raise ValueError(f"the cache has {kv_cache.num_blocks} blocks but this model has {len(self.blocks)}")
        if self.is_cache_enabled:
            raise ValueError(
                f"{type(self._cache_config).__name__} skips blocks, which would leave their keys and values stale; "
                "call disable_cache() before using a KV cache"
            )

    @staticmethod
    def _grouped_timestep(timestep: torch.Tensor, batch_size: int, frames: int, tokens: int) -> torch.Tensor:
        """`(batch, groups)` from any accepted shape."""
        if timestep.ndim == 1:
            timestep = timestep.unsqueeze(1)
        if timestep.ndim != 2 or timestep.shape[0] != batch_size or timestep.shape[1] not in (1, frames, tokens):
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}; allowed are ({batch_size},), ({batch_size}, 1), "
                f"({batch_size}, {frames}) per frame and ({batch_size}, {tokens}) per token"
            )
        return timestep


def _make_causal(model: WanTransformer3DModel) -> None:
    model.rope.__class__ = CausalWanRotaryPosEmbed
    model.condition_embedder.timesteps_proj.__class__ = CausalWanTimesteps
    for block in model.blocks:
        block.__class__ = CausalWanTransformerBlock
        processor = CausalWanAttnProcessor()
        processor._attention_backend = block.attn1.processor._attention_backend
        processor._parallel_config = block.attn1.processor._parallel_config
        block.attn1.set_processor(processor)
