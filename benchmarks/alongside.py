"""A rollout decoded alongside the denoising of the next chunk against one that does one after the other.

python -m benchmarks.alongside --chunks 10 --threads 1
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from rich.table import Table

from benchmarks.clock import interleaved
from benchmarks.experiment import Bench, run_experiment, table_of
from wan_autoregressive.scripts.costs.build import start_rollout


@dataclass
class RolloutTimes:
    """Wall seconds of one way, in every round."""

    total_s: list[float]
    """From the call with ready embeddings to the last chunk's frames."""
    interval_s: list[float]
    """Median over a round's chunks of the time since the chunk before was handed out."""


@dataclass
class AlongsideResult:
    """Both ways, measured in turns."""

    one_after_the_other: RolloutTimes
    alongside: RolloutTimes
    torch_threads: int
    """Threads that one operation may use on a CPU. Alongside, two operations run at a time, each with as many."""

    @property
    def total_ratio(self) -> float:
        """Median total alongside by that of one after the other: below 1 it pays."""
        return statistics.median(self.alongside.total_s) / statistics.median(self.one_after_the_other.total_s)

    @property
    def interval_ratio(self) -> float:
        """The same of the intervals."""
        return statistics.median(self.alongside.interval_s) / statistics.median(self.one_after_the_other.interval_s)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total_ratio": self.total_ratio, "interval_ratio": self.interval_ratio}


def measure_alongside(bench: Bench) -> AlongsideResult:
    """Run rollouts both ways, in turns; ValueError without decoding or with a single chunk."""
    if not bench.workload.with_vae or bench.workload.chunks < 2:
        raise ValueError("ways to decode chunks are compared, which needs --vae and at least 2 --chunks")
    times = {alongside: RolloutTimes([], []) for alongside in (False, True)}

    def run(alongside: bool) -> float:
        handed_out = _hand_outs(bench, alongside)
        intervals = [after - before for before, after in pairwise(handed_out)]
        times[alongside].total_s.append(handed_out[-1])
        times[alongside].interval_s.append(statistics.median(intervals))
        return handed_out[-1]

    interleaved({"one after the other": lambda: run(False), "alongside": lambda: run(True)}, bench.repeats)
    return AlongsideResult(times[False], times[True], torch.get_num_threads())


def _hand_outs(bench: Bench, alongside: bool) -> list[float]:
    """Seconds after the call at which each chunk's frames were there."""
    rollout = start_rollout(bench.pipe, bench.workload)
    start = time.perf_counter()
    chunks = rollout.chunks(alongside, stop=lambda: rollout.chunks_done >= bench.workload.chunks)
    # No chunk is handed out before the device is done with it: its latents have been looked at.
    return [time.perf_counter() - start for _ in chunks]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure with the arguments of the command line."""

    def measure(bench: Bench) -> tuple[dict[str, Any], Table]:
        result = measure_alongside(bench)
        return {"decode_alongside": result.as_dict()}, _table(result)

    run_experiment(__doc__, measure, argv, needs_window=False)


def _table(result: AlongsideResult) -> Table:
    rows = []
    for name, times in (("one after the other", result.one_after_the_other), ("alongside", result.alongside)):
        medians = (statistics.median(seconds) for seconds in (times.total_s, times.interval_s))
        rows.append((name, *(f"{median:.4f}" for median in medians)))
    rows.append(("ratio of medians", f"{result.total_ratio:.3f}", f"{result.interval_ratio:.3f}"))
    return table_of(
        ("decoding", "s per rollout", "s between chunks"),
        rows,
        f"{len(result.alongside.total_s)} rounds in turns; alongside, two threads run operations of up to "
        f"{result.torch_threads} torch threads each",
    )


if __name__ == "__main__":
    main()
