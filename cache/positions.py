"""Which rotary position has frame k? One policy for each way to count, each the only place that answers.

A policy belongs to one cache. It knows frames and integers, neither tensors nor rotary tables.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from wan_autoregressive.cache.token_window import Span

SinkView = Literal["moved", "in_place", "unseen"]
"""How a forward sees the sink: where the policy moves it, or as frames like any others, or not at all."""


@dataclass(frozen=True)
class PlannedFrames:
    """A forward that is about to run."""

    start: int
    """Number in the video of its first frame."""
    num_frames: int
    places: tuple[Span, ...]
    """Places in time order, in tokens, of all that it attends to, in the order in which attention gets it: the past
    and behind it the forward's own tokens, which are the newest."""
    tokens_per_frame: int
    begins_chunk: bool
    """Whether its frames are new to the cache, instead of overwriting the newest ones."""
    replaces_sink: bool
    max_positions: int
    """Rows of the rotary table."""
    num_held: int
    """Whole frames that are held once it is done, seen or not, and its own that are not kept."""
    sink: SinkView = "moved"

    @property
    def num_attended(self) -> int:
        """Whole frames attended to, own ones included."""
        return max((stop for _, stop in self.places), default=0) // self.tokens_per_frame


@dataclass(frozen=True)
class FramePositions:
    """Rotary positions of one forward, in frames."""

    start: float
    """Of the forward's first frame; its others follow. A whole number is looked up in the rotary table and a float is
    computed, see [`CausalWanRotaryPosEmbed.at`]."""
    keys: tuple[tuple[float, float], ...] | None = None
    """Of all attended keys, in the order in which attention gets them, where they are cached without rotary embedding;
    otherwise they carry it already."""
    window_shift: float = 0
    """Frames by which all cached keys but the sink's must be moved before the forward: 0 or negative."""
    sink_shift: float | None = None
    """Frames by which the sink's keys must be moved, from where they were written; `None` leaves them."""


class PositionPolicy(Protocol):
    """A way to count. Its fields are its state."""

    name: ClassVar[str]

    def plan(self, frames: PlannedFrames) -> FramePositions:
        """Positions of a forward. Planning the same forward again gives the same."""

    def jump(self, num_frames: float) -> None:
        """Move the next chunk away from the past in time (a hard cut)."""

    def commit(self, begins_chunk: bool) -> None:
        """A planned forward has succeeded, and its frames are in the cache."""


@dataclass
class AbsolutePositions:
    """A frame's number in the video, up to the end of the rotary table.

    Once a jump was by a float, positions are floats: they may lie between frames and have no end.
    """

    name: ClassVar[str] = "absolute"
    shift: float = 0
    """Frames that jumps have added."""

    def plan(self, frames: PlannedFrames) -> FramePositions:
        return FramePositions(frames.start + self.shift)

    def jump(self, num_frames: float) -> None:
        self.shift += num_frames

    def commit(self, begins_chunk: bool) -> None:
        pass


@dataclass
class RelativePositions:
    """A frame's place in the window; keys are kept without rotary embedding and rotated at every use.

    Infinity-RoPE, Reward-Forcing. A jump lasts as long as its chunk is the newest one.
    """

    name: ClassVar[str] = "relative"
    newest_jump: float = 0
    next_jump: float = 0

    def plan(self, frames: PlannedFrames) -> FramePositions:
        size = frames.tokens_per_frame
        if any(place % size for span in frames.places for place in span):
            raise ValueError(
                f"relative positions need whole frames of {size} tokens in the window, the sink and every chunk; got "
                f"places {frames.places}"
            )
        jump = self.next_jump if frames.begins_chunk else self.newest_jump
        own = frames.num_attended - frames.num_frames
        positions: list[tuple[float, float]] = []
        for start, stop in ((start // size, stop // size) for start, stop in frames.places):
            positions.append((start, min(stop, own)))
            positions.append((max(start, own) + jump, stop + jump))
        keys = tuple(span for span in positions if span[0] < span[1])
        return FramePositions(own + jump, keys)

    def jump(self, num_frames: float) -> None:
        self.next_jump = num_frames

    def commit(self, begins_chunk: bool) -> None:
        if begins_chunk:
            self.newest_jump, self.next_jump = self.next_jump, 0


@dataclass
class SinkRelativePositions:
    """As absolute, but the sink is moved up to the window: the attention of relative positions, for nearly nothing.

    Distances inside the window are what they were, so its keys stay as they are, but for a common shift back to the
    start of the rotary table once in a thousand frames. The sink is rotated anew whenever it moves, always from the
    keys as they were first written: nothing is rotated twice, and nothing drifts.
    """

    name: ClassVar[str] = "sink_relative"
    shift: float = 0
    """Frames that jumps have added."""
    base: float = 0
    """What positions count from."""
    sink_start: float | None = None
    """Where the sink is."""
    sink_origin: float = 0
    """Where the sink was written."""
    sink_home: float = 0
    """Where its frames would be if they were like any others; may be before the start of the table."""

    def plan(self, frames: PlannedFrames) -> FramePositions:
        if frames.replaces_sink:
            self.sink_start = None
        end = frames.start + self.shift + frames.num_frames - self.base
        window_shift: float = 0
        if end > frames.max_positions >= frames.num_held:  # room for a later forward that sees all that is held
            window_shift = frames.num_held - end
            self.base -= window_shift
            self.sink_home += window_shift
            end = frames.num_held
        sink_start, sink_shift = end - frames.num_attended, None
        if self.sink_start is None:
            self.sink_origin = self.sink_home = sink_start
        elif frames.sink == "in_place":
            sink_start = self.sink_home
        elif frames.sink == "unseen":
            sink_start = self.sink_start
        if self.sink_start not in (None, sink_start):
            sink_shift = sink_start - self.sink_origin
        self.sink_start = sink_start
        return FramePositions(end - frames.num_frames, None, window_shift, sink_shift)

    def jump(self, num_frames: float) -> None:
        self.shift += num_frames

    def commit(self, begins_chunk: bool) -> None:
        pass


POSITION_POLICIES: dict[str, type[AbsolutePositions | RelativePositions | SinkRelativePositions]] = {
    policy.name: policy for policy in (AbsolutePositions, RelativePositions, SinkRelativePositions)
}
