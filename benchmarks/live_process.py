"""`wan-ar serve` as a process of its own, on a free port, and the memory that it takes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Self

from wan_autoregressive.resident_memory import resident_bytes

_END_S = 60


class ServerProcess:
    """Runs from the start on; `stop` or the end of a `with` block ends it.

    Args:
        words: Further flags.
        log: Where it writes what goes wrong.
    """

    def __init__(self, *words: str, log: Path) -> None:
        command = [sys.executable, "-m", "wan_autoregressive.scripts.cli", "serve", "--port", "0", *words]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.log = log.open("w")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment, start_new_session=True
        )
        assert self.process.stdout is not None
        self.link = self.process.stdout.readline().strip()
        if not self.link.startswith("http://"):
            self.stop()
            raise RuntimeError(f"the server did not start: {log.read_text()}")
        self.port = int(self.link.split("://")[1].split("/")[0].rsplit(":", 1)[1])

    def rss_bytes(self) -> int:
        """Resident memory; of Linux."""
        return resident_bytes(self.process.pid)

    def cpu_s(self) -> tuple[float, float]:
        """Seconds on all cores that its own threads took, and the processes that it started and saw end; of Linux."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        own, children = sum(map(int, fields[11:13])), sum(map(int, fields[13:15]))
        return own / os.sysconf("SC_CLK_TCK"), children / os.sysconf("SC_CLK_TCK")

    def stop(self) -> int:
        """End it; gives its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(_END_S)
        finally:
            self.log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
