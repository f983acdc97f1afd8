"""The K/V of one transformer block, in buffers that never move."""

import torch

from wan_autoregressive.cache.rotary import RotaryEmbedding, apply_rotary_emb
from wan_autoregressive.cache.sink_update import SinkUpdate
from wan_autoregressive.cache.token_window import Span, TokenWindow, WriteMode, WritePlan


class WanKVBlockCache:
    """Keys and values of one block's self-attention.

    Buffers are `(batch, capacity, heads, head_dim)` in the dtype and on the device of the first key. A finite window
    allocates its `window_size` at once and never again. Without a window the capacity is `max_tokens` if that was
    given; past it, or without it, the buffers double when full, the only copy of the past that is ever made.

    An update is `plan` (Python integers only), `write` (tensors only) and `commit`, so that a compiled block sees no
    bookkeeping and a forward that failed leaves the state as it was.

    It has no `.to`: accelerate's hooks would call it and move the past.
    """

    def __init__(
        self,
        window_size: int = -1,
        sink_size: int = 0,
        max_tokens: int | None = None,
        sink_update: SinkUpdate | None = None,
    ) -> None:
        self.window = TokenWindow(window_size, sink_size)
        self._sink_update = sink_update
        self._initial_capacity = window_size if window_size != -1 else max_tokens
        self._plan: WritePlan | None = None
        self._key: torch.Tensor | None = None
        self._value: torch.Tensor | None = None
        self._written_sink_key: torch.Tensor | None = None
        """The sink's keys as they were written, once they are moved."""

    def plan(self, num_tokens: int, mode: WriteMode) -> None:
        """Settle which slots the next `write` fills. Raises `ValueError` if the chunk does not fit."""
        self._plan = self.window.plan(num_tokens, mode)

    def write(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a chunk into its planned slots and return what it attends to.

        Args:
            key, value (`torch.Tensor` of shape `(batch, chunk_tokens, heads, head_dim)`): The chunk, key after
                normalisation and rotary embedding.

        Returns:
            Views of the buffers, `(batch, valid_tokens, heads, head_dim)`, newest chunk included. Tokens are in slot
            order, which after an eviction is not the order of time; attention does not mind.

        Raises:
            ValueError: a batch, head count, head size, dtype or device other than the one held. Nothing is written.
            RuntimeError: no plan was made, or gradients would be needed through the cache.
        """
        if self._plan is None:
            raise RuntimeError("write() without a plan: call plan(num_tokens, mode) first, or use WanKVCache.update()")
        self._check(key, value)
        capacity = self._plan.state_after.length
        if self._key is None or self._value is None or _layout(key) != _layout(self._key):
            capacity = max(capacity, self._initial_capacity or 0)
            self._key, self._value = _grown(key, None, capacity), _grown(value, None, capacity)
        elif capacity > self._key.shape[1]:
            capacity = max(capacity, 2 * self._key.shape[1])
            self._key, self._value = _grown(key, self._key, capacity), _grown(value, self._value, capacity)

        if self._sink_update is not None and self._plan.evicted:
            for buffer in (self._key, self._value):
                self._sink_update.absorb(buffer, self.window.sink_size, self._plan.evicted)
        done = 0
        for start, stop in self._plan.spans:
            self._key[:, start:stop] = key[:, done : done + stop - start]
            self._value[:, start:stop] = value[:, done : done + stop - start]
            done += stop - start
        length = self._plan.state_after.length
        return self._key[:, :length], self._value[:, :length]

    def commit(self) -> None:
        """Make the planned state the state. Called once the whole forward has succeeded."""
        if self._plan is None:
            raise RuntimeError("commit() without a plan: call plan(num_tokens, mode) first")
        self.window.commit(self._plan)
        self._plan = None

    def keep_newest(self, num_tokens: int) -> None:
        """Forget all but the sink and the newest `num_tokens` tokens."""
        source, (start, stop) = self.window.keep_newest(num_tokens)
        for buffer in (self._key, self._value):
            if buffer is not None and source:
                buffer[:, start:stop] = torch.cat([buffer[:, a:b] for a, b in source], dim=1)

    def move_window(self, rotation: RotaryEmbedding) -> None:
        """Rotate all keys but the sink's."""
        if self._key is not None:
            window = self._key[:, self.window.sink_size : self.window.state.length]
            window.copy_(apply_rotary_emb(window, *rotation))

    def move_sink(self, rotation: RotaryEmbedding) -> None:
        """Rotate the sink's keys, starting from how they were written."""
        if self._key is None:
            return
        sink = self._key[:, : self.window.sink_size]
        if self._written_sink_key is None:
            self._written_sink_key = sink.clone()
        sink.copy_(apply_rotary_emb(self._written_sink_key, *rotation))

    def forget_sink(self) -> None:
        """The sink is about to be replaced."""
        self._written_sink_key = None

    @property
    def planned_places(self) -> tuple[Span, ...]:
        """Places in time order of the tokens that the planned `write` returns, for runs of slots."""
        if self._plan is None:
            raise RuntimeError("no write is planned")
        return self.window.places(self._plan.state_after)

    @property
    def planned_length(self) -> int:
        """Tokens held once the planned `write` is done."""
        return self.window.state.length if self._plan is None else self._plan.state_after.length

    @property
    def planned_tokens(self) -> int:
        """Tokens of the chunk that the planned `write` takes."""
        return 0 if self._plan is None else sum(stop - start for start, stop in self._plan.spans)

    def reset(self) -> None:
        """Forget all tokens; the buffers stay allocated for the next video if it has the same shape."""
        self.window.reset()
        self._plan = None
        self._written_sink_key = None

    def release(self) -> None:
        """Forget all tokens and free the buffers."""
        self.reset()
        self._key = self._value = None

    @property
    def cached_key(self) -> torch.Tensor | None:
        """Keys in order of time, `(batch, valid_tokens, heads, head_dim)`: a view, or a copy once the ring has
        turned. `None` when empty. For looking at; attention uses what `write` returns."""
        return self._chronological(self._key)

    @property
    def cached_value(self) -> torch.Tensor | None:
        """Values in order of time; see `cached_key`."""
        return self._chronological(self._value)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the buffers and of a moved sink's copy, 0 before the first write."""
        buffers = (self._key, self._value, self._written_sink_key)
        return sum(b.numel() * b.element_size() for b in buffers if b is not None)

    def _chronological(self, buffer: torch.Tensor | None) -> torch.Tensor | None:
        spans = self.window.chronological_spans()
        if buffer is None or not spans:
            return None
        if len(spans) == 1:
            return buffer[:, spans[0][0] : spans[0][1]]
        return torch.cat([buffer[:, start:stop] for start, stop in spans], dim=1)

    def _check(self, key: torch.Tensor, value: torch.Tensor) -> None:
        planned = self.planned_tokens
        if key.ndim != 4 or key.shape != value.shape or key.shape[1] != planned:
            raise ValueError(
                f"key {tuple(key.shape)} and value {tuple(value.shape)} must both be "
                f"(batch, {planned}, heads, head_dim)"
            )
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise RuntimeError("the KV cache overwrites its buffers in place: run the model under torch.no_grad()")
        if value.dtype != key.dtype:
            raise ValueError(f"key is {key.dtype} but value is {value.dtype}; both must have the same dtype")
        if self._key is not None and self.window.state.length and _layout(key) != _layout(self._key):
            raise ValueError(
                f"the cache holds (batch, heads, head_dim, dtype, device) {_layout(self._key)} but got "
                f"{_layout(key)}. Call reset() between videos, and keep one cache per batch"
            )


def _layout(tensor: torch.Tensor) -> tuple[int, int, int, torch.dtype, torch.device]:
    batch, _, heads, head_dim = tensor.shape
    return batch, heads, head_dim, tensor.dtype, tensor.device


def _grown(like: torch.Tensor, old: torch.Tensor | None, capacity: int) -> torch.Tensor:
    """A buffer of `capacity` tokens that starts with the content of `old`."""
    batch, _, heads, head_dim = like.shape
    buffer = like.new_empty(batch, capacity, heads, head_dim)
    if old is not None:
        buffer[:, : old.shape[1]] = old
    return buffer
