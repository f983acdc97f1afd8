"""Where a block's keys or values are kept: tensors that never move, one slot per token."""

from typing import Self

import torch

from wan_autoregressive.cache.dynamic_dims import mark_dynamic
from wan_autoregressive.cache.token_window import Span

Layout = tuple[int, int, int, torch.dtype, torch.device]
"""Batch, heads, head_dim, dtype and device of keys or values."""


class TokenBuffer:
    """Keys or values of one block as they are.

    A subclass that keeps them in another form gives `encode`, `tokens`, `attended`, `seen` and `slot_bytes` of its
    own.

    Args:
        parts: What is kept, tensors `(batch, capacity, heads, …)`. The first ends in `head_dim`, the last is in the
            dtype of the tokens.
    """

    def __init__(self, parts: tuple[torch.Tensor, ...]) -> None:
        self.parts = parts

    @classmethod
    def empty(cls, like: torch.Tensor, capacity: int) -> Self:
        """A buffer of `capacity` slots for tokens like these, `(batch, tokens, heads, head_dim)`."""
        return cls(tuple(_grown(part, capacity) for part in cls.encode(like[:, :0])))

    @staticmethod
    def encode(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is kept of tokens `(batch, tokens, heads, head_dim)`, in the order of `parts`."""
        return (tokens,)

    @staticmethod
    def slot_bytes(head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one slot and head, for tokens of `dtype`."""
        return head_dim * dtype.itemsize

    def tokens(self) -> torch.Tensor:
        """All slots, `(batch, capacity, heads, head_dim)`: the buffer itself."""
        return self.parts[0]

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Slots `[start, stop)`, `(batch, stop - start, heads, head_dim)`: a view, or a copy where `tokens` is one."""
        return type(self)(tuple(part[:, start:stop] for part in self.parts)).tokens()

    def window(self, length: int) -> Self:
        """Slots `[0, length)` in the same memory."""
        views = tuple(part[:, :length] for part in self.parts)
        mark_dynamic(*views)
        return type(self)(views)

    def rows(self, start: int, stop: int) -> Self:
        """Rows `[start, stop)` of the batch in the same memory."""
        return type(self)(tuple(part[start:stop] for part in self.parts))

    def repeated(self, count: int) -> Self:
        """New memory for `count` times the batch, as many slots."""
        with torch.inference_mode(False):  # to be written outside of that mode as well
            return type(self)(tuple(part.new_empty(count * len(part), *part.shape[1:]) for part in self.parts))

    def take(self, other: Self, length: int) -> None:
        """Copy the first slots of another buffer of the same layout, where that is other memory."""
        for part, taken in zip(self.parts, other.parts, strict=True):
            if part.data_ptr() != taken.data_ptr():
                part[:, :length] = taken[:, :length]

    def put(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Put tokens `(batch, tokens, heads, head_dim)` into slots `(tokens,)`, or `(batch, tokens)` of their own."""
        for part, encoded in zip(self.parts, self.encode(tokens), strict=True):
            put_in(part, slots, encoded)

    def attended(self, slots: torch.Tensor, newest: torch.Tensor) -> torch.Tensor:
        """What attention sees when `newest` has just been put into `slots`: the buffer itself."""
        return self.parts[0]

    def seen(self, past: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """What is kept in the slots `past` `(past_tokens,)`, and `own` as it was given behind it: a copy."""
        return torch.cat([self.parts[0].index_select(1, past), own], dim=1)

    def write(self, span: Span, tokens: torch.Tensor) -> None:
        """Put tokens `(batch, tokens, heads, head_dim)` into consecutive slots."""
        for part, encoded in zip(self.parts, self.encode(tokens), strict=True):
            part[:, span[0] : span[1]] = encoded

    def gather(self, source: tuple[Span, ...], target: Span) -> None:
        """Move the content of some slots to others, as it is kept."""
        for part in self.parts:
            part[:, target[0] : target[1]] = torch.cat([part[:, start:stop] for start, stop in source], dim=1)

    def grow(self, capacity: int) -> None:
        """Get new memory of `capacity` slots that starts with the present content."""
        self.parts = tuple(_grown(part, capacity) for part in self.parts)

    def copy(self, stop: int) -> Self:
        """Slots `[0, stop)` in memory of their own."""
        return type(self)(tuple(part[:, :stop].clone() for part in self.parts))

    def held(self, length: int) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
        """Views of what is kept in the first slots; a tensor by itself where that is all."""
        if length == 0:
            return None
        parts = tuple(part[:, :length] for part in self.parts)
        return parts[0] if len(parts) == 1 else parts

    @classmethod
    def from_held(cls, parts: torch.Tensor | tuple[torch.Tensor, ...], capacity: int, device: torch.device) -> Self:
        """A buffer of `capacity` slots that starts with what `held` gave."""
        buffer = cls(tuple(part.to(device) for part in (parts if isinstance(parts, tuple) else (parts,))))
        buffer.grow(capacity)
        return buffer

    @property
    def capacity(self) -> int:
        return self.parts[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def layout(self) -> Layout:
        """Of the tokens, whatever they are kept as."""
        batch, _, heads, head_dim = self.parts[0].shape
        return batch, heads, head_dim, self.parts[-1].dtype, self.parts[-1].device


def put_in(part: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`part` `(batch, capacity, heads, …)` with tokens in slots `(tokens,)` or `(batch, tokens)`: in place."""
    if slots.ndim == 1:
        return part.index_copy_(1, slots, tokens)
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
    return part.index_put_((rows, slots), tokens)


def layout_of(tokens: torch.Tensor) -> Layout:
    """Of tokens `(batch, tokens, heads, head_dim)`."""
    batch, _, heads, head_dim = tokens.shape
    return batch, heads, head_dim, tokens.dtype, tokens.device


def _grown(part: torch.Tensor, capacity: int) -> torch.Tensor:
    with torch.inference_mode(False):  # to be written outside of that mode as well
        grown = part.new_empty(part.shape[0], capacity, *part.shape[2:])
    grown[:, : part.shape[1]] = part
    return grown
