"""The command as its own process, on a free port."""

import os
import signal
import subprocess
import sys
from pathlib import Path


class ServerProcess:
    def __init__(self, *words: str, log: Path) -> None:
        command = [sys.executable, "-m", "wan_autoregressive.scripts.cli", "serve", "--port", "0", *words]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.log = log.open("w")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment, start_new_session=True
        )
        assert self.process.stdout is not None
        self.link = self.process.stdout.readline().strip()
        assert self.link.startswith("http://"), log.read_text()
        self.port = int(self.link.split("://")[1].split("/")[0].rsplit(":", 1)[1])

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.log.close()
