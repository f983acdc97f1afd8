"""What a chunk costs against window, resolution, chunk size, position mode or how the cache is kept."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import cast

import torch

from wan_autoregressive.configs.choices import POSITION_MODES, KVDtype, PositionMode
from wan_autoregressive.pipelines import WanAutoregressivePipeline
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.scripts.benchmark.build import start_rollout
from wan_autoregressive.scripts.benchmark.clock import interleaved
from wan_autoregressive.scripts.benchmark.counting import flop_counter
from wan_autoregressive.scripts.benchmark.settings import BenchmarkSettings

_KV_DTYPES: dict[str, KVDtype | None] = {"model": None, "int8": "int8"}


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


def sweep_settings(settings: BenchmarkSettings, kind: str, values: list[str] | None) -> dict[str, BenchmarkSettings]:
    """The settings of each value; ValueError for a value that cannot work.

    Args:
        values: Latent frames for `window` and `chunk`, `HEIGHTxWIDTH` for `resolution`, modes for `position`,
            `model` or `int8` for `kv-dtype`; `None` takes small defaults.
    """
    if settings.window_frames is None:
        raise ValueError("a sweep compares steady chunks, which need a window; set --window-frames")
    if values is None:
        values = _default_values(settings, kind)
    return {value: _replaced(settings, kind, value) for value in values}


@torch.no_grad()
def run_sweep(pipe: WanAutoregressivePipeline, points: dict[str, BenchmarkSettings], repeats: int) -> list[SweepRow]:
    """Measure all points in turns; their rollouts live side by side."""
    rollouts = {value: start_rollout(pipe, point, decode=False) for value, point in points.items()}
    flops = {value: _fill(rollouts[value], point) for value, point in points.items()}
    works = {value: lambda rollout=rollout: _step_seconds(rollout) for value, rollout in rollouts.items()}
    seconds = interleaved(works, repeats)
    return [
        SweepRow(
            value=value,
            chunk_frames=point.chunk_frames,
            chunk_tokens=point.chunk_tokens,
            window_tokens=(point.window_frames or 0) * point.tokens_per_frame,
            flops=flops[value],
            kv_cache_bytes=rollouts[value].cache.allocated_bytes,
            median_s=statistics.median(seconds[value]),
            seconds=seconds[value],
        )
        for value, point in points.items()
    ]


def _fill(rollout: WanRollout, settings: BenchmarkSettings) -> int:
    """Fill the window and return the FLOPs of the chunk after that."""
    for _ in range(settings.chunks_to_fill):
        rollout.step()
    with flop_counter() as counter:
        rollout.step()
    return counter.get_total_flops()


def _step_seconds(rollout: WanRollout) -> float:
    timings = rollout.step().timings
    return timings.clean_pass_s + timings.denoise_s


def _default_values(settings: BenchmarkSettings, kind: str) -> list[str]:
    if kind == "position":
        return list(POSITION_MODES)
    if kind == "kv-dtype":
        return list(_KV_DTYPES)
    if kind == "window":
        least = settings.sink_frames + settings.chunk_frames
        return [str(least + extra * settings.chunk_frames) for extra in (0, 1, 2, 4)]
    if kind == "chunk":
        return ["1", "2", "3", "4", "6"]
    unit = settings.geometry.spatial_factor * settings.geometry.patch_size[1]
    scaled = [[round(side * scale / unit) * unit for side in settings.pixels] for scale in (0.5, 0.75, 1, 1.5)]
    return [f"{height}x{width}" for height, width in scaled]


def _replaced(settings: BenchmarkSettings, kind: str, value: str) -> BenchmarkSettings:
    if kind == "position":
        if value not in POSITION_MODES:
            raise ValueError(f"the sweep value is {value!r}; position takes {', '.join(POSITION_MODES)}")
        return dataclasses.replace(settings, position_mode=cast(PositionMode, value))
    if kind == "kv-dtype":
        if value not in _KV_DTYPES:
            raise ValueError(f"the sweep value is {value!r}; kv-dtype takes {', '.join(_KV_DTYPES)}")
        return dataclasses.replace(settings, kv_dtype=_KV_DTYPES[value])
    numbers = [int(word) if word.isdecimal() else 0 for word in value.split("x")]
    if 0 in numbers or len(numbers) != (2 if kind == "resolution" else 1):
        raise ValueError(f"the sweep value is {value!r}; {kind} takes {'HxW' if kind == 'resolution' else 'numbers'}")
    if kind == "resolution":
        return dataclasses.replace(settings, height=numbers[0], width=numbers[1])
    if kind == "window":
        return dataclasses.replace(settings, window_frames=numbers[0])
    window = max(settings.window_frames or 0, settings.sink_frames + numbers[0])
    return dataclasses.replace(settings, chunk_frames=numbers[0], window_frames=window)
