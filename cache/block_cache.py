"""The K/V of one transformer block, in buffers that never move."""

from dataclasses import asdict, replace
from typing import Any

import torch

from wan_autoregressive.cache.dynamic_dims import mark_dynamic
from wan_autoregressive.cache.int8_buffer import Int8Buffer
from wan_autoregressive.cache.memory_bank import MemoryBank
from wan_autoregressive.cache.open_window import OpenSlots, OpenWindow, check_tokens
from wan_autoregressive.cache.positions import SinkView
from wan_autoregressive.cache.rotary import RotaryEmbedding, apply_rotary_emb
from wan_autoregressive.cache.sink_update import SinkUpdate
from wan_autoregressive.cache.static_buffers import StaticBuffers
from wan_autoregressive.cache.token_buffer import TokenBuffer, layout_of
from wan_autoregressive.cache.token_window import PastView, Span, TokenWindow, WindowState, WriteMode, WritePlan
from wan_autoregressive.configs.choices import KVDtype


class WanKVBlockCache:
    """Keys and values of one block's self-attention.

    Buffers are `(batch, capacity, heads, head_dim)` on the device of the first key, in its dtype or as `kv_dtype`. A
    finite window allocates its `window_size` at once and never again. Without a window the capacity is `max_tokens` if
    that was given; past it, or without it, the buffers double when full, the only copy of the past that is ever kept.

    An update is `plan` (Python integers only), `open`, `write` (tensors only) and `commit`, so that a compiled block
    sees no bookkeeping and a forward that failed leaves the state as it was.

    It has no `.to`: accelerate's hooks would call it and move the past.

    Args:
        slots: For a chunk's slot numbers; blocks that are written alike share it.
        bank: Frames that every write sees beside what is held.
    """

    def __init__(
        self,
        window_size: int = -1,
        sink_size: int = 0,
        max_tokens: int | None = None,
        sink_update: SinkUpdate | None = None,
        kv_dtype: KVDtype | None = None,
        slots: StaticBuffers | None = None,
        bank: MemoryBank | None = None,
    ) -> None:
        self.bank = MemoryBank() if bank is None else bank
        self.window = TokenWindow(window_size, sink_size)
        self._sink_update = sink_update
        self._initial_capacity = window_size if window_size != -1 else max_tokens
        self._plan: WritePlan | None = None
        self._planned_tokens = 0
        self._moves_sink = True
        self._open: OpenWindow | None = None
        self._slots = StaticBuffers() if slots is None else slots
        self._buffer_type: type[TokenBuffer] = Int8Buffer if kv_dtype == "int8" else TokenBuffer
        self._key: TokenBuffer | None = None
        self._value: TokenBuffer | None = None
        self._written_sink_key: TokenBuffer | None = None
        """The sink's keys as they were written, once they are moved."""

    def plan(self, num_tokens: int, mode: WriteMode, keep: int | None = None, view: PastView | None = None) -> None:
        """Settle which slots the next `write` fills, see [`TokenWindow.plan`]. Raises `ValueError` if the chunk does
        not fit."""
        plan = self.window.plan(num_tokens, mode, keep, view)
        if self.bank.held is not None and plan.past is None:  # the past is not just what is held
            plan = replace(plan, past=self.window.past_of(plan))
        self._plan, self._open = plan, None
        self._planned_tokens = num_tokens
        self._moves_sink = view is None or view.sink

    def open(self, like: torch.Tensor, slots: OpenSlots | None = None) -> OpenSlots:
        """Make room for the planned write, and let the sink take up what goes. `write` does so if nobody has.

        Args:
            like: Of any length, `(batch, tokens, heads, head_dim)`, for the layout of an empty cache.
            slots: What `open` of a block with the same plan returned.

        Raises:
            RuntimeError: no plan was made.
        """
        plan = self._needed_plan()
        length = plan.state_after.length
        if self._key is None or self._value is None or (self._is_empty and layout_of(like) != self._key.layout):
            capacity = max(length, self._initial_capacity or 0)
            self._key = self._buffer_type.empty(like, capacity)
            self._value = self._buffer_type.empty(like, capacity)
            self.bank.make_room(like)
        elif length > self._key.capacity:
            capacity = max(length, 2 * self._key.capacity)
            self._key.grow(capacity)
            self._value.grow(capacity)

        if self._sink_update is not None and plan.evicted:
            for buffer in (self._key, self._value):
                self._sink_update.absorb(buffer.parts[0], self.window.sink_size, plan.evicted)
        device = self._key.layout[-1]
        if slots is None or slots.chunk.device != device:
            past = None if plan.past is None else self._numbers("past", plan.past, device)
            slots = OpenSlots(self._numbers("chunk", plan.spans, device), past)
        # What is seen by slot numbers is seen in all of the buffer, whose size never changes.
        seen = length if plan.past is None else self._key.capacity
        self._open = OpenWindow(self._key.window(seen), self._value.window(seen), slots, self.bank.held)
        return slots

    def write(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a chunk into its planned slots and return what it attends to.

        Args:
            key, value: `(batch, chunk_tokens, heads, head_dim)`. The chunk, key after normalisation and rotary
                embedding.

        Returns:
            Views of the buffers, `(batch, valid_tokens, heads, head_dim)`, newest chunk included. Tokens are in slot
            order, which after an eviction is not the order of time; attention does not mind. With int8 copies in the
            dtype of the chunk, which is in them as it was given, and after a plan with `keep` or `view` copies of what
            is seen of the past, oldest first, and of the chunk behind it: drop copies after attention.

        Raises:
            ValueError: a batch, head count, head size, dtype or device other than the one held. Nothing is written.
            RuntimeError: no plan was made, or gradients would be needed through the cache.
        """
        return self._opened(key, value).write(key, value)

    def put(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """`write` for a chunk that attends to nothing."""
        self._opened(key, value).put(key, value)

    def commit(self) -> None:
        """Make the planned state the state. Called once the whole forward has succeeded."""
        self.window.commit(self._needed_plan())
        self._plan = self._open = None

    @property
    def open_slots(self) -> OpenSlots:
        """Of the planned write, once `open` has made room for it."""
        assert self._open is not None
        return self._open.slots

    @property
    def buffers(self) -> tuple[TokenBuffer, TokenBuffer] | None:
        """Of keys and of values, as they are kept; `None` before the first write."""
        return None if self._key is None or self._value is None else (self._key, self._value)

    def use_buffers(self, key: TokenBuffer, value: TokenBuffer) -> None:
        """Keep what is held in other memory, which holds it already."""
        self._key, self._value = key, value

    def keep_newest(self, num_tokens: int) -> None:
        """Forget all but the sink and the newest `num_tokens` tokens, see [`TokenWindow.keep_newest`]."""
        source, target = self.window.keep_newest(num_tokens)
        for buffer in (self._key, self._value):
            if buffer is not None and source:
                buffer.gather(source, target)

    def propose_to_bank(self) -> None:
        """Let the first frame of the newest chunk be the next to enter the bank, as it is kept here."""
        if self._key is None or self._value is None or self.window.state.newest_size < self.bank.frame_size:
            raise RuntimeError(
                f"no frame of {self.bank.frame_size} tokens to propose: the newest chunk has "
                f"{self.window.state.newest_size}"
            )
        spans = self.window.first_of_newest(self.bank.frame_size)
        parts = [[buffer.read(*span) for span in spans] for buffer in (self._key, self._value)]
        self.bank.propose(*(torch.cat(part, dim=1) for part in parts))

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
        """Places in time order of the tokens that the planned `write` returns, for runs of them."""
        plan = self._needed_plan()
        if plan.past is None:
            return self.window.places(plan.state_after)
        return ((0, sum(stop - start for start, stop in plan.past) + self._planned_tokens),)

    @property
    def planned_sink(self) -> SinkView:
        """How the planned `write` lets the sink be seen."""
        past = self._needed_plan().past
        if past is not None and all(start >= self.window.sink_size for start, _ in past):
            return "unseen"
        return "moved" if self._moves_sink else "in_place"

    @property
    def planned_held(self) -> int:
        """Tokens that are held once the planned `write` is done, and those of the chunk that are not kept."""
        plan = self._needed_plan()
        return plan.state_after.length + self._planned_tokens - plan.kept

    @property
    def planned_evicts(self) -> bool:
        """Whether the planned `write` takes the slots of older tokens."""
        return bool(self._needed_plan().evicted)

    @property
    def planned_tokens(self) -> int:
        """Tokens of the chunk that the planned `write` takes."""
        return 0 if self._plan is None else self._planned_tokens

    @property
    def planned_kept(self) -> int:
        """Tokens of the chunk that are held once the planned `write` is done."""
        return 0 if self._plan is None else self._plan.kept

    def reset(self) -> None:
        """Forget all tokens; the buffers stay allocated for the next video if it has the same shape."""
        self.window.reset()
        self.bank.reset()
        self._plan = self._open = None
        self._written_sink_key = None

    def state_dict(self) -> dict[str, Any]:
        """Plain values, and views of what is kept, `(batch, valid_tokens, heads, …)`, in slot order: the order in
        which attention adds up, so that what follows is the same to the bit."""
        length, sink = self.window.state.length, self.window.sink_size
        return {
            "window": asdict(self.window.state),
            "capacity": 0 if self._key is None else self._key.capacity,
            "key": None if self._key is None else self._key.held(length),
            "written_sink_key": None if self._written_sink_key is None else self._written_sink_key.held(sink),
            "value": None if self._value is None else self._value.held(length),
            "bank": self.bank.state_dict() if self.bank.num_frames else None,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over what `state_dict` of a block made with the same sizes and `kv_dtype` gave, copied to `device`."""

        def buffer(parts: Any, capacity: int) -> TokenBuffer | None:
            # As large as it was, so that the strides that attention sees are the same too.
            return None if parts is None else self._buffer_type.from_held(parts, capacity, device)

        self.window.state = WindowState(**state["window"])
        self._plan = self._open = None
        self._key, self._value = buffer(state["key"], state["capacity"]), buffer(state["value"], state["capacity"])
        self._written_sink_key = buffer(state["written_sink_key"], self.window.sink_size)
        if state["bank"] is not None:
            self.bank.load_state_dict(state["bank"], device)

    def release(self) -> None:
        """Forget all tokens and free the buffers."""
        self.reset()
        self.bank.release()
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
        """Bytes of the buffers, of a moved sink's copy and of the bank, 0 before the first write."""
        buffers = self._key, self._value, self._written_sink_key
        return self.bank.nbytes + sum(buffer.nbytes for buffer in buffers if buffer is not None)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a key and its value are kept in, of the whole batch; 0 before the first write."""
        return sum(b.nbytes // b.capacity for b in (self._key, self._value) if b is not None)

    def _opened(self, key: torch.Tensor, value: torch.Tensor) -> OpenWindow:
        """What a planned write of this chunk works on."""
        self._check_pair(key, value)
        if self._open is None or (layout_of(key) != self._open.key.layout and self._is_empty):
            check_tokens(key, self.planned_tokens)
            self.open(key)
        assert self._open is not None
        return self._open

    def _chronological(self, buffer: TokenBuffer | None) -> torch.Tensor | None:
        spans = self.window.state.held
        if buffer is None or not spans:
            return None
        if len(spans) == 1:
            return buffer.read(*spans[0])
        return torch.cat([buffer.read(*span) for span in spans], dim=1)

    @property
    def _is_empty(self) -> bool:
        return self.window.state.length == 0

    def _numbers(self, of: str, spans: tuple[Span, ...], device: torch.device) -> torch.Tensor:
        """All slots of the spans, in memory that is the same for the same count of them."""
        count = sum(stop - start for start, stop in spans)
        numbers = self._slots.empty((of, count, device), (count,), torch.int64, device)
        filled = 0
        for start, stop in spans:
            torch.arange(start, stop, out=numbers[filled : filled + stop - start])
            filled += stop - start
        mark_dynamic(numbers, dim=0)
        return numbers

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
