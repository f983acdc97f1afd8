"""Rotary embedding of keys and queries."""

import torch

RotaryEmbedding = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, `(1, tokens or 1, 1, head_dim)`, both once for each channel of a pair: cos, cos and -sin, sin."""


def rotate_pairs(hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel pairs of `(batch, tokens, heads, head_dim)`. Rotations add up: 3 frames and 4 make 7."""
    swapped = hidden_states.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (hidden_states * cos).add_(swapped * sin).type_as(hidden_states)


def apply_rotary_emb(
    hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, in_place: bool = False
) -> torch.Tensor:
    """`rotate_pairs` in a single pass over memory for float32; the last bit may be rounded differently.

    Args:
        in_place: `hidden_states` is the caller's to overwrite, where that saves memory.
    """
    if hidden_states.dtype != torch.float32:
        return rotate_pairs(hidden_states, cos, sin)
    rotation = torch.complex(cos[..., 1::2], sin[..., 1::2])
    pairs = torch.view_as_complex(hidden_states.unflatten(-1, (-1, 2)))
    rotated = pairs.mul_(rotation) if in_place else pairs * rotation
    return torch.view_as_real(rotated).flatten(-2)
