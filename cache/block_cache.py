"""The K/V of one transformer block, in buffers that never move."""

from dataclasses import dataclass

import torch

from wan_autoregressive.cache.any_length import allow_any_length
from wan_autoregressive.cache.fixed_memory import FixedMemory
from wan_autoregressive.cache.int8_buffer import Int8Buffer
from wan_autoregressive.cache.rotary import RotaryEmbedding, apply_rotary_emb
from wan_autoregressive.cache.sink_update import SinkUpdate
from wan_autoregressive.cache.token_buffer import Layout, TokenBuffer
from wan_autoregressive.cache.token_window import Span, TokenWindow, WriteMode, WritePlan
from wan_autoregressive.configs.choices import KVDtype


@dataclass
class _OpenWindow:
    """What a planned write works on: tensors only, so that a compiled block knows nothing of slots and lengths."""

    key: TokenBuffer
    value: TokenBuffer
    slots: torch.Tensor


class WanKVBlockCache:
    """Keys and values of one block's self-attention.

    Buffers are `(batch, capacity, heads, head_dim)` on the device of the first key, in its dtype or as `kv_dtype`. A
    finite window allocates its `window_size` at once and never again. Without a window the capacity is `max_tokens` if
    that was given; past it, or without it, the buffers double when full, the only copy of the past that is ever kept.

    An update is `plan` (Python integers only), `open`, `write` (tensors only) and `commit`, so that a compiled block
    sees no bookkeeping and a forward that failed leaves the state as it was.

    It has no `.to`: accelerate's hooks would call it and move the past.

    Args:
        slots ([`FixedMemory`], *optional*): For a chunk's slot numbers; blocks that are written alike share it.
    """

    def __init__(
        self,
        window_size: int = -1,
        sink_size: int = 0,
        max_tokens: int | None = None,
        sink_update: SinkUpdate | None = None,
        kv_dtype: KVDtype | None = None,
        slots: FixedMemory | None = None,
    ) -> None:
        self.window = TokenWindow(window_size, sink_size)
        self._sink_update = sink_update
        self._initial_capacity = window_size if window_size != -1 else max_tokens
        self._plan: WritePlan | None = None
        self._open: _OpenWindow | None = None
        self._slots = FixedMemory() if slots is None else slots
        self._buffer_type: type[TokenBuffer] = Int8Buffer if kv_dtype == "int8" else TokenBuffer
        self._key: TokenBuffer | None = None
        self._value: TokenBuffer | None = None
        self._written_sink_key: TokenBuffer | None = None
        """The sink's keys as they were written, once they are moved."""

    def plan(self, num_tokens: int, mode: WriteMode) -> None:
        """Settle which slots the next `write` fills. Raises `ValueError` if the chunk does not fit."""
        self._plan, self._open = self.window.plan(num_tokens, mode), None

    def open(self, like: torch.Tensor, slots: torch.Tensor | None = None) -> torch.Tensor:
        """Make room for the planned write, and let the sink take up what goes. `write` does so if nobody has.

        Args:
            like: Of any length, `(batch, tokens, heads, head_dim)`, for the layout of an empty cache.
            slots (`torch.Tensor` of shape `(chunk_tokens,)`, *optional*): What `open` of a block with the same plan
                returned.

        Returns:
            The slots of the chunk's tokens.

        Raises:
            RuntimeError: no plan was made.
        """
        plan = self._needed_plan()
        length = plan.state_after.length
        if self._key is None or self._value is None or (self._is_empty and _layout(like) != self._key.layout):
            capacity = max(length, self._initial_capacity or 0)
            self._key = self._buffer_type.empty(like, capacity)
            self._value = self._buffer_type.empty(like, capacity)
        elif length > self._key.capacity:
            capacity = max(length, 2 * self._key.capacity)
            self._key.grow(capacity)
            self._value.grow(capacity)

        if self._sink_update is not None and plan.evicted:
            for buffer in (self._key, self._value):
                self._sink_update.absorb(buffer.parts[0], self.window.sink_size, plan.evicted)
        if slots is None or slots.device != self._key.layout[-1]:
            slots = self._planned_slots(plan.spans, self._key.layout[-1])
        self._open = _OpenWindow(self._key.window(length), self._value.window(length), slots)
        return slots

    def write(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a chunk into its planned slots and return what it attends to.

        Args:
            key, value (`torch.Tensor` of shape `(batch, chunk_tokens, heads, head_dim)`): The chunk, key after
                normalisation and rotary embedding.

        Returns:
            Views of the buffers, `(batch, valid_tokens, heads, head_dim)`, newest chunk included. Tokens are in slot
            order, which after an eviction is not the order of time; attention does not mind. With int8 copies in the
            dtype of the chunk, which is in them as it was given: drop them after attention.

        Raises:
            ValueError: a batch, head count, head size, dtype or device other than the one held. Nothing is written.
            RuntimeError: no plan was made, or gradients would be needed through the cache.
        """
        self._check_pair(key, value)
        if self._open is None or (_layout(key) != self._open.key.layout and self._is_empty):
            _check_tokens(key, self.planned_tokens)
            self.open(key)
        window = self._open
        assert window is not None
        _check_tokens(key, window.slots.shape[0])
        if _layout(key) != window.key.layout:
            raise ValueError(
                f"the cache holds (batch, heads, head_dim, dtype, device) {window.key.layout} but got "
                f"{_layout(key)}. Call reset() between videos, and keep one cache per batch"
            )
        window.key.put(window.slots, key)
        window.value.put(window.slots, value)
        return window.key.attended(window.slots, key), window.value.attended(window.slots, value)

    def commit(self) -> None:
        """Make the planned state the state. Called once the whole forward has succeeded."""
        self.window.commit(self._needed_plan())
        self._plan = self._open = None

    def keep_newest(self, num_tokens: int) -> None:
        """Forget all but the sink and the newest `num_tokens` tokens."""
        source, target = self.window.keep_newest(num_tokens)
        for buffer in (self._key, self._value):
            if buffer is not None and source:
                buffer.gather(source, target)

    def move_window(self, rotation: RotaryEmbedding) -> None:
        """Rotate all keys but the sink's. In int8 each call rounds them once more."""
        if self._key is not None:
            span = self.window.sink_size, self.window.state.length
            self._key.write(span, apply_rotary_emb(self._key.read(*span), *rotation))

    def move_sink(self, rotation: RotaryEmbedding) -> None:
        """Rotate the sink's keys, starting from how they were written; in int8 rounded twice however often."""
        if self._key is None:
            return
        span = 0, self.window.sink_size
        if self._written_sink_key is None:
            self._written_sink_key = self._key.copy(self.window.sink_size)
        self._key.write(span, apply_rotary_emb(self._written_sink_key.read(*span), *rotation))

    def forget_sink(self) -> None:
        """The sink is about to be replaced."""
        self._written_sink_key = None

    @property
    def planned_places(self) -> tuple[Span, ...]:
        """Places in time order of the tokens that the planned `write` returns, for runs of slots."""
        return self.window.places(self._needed_plan().state_after)

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
        self._plan = self._open = None
        self._written_sink_key = None

    def release(self) -> None:
        """Forget all tokens and free the buffers."""
        self.reset()
        self._key = self._value = None

    @property
    def cached_key(self) -> torch.Tensor | None:
        """Keys in order of time, `(batch, valid_tokens, heads, head_dim)`: a view, or a copy once the ring has
        turned or if they are kept as int8. `None` when empty. For looking at; attention uses what `write` returns."""
        return self._chronological(self._key)

    @property
    def cached_value(self) -> torch.Tensor | None:
        """Values in order of time; see `cached_key`."""
        return self._chronological(self._value)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the buffers and of a moved sink's copy, 0 before the first write."""
        return sum(b.nbytes for b in (self._key, self._value, self._written_sink_key) if b is not None)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a key and its value are kept in, of the whole batch; 0 before the first write."""
        return sum(b.nbytes // b.capacity for b in (self._key, self._value) if b is not None)

    def _chronological(self, buffer: TokenBuffer | None) -> torch.Tensor | None:
        spans = self.window.chronological_spans()
        if buffer is None or not spans:
            return None
        if len(spans) == 1:
            return buffer.read(*spans[0])
        return torch.cat([buffer.read(*span) for span in spans], dim=1)

    @property
    def _is_empty(self) -> bool:
        return self.window.state.length == 0

    def _planned_slots(self, spans: tuple[Span, ...], device: torch.device) -> torch.Tensor:
        num_tokens = self.planned_tokens
        slots = self._slots.empty((num_tokens, device), (num_tokens,), torch.int64, device)
        filled = 0
        for start, stop in spans:
            torch.arange(start, stop, out=slots[filled : filled + stop - start])
            filled += stop - start
        allow_any_length(slots, dim=0)
        return slots

    def _needed_plan(self) -> WritePlan:
        if self._plan is None:
            raise RuntimeError("no write is planned: call plan(num_tokens, mode) first, or use WanKVCache.update()")
        return self._plan

    def _check_pair(self, key: torch.Tensor, value: torch.Tensor) -> None:
        if key.ndim != 4 or key.shape != value.shape:
            raise ValueError(
                f"key {tuple(key.shape)} and value {tuple(value.shape)} must both be "
                "(batch, chunk_tokens, heads, head_dim)"
            )
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise RuntimeError("the KV cache overwrites its buffers in place: run the model under torch.no_grad()")
        if value.dtype != key.dtype:
            raise ValueError(f"key is {key.dtype} but value is {value.dtype}; both must have the same dtype")


def _check_tokens(key: torch.Tensor, planned: int) -> None:
    if key.shape[1] != planned:
        raise ValueError(f"key and value have {key.shape[1]} tokens, but a write of {planned} is planned")


def _layout(tensor: torch.Tensor) -> Layout:
    batch, _, heads, head_dim = tensor.shape
    return batch, heads, head_dim, tensor.dtype, tensor.device
