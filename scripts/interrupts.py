"""Ctrl-C as a wish to stop soon, and a second one as a wish to stop now."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class SoftInterrupt:
    """Within the block the first SIGINT only sets `requested`; any further one raises KeyboardInterrupt as usual.

    Outside the main thread, and where SIGINT is ignored (as for a job in the background), nothing is changed.
    """

    def __init__(self, message: str) -> None:
        self.requested = False
        self._message = message
        self._before: Any = None

    def __enter__(self) -> SoftInterrupt:
        ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not None
        if ours and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not through sys.stderr, which may be in the middle of a write.
        os.write(2, f"\nwan-ar: {self._message}\n".encode())
