"""Does the time per chunk grow over a long rollout? A straight line through the steady chunks.

    python -m benchmarks.long_rollout --chunks 300 --no-vae --threads 1 --plot chunks.png

After every chunk a forward without a cache is timed, which never changes: how fast the machine is at the moment. Chunk
times are fitted in seconds and in such forwards, which takes out what slows the machine for a while. On a CPU with one
thread both are CPU seconds, which other work disturbs less; else wall seconds, since threads that wait for others use
CPU time too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.clock import timed
from benchmarks.experiment import Bench, run_experiment
from wan_autoregressive.scripts.costs.build import prompt_embeds, start_rollout

LEAST_CHUNKS = 10
"""A slope over fewer is noise."""


@dataclass(frozen=True)
class LineFit:
    """Least squares `time = intercept + slope * chunk`."""

    slope: float
    intercept: float
    mean: float
    percent_per_100_chunks: float
    """Slope over 100 chunks in percent of the mean."""
    standard_error_percent: float
    """One standard error of it, from the scatter around the line."""


def fit_line(indices: Sequence[int], times: Sequence[float]) -> LineFit:
    """Fit chunks that are alike."""
    (slope, intercept), covariance = np.polyfit(indices, times, deg=1, cov=True)
    mean = float(np.mean(times))
    percent, error = 1e4 * slope / mean, 1e4 * float(np.sqrt(covariance[0, 0])) / mean
    return LineFit(float(slope), float(intercept), mean, float(percent), error)


@dataclass(frozen=True)
class LongRollout:
    """Times of every chunk, and lines through the steady ones."""

    first_steady: int
    chunk_s: list[float]
    probe_s: list[float]
    seconds: LineFit
    in_probes: LineFit


def measure_long_rollout(bench: Bench) -> LongRollout:
    """Time `--chunks` chunks; ValueError if too few are steady."""
    workload = bench.workload
    # The chunk that fills the window still follows a shorter clean pass.
    first_steady = 1 if workload.window_tokens is None else workload.chunks_to_fill
    if workload.chunks - first_steady < LEAST_CHUNKS:
        raise ValueError(f"chunks is {workload.chunks}; a line needs at least {first_steady + LEAST_CHUNKS} of them")
    single_threaded = workload.device == "cpu" and torch.get_num_threads() == 1

    def seconds_of(work: Callable[[], Any]) -> float:
        started = time.process_time()
        wall_s = timed(work, bench.device)
        return time.process_time() - started if single_threaded else wall_s

    rollout, probe = start_rollout(bench.pipe, workload), _probe(bench)
    probe()
    chunk_s, probe_s = [], []
    for _ in range(workload.chunks):
        chunk_s.append(seconds_of(rollout.step))
        probe_s.append(seconds_of(probe))
    indices = range(first_steady, workload.chunks)
    relative = [chunk_s[index] / probe_s[index] for index in indices]
    seconds = fit_line(indices, chunk_s[first_steady:])
    return LongRollout(first_steady, chunk_s, probe_s, seconds, fit_line(indices, relative))


def _probe(bench: Bench) -> Callable[[], Any]:
    transformer, embeds = bench.pipe.transformer, prompt_embeds(bench.workload)
    latents = torch.zeros(bench.workload.latents_shape, device=bench.device, dtype=transformer.dtype)
    timestep = torch.zeros(1, device=bench.device)
    return torch.no_grad()(lambda: transformer(latents, timestep, embeds))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure with the arguments of the command line."""

    def add_flags(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the seconds per chunk and the line")

    def measure(bench: Bench) -> tuple[dict[str, Any], str]:
        result = measure_long_rollout(bench)
        if bench.args.plot is not None:
            _plot(bench.args.plot, result)
        return {"long_rollout": asdict(result)}, _as_text(result)

    run_experiment(__doc__, measure, argv, add_flags, needs_window=False)


def _as_text(result: LongRollout) -> str:
    lines = []
    for unit, fit in (("s", result.seconds), ("forwards of now", result.in_probes)):
        lines.append(
            f"a chunk takes {fit.mean:.4f} {unit}, {fit.percent_per_100_chunks:+.2f} % per 100 chunks (standard error "
            f"{fit.standard_error_percent:.2f}) from chunk {result.first_steady} to {len(result.chunk_s) - 1}"
        )
    return "\n".join(lines)


def _plot(path: Path, result: LongRollout) -> None:
    from matplotlib.figure import Figure

    ends = np.array([result.first_steady, len(result.chunk_s) - 1])
    axes = (figure := Figure(figsize=(9, 4.2))).add_subplot()
    axes.plot(result.chunk_s, ".", label="chunks")
    line = result.seconds.intercept + result.seconds.slope * ends
    axes.plot(ends, line, label=f"{result.seconds.percent_per_100_chunks:+.2f} % per 100 chunks")
    axes.set(xlabel="chunk", ylabel="seconds", ylim=(0, None))
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
