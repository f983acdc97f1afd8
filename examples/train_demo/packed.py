"""The training forward: many frames with their own timesteps and a visibility mask, in one pass.

Training by teacher forcing puts the clean frames of a clip and several noisy versions of its chunks side by side:
which frame may attend to which is a matrix over frames. The weights are those of a stock `WanTransformer3DModel`; at
inference the same function is computed chunk by chunk with a KV cache.
"""

import dataclasses
import math

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch.nn import functional

from examples.train_demo.text import MAX_TOKENS


@dataclasses.dataclass(frozen=True)
class PackedLayout:
    """Positions and visibility of N frames of S tokens.

    `cos`, `sin`: (1, N * S, 1, head_dim / 2). `bias`: (N * S, N * S), 0 where attention is allowed, else -inf.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    bias: torch.Tensor


def make_layout(
    model: WanTransformer3DModel, frames: torch.Tensor, visible: torch.Tensor, height: int, width: int
) -> PackedLayout:
    """Layout of frames at latent positions `frames` (N,), with `visible` (N, N): row may attend to column.

    `height` and `width` are those of the latents, before patching.
    """
    rows, columns = height // model.config.patch_size[1], width // model.config.patch_size[2]
    rope = model.rope
    shape = (len(frames), rows, columns)

    def table(values: torch.Tensor) -> torch.Tensor:
        temporal, vertical, horizontal = values.split([rope.t_dim, rope.h_dim, rope.w_dim], dim=1)
        parts = [
            temporal[frames][:, None, None].expand(*shape, -1),
            vertical[:rows][None, :, None].expand(*shape, -1),
            horizontal[:columns][None, None].expand(*shape, -1),
        ]
        return torch.cat(parts, dim=-1).reshape(1, len(frames) * rows * columns, 1, -1)[..., 0::2].contiguous()

    tokens = rows * columns
    mask = visible.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    bias = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    return PackedLayout(table(rope.freqs_cos), table(rope.freqs_sin), bias)


def packed_flow(
    model: WanTransformer3DModel,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    text: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """Flow (B, C, N, H, W) for N frames with timesteps (B, N) in 0..1000, given a layout's `cos`, `sin`, `bias`.

    Args:
        text: (B, tokens, text_dim) without padding. The model attends to `MAX_TOKENS` tokens, the rest zeros; all
            zero tokens have the same key and value, so one of them with a bias of log(count) does the same.
    """
    batch, _, frames, height, width = latents.shape
    hidden = model.patch_embedding(latents).flatten(2).transpose(1, 2)
    embedder = model.condition_embedder
    time = embedder.time_embedder(embedder.timesteps_proj(timesteps.flatten())).unflatten(0, (batch, frames))
    modulation = embedder.time_proj(embedder.act_fn(time)).float().unflatten(2, (6, -1))
    tokens = text.shape[1]
    text = embedder.text_embedder(functional.pad(text, (0, 0, 0, 1)))
    text_bias = torch.zeros(1, tokens + 1, device=text.device)
    text_bias[:, -1] = math.log(MAX_TOKENS - tokens)
    for block in model.blocks:
        hidden = _block(block, hidden, modulation, text, cos, sin, bias, text_bias)
    table = model.scale_shift_table[:, None] + time.float()[:, :, None]
    hidden = _modulate(model.norm_out(hidden.float()), table[:, :, 1], table[:, :, 0])
    patches = model.proj_out(hidden)
    _, patch_height, patch_width = model.config.patch_size
    rows, columns = height // patch_height, width // patch_width
    patches = patches.view(batch, frames, rows, columns, patch_height, patch_width, -1)
    return patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(latents.shape).float()


def _block(
    block: WanTransformerBlock,
    hidden: torch.Tensor,  # (B, N * S, D)
    modulation: torch.Tensor,  # (B, N, 6, D)
    text: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    bias: torch.Tensor,
    text_bias: torch.Tensor,
) -> torch.Tensor:
    table = block.scale_shift_table[:, None] + modulation
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.unbind(2)
    normed = _modulate(block.norm1(hidden), scale, shift)
    hidden = hidden + _gate(_attend(block.attn1, normed, normed, bias, (cos, sin)), gate)
    hidden = hidden + _attend(block.attn2, block.norm2(hidden), text, text_bias, None)
    normed = _modulate(block.norm3(hidden), ffn_scale, ffn_shift)
    return hidden + _gate(block.ffn(normed), ffn_gate)


def _attend(
    attention: WanAttention,
    hidden: torch.Tensor,
    context: torch.Tensor,
    bias: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    query = attention.norm_q(attention.to_q(hidden).float()).unflatten(2, (attention.heads, -1))
    key = attention.norm_k(attention.to_k(context).float()).unflatten(2, (attention.heads, -1))
    value = attention.to_v(context).unflatten(2, (attention.heads, -1))
    if rotary is not None:
        query, key = _rotate(query, *rotary), _rotate(key, *rotary)
    # Written out: with these short sequences the CPU's fused attention is two to six times slower backwards.
    query, key, value = (part.to(value.dtype).transpose(1, 2) for part in (query, key, value))
    logits = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + bias
    attended = logits.softmax(-1).to(value.dtype) @ value
    return attention.to_out[0](attended.transpose(1, 2).flatten(2))


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = states.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)


def _modulate(hidden: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Scale and shift tokens (B, N * S, D) by their frame's rows (B, N, D)."""
    frames = hidden.unflatten(1, (scale.shape[1], -1))
    return (frames * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def _gate(hidden: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return (hidden.unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]).flatten(1, 2)
