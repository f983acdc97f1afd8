"""A rollout decoded alongside the denoising of the next chunk against one that does one after the other."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch

from wan_autoregressive.pipelines import WanAutoregressivePipeline
from wan_autoregressive.scripts.benchmark.build import start_rollout
from wan_autoregressive.scripts.benchmark.clock import interleaved
from wan_autoregressive.scripts.benchmark.settings import BenchmarkSettings


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


def measure_alongside(pipe: WanAutoregressivePipeline, settings: BenchmarkSettings) -> AlongsideResult:
    """Run rollouts of `settings.chunks` chunks both ways, `settings.repeats` times each."""
    times = {alongside: RolloutTimes([], []) for alongside in (False, True)}

    def run(alongside: bool) -> float:
        handed_out = _hand_outs(pipe, settings, alongside)
        intervals = [after - before for before, after in pairwise(handed_out)]
        times[alongside].total_s.append(handed_out[-1])
        times[alongside].interval_s.append(statistics.median(intervals))
        return handed_out[-1]

    interleaved({"one after the other": lambda: run(False), "alongside": lambda: run(True)}, settings.repeats)
    return AlongsideResult(times[False], times[True], torch.get_num_threads())


def _hand_outs(pipe: WanAutoregressivePipeline, settings: BenchmarkSettings, alongside: bool) -> list[float]:
    """Seconds after the call at which each chunk's frames were there."""
    rollout = start_rollout(pipe, settings)
    start = time.perf_counter()
    chunks = rollout.chunks(alongside, stop=lambda: rollout.chunks_done >= settings.chunks)
    # No chunk is handed out before the device is done with it: its latents have been looked at.
    return [time.perf_counter() - start for _ in chunks]
