"""A step of every chunk in flight as one batch against one chunk after the other: chunks per second, and latency.

python -m benchmarks.stream_batch --no-vae --threads 1 --chunk-sizes 1 3 6 --repeats 20

Both make the same steps behind the same full window, without a context pass. A chunk in lanes is handed out after as
many ticks as there are steps; how long that is counts as its latency.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from benchmarks.clock import interleaved, median_ratio, timed
from benchmarks.experiment import Bench, run_experiment, table_of
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.scripts.costs.build import start_rollout


@dataclass
class StreamBatchResult:
    """Seconds of a steady chunk with chunks of one size, in every round."""

    chunk_frames: int
    rows: int
    """Chunks that run as one batch."""
    chunkwise_s: list[float]
    stream_batch_s: list[float]

    @property
    def throughput_ratio(self) -> float:
        """Chunks per second in lanes by those of one after the other: above 1 it pays."""
        return median_ratio(self.chunkwise_s, self.stream_batch_s)

    @property
    def latency_ratio(self) -> float:
        """Seconds from noise to the finished chunk, in lanes by those of one after the other."""
        return self.rows / self.throughput_ratio

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "throughput_ratio": self.throughput_ratio, "latency_ratio": self.latency_ratio}


def measure_stream_batch(bench: Bench, chunk_frames: int) -> StreamBatchResult:
    """Make chunks of both, in turns, once the windows are full."""
    workload = bench.workload.with_rollout(chunk_frames=chunk_frames, switch_policy="cross_attention")
    rollouts = {
        "chunkwise": start_rollout(bench.pipe, workload.with_rollout(clean_pass=False)),
        "stream_batch": start_rollout(bench.pipe, workload.with_rollout(sampler="stream_batch")),
    }
    for rollout in rollouts.values():
        for _ in range(workload.chunks_to_fill + workload.steps):
            rollout.step()

    def step(rollout: WanRollout) -> float:
        return timed(rollout.step, bench.device)

    seconds = interleaved(
        {name: lambda rollout=rollout: step(rollout) for name, rollout in rollouts.items()}, bench.repeats
    )
    return StreamBatchResult(chunk_frames, workload.steps, seconds["chunkwise"], seconds["stream_batch"])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure with the arguments of the command line."""

    def add_flags(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--chunk-sizes", type=int, nargs="+", metavar="N", help="latent frames, instead of --chunk-frames"
        )

    def measure(bench: Bench) -> tuple[dict[str, Any], Table]:
        sizes = bench.args.chunk_sizes or [bench.workload.rollout.chunk_frames]
        results = [measure_stream_batch(bench, size) for size in sizes]
        return {"stream_batch": [result.as_dict() for result in results]}, _table(results)

    run_experiment(__doc__, measure, argv, add_flags)


def _table(results: Sequence[StreamBatchResult]) -> Table:
    rows = []
    for result in results:
        chunkwise, lanes = statistics.median(result.chunkwise_s), statistics.median(result.stream_batch_s)
        rows.append(
            (
                str(result.chunk_frames),
                *(f"{1 / chunkwise:.3g}", f"{1 / lanes:.3g}", f"{result.throughput_ratio:.2f}"),
                *(f"{chunkwise:.3g}", f"{result.rows * lanes:.3g}", f"{result.latency_ratio:.2f}"),
            )
        )
    return table_of(
        (
            "latent frames per chunk",
            *("chunks/s, one by one", "in lanes", "ratio"),
            *("latency s, one by one", "in lanes", "ratio"),
        ),
        rows,
        f"medians of {len(results[0].chunkwise_s)} chunks of each, made in turns; {results[0].rows} lanes",
    )


if __name__ == "__main__":
    main()
