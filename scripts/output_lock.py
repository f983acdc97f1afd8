"""One run per video: a second one would write into the files of the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from wan_autoregressive.scripts.interrupts import delay_stops
from wan_autoregressive.scripts.output_files import OutputFiles

StillHeld = Callable[[], None]
"""Raises `OutputLostError` once a video is another run's; asked before anything is put under a final name."""


class OutputHeldError(ValueError):
    """Another run is making the video."""


class OutputLostError(RuntimeError):
    """Another run has taken the video over."""


def never_lost() -> None:
    """The `StillHeld` of a lock that only its owner's end can open."""


@contextmanager
def hold_output(output: Path) -> Iterator[StillHeld]:
    """Keep other runs from making the same video, until the block or the process ends, however it ends.

    Raises:
        OutputHeldError: another run is at it.
        OSError: the folder cannot be written to.
    """
    files = OutputFiles(output)
    lock = FileLock(files.lock)
    try:
        with delay_stops():  # a lock that is half taken would leave its file
            lock.acquire(timeout=0)
        if files.lease.exists():
            raise OutputHeldError(
                f"runs with --share make '{output}'; add --share, or delete '{files.lease}' if none of them is left"
            )
        yield never_lost
    except Timeout as error:
        raise OutputHeldError(
            f"another run is writing '{output}'; wait for it, stop it, or give another output"
        ) from error
    finally:
        with delay_stops():
            if lock.is_locked:
                with suppress(OSError):  # a system that cannot remove an open file keeps it
                    Path(lock.lock_file).unlink()
            lock.release()
