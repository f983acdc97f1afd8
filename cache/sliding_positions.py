"""Positions for a window that slides without end while only the sink is moved along."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PositionMoves:
    """Rotations in frames that a forward needs before it writes.

    Distances inside the window are what they were, so its keys stay as they are, but for a common shift back to the
    start of the rotary table once in a thousand frames. The sink is rotated anew whenever it moves, always from the
    keys as they were first written: nothing is rotated twice, and nothing drifts.
    """

    query_start: int
    """Position of the chunk's first frame."""
    window_shift: int
    """All of the window's keys, 0 or negative."""
    sink_shift: int | None
    """The sink's keys, from where they were written; `None` if it stays where it is."""


@dataclass
class SlidingPositions:
    """Where positions count from, and where the sink is."""

    base: int = 0
    sink_start: int | None = None
    sink_origin: int = 0

    def advance(self, start_frame: int, num_frames: int, held_frames: int, max_positions: int) -> PositionMoves:
        """Positions of a chunk at `start_frame`, `held_frames` being in the cache once it is written."""
        end = start_frame + num_frames - self.base
        window_shift = 0
        if end > max_positions >= held_frames:
            window_shift = held_frames - end
            self.base -= window_shift
            end = held_frames
        sink_start, sink_shift = end - held_frames, None
        if self.sink_start is None:
            self.sink_origin = sink_start
        elif sink_start != self.sink_start:
            sink_shift = sink_start - self.sink_origin
        self.sink_start = sink_start
        return PositionMoves(end - num_frames, window_shift, sink_shift)

    def forget_sink(self) -> None:
        """The sink is about to be replaced by frames at positions of their own."""
        self.sink_start = None
