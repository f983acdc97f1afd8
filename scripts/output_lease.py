"""One run per video among runs on any machines that see one folder, where a run that is no longer heard from loses it.

A lock of the system's own (`output_lock.py`) ends with its process, but many file systems that machines share keep it
on one machine, or for as long as a machine that died is not back. A lease is a file that its owner touches again and
again. Who has watched it unchanged for `LEASE_S` seconds of a clock of its own takes it over; on the owner's machine
that is done as soon as the owner is dead.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, SoftFileLease, Timeout

from wan_autoregressive.scripts.interrupts import delay_stops
from wan_autoregressive.scripts.output_files import OutputFiles
from wan_autoregressive.scripts.output_lock import OutputHeldError, OutputLostError, StillHeld

LEASE_S = 60.0
"""Seconds; the owner touches its lease three times as often. All runs of a folder must agree on it."""


class OutputLeases:
    """The leases that a run holds, and those of others that it watches."""

    def __init__(self, lease_s: float = LEASE_S) -> None:
        self._lease_s = lease_s
        self._leases: dict[Path, SoftFileLease] = {}

    @contextmanager
    def hold(self, output: Path) -> Iterator[StillHeld]:
        """Keep other runs from making the same video for as long as this one is heard from.

        What is given says whether that was so without a break. Between the question and what is then done a process
        can still be stopped for longer than a lease lasts; so that what two runs write must be the same.

        Raises:
            OutputHeldError: another run is at it; ask again later, with the same object, which remembers since when
                nothing was heard from that run.
            OSError: the folder cannot be written to.
        """
        path = OutputFiles(output).lease
        lease = self._leases.setdefault(output, SoftFileLease(path, lease_duration=self._lease_s))
        try:
            with delay_stops():
                lease.acquire(timeout=0)
            _refuse_plain_run(output)
            yield lambda: self._check(lease, output)
        except Timeout as error:
            raise OutputHeldError(f"another run is writing '{output}'") from error
        except Exception:
            if lease.is_locked:
                self._check(lease, output)  # if it was lost, that is why
            raise
        finally:
            if lease.is_locked:
                with delay_stops():
                    lease.release()
                    del self._leases[output]

    def _check(self, lease: SoftFileLease, output: Path) -> None:
        if lease.compromise is None:
            if lease.is_lock_held_by_us:
                return
            time.sleep(0.1)  # who asks whether a lease is out of date moves it aside for a moment
            if lease.is_lock_held_by_us:
                return
        raise OutputLostError(
            f"another run has taken '{output}' over, because this one was not heard from for {self._lease_s:g} s"
        )


def _refuse_plain_run(output: Path) -> None:
    """Raise `Timeout` while a run without --share holds the output, which asks for our lease once it has its lock."""
    path = OutputFiles(output).lock
    if path.exists():
        with FileLock(path, timeout=0):
            path.unlink(missing_ok=True)  # its owner was killed
