"""One run per video: a second one would write into the files of the first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from wan_autoregressive.scripts.interrupts import delay_stops
from wan_autoregressive.scripts.output_files import OutputFiles


@contextmanager
def hold_output(output: Path) -> Iterator[None]:
    """Keep other runs from making the same video, until the block or the process ends, however it ends.

    Raises:
        ValueError: another run is at it.
        OSError: the folder cannot be written to.
    """
    lock = FileLock(OutputFiles(output).lock)
    try:
        with delay_stops():  # a lock that is half taken would leave its file
            lock.acquire(timeout=0)
        yield
    except Timeout as error:
        raise ValueError(f"another run is writing '{output}'; wait for it, stop it, or give another output") from error
    finally:
        with delay_stops():
            if lock.is_locked:
                with suppress(OSError):  # a system that cannot remove an open file keeps it
                    Path(lock.lock_file).unlink()
            lock.release()
