"""Baselines on stock `WanTransformer3DModel`: no cache at all, and a cache by concatenation."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformer3DModel

from benchmarks.baselines import BaselineSetup, MakeChunk
from wan_autoregressive.models.causal_wan_embeddings import CausalWanRotaryPosEmbed


def recompute(setup: BaselineSetup) -> MakeChunk:
    """No cache: every step runs the whole window, past frames and chunk, through the stock model.

    With one timestep for all frames, which is cheaper than the timestep per token that clean past frames would need:
    the figure is a lower bound.
    """
    transformer = _stock_transformer(setup)
    generator = torch.Generator().manual_seed(setup.seed)
    batch, channels, frames, height, width = setup.latents_shape
    past_shape = (batch, channels, setup.window_frames - frames, height, width)
    past = torch.randn(past_shape, generator=generator).to(setup.device)

    def flow(latents: torch.Tensor, timestep: float) -> torch.Tensor:
        window = torch.cat([past, latents], dim=2).to(setup.dtype)
        timesteps = torch.full((batch,), timestep, device=setup.device)
        return transformer(window, timesteps, setup.prompt_embeds, return_dict=False)[0][:, :, -frames:]

    def make_chunk(index: int) -> torch.Tensor:
        nonlocal past
        latents = _denoise(setup, flow, generator)
        past = torch.cat([past, latents], dim=2)[:, :, frames:]
        return latents

    return make_chunk


def concat(setup: BaselineSetup) -> MakeChunk:
    """A rolling cache grown and cut with `torch.cat`, and modulation per token: as diffusers pull request 13681."""
    transformer = _stock_transformer(setup)
    transformer.rope.__class__ = _OffsetRotaryPosEmbed
    processors = [ConcatCacheProcessor(setup.window_frames * setup.tokens_per_frame) for _ in transformer.blocks]
    for block, processor in zip(transformer.blocks, processors, strict=True):
        block.attn1.set_processor(processor)
    generator = torch.Generator().manual_seed(setup.seed)
    batch, _, frames = setup.latents_shape[:3]
    tokens = frames * setup.tokens_per_frame

    def flow(latents: torch.Tensor, timestep: float) -> torch.Tensor:
        timesteps = torch.full((batch, tokens), timestep, device=setup.device)
        output = transformer(latents.to(setup.dtype), timesteps, setup.prompt_embeds, return_dict=False)[0]
        for processor in processors:
            processor.overwrite_newest = True
        return output

    def make_chunk(index: int) -> torch.Tensor:
        transformer.rope.frame_offset = index * frames
        for processor in processors:
            processor.overwrite_newest = False
        latents = _denoise(setup, flow, generator)
        flow(latents, 0.0)
        return latents

    return make_chunk


class ConcatCacheProcessor(WanAttnProcessor):
    """Self-attention that keeps the last `window_tokens` keys and values as tensors made anew by every forward."""

    def __init__(self, window_tokens: int) -> None:
        super().__init__()
        self.window_tokens = window_tokens
        self.overwrite_newest = False
        self._key: torch.Tensor | None = None
        self._value: torch.Tensor | None = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        assert rotary_emb is not None
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        self._key, self._value = self._merged(self._key, key), self._merged(self._value, value)
        output = dispatch_attention_fn(
            query,
            self._key,
            self._value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[1](attn.to_out[0](output.flatten(2, 3).type_as(query)))

    def _merged(self, held: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, heads, head_dim)` of past and chunk, cut to the window."""
        if held is None:
            return new
        past = held[:, : -new.shape[1]] if self.overwrite_newest else held
        return torch.cat([past, new], dim=1)[:, -self.window_tokens :]


def _rotate(hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As upstream's processor does it; a copy, so that a faster one of ours would not speed the baseline up."""
    even, odd = hidden_states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    rotated = torch.empty_like(hidden_states)
    rotated[..., 0::2] = even * cos - odd * sin
    rotated[..., 1::2] = even * sin + odd * cos
    return rotated


class _OffsetRotaryPosEmbed(CausalWanRotaryPosEmbed):
    """Rotary tables from `frame_offset`, which the stock model does not pass."""

    frame_offset = 0

    def forward(self, hidden_states: torch.Tensor, frame_offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(hidden_states, self.frame_offset)


def _stock_transformer(setup: BaselineSetup) -> WanTransformer3DModel:
    """A stock model on the very parameters of the pipeline's."""
    with torch.device("meta"):
        stock = WanTransformer3DModel.from_config(setup.transformer.config)
    stock.load_state_dict(setup.transformer.state_dict(), assign=True)
    for name, buffer in setup.transformer.rope.named_buffers():  # tables are not in the state dict
        setattr(stock.rope, name, buffer)
    return stock.eval()


def _denoise(setup: BaselineSetup, flow: Any, generator: torch.Generator) -> torch.Tensor:
    latents = torch.randn(setup.latents_shape, generator=generator).to(setup.device)
    for timestep in setup.scheduler.timesteps.tolist():
        prediction = flow(latents, timestep)
        latents = setup.scheduler.step(prediction, timestep, latents, generator=generator).prev_sample
    return latents
