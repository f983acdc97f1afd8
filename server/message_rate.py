"""How many messages somebody may send."""

from __future__ import annotations

import time


class MessageRate:
    """So many a second in the long run, and some more at once.

    Args:
        burst: Messages that may come at once after a silence.
    """

    def __init__(self, per_second: float, burst: int) -> None:
        self._per_second, self._burst = per_second, burst
        self._left, self._at = float(burst), time.monotonic()

    def take(self) -> bool:
        """Count a message; whether it is within bounds."""
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
