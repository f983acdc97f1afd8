"""Ctrl-C, SIGTERM and SIGHUP, all the same: a wish to stop soon where that is offered, or to stop now."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType
from typing import Any

Handler = Callable[[int, FrameType | None], None]

# Windows has no SIGHUP.
_STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal asked the program to end. `exit_code` is what shells give a program that a signal ended."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def raise_stopped(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


@contextlib.contextmanager
def handle_stops(handler: Handler) -> Iterator[None]:
    """Give the signals that stop a program to `handler` within the block.

    Outside of the main thread, and for a signal that is ignored (as for a job in the background or under nohup),
    nothing is changed.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in _STOPS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def import_or_leave(module_name: str) -> ModuleType:
    """Import a module; a signal meanwhile ends the process then and there, with the line and the code of `Stopped`.

    For what is imported before there is anything to clean up: torch calls Python from C++ while it is imported, and an
    exception that a handler raises in there aborts the process instead of passing through.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        stopped = Stopped(number)
        with contextlib.suppress(OSError):
            os.write(2, f"wan-ar: error: {stopped}\n".encode())
        os._exit(stopped.exit_code)

    with handle_stops(leave):
        return importlib.import_module(module_name)


@contextlib.contextmanager
def delay_stops() -> Iterator[None]:
    """Let a signal that comes within the block stop the program at its end."""
    numbers: list[int] = []
    with handle_stops(lambda number, frame: numbers.append(number)):
        yield
    if numbers:
        raise Stopped(numbers[0])


class SoftStop:
    """Within `soften` the first signal only sets `requested`; any further one stops at once."""

    def __init__(self) -> None:
        self._number: int | None = None

    @property
    def requested(self) -> bool:
        return self._number is not None

    def check(self) -> None:
        """Raise `Stopped` if a stop was requested."""
        if self._number is not None:
            raise Stopped(self._number)

    def soften(self) -> contextlib.AbstractContextManager[None]:
        """The block in which signals are wishes."""
        return handle_stops(self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise Stopped(number)
        self._number = number
        # Not through sys.stderr, which may be in the middle of a write.
        with contextlib.suppress(OSError):
            os.write(2, b"\nwan-ar: stopping after this chunk; a second signal (Ctrl-C again) stops at once\n")
