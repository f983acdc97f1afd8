"""Caches that go their own ways in one memory, a lane each, so that one forward runs through several of them.

Lanes begin as copies of one cache. From then on each is appended to by its own forwards: it has its own window,
positions and slots, and its keys and values are rows of a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from wan_autoregressive.cache.adaptive_sink import AdaptiveSink, SinkQueue
from wan_autoregressive.cache.block_cache import WanKVBlockCache
from wan_autoregressive.cache.dynamic_dims import mark_dynamic
from wan_autoregressive.cache.kv_cache import WanKVCache
from wan_autoregressive.cache.open_window import OpenSlots, OpenWindow
from wan_autoregressive.cache.positions import FramePositions
from wan_autoregressive.cache.rotary import RotaryEmbedding
from wan_autoregressive.cache.static_buffers import StaticBuffers
from wan_autoregressive.cache.token_buffer import TokenBuffer
from wan_autoregressive.cache.token_window import PastView, Span


class LaneBlock:
    """Keys and values of one block in all lanes, `(lanes * batch, capacity, heads, head_dim)`, lane after lane."""

    def __init__(self, slots: StaticBuffers, sink: AdaptiveSink | None) -> None:
        self._slots = slots
        self._sink = sink
        self._memory: tuple[TokenBuffer, TokenBuffer] | None = None
        self._open: OpenWindow | None = None
        self._queue: SinkQueue | None = None
        self._queue_rows: torch.Tensor | None = None
        self._sink_rows: tuple[TokenBuffer, TokenBuffer] | None = None

    def share(self, lanes: Sequence[WanKVBlockCache]) -> None:
        """Let lanes keep what they hold in rows of one memory, the one there is if it fits."""
        held = [_buffers(lane) for lane in lanes]
        largest = max(held, key=_capacity)
        if self._memory is None or not _fits(self._memory[0], largest[0], len(lanes)):
            self._memory = largest[0].repeated(len(lanes)), largest[1].repeated(len(lanes))
            self._queue = None
        batch = largest[0].layout[0]
        for index, (lane, own) in enumerate(zip(lanes, held, strict=True)):
            key, value = (memory.rows(index * batch, (index + 1) * batch) for memory in self._memory)
            key.take(own[0], lane.window.state.length)
            value.take(own[1], lane.window.state.length)
            lane.use_buffers(key, value)
        if self._sink is not None and self._queue is None:
            # A lane's first frame is written over once for each lane before it.
            most = self._sink.window_frames + len(lanes)
            self._queue = SinkQueue(self._sink, len(lanes) * batch, most, largest[0].layout[-1])

    def open(self, lanes: Sequence[WanKVBlockCache], used: range, slots: OpenSlots | None) -> OpenSlots:
        """Make room for a planned write in the lanes that are used; they have made room of their own.

        Args:
            slots: What `open` of another block returned for the same plans.
        """
        assert self._memory is not None
        if any(_capacity(_buffers(lane)) != _capacity(self._memory) for lane in lanes):  # without a window they grow
            self.share(lanes)
        device, batch = self._memory[0].layout[-1], self._memory[0].layout[0] // len(lanes)
        if slots is None or slots.chunk.device != device:
            own = torch.stack([lanes[lane].open_slots.chunk for lane in used]).repeat_interleave(batch, dim=0)
            slots = OpenSlots(self._slots.copy_in(("chunk", own.shape, device), own))
            mark_dynamic(slots.chunk, dim=0)
        block, first, last = lanes[used.start], used.start * batch, used.stop * batch
        rows = [memory.rows(first, last) for memory in self._memory]
        length = block.planned_held
        self._open = OpenWindow(rows[0].window(length), rows[1].window(length), slots)
        mark_dynamic(*self._open.key.parts, *self._open.value.parts, dim=0)
        if self._queue is not None:
            held_frames = block.window.state.length // self._queue.sink.frame_size
            self._queue_rows = self._queue.begin(first, last, held_frames, block.planned_evicts)
            size = self._queue.sink.sink_frames * self._queue.sink.frame_size
            self._sink_rows = rows[0].window(size), rows[1].window(size)
            mark_dynamic(*self._sink_rows[0].parts, *self._sink_rows[1].parts, dim=0)
        return slots

    def write(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As [`WanKVBlockCache.write`], for a batch of the lanes that are used, lane after lane."""
        window, queue = self._needed_open(), self._queue
        if queue is not None and self._queue_rows is not None and self._sink_rows is not None:
            similarity = queue.sink.similarity(self._sink_rows, (key, value), queue.held_frames)
            slots = queue.next_slots(self._queue_rows, similarity, window.slots.chunk)
            window = replace(window, slots=OpenSlots(slots))
        return window.write(key, value)

    def commit(self) -> None:
        self._open = None
        if self._queue is not None:
            self._queue.commit()

    @property
    def planned_kept(self) -> int:
        """Tokens that the planned `write` puts into each lane."""
        return self._needed_open().slots.chunk.shape[1]

    @property
    def planned_places(self) -> tuple[Span, ...]:
        """Of the tokens that the planned `write` returns, for each lane the same."""
        return ((0, self._needed_open().key.capacity),)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a key and its value are kept in, in all lanes of the planned `write`."""
        window = self._needed_open()
        return sum(buffer.nbytes // buffer.capacity for buffer in (window.key, window.value))

    def _needed_open(self) -> OpenWindow:
        if self._open is None:
            raise RuntimeError("no write is planned: call LaneCaches.begin_forward() first")
        return self._open

    @property
    def queue(self) -> SinkQueue | None:
        """Of an adaptive sink."""
        return self._queue


class LaneCaches:
    """Takes the place of a [`WanKVCache`] in forwards of several lanes.

    A chunk that starts where the newest one of its lane does overwrites it; otherwise it is appended.

    Args:
        first: Lane 0. Later ones start as copies of it, in memory that they share with it.
        sink: How a frame in the sink makes room for a new one.
    """

    def __init__(self, first: WanKVCache, sink: AdaptiveSink | None = None) -> None:
        self.lanes = [first]
        self._newest: list[int | None] = [None]
        """First frame of the chunk that a lane was written last."""
        self._sink = sink
        self._used = range(1)
        self._starts: Sequence[int] = (0,)
        self._slots = StaticBuffers()
        self._blocks = [LaneBlock(self._slots, sink) for _ in first.block_caches]

    def split(self, count: int) -> None:
        """Make `count` lanes that hold what the first one does."""
        first = self.lanes[0]
        self.lanes = [first, *(first.twin() for _ in range(count - 1))]
        self._newest = [None] * count
        self._share()

    def use(self, lanes: range, start_frames: Sequence[int]) -> None:
        """Run the next forward through these lanes, for which `plan` must be the same."""
        self._used, self._starts = lanes, start_frames

    def plan(self, lane: int, start_frame: int, num_tokens: int) -> tuple[int, int]:
        """Tokens that a lane would hold before and after a chunk, where they do not count those that it evicts."""
        cache = self.lanes[lane]
        added = 0 if self._newest[lane] == start_frame else num_tokens
        return cache.num_tokens, cache.num_tokens + added

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def begin_forward(
        self, num_tokens: int, like: torch.Tensor, keep: int | None = None, view: PastView | None = None
    ) -> Sequence[LaneBlock | WanKVBlockCache]:
        """As [`WanKVCache.begin_forward`], of a batch of all lanes that are used; a single one is a cache like any."""
        own = like[: len(like) // len(self._used)]
        for lane, start in zip(self._used, self._starts, strict=True):
            cache = self.lanes[lane]
            cache.enable_overwrite_mode() if self._newest[lane] == start else cache.enable_append_mode()
            blocks = cache.begin_forward(num_tokens, own, keep, view)
        if len(self._used) == 1 and self._sink is None:
            return blocks
        slots = None
        for index, block in enumerate(self._blocks):
            slots = block.open(self._of_block(index), self._used, slots)
        return self._blocks

    def plan_positions(
        self,
        start_frames: Sequence[int],
        num_frames: int,
        tokens_per_frame: int,
        max_positions: int,
        rotation: Callable[[float], RotaryEmbedding],
    ) -> list[FramePositions]:
        """As [`WanKVCache.plan_positions`], for each lane that is used."""
        return [
            self.lanes[lane].plan_positions(start, num_frames, tokens_per_frame, max_positions, rotation)
            for lane, start in zip(self._used, start_frames, strict=True)
        ]

    def end_forward(self) -> None:
        """As [`WanKVCache.end_forward`]."""
        for lane, start in zip(self._used, self._starts, strict=True):
            self.lanes[lane].end_forward()
            self._newest[lane] = start
        for block in self._blocks:
            block.commit()

    def reset(self) -> None:
        """Forget all lanes but the first, which is somebody else's. Memory stays allocated."""
        self.lanes, self._newest = self.lanes[:1], [None]
        for queue in self._queues:
            queue.reset()

    def state_dict(self) -> dict[str, Any]:
        """Of all but the first lane."""
        return {
            "sink": None if self._sink is None else asdict(self._sink),
            "lanes": [lane.state_dict() for lane in self.lanes[1:]],
            "newest": list(self._newest),
            "queues": [queue.state_dict() for queue in self._queues],
        }

    @classmethod
    def from_state(cls, first: WanKVCache, state: dict[str, Any], device: torch.device) -> "LaneCaches":
        """Lanes with the state that `state_dict` gave, behind a first one that has its own already."""
        lanes = cls(first, None if state["sink"] is None else AdaptiveSink(**state["sink"]))
        for saved in state["lanes"]:
            lane = first.twin()
            lane.load_state_dict(saved, device)
            lanes.lanes.append(lane)
        lanes._newest = list(state["newest"])
        lanes._share()
        for queue, saved in zip(lanes._queues, state["queues"], strict=True):
            queue.load_state_dict(saved)
        return lanes

    def fork(self) -> "LaneCaches":
        """A copy with memory of its own."""
        twin = LaneCaches(self.lanes[0].twin(), self._sink)
        twin.lanes += [lane.twin() for lane in self.lanes[1:]]
        twin._newest = list(self._newest)
        twin._share()
        for queue, own in zip(twin._queues, self._queues, strict=True):
            queue.load_state_dict(own.state_dict())
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes of the later lanes' keys and values."""
        return sum(lane.allocated_bytes for lane in self.lanes[1:])

    @property
    def slot_bytes(self) -> int:
        """Bytes of what says into which slots they go."""
        numbers = self._slots.nbytes + sum(lane.slots.nbytes for lane in self.lanes[1:])
        return numbers + sum(queue.nbytes for queue in self._queues)

    def _share(self) -> None:
        if self.lanes[0].block_caches[0].buffers is None:  # nothing has been written yet
            return
        for index, block in enumerate(self._blocks):
            block.share(self._of_block(index))

    @property
    def _queues(self) -> list[SinkQueue]:
        return [block.queue for block in self._blocks if block.queue is not None]

    def _of_block(self, index: int) -> list[WanKVBlockCache]:
        return [lane.block_caches[index] for lane in self.lanes]


def _buffers(lane: WanKVBlockCache) -> tuple[TokenBuffer, TokenBuffer]:
    if lane.buffers is None:
        raise RuntimeError("a cache that holds nothing cannot be split into lanes")
    return lane.buffers


def _capacity(buffers: tuple[TokenBuffer, TokenBuffer]) -> int:
    return buffers[0].capacity


def _fits(memory: TokenBuffer, buffer: TokenBuffer, count: int) -> bool:
    """Whether memory has room for `count` buffers like this one, and no more."""
    batch, *layout = buffer.layout
    return memory.layout == (count * batch, *layout) and memory.capacity == buffer.capacity
