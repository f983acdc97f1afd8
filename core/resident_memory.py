"""Memory that a process has; of Linux."""

import os
from pathlib import Path


def resident_bytes(pid: int | None = None) -> int:
    """Resident memory of a process, of this one without `pid`. Raises `OSError` where there is no `/proc`."""
    pages = int(Path(f"/proc/{'self' if pid is None else pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
