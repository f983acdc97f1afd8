"""Which buffer slots hold which tokens: the integer bookkeeping of a rolling KV cache, without tensors."""

from dataclasses import dataclass, field, replace
from typing import Literal

WriteMode = Literal["append", "overwrite", "rewrite", "rewrite_all"]

Span = tuple[int, int]
"""Slots `[start, stop)`."""


@dataclass(frozen=True)
class WindowState:
    """Where the tokens of one block are."""

    held: tuple[Span, ...] = ()
    """Their slots, from the oldest token to the newest, the sink first. Together they fill slots `[0, length)`."""
    newest_size: int = 0
    """Tokens of the newest chunk."""
    pins: dict[str, tuple[Span, ...]] = field(default_factory=dict)
    """Slots of the tokens that stay beside the sink, by the name under which they were pinned."""

    @property
    def length(self) -> int:
        """Tokens held."""
        return _count(self.held)

    @property
    def newest(self) -> tuple[Span, ...]:
        """Slots of the newest chunk, in token order."""
        return _last_tokens(self.held, self.newest_size)


@dataclass(frozen=True)
class PastView:
    """Which of the past a forward sees, in tokens."""

    newest: int | None = None
    """The ones right before its own; `None` is all."""
    sink: bool = True
    """Whether the sink is seen where `newest` does not reach it, and may be moved. If not, it is like other frames:
    seen as far as `newest` reaches, where it was written."""


@dataclass(frozen=True)
class WritePlan:
    """What one update will do: the slots to write, in token order, and the state once they are written."""

    spans: tuple[Span, ...]
    state_after: WindowState
    evicted: tuple[Span, ...] = ()
    """Slots of the tokens that go, oldest first. They are overwritten by the update or already lie outside."""
    past: tuple[Span, ...] | None = None
    """Slots that attention sees of the past, oldest first, the update's own tokens coming behind; `None` if it sees
    just what is held once the update is done, in slot order."""

    @property
    def kept(self) -> int:
        """Tokens that are written."""
        return _count(self.spans)


class TokenWindow:
    """Slots `[0, window_size)`: the sink in the first ones, and in the others pinned tokens and a ring of the rest.

    A new chunk overwrites the oldest tokens that are neither sink nor pinned in place, so nothing that is kept ever
    moves. That is equivalent to dropping them and shifting the rest, because attention does not depend on the order of
    the keys. Planning changes nothing; `commit` does, so an update that failed can be tried again.

    Args:
        window_size: Tokens held at most, sink and newest chunk included; -1 keeps everything.
        sink_size: The first tokens of the video, which stay. Needs a finite window.

    Raises:
        ValueError: sizes that cannot work together, at construction or for a chunk.
    """

    def __init__(self, window_size: int = -1, sink_size: int = 0) -> None:
        if window_size != -1 and window_size < 1:
            raise ValueError(f"window_size is {window_size}; it must be -1 (keep everything) or at least 1 token")
        if sink_size < 0:
            raise ValueError(f"sink_size is {sink_size}; it must be 0 or more tokens")
        if sink_size and window_size == -1:
            raise ValueError(f"sink_size is {sink_size} but window_size is -1: without eviction a sink has no effect")
        if sink_size and sink_size >= window_size:
            raise ValueError(f"sink_size ({sink_size}) leaves no room in window_size ({window_size})")
        self.window_size = window_size
        self.sink_size = sink_size
        self.state = WindowState()

    def plan(
        self, num_tokens: int, mode: WriteMode, keep: int | None = None, view: PastView | None = None
    ) -> WritePlan:
        """The slots that `num_tokens` new tokens go to.

        `append` adds a chunk and evicts first; `overwrite` replaces the newest chunk; `rewrite` replaces everything
        but the sink, `rewrite_all` the sink as well (both for a pass over many frames at once, as after a prompt
        switch).

        Args:
            keep: How many of them, from the first on, are held afterwards; `None` is all. With 0 nothing is evicted
                and the newest chunk stays, though an `overwrite` does not see it.
            view: What they see of the past; `None` is all that is held.
        """
        if num_tokens < 1:
            raise ValueError(f"a chunk has {num_tokens} tokens; it needs at least 1")
        if keep is not None and not 0 <= keep <= num_tokens:
            raise ValueError(f"keep is {keep}; of a chunk of {num_tokens} tokens 0 to {num_tokens} can be kept")
        kept = num_tokens if keep is None else keep
        if mode in ("rewrite", "rewrite_all"):
            if kept != num_tokens:
                raise ValueError(f"a rewrite keeps all of its {num_tokens} tokens; leave out keep, which is {keep}")
            plan = self._plan_rewrite(num_tokens, keep_sink=mode == "rewrite")
        elif kept == 0:
            plan = WritePlan((), self.state)
        else:
            plan = self._plan_append(kept) if mode == "append" else self._plan_overwrite(kept)
        if kept == num_tokens and view is None:
            return plan
        # Written by this update, or hidden from it as it stands for the same frames.
        own = kept or (self.state.newest_size if mode == "overwrite" else 0)
        past = _first_tokens(plan.state_after.held, plan.state_after.length - own)
        return replace(plan, past=self._seen(past, view or PastView()))

    def commit(self, plan: WritePlan) -> None:
        self.state = plan.state_after

    def reset(self) -> None:
        self.state = WindowState()

    def pin(self, name: str, num_tokens: int) -> None:
        """Let the first `num_tokens` of the newest chunk stay, in the place of what was pinned under `name`.

        They go when everything but the sink goes: with a rewrite or `keep_newest`. Raises `ValueError` if the newest
        chunk has fewer tokens.
        """
        if not 0 <= num_tokens <= self.state.newest_size:
            raise ValueError(f"cannot pin {num_tokens} tokens of a newest chunk that has {self.state.newest_size}")
        spans = _without(_first_tokens(self.state.newest, num_tokens), self._sink)
        self.state = replace(self.state, pins={**self.state.pins, name: spans})

    def unpin(self, name: str) -> None:
        """Let what was pinned under `name` go like any other token. Raises `KeyError` for a name that is not there."""
        pins = dict(self.state.pins)
        del pins[name]
        self.state = replace(self.state, pins=pins)

    def past_of(self, plan: WritePlan) -> tuple[Span, ...]:
        """Slots of what is held beside the update's own tokens once it is done, oldest first."""
        held = plan.state_after.held
        return _first_tokens(held, _count(held) - plan.kept)

    def first_of_newest(self, num_tokens: int) -> tuple[Span, ...]:
        """Slots of the first tokens of the newest chunk."""
        return _first_tokens(self.state.newest, num_tokens)

    def keep_newest(self, num_tokens: int) -> tuple[tuple[Span, ...], Span]:
        """Forget all but the sink and the newest `num_tokens` tokens, which move up behind the sink.

        If the whole newest chunk is among them, it can still be overwritten.

        Returns:
            The slots they come from, oldest first, and the slots they belong in now.
        """
        length, newest_size = self.state.length, self.state.newest_size
        start = min(self.sink_size, length)
        kept = min(num_tokens, length - start)
        source = _last_tokens(self.state.held, kept)
        is_whole = newest_size <= kept or start + kept == length
        self.state = WindowState(_joined(((0, start + kept),)), newest_size if is_whole else 0)
        return source, (start, start + kept)

    def places(self, state: WindowState | None = None) -> tuple[Span, ...]:
        """For consecutive runs of slots, from slot 0 on: which places in time order `[start, stop)` they hold."""
        runs, place = [], 0
        for start, stop in (state or self.state).held:
            runs.append((start, (place, place + stop - start)))
            place += stop - start
        return tuple(places for _, places in sorted(runs))

    @property
    def _sink(self) -> tuple[Span, ...]:
        return ((0, self.sink_size),)

    def _seen(self, past: tuple[Span, ...], view: PastView) -> tuple[Span, ...]:
        total = _count(past)
        newest = total if view.newest is None else min(view.newest, total)
        hidden_sink = min(self.sink_size, total - newest) if view.sink else 0
        return _first_tokens(past, hidden_sink) + _last_tokens(past, newest)

    def _plan_append(self, num_tokens: int) -> WritePlan:
        state, length = self.state, self.state.length
        if self.window_size == -1:
            spans: tuple[Span, ...] = ((length, length + num_tokens),)
            return WritePlan(spans, replace(state, held=_joined(state.held + spans), newest_size=num_tokens))
        pinned = tuple(span for spans in state.pins.values() for span in spans)
        unpinned = _without(state.held, pinned)
        protected = self.sink_size + length - _count(unpinned)
        if protected + num_tokens > self.window_size:
            pins = f", {protected - self.sink_size} pinned ones" if pinned else ""
            raise ValueError(
                f"a chunk of {num_tokens} tokens{pins} and a sink of {self.sink_size} do not fit in a window of "
                f"{self.window_size}: the chunk would evict itself. Use a window of at least {protected + num_tokens} "
                "tokens"
            )
        added = min(num_tokens, self.window_size - length)
        evicted = _first_tokens(_without(unpinned, self._sink), num_tokens - added)
        spans = _joined(((length, length + added), *evicted))
        held = _joined((*_without(state.held, evicted), *spans))
        return WritePlan(spans, replace(state, held=held, newest_size=num_tokens), evicted)

    def _plan_overwrite(self, num_tokens: int) -> WritePlan:
        if self.state.newest_size == 0:
            raise ValueError("overwrite before any append: there is no newest chunk. Call enable_append_mode() first")
        if num_tokens != self.state.newest_size:
            raise ValueError(
                f"overwrite with {num_tokens} tokens, but the newest chunk has {self.state.newest_size}: an overwrite "
                "replaces exactly the newest chunk. Use append mode for a new one"
            )
        return WritePlan(self.state.newest, self.state)

    def _plan_rewrite(self, num_tokens: int, keep_sink: bool) -> WritePlan:
        start = min(self.sink_size, self.state.length) if keep_sink else 0
        stop = start + num_tokens
        if self.window_size != -1 and stop > self.window_size:
            raise ValueError(
                f"a rewrite of {num_tokens} tokens behind {start} kept ones does not fit in a window of "
                f"{self.window_size}"
            )
        return WritePlan(((start, stop),), WindowState(((0, stop),), num_tokens))


def _count(spans: tuple[Span, ...]) -> int:
    """Tokens in all spans."""
    return sum(stop - start for start, stop in spans)


def _joined(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    """The same slots in the same order, in as few spans as possible."""
    joined: list[Span] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        elif start < stop:
            joined.append((start, stop))
    return tuple(joined)


def _without(spans: tuple[Span, ...], removed: tuple[Span, ...]) -> tuple[Span, ...]:
    """The slots that are in no removed span, in the same order."""
    for first, end in removed:
        parts = [part for start, stop in spans for part in ((start, min(stop, first)), (max(start, end), stop))]
        spans = tuple(part for part in parts if part[0] < part[1])
    return spans


def _first_tokens(spans: tuple[Span, ...], count: int) -> tuple[Span, ...]:
    """The first `count` tokens of consecutive spans."""
    taken = []
    for start, stop in spans:
        if count > 0:
            taken.append((start, min(stop, start + count)))
        count -= stop - start
    return tuple(taken)


def _last_tokens(spans: tuple[Span, ...], count: int) -> tuple[Span, ...]:
    """The last `count` tokens of consecutive spans."""
    taken = []
    for start, stop in reversed(spans):
        if count > 0:
            taken.append((max(start, stop - count), stop))
        count -= stop - start
    return tuple(reversed(taken))
