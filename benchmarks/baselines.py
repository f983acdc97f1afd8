"""Other ways to make the same chunks, measured beside the pipeline, on the same weights.

    python -m benchmarks.baselines recompute concat fused-qkv --preset 1.3b --layers 2 --no-vae

A baseline is a function `prepare(setup: BaselineSetup) -> make_chunk`. It is called once; `make_chunk(index)` then
makes chunk 0, 1, 2, ... : all denoising steps and whatever writes its memory of the past, without VAE. What it
returns is not looked at. `package.module:function` measures any such function.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table

from benchmarks.clock import interleaved, median_ratio, timed
from benchmarks.experiment import Bench, run_experiment, table_of
from wan_autoregressive import CausalWanTransformer3DModel, SelfForcingScheduler
from wan_autoregressive.scripts.costs.allocations import flop_counter
from wan_autoregressive.scripts.costs.build import prompt_embeds, start_rollout

NAMED_BASELINES = {
    "recompute": "benchmarks.stock_rollouts:recompute",
    "concat": "benchmarks.stock_rollouts:concat",
    "fused-qkv": "benchmarks.fused_qkv:fused_qkv",
}


@dataclass(frozen=True)
class BaselineSetup:
    """What a baseline works with. Frames are latent frames."""

    transformer: CausalWanTransformer3DModel
    """The pipeline's own; share its weights rather than copying them."""
    prompt_embeds: torch.Tensor
    """`(1, text_tokens, text_dim)`."""
    scheduler: SelfForcingScheduler
    """With the chunk's `timesteps` set."""
    latents_shape: tuple[int, int, int, int, int]
    """Of one chunk: `(batch, channels, frames, height, width)`."""
    window_frames: int
    """The current chunk included."""
    tokens_per_frame: int
    device: torch.device
    dtype: torch.dtype
    seed: int


MakeChunk = Callable[[int], Any]
Baseline = Callable[[BaselineSetup], MakeChunk]


@dataclass(frozen=True)
class BaselineResult:
    """Seconds of steady chunks without VAE, one entry per repetition, beside the pipeline's of the same rounds."""

    name: str
    ratio: float
    """Its time by the pipeline's: median of the rounds. Above 1 the pipeline is faster."""
    median_s: float
    pipeline_median_s: float
    seconds: list[float]
    pipeline_seconds: list[float]
    flops: int
    """Of one steady chunk; only operations of torch are counted."""


def resolve_baseline(name: str) -> Baseline:
    """A baseline by its name or as `module:function`; ValueError if there is none."""
    module_name, _, function_name = NAMED_BASELINES.get(name, name).partition(":")
    if not module_name or not function_name:
        known = ", ".join(NAMED_BASELINES)
        raise ValueError(f"the baseline is {name!r}; allowed are {known} and module:function")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the baseline {name!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"the baseline {name!r} is a {type(function).__name__}, not a function")
    return function


@torch.no_grad()
def compare(bench: Bench, baselines: Mapping[str, Baseline]) -> list[BaselineResult]:
    """Measure baselines and pipeline in turns, once the window is full."""
    device, fill = bench.device, bench.workload.chunks_to_fill
    prepared = {name: baseline(baseline_setup(bench)) for name, baseline in baselines.items()}
    rollout = start_rollout(bench.pipe, bench.workload, decode=False)
    for _ in range(fill):
        rollout.step()
    flops, next_index = {}, dict.fromkeys(prepared, fill + 1)
    for name, make_chunk in prepared.items():
        for index in range(fill):
            make_chunk(index)
        with flop_counter() as counter:
            make_chunk(fill)
        flops[name] = counter.get_total_flops()

    def run_baseline(name: str) -> float:
        index = next_index[name]
        next_index[name] += 1
        return timed(lambda: prepared[name](index), device)

    works = {"pipeline": lambda: timed(rollout.step, device)}
    works |= {name: partial(run_baseline, name) for name in prepared}
    seconds = interleaved(works, bench.repeats)
    return [
        BaselineResult(
            name=name,
            ratio=median_ratio(seconds[name], seconds["pipeline"]),
            median_s=statistics.median(seconds[name]),
            pipeline_median_s=statistics.median(seconds["pipeline"]),
            seconds=seconds[name],
            pipeline_seconds=seconds["pipeline"],
            flops=flops[name],
        )
        for name in prepared
    ]


def baseline_setup(bench: Bench) -> BaselineSetup:
    """What every baseline gets."""
    workload = bench.workload
    scheduler = SelfForcingScheduler.from_config(bench.pipe.scheduler.config)
    scheduler.set_timesteps(workload.steps)
    return BaselineSetup(
        transformer=bench.pipe.transformer,
        prompt_embeds=prompt_embeds(workload),
        scheduler=scheduler,
        latents_shape=workload.latents_shape,
        window_frames=workload.rollout.window_frames or 0,
        tokens_per_frame=workload.tokens_per_frame,
        device=bench.device,
        dtype=getattr(torch, workload.dtype),
        seed=workload.seed,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure with the arguments of the command line."""

    def add_flags(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "names", nargs="+", metavar="BASELINE", help=f"{', '.join(NAMED_BASELINES)} or module:function"
        )

    def measure(bench: Bench) -> tuple[dict[str, Any], Table]:
        results = compare(bench, {name: resolve_baseline(name) for name in bench.args.names})
        return {"baselines": [asdict(result) for result in results]}, _table(results)

    run_experiment(__doc__, measure, argv, add_flags)


def _table(results: list[BaselineResult]) -> Table:
    rows = [("pipeline", f"{results[0].pipeline_median_s:.4f}", "1.00", "")]
    for result in results:
        rows.append((result.name, f"{result.median_s:.4f}", f"{result.ratio:.2f}", f"{result.flops / 1e9:.2f}"))
    return table_of(("without VAE", "s per chunk", "times the pipeline", "GFLOP"), rows)


if __name__ == "__main__":
    main()
