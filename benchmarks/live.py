"""What the live server costs, seen from a client: a Markdown table.

    python -m benchmarks.live

Runs `wan-ar serve` with the demo model as a process of its own, and the bare rollout in this one, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from benchmarks.live_process import ServerProcess
from wan_autoregressive.client import AsyncLiveClient, LiveChunk
from wan_autoregressive.configs import load_preset, resolve_config
from wan_autoregressive.demo import DEMO
from wan_autoregressive.scripts.load_pipeline import load_pipeline
from wan_autoregressive.server.live_model import LiveModel

RED, GREEN = "a red circle moving right on a navy background", "a green cross moving left on a navy background"
_SESSIONS = (1, 2, 4, 8)
_BLOCK = 8  # chunks in a row of one kind, while the other kind waits
_FULL_WINDOW = 6  # chunks after which all cost the same


async def first_chunk_s(link: str, repeats: int) -> list[float]:
    """Seconds from a start to its first chunk."""
    found = []
    async with AsyncLiveClient(link) as live:
        await live.start(RED)
        await live.next_chunk()  # the process has done everything once
        await live.forget()
    for number in range(repeats):
        async with AsyncLiveClient(link) as live:
            started = time.perf_counter()
            await live.start(RED, seed=number)
            await live.next_chunk()
            found.append(time.perf_counter() - started)
            await live.forget()
    return found


async def change_s(link: str, repeats: int) -> list[float]:
    """Seconds from a change of prompt, half way through a chunk that plays in real time, to a chunk with it."""
    found = []
    async with AsyncLiveClient(link) as live:
        await live.start(RED, seed=0)
        chunk = await live.next_chunk()
        fps = live.video.hello["fps"]
        for number in range(repeats):
            for _ in range(3):
                await asyncio.sleep(chunk.frames / fps)
                chunk = await live.next_chunk()
            await asyncio.sleep(chunk.frames / fps / 2)
            prompt = (GREEN, RED)[number % 2]
            started = time.perf_counter()
            await live.set_prompt(prompt, playhead=(chunk.start_frame + chunk.frames / 2) / fps)
            while chunk.prompt != prompt:
                chunk = await live.next_chunk()
            found.append(time.perf_counter() - started)
        await live.forget()
    return found


async def frames_per_second(link: str, sessions: int, seconds: float) -> tuple[list[float], list[LiveChunk]]:
    """Of every session, all taking chunks as fast as they come; and the chunks."""
    chunks: list[LiveChunk] = []

    async def watch(number: int) -> float:
        async with AsyncLiveClient(link) as live:
            await live.start(RED, seed=number)
            await live.next_chunk()
            begun, frames = time.perf_counter(), 0
            while time.perf_counter() < begun + seconds:
                chunks.append(await live.next_chunk())
                frames += chunks[-1].frames
            took = time.perf_counter() - begun
            await live.forget()
            return frames / took

    return list(await asyncio.gather(*(watch(number) for number in range(sessions)))), chunks


async def chunk_s_in_turns(
    server: ServerProcess, model: LiveModel, blocks: int
) -> tuple[list[float], list[float], float]:
    """Seconds per chunk of a session and of a bare rollout, in turns; the other one rests meanwhile.

    And the share of the server's CPU seconds that went into the encoder's processes.
    """
    rollout, served, bare = model.start(RED, 0), [], []
    own_s = encoder_s = 0.0
    async with AsyncLiveClient(server.link) as live:
        await live.start(RED, seed=0)
        for _ in range(_FULL_WINDOW):
            await live.next_chunk()
            await asyncio.to_thread(rollout.step)
        for _ in range(blocks):
            await live.pause()
            await asyncio.sleep(1)  # for the step under way
            started = time.perf_counter()
            for _ in range(_BLOCK):
                await asyncio.to_thread(rollout.step)  # the connection stays awake meanwhile
            bare.append((time.perf_counter() - started) / _BLOCK)
            await live.resume()
            for _ in range(3):  # those that were made ahead, and one begun from rest
                await live.next_chunk()
            before, started = server.cpu_s(), time.perf_counter()
            for _ in range(_BLOCK):
                await live.next_chunk()
            served.append((time.perf_counter() - started) / _BLOCK)
            after = server.cpu_s()
            own_s, encoder_s = own_s + after[0] - before[0], encoder_s + after[1] - before[1]
        await live.forget()
    return served, bare, encoder_s / (own_s + encoder_s)


async def held_bytes(server: ServerProcess, sessions: int, chunks: int) -> float:
    """Memory of one session more with its snapshots, where there are two already."""

    async def fill(live: AsyncLiveClient, number: int) -> None:
        await live.start(RED, seed=number)
        for _ in range(chunks):
            await live.next_chunk()

    async with AsyncExitStack() as opened:
        clients = [await opened.enter_async_context(AsyncLiveClient(server.link)) for _ in range(2 + sessions)]
        await asyncio.gather(*(fill(client, number) for number, client in enumerate(clients[:2])))
        before = server.rss_bytes()
        await asyncio.gather(*(fill(client, number) for number, client in enumerate(clients[2:])))
        held = (server.rss_bytes() - before) / sessions
        for client in clients:
            await client.forget()
        return held


async def come_and_go(link: str, sessions: int) -> None:
    """Sessions one after the other, each with a chunk."""
    for number in range(sessions):
        async with AsyncLiveClient(link) as live:
            await live.start(RED, seed=number)
            await live.next_chunk()
            await live.forget()


def demo_model() -> LiveModel:
    """What `wan-ar serve` serves."""
    config = resolve_config(load_preset(DEMO))
    return LiveModel(load_pipeline(config), config.rollout_settings(), config.fps, config.scale)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure with the arguments of the command line, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="of what is done once a time")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each number of sessions")
    parser.add_argument("--visits", type=int, default=100, help="sessions that come and go")
    args = parser.parse_args(argv)
    rows: list[tuple[str, str]] = []
    words = ("--slots", str(max(_SESSIONS)))
    with tempfile.TemporaryDirectory() as folder, ServerProcess(*words, log=Path(folder) / "log") as server:
        link = server.link
        held = asyncio.run(held_bytes(server, max(_SESSIONS) - 2, 10))  # first: later, free memory would be taken
        rows.append(("memory of a session, what it leaves free included", f"{held / 2**20:.0f} MiB"))
        rows.append(("Enter to first chunk", spread(asyncio.run(first_chunk_s(link, args.repeats)))))
        rows.append(("change of prompt to a chunk with it", spread(asyncio.run(change_s(link, args.repeats)))))
        for sessions in _SESSIONS:
            rates, chunks = asyncio.run(frames_per_second(link, sessions, args.seconds))
            each = f"{sum(rates):.1f} together, {min(rates):.1f} to {max(rates):.1f} each"
            rows.append((f"frames per second, sessions: {sessions}", each))
        model = demo_model()
        size = sum(len(chunk.mp4) for chunk in chunks) / sum(chunk.frames for chunk in chunks) * model.fps
        served, bare, encoder_share = asyncio.run(chunk_s_in_turns(server, model, blocks=3 * args.repeats))
        over = [100 * (one / other - 1) for one, other in zip(served, bare, strict=True)]
        rows.append(("a chunk of a session, of a bare rollout", f"{spread(served)}; {spread(bare)}"))
        overhead = f"{statistics.median(over):+.1f} % ({min(over):+.1f} to {max(over):+.1f})"
        rows.append(("server's overhead per chunk", overhead))
        rows.append(("share of ffmpeg in the server's CPU time", f"{100 * encoder_share:.1f} %"))
        rows.append(("bytes of a second of video", f"{size / 1000:.0f} kB"))
        before = server.rss_bytes()
        asyncio.run(come_and_go(link, args.visits))
        grown = f"{before / 2**20:.0f} MiB, {server.rss_bytes() / 2**20:.0f} MiB"
        rows.append((f"server's memory before and after {args.visits} sessions that came and went", grown))
    print("| measured with `python -m benchmarks.live` | |\n|---|---|")
    print("\n".join(f"| {name} | {value} |" for name, value in rows))


def spread(seconds: Sequence[float]) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    main()
