"""One session for a long time: do memory and latency stay flat?

    python -m benchmarks.live_soak --minutes 30

A viewer plays in real time, changes the prompt every half minute, and goes back five chunks every two minutes. Each
row is a part of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.live_process import ServerProcess
from wan_autoregressive.client import AsyncLiveClient

_PROMPTS = ("a red circle moving right on a navy background", "a green cross moving left on a black background")
_CHANGE_S, _FORK_S, _BACK = 30, 120, 5


@dataclass(frozen=True)
class SoakPart:
    """What was seen in a part of the time."""

    minute: float
    chunks: int
    step_s: float
    """Median of the chunks' steps."""
    late_s: float
    """Longest that a chunk came after its time to be shown."""
    rss_bytes: int


async def soak(server: ServerProcess, minutes: float, parts: int = 10) -> list[SoakPart]:
    """Watch for `minutes`."""
    found: list[SoakPart] = []
    async with AsyncLiveClient(server.link) as live:
        await live.start(_PROMPTS[0], seed=0)
        first = await live.next_chunk()
        fps, begun = live.video.hello["fps"], time.monotonic()
        due, path = begun, [first.chunk]  # when the next chunk has to be there
        next_change, next_fork, changes = begun + _CHANGE_S, begun + _FORK_S, 0
        steps, late, made = [first.step_s], [0.0], first
        while time.monotonic() < begun + 60 * minutes:
            due += made.frames / fps
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if time.monotonic() > next_change:
                next_change, changes = next_change + _CHANGE_S, changes + 1
                await live.set_prompt(_PROMPTS[changes % 2])
            if time.monotonic() > next_fork:
                next_fork += _FORK_S
                await live.fork(path[-_BACK], seed=changes)
            made = await live.next_chunk()
            path = [*path[-2 * _BACK :], made.chunk]
            late.append(max(0.0, time.monotonic() - due))
            due = max(due, time.monotonic())
            steps.append(made.step_s)
            now = (time.monotonic() - begun) / 60
            if now > (len(found) + 1) * minutes / parts:
                found.append(SoakPart(now, len(steps), statistics.median(steps), max(late), server.rss_bytes()))
                steps, late = [], []
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure with the arguments of the command line, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        words = ("--max-seconds", str(180 * args.minutes), "--state", f"{folder}/state")
        with ServerProcess(*words, log=Path(folder) / "log") as server:
            parts = asyncio.run(soak(server, args.minutes))
    print("| minute | chunks | step, median | latest chunk | server's memory |")
    print("|---|---|---|---|---|")
    for part in parts:
        rss = f"{part.rss_bytes / 2**20:.0f} MiB"
        print(f"| {part.minute:.1f} | {part.chunks} | {part.step_s:.3f} s | {part.late_s:.2f} s late | {rss} |")


if __name__ == "__main__":
    main()
