"""Whole videos over several ranks: what is run on each of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from wan_autoregressive import WanAutoregressivePipeline, demo_checkpoint
from wan_autoregressive.pipelines.parallel_rollout import parallel_rollouts

PROMPT, OTHER = "a red circle moving right on a navy background", "a green square moving up on a black background"
SIZE = {"height": 32, "width": 32, "num_inference_steps": 2}
WINDOW = {"num_frames": 57, "window_frames": 7, "sink_frames": 2}  # 15 latent frames
TEXT_ONLY = {"switch_policy": "cross_attention"}
SWITCH = {**WINDOW, "prompt_schedule": {6: OTHER}}


def source() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (49, 32, 32, 3), dtype=np.uint8))


VIDEOS: dict[str, dict[str, Any]] = {
    "absolute": WINDOW,
    "relative": {**WINDOW, "position_mode": "relative"},
    "sink_relative": {**WINDOW, "position_mode": "sink_relative"},
    "moving average sink": {**WINDOW, "position_mode": "relative", "sink_update": "moving_average"},
    "int8, sink_relative": {**WINDOW, "position_mode": "sink_relative", "kv_dtype": "int8"},
    "guidance": {**WINDOW, "guidance_scale": 2.0, "negative_prompt": "gray"},
    "recache": SWITCH,
    "cross_attention": {**SWITCH, **TEXT_ONLY},
    "cut": {**SWITCH, "switch_policy": "cut", "position_mode": "relative"},
    "blend": {**SWITCH, "switch_policy": "blend"},
    "flush": {**SWITCH, "switch_policy": "flush"},
    "chunks of 1": {**WINDOW, "chunk_frames": 1},
    "no window": {"num_frames": 33},
    "given frames": {**WINDOW, "video": source()[:9]},
    "video to video": {"window_frames": 7, "video": source(), "strength": 0.7},
    "rolling": {**WINDOW, "sampler": "rolling", "sink_frames": 3, "position_mode": "sink_relative"},
    "recompute": {**TEXT_ONLY, "num_frames": 45, "sampler": "recompute", "window_frames": 6},
    "memory_bank": {**WINDOW, "sampler": "memory_bank", "memory_bank_frames": 2},
    "stream_batch": {**WINDOW, **TEXT_ONLY, "sampler": "stream_batch"},
    "stream_batch, video to video": {
        **{**TEXT_ONLY, "sampler": "stream_batch", "window_frames": 7, "video": source(), "strength": 0.7}
    },
}


def start(pipe: WanAutoregressivePipeline, **options: Any) -> Any:
    return pipe.rollout(**{"prompt": PROMPT, **SIZE, "generator": generator(), "output_type": "uint8", **options})


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def demo() -> WanAutoregressivePipeline:
    pipe = WanAutoregressivePipeline.from_pretrained(demo_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made(rollout: Any, **chunks: Any) -> dict[str, Any]:
    """All chunks to come."""
    found = list(rollout.chunks(**chunks))
    return {
        "latents": torch.cat([chunk.latents for chunk in found], dim=2),
        "frames": np.concatenate([chunk.frames for chunk in found], axis=1),
        "cache_bytes": rollout.cache.allocated_bytes,
        "steps": rollout.steps_done,
    }


def videos(names: list[str], pipe: WanAutoregressivePipeline | None = None) -> dict[str, dict[str, Any]]:
    pipe = pipe or demo()
    return {name: made(start(pipe, **VIDEOS[name])) for name in names}


def video_launch(names: list[str], folder: Path) -> dict[str, Any]:
    """What rank 0 found; of the others, the latents that they ended with."""
    pipe = demo()
    with parallel_rollouts(pipe, timeout_s=20) as leads:
        if leads:
            return videos(names, pipe)
    return {}
