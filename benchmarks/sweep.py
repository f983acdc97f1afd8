"""What a chunk costs against window, resolution, chunk size, position mode or how the cache is kept.

python -m benchmarks.sweep window --values 6,9,12 --preset 1.3b --layers 1 --height 240 --width 416 --no-vae
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table

from benchmarks.clock import interleaved
from benchmarks.experiment import Bench, run_experiment, table_of
from wan_autoregressive import WanRollout
from wan_autoregressive.configs.choices import POSITION_MODES
from wan_autoregressive.scripts.costs.build import start_rollout
from wan_autoregressive.scripts.costs.formulas import costs_per_chunk
from wan_autoregressive.scripts.costs.workload import Workload
from wan_autoregressive.scripts.run_report import human_bytes

KINDS = ("window", "resolution", "chunk", "position", "kv-dtype")
_KV_DTYPES = {"model": None, "int8": "int8"}


@dataclass(frozen=True)
class SweepRow:
    """One steady chunk at one value, without VAE, its clean pass included."""

    value: str
    chunk_frames: int
    chunk_tokens: int
    window_tokens: int
    flops: int
    kv_cache_bytes: int
    median_s: float
    seconds: list[float]


def sweep_workloads(workload: Workload, kind: str, values: list[str] | None) -> dict[str, Workload]:
    """The workload of each value; ValueError for a value that cannot work.

    Args:
        values: Latent frames for `window` and `chunk`, `HEIGHTxWIDTH` for `resolution`, modes for `position`,
            `model` or `int8` for `kv-dtype`; `None` takes small defaults.
    """
    return {value: _replaced(workload, kind, value) for value in values or _default_values(workload, kind)}


@torch.no_grad()
def run_sweep(bench: Bench, points: dict[str, Workload]) -> list[SweepRow]:
    """Measure all points in turns; their rollouts live side by side."""
    rollouts = {value: start_rollout(bench.pipe, point, decode=False) for value, point in points.items()}
    for value, point in points.items():
        for _ in range(point.chunks_to_fill + 1):
            rollouts[value].step()
    works = {value: partial(_step_seconds, rollout) for value, rollout in rollouts.items()}
    seconds = interleaved(works, bench.repeats)
    return [
        SweepRow(
            value=value,
            chunk_frames=point.rollout.chunk_frames,
            chunk_tokens=point.chunk_tokens,
            window_tokens=point.window_tokens or 0,
            flops=sum(costs.flops for costs in costs_per_chunk(point, point.chunks_to_fill + 1).values()),
            kv_cache_bytes=bench.pipe.estimate(**asdict(point.rollout)).kv_cache_bytes or 0,
            median_s=statistics.median(seconds[value]),
            seconds=seconds[value],
        )
        for value, point in points.items()
    ]


def _step_seconds(rollout: WanRollout) -> float:
    timings = rollout.step().timings
    return timings.clean_pass_s + timings.denoise_s


def _default_values(workload: Workload, kind: str) -> list[str]:
    rollout = workload.rollout
    if kind == "position":
        return list(POSITION_MODES)
    if kind == "kv-dtype":
        return list(_KV_DTYPES)
    if kind == "window":
        least = rollout.sink_frames + rollout.chunk_frames
        return [str(least + extra * rollout.chunk_frames) for extra in (0, 1, 2, 4)]
    if kind == "chunk":
        return ["1", "2", "3", "4", "6"]
    unit = workload.model.spatial_factor * workload.model.transformer["patch_size"][1]
    sides = (rollout.height, rollout.width)
    scaled = [[round(side * scale / unit) * unit for side in sides] for scale in (0.5, 0.75, 1, 1.5)]
    return [f"{height}x{width}" for height, width in scaled]


def _replaced(workload: Workload, kind: str, value: str) -> Workload:
    if kind == "position":
        return workload.with_rollout(position_mode=value)
    if kind == "kv-dtype":
        if value not in _KV_DTYPES:
            raise ValueError(f"the sweep value is {value!r}; kv-dtype takes {', '.join(_KV_DTYPES)}")
        return workload.with_rollout(kv_dtype=_KV_DTYPES[value])
    numbers = [int(word) if word.isdecimal() else 0 for word in value.split("x")]
    if 0 in numbers or len(numbers) != (2 if kind == "resolution" else 1):
        raise ValueError(f"the sweep value is {value!r}; {kind} takes {'HxW' if kind == 'resolution' else 'numbers'}")
    if kind == "resolution":
        return workload.with_rollout(height=numbers[0], width=numbers[1])
    if kind == "window":
        return workload.with_rollout(window_frames=numbers[0])
    window = max(workload.rollout.window_frames or 0, workload.rollout.sink_frames + numbers[0])
    return workload.with_rollout(chunk_frames=numbers[0], window_frames=window)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure with the arguments of the command line."""

    def add_flags(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("kind", choices=KINDS, help="what changes")
        parser.add_argument("--values", metavar="LIST", help="comma-separated, such as 6,9,12 or 240x416,480x832")

    def measure(bench: Bench) -> tuple[dict[str, Any], Table]:
        values = bench.args.values.split(",") if bench.args.values else None
        rows = run_sweep(bench, sweep_workloads(bench.workload, bench.args.kind, values))
        return {"sweep": [asdict(row) for row in rows]}, _table(rows)

    run_experiment(__doc__, measure, argv, add_flags)


def _table(sweep: list[SweepRow]) -> Table:
    titles = ("value", "chunk tokens", "window tokens", "GFLOP", "K/V", "s per chunk", "s per latent frame")
    rows = []
    for row in sweep:
        times = (f"{row.median_s:.4f}", f"{row.median_s / row.chunk_frames:.4f}")
        size = (str(row.chunk_tokens), str(row.window_tokens))
        rows.append((row.value, *size, f"{row.flops / 1e9:.2f}", human_bytes(row.kv_cache_bytes), *times))
    return table_of(titles, rows)


if __name__ == "__main__":
    main()
