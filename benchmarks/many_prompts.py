"""What handing out a long list costs: a stand-in of known speed makes 10,000 videos on workers of Ray.

    python -m benchmarks.many_prompts --output DIR

Nothing is rendered: a video is a pause and an empty file. Measured are the time that a worker waits between two
videos, the driver's memory, and what the loss of a third of the workers costs, all killed with SIGKILL when a third of
the list is done. Writes `many_prompts.json` and prints the same as a table. Needs the extra `ray`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from wan_autoregressive.resident_memory import resident_bytes
from wan_autoregressive.scripts.generate_inputs import Job
from wan_autoregressive.scripts.ray_workers import render_on_ray
from wan_autoregressive.scripts.render_job import Outcome
from wan_autoregressive.scripts.spread_flags import Spread


@dataclass
class Pause:
    """Makes a video by waiting, and notes when: `start end` on the machine's clock, a line for each, by process."""

    seconds: float
    folder: Path

    def render(self, job: Job) -> Outcome:
        start = time.time()
        time.sleep(self.seconds)
        job.output.touch()
        end = time.time()
        with open(self.folder / f"times-{os.getpid()}", "a") as file:
            file.write(f"{start!r} {end!r}\n")
        return Outcome(job, "made", seed=0, frames=0, seconds=end - start)


def make_pause(seconds: float, folder: Path, tell: Callable[[str], None]) -> AbstractContextManager[Pause]:
    return nullcontext(Pause(seconds, folder))


def driver_mb() -> float:
    """Resident memory of this process, now, in MB."""
    return resident_bytes() / 1e6


def times_of(path: Path) -> list[tuple[float, float]]:
    """Start and end of what a process made, in order."""
    return [(float(start), float(end)) for start, end in (line.split() for line in path.read_text().splitlines())]


def measure(output: Path, num_jobs: int, workers: int, seconds: float) -> dict[str, float]:
    """Run the list once, killing a third of the workers when a third of it is done."""
    folder = output / "videos"
    folder.mkdir(parents=True)
    jobs = [Job(f"prompt {number}", folder / f"{number:05}.mp4") for number in range(num_jobs)]
    made, killed, killed_at, memory = 0, 0, 0.0, [0.0, 0.0]
    begun = time.time()
    for outcome in render_on_ray(partial(make_pause, seconds, output), jobs, Spread(workers=workers)):
        assert outcome.state == "made", outcome.reason
        made += 1
        if made == 1:
            memory[0] = driver_mb()
        if made == num_jobs // 3:
            for path in sorted(output.glob("times-*"))[: workers // 3]:
                os.kill(int(path.name.split("-")[1]), signal.SIGKILL)
                killed += 1
            killed_at = time.time()
        if made == num_jobs:
            memory[1] = driver_mb()
    lines = [times_of(path) for path in output.glob("times-*")]
    gaps = sorted(later[0] - earlier[1] for line in lines for earlier, later in pairwise(line))
    starts, ends = sorted(line[0][0] for line in lines), sorted(line[-1][1] for line in lines)
    back = [start for start in starts if start > killed_at]
    return {
        "videos": made,
        "workers": workers,
        "seconds_a_video": seconds,
        "made_more_than_once": sum(len(line) for line in lines) - made,
        "seconds_from_the_first_video_to_the_last": ends[-1] - starts[0],
        "seconds_before_the_first_video": starts[0] - begun,
        "wait_between_videos_ms_median": 1e3 * gaps[len(gaps) // 2],
        "wait_between_videos_ms_99th_percentile": 1e3 * gaps[len(gaps) * 99 // 100],
        "workers_killed": killed,
        "seconds_until_all_workers_are_back": back[-1] - killed_at if len(back) == killed else float("nan"),
        "driver_mb_at_the_first_video": memory[0],
        "driver_mb_at_the_last_video": memory[1],
        "driver_cpu_ms_a_video": 1e3 * time.process_time() / made,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--videos", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.2, help="that a video takes (default: 0.2)")
    args = parser.parse_args()
    figures = measure(args.output, args.videos, args.workers, args.seconds)
    (args.output / "many_prompts.json").write_text(json.dumps(figures, indent=2) + "\n")
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:.5g}")
    Console().print(table)


if __name__ == "__main__":
    main()
