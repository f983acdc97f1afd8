"""Many viewers at a few slots: is a chunk lost, is the queue fair?

    python -m benchmarks.live_load --clients 50 --slots 4 --minutes 2

Every client comes, waits for its turn, watches some chunks as fast as they are made, leaves, and comes again as
another viewer. A chunk is lost where the next one does not begin where the last one ended; the queue is unfair where
somebody's place gets worse.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.live_process import ServerProcess
from wan_autoregressive.client import AsyncLiveClient, Conversation, LiveChunk, LiveError

_PROMPTS = ("a red circle moving right on a navy background", "a green cross moving left on a black background")


class _Recorded(Conversation):
    """Remembers every place in the queue that it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[int] = []

    def take(self, message: str | bytes) -> LiveChunk | None:
        before = self.queue_place
        made = super().take(message)
        if self.queue_place and self.queue_place != before:
            self.places.append(self.queue_place)
        return made


@dataclass
class LoadResult:
    """What all clients saw together."""

    visits: int = 0
    chunks: int = 0
    gaps: int = 0
    """Chunks that did not begin where the one before ended, or had another session's prompt."""
    unfair: int = 0
    """Times that a place in the queue got worse."""
    refused: int = 0
    """Visits that ended with an error of the server."""
    waits_s: list[float] = field(default_factory=list)
    """From coming to the first chunk."""


async def load(link: str, clients: int, seconds: float, watched: int = 4) -> LoadResult:
    """Let clients come and go for a time; each visit sees `watched` chunks."""
    result, until = LoadResult(), time.monotonic() + seconds

    async def come_again_and_again(number: int) -> None:
        while time.monotonic() < until:
            await _visit(link, f"{_PROMPTS[number % 2]} {number}", watched, result)

    await asyncio.gather(*(come_again_and_again(number) for number in range(clients)))
    return result


async def _visit(link: str, prompt: str, watched: int, result: LoadResult) -> None:
    async with AsyncLiveClient(link, timeout_s=600) as live:
        live.video = recorded = _Recorded()
        came, frame = time.monotonic(), 0
        result.visits += 1
        try:
            await live.start(prompt, seed=result.visits)
            for _ in range(watched):
                chunk = await live.next_chunk()
                if chunk.index == 0:
                    result.waits_s.append(time.monotonic() - came)
                result.chunks += 1
                result.gaps += chunk.start_frame != frame or chunk.prompt != prompt
                frame = chunk.start_frame + chunk.frames
            await live.forget()
        except LiveError:
            result.refused += 1
        result.unfair += sum(later > earlier for earlier, later in itertools.pairwise(recorded.places))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure with the arguments of the command line, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=2.0)
    args = parser.parse_args(argv)
    words = ("--slots", str(args.slots), "--queue", str(args.clients), "--per-address", "0")
    with tempfile.TemporaryDirectory() as folder, ServerProcess(*words, log=Path(folder) / "log") as server:
        before = server.rss_bytes()
        result = asyncio.run(load(server.link, args.clients, 60 * args.minutes))
        after = server.rss_bytes()
    waits = sorted(result.waits_s)
    print(f"| {args.clients} clients, {args.slots} slots, {args.minutes:g} minutes | |")
    print("|---|---|")
    print(f"| visits, chunks | {result.visits}, {result.chunks} |")
    print(f"| chunks lost, visits refused | {result.gaps}, {result.refused} |")
    print(f"| places in the queue that got worse | {result.unfair} |")
    print(f"| wait for the first chunk, median and longest | {waits[len(waits) // 2]:.1f} s, {waits[-1]:.1f} s |")
    print(f"| server's memory before and after | {before / 2**20:.0f} MiB, {after / 2**20:.0f} MiB |")


if __name__ == "__main__":
    main()
