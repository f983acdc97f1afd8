"""How many viewers the model is fast enough for, going by the chunks that it made last."""

from __future__ import annotations

import statistics
from collections import deque

_LAST = 15
"""Chunks that count; of their median, so that a single slow one means nothing."""


class Pace:
    """Guarded by the engine's lock.

    Args:
        step_s: Seconds that the model takes for a chunk, as measured at the start.
        video_s: Seconds of video in it.
    """

    def __init__(self, step_s: float, video_s: float) -> None:
        self._shares = deque([step_s / video_s] * _LAST, maxlen=_LAST)

    def measured(self, step_s: float, video_s: float) -> None:
        """Another chunk was made."""
        self._shares.append(step_s / video_s)

    @property
    def viewers(self) -> int:
        """That can watch at the same time; at least one, even if not in real time."""
        return max(1, int(1 / statistics.median(self._shares)))
