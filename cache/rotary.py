"""Rotary embedding of keys and queries."""

import torch

RotaryEmbedding = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, `(1, tokens or 1, 1, head_dim)`, every value twice in a row."""


def apply_rotary_emb(hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel pairs of `(batch, tokens, heads, head_dim)`. Rotations add up: 3 frames and 4 make 7."""
    signed_sin = torch.stack([-sin[..., 1::2], sin[..., 1::2]], dim=-1).flatten(-2)
    swapped = hidden_states.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (hidden_states * cos).add_(swapped * signed_sin).type_as(hidden_states)
