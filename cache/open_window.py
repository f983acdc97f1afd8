"""What a write that is planned works on, once there is room for it."""

from dataclasses import dataclass

import torch

from wan_autoregressive.cache.token_buffer import TokenBuffer, layout_of


@dataclass
class OpenSlots:
    """Numbers of slots that a planned write works on."""

    chunk: torch.Tensor
    """Of the tokens that are kept, `(kept_tokens,)`; `(batch, kept_tokens)` where rows go their own ways."""
    past: torch.Tensor | None = None
    """Of what attention sees of the past, `(past_tokens,)`, where that is not just what is held."""


@dataclass
class OpenWindow:
    """Tensors only, so that a compiled block knows nothing of spans and lengths."""

    key: TokenBuffer
    value: TokenBuffer
    slots: OpenSlots
    bank: tuple[torch.Tensor, torch.Tensor] | None = None
    """Keys and values that are seen beside those in slots."""

    def write(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put a chunk `(batch, chunk_tokens, heads, head_dim)` into its slots and return what it attends to.

        Raises:
            ValueError: another number of tokens, batch, head count, head size, dtype or device. Nothing is written.
        """
        chunk, past = self.slots.chunk, self.slots.past
        if past is None:
            check_tokens(key, chunk.shape[-1])
        self.put(key, value)
        attended = []
        beside: tuple[torch.Tensor | None, ...] = self.bank or (None, None)
        for buffer, tokens, banked in zip((self.key, self.value), (key, value), beside, strict=True):
            if past is None:
                attended.append(buffer.attended(chunk, tokens))
            else:
                own = tokens if banked is None else torch.cat([banked, tokens], dim=1)
                attended.append(buffer.seen(past, own))
        return attended[0], attended[1]

    def put(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put those of a chunk that are kept into their slots.

        Raises:
            ValueError: another batch, head count, head size, dtype or device, or too few tokens. Nothing is written.
        """
        chunk = self.slots.chunk
        if layout_of(key) != self.key.layout:
            raise ValueError(
                f"the cache holds (batch, heads, head_dim, dtype, device) {self.key.layout} but got "
                f"{layout_of(key)}. Call reset() between videos, and keep one cache per batch"
            )
        if key.shape[1] < chunk.shape[-1]:
            check_tokens(key, chunk.shape[-1])
        for buffer, tokens in ((self.key, key), (self.value, value)):
            buffer.put(chunk, tokens[:, : chunk.shape[-1]])


def check_tokens(key: torch.Tensor, planned: int) -> None:
    """Raise `ValueError` for keys of another number of tokens."""
    if key.shape[1] != planned:
        raise ValueError(f"key and value have {key.shape[1]} tokens, but a write of {planned} is planned")
