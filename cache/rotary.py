"""Rotary embedding of keys and queries."""

import torch

RotaryEmbedding = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, `(1, tokens or 1, 1, head_dim)`, every value twice in a row."""


def apply_rotary_emb(hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel pairs of `(batch, tokens, heads, head_dim)`. Rotations add up: 3 frames and 4 make 7."""
    even, odd = hidden_states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    rotated = torch.empty_like(hidden_states)
    rotated[..., 0::2] = even * cos - odd * sin
    rotated[..., 1::2] = even * sin + odd * cos
    return rotated
