"""Run parts one after the other, each in a process of its own and for no longer than its share of the time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu_kit.parts import Part

ROOT = Path(__file__).resolve().parents[2]
_LOG_LINES = 40

State = Literal["ok", "failed", "out of time", "needs CUDA"]


@dataclass
class Outcome:
    """What became of a part."""

    name: str
    title: str
    share: float
    state: State
    seconds: float = 0.0
    limit_s: float = 0.0
    """The most it could have taken."""
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Rows by the table's title: all that it has written down, also if it failed or was ended."""
    log: str = ""
    """The last lines that it printed, if it did not end well: of an exception the traceback."""

    @property
    def failed(self) -> bool:
        return self.state in ("failed", "out of time")


def run_parts(parts: Sequence[Part], device: str, tiny: bool, total_s: float, scratch: Path) -> Iterator[Outcome]:
    """The outcomes, each as soon as it is there; all of them together take `total_s` seconds at most.

    Args:
        scratch: A folder for records and logs.
    """
    deadline = time.monotonic() + total_s
    shares = [part.share for part in parts]
    for index, part in enumerate(parts):
        limit_s = (deadline - time.monotonic()) * part.share / sum(shares[index:])
        if part.needs_cuda and not device.startswith("cuda"):
            yield Outcome(part.name, part.title, part.share, "needs CUDA")
        else:
            yield _run(part, device, tiny, limit_s, scratch)


def _run(part: Part, device: str, tiny: bool, limit_s: float, scratch: Path) -> Outcome:
    record, log = scratch / f"{part.name}.json", scratch / f"{part.name}.log"
    words = [sys.executable, "-m", "benchmarks.gpu_kit.one_part", part.function, json.dumps(dict(part.arguments))]
    words += [device, str(record), *(["--tiny"] if tiny else [])]
    started = time.monotonic()
    with log.open("wb") as output:
        # A session of its own, so that what the part has started ends with it.
        process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            state: State = "failed" if process.wait(limit_s) else "ok"
        except subprocess.TimeoutExpired:
            state = "out of time"
        finally:
            _end(process)
    tables = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    lines = [] if state == "ok" else log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    seconds = time.monotonic() - started
    return Outcome(part.name, part.title, part.share, state, seconds, limit_s, tables, "\n".join(lines))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started and that is still there."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()
