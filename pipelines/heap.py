"""Memory that glibc holds free between blocks that live long: given back before it becomes much.

Copies of keys and values come and go between the activations of a step, and leave holes that fit neither: without
this the process grows by ten times the size of the copies. But what is given back has to be mapped in again, and a
step that finds all of its memory gone takes a sixth longer, so it is done where the process has grown, not each time.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from wan_autoregressive.resident_memory import resident_bytes

_GROWTH = 0.25  # of the resident memory, since it was last known to be needed


class HeapWatch:
    """Looks at the process, which is one for all videos.

    Args:
        resident_bytes: Memory that the process has.
        give_back: Returns what is free to the system.
    """

    def __init__(self, resident_bytes: Callable[[], int], give_back: Callable[[], None]) -> None:
        self._resident_bytes, self._give_back = resident_bytes, give_back
        self._needed: int | None = None
        self._lock = threading.Lock()

    def look(self) -> None:
        """To be called at the same place of every step: there the same amount is free."""
        with self._lock:
            resident = self._resident_bytes()
            if self._needed is None or resident < self._needed:
                self._needed = resident  # what a step has taken again since the memory was given back
            elif resident > self._needed * (1 + _GROWTH):
                self._give_back()
                self._needed = None

    def expect_less(self) -> None:
        """A video goes: the next look gives back what it leaves free, however little it is."""
        with self._lock:
            self._needed = 0


def _watch() -> HeapWatch:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library, or no /proc
            trim = ctypes.CDLL("libc.so.6").malloc_trim
            resident_bytes()
            return HeapWatch(resident_bytes, lambda: trim(0))
    return HeapWatch(lambda: 0, lambda: None)


HEAP = _watch()
"""Of this process. It does nothing where the C library holds nothing back."""
