"""Which forwards a chunk takes with each sampler once the window is full, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from wan_autoregressive.configs.registry import SAMPLERS
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.scripts.costs.formulas import StageCosts, flops_per_forward, kv_bytes_read, kv_bytes_written


@dataclass(frozen=True)
class Forward:
    """One forward of the transformer, in latent frames."""

    frames: int
    """Its own."""
    past: int
    """Cached ones that each of its tokens sees beside them."""
    kept: int
    """Own ones whose keys and values it writes to the cache."""
    rows: int = 1
    """Chunks that it runs side by side, each with a past of its own."""
    keys_values_only: bool = False
    """It ends with the last layer's keys and values."""


StageForwards = dict[str, list[Forward]]
"""By the stages `denoise` and `clean_pass`."""


def steady_forwards(rollout: RolloutConfig, steps: int) -> StageForwards:
    """Forwards of a chunk of a long video without an end in sight, whose window is full.

    With L steps and C, W, K, B, n and A being `chunk_frames`, `window_frames`, `sink_frames`, `memory_bank_frames`,
    `context_frames` and `attended_frames`; `forward(own, past)` in latent frames, `context` without its tail:

        chunkwise      L forward(C, W - C)                       + context(C, W - C)
        memory_bank    L forward(C, W - C + B)                   + context(C, W - C + B)
        rolling        forward(L C, K + max(0, min(A - K - L C, W - K - C)))  + context(C, min(A, W) - C)
        recompute      L forward(C, n)                           + context(c_i, c_1 + .. + c_(i-1)) for n in parts of C
        stream_batch   one forward of L rows (C, W - C);  `sequential` L forward(C, W - C)

    Beside them a full memory bank compares its B frames of D = heads * head_dim numbers with the text: 2 N B D in N
    layers.

    Raises:
        ValueError: no `window_frames`, or a sampler that is not of this package.
    """
    if rollout.window_frames is None:
        raise ValueError("without a window every chunk costs more than the last; set window_frames")
    if rollout.sampler not in _FORWARDS:
        raise ValueError(
            f"the forwards of sampler {rollout.sampler!r} are not known; known are {', '.join(_FORWARDS)}"
        )
    return _FORWARDS[rollout.sampler](rollout, steps, rollout.window_frames)


def steady_costs(
    model: Mapping[str, Any],
    rollout: RolloutConfig,
    steps: int,
    tokens_per_frame: int,
    itemsize: int,
    scale: int = 0,
    image_tokens: int = 0,
) -> dict[str, StageCosts]:
    """Of `steady_forwards`, by stage, for one branch and one video. Text and timesteps are embedded before, and so is
    an image of `image_tokens`, if one is attended to.

    Args:
        model: Config of the transformer.
        itemsize, scale: Bytes of a number in the cache, and of the scale of a token and head.
    """
    costs = {}
    for stage, forwards in steady_forwards(rollout, steps).items():
        flops = written = read = 0
        for forward in forwards:
            own, past = forward.frames * tokens_per_frame, forward.past * tokens_per_frame
            flops += flops_per_forward(
                model,
                own,
                past,
                rollout.max_sequence_length,
                forward.rows,
                text_ready=True,
                time_ready=True,
                keys_values_only=forward.keys_values_only,
                image_tokens=image_tokens,
            )
            written += kv_bytes_written(model, forward.kept * tokens_per_frame, itemsize, forward.rows, scale)
            read += kv_bytes_read(model, own + past, itemsize, forward.rows, forward.keys_values_only, scale)
        costs[stage] = StageCosts(flops, written, read)
    # A full memory bank compares each of its frames with the text, in every layer.
    compared = 2 * model["num_layers"] * rollout.memory_bank_frames * _dim(model)
    return costs | {"denoise": replace(costs["denoise"], flops=costs["denoise"].flops + compared)}


def _dim(model: Mapping[str, Any]) -> int:
    return int(model["num_attention_heads"] * model["attention_head_dim"])


def _options(rollout: RolloutConfig) -> dict[str, Any]:
    options: dict[str, Any] = SAMPLERS.load(rollout.sampler).options(rollout)
    return options


def _chunkwise(rollout: RolloutConfig, steps: int, window: int) -> StageForwards:
    chunk = rollout.chunk_frames
    context = [Forward(chunk, window - chunk, chunk, keys_values_only=True)] if rollout.clean_pass else []
    return {"denoise": [Forward(chunk, window - chunk, chunk)] * steps, "clean_pass": context}


def _memory_bank(rollout: RolloutConfig, steps: int, window: int) -> StageForwards:
    chunk = rollout.chunk_frames
    past = window - chunk + rollout.memory_bank_frames
    context = Forward(chunk, past, chunk, keys_values_only=True)
    return {"denoise": [Forward(chunk, past, chunk)] * steps, "clean_pass": [context]}


def _rolling(rollout: RolloutConfig, steps: int, window: int) -> StageForwards:
    chunk, sink = rollout.chunk_frames, rollout.sink_frames
    attended, own = _options(rollout)["attended_frames"], steps * chunk
    past = sink + max(0, min(attended - sink - own, window - sink - chunk))
    context = Forward(chunk, min(attended, window) - chunk, chunk, keys_values_only=True)
    return {"denoise": [Forward(own, past, kept=0)], "clean_pass": [context]}


def _recompute(rollout: RolloutConfig, steps: int, window: int) -> StageForwards:
    chunk, context = rollout.chunk_frames, _options(rollout)["context_frames"]
    parts = [(start, min(chunk, context - start)) for start in range(0, context, chunk)]
    return {
        "denoise": [Forward(chunk, context, chunk)] * steps,
        "clean_pass": [Forward(size, start, size, keys_values_only=True) for start, size in parts],
    }


def _stream_batch(rollout: RolloutConfig, steps: int, window: int) -> StageForwards:
    chunk, rows = rollout.chunk_frames, 1 if _options(rollout)["sequential"] else steps
    forward = Forward(chunk, window - chunk, chunk, rows)
    return {"denoise": [forward] * (steps // rows), "clean_pass": []}


_FORWARDS: dict[str, Callable[[RolloutConfig, int, int], StageForwards]] = {
    "chunkwise": _chunkwise,
    "memory_bank": _memory_bank,
    "rolling": _rolling,
    "recompute": _recompute,
    "stream_batch": _stream_batch,
}
