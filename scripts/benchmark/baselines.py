"""Other ways to make the same chunks, to be measured beside the pipeline, on the same weights.

A baseline is a function `prepare(setup: BaselineSetup) -> make_chunk`. It is called once; `make_chunk(index)` then
makes chunk 0, 1, 2, ... : all denoising steps and whatever writes its memory of the past, without VAE. What it
returns is not looked at. `--baseline package.module:function` measures any such function.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from wan_autoregressive.models.causal_wan_transformer import CausalWanTransformer3DModel
from wan_autoregressive.pipelines import WanAutoregressivePipeline
from wan_autoregressive.schedulers import SelfForcingScheduler
from wan_autoregressive.scripts.benchmark.build import prompt_embeds, start_rollout
from wan_autoregressive.scripts.benchmark.clock import interleaved, median_ratio, timed
from wan_autoregressive.scripts.benchmark.counting import flop_counter
from wan_autoregressive.scripts.benchmark.settings import BenchmarkSettings

NAMED_BASELINES = {
    "recompute": "wan_autoregressive.scripts.benchmark.stock_rollouts:recompute",
    "concat": "wan_autoregressive.scripts.benchmark.stock_rollouts:concat",
    "fused-qkv": "wan_autoregressive.scripts.benchmark.fused_qkv:fused_qkv",
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
def compare(pipe: WanAutoregressivePipeline, settings: BenchmarkSettings, names: list[str]) -> list[BaselineResult]:
    """Measure baselines and pipeline in turns, once the window is full.

    Raises:
        ValueError: an unknown baseline, or no window.
    """
    device, fill = torch.device(settings.device), settings.chunks_to_fill
    prepared = {name: resolve_baseline(name)(baseline_setup(pipe, settings)) for name in names}
    rollout = start_rollout(pipe, settings, decode=False)
    for _ in range(fill):
        rollout.step()
    flops, next_index = {}, dict.fromkeys(names, fill + 1)
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
    works |= {name: lambda name=name: run_baseline(name) for name in names}  # type: ignore[misc]
    seconds = interleaved(works, settings.repeats)
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
        for name in names
    ]


def baseline_setup(pipe: WanAutoregressivePipeline, settings: BenchmarkSettings) -> BaselineSetup:
    """What every baseline gets; ValueError without a window."""
    if settings.window_frames is None:
        raise ValueError("baselines are compared on steady chunks, which need a window; set --window-frames")
    geometry = settings.geometry
    scheduler = SelfForcingScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(settings.steps)
    return BaselineSetup(
        transformer=pipe.transformer,
        prompt_embeds=prompt_embeds(settings),
        scheduler=scheduler,
        latents_shape=(1, geometry.channels, settings.chunk_frames, *geometry.latent_size(*settings.pixels)),
        window_frames=settings.window_frames,
        tokens_per_frame=settings.tokens_per_frame,
        device=torch.device(settings.device),
        dtype=getattr(torch, settings.dtype),
        seed=settings.seed,
    )
