"""LongLive 2.0: Wan2.2-TI2V-5B with UniPC, scene cuts and given frames."""

import math
from pathlib import Path
from typing import Any

import torch

from golden_kinds.recording import (
    Recorder,
    channels_first,
    in_order,
    largest_difference,
    padded_embeds,
    transformer_of,
)
from wan_autoregressive import SelfForcingScheduler, WanAutoregressivePipeline
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.prompts import PromptState
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.pipelines.switching import Past

KIND = "ll2"
WEIGHTS = "tiny_wan22.pt"
CUT_WORDS = "The scene transitions. "


def matches(name: str, meta: dict[str, Any]) -> bool:
    return str(meta.get("upstream")).startswith("NVlabs/LongLive") and "solver" in meta["schedule"]


def differences(
    meta: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    weights_folder: Path,
    sinusoid_dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> dict[str, float]:
    """Args:
    sinusoid_dtype: float32 as diffusers, float64 as the original.
    changes: Settings of the rollout that are to differ from the original's.
    """
    videos = channels_first(tensors)
    transformer = transformer_of(meta, weights_folder / WEIGHTS, "generator")
    transformer.set_sinusoid_dtype(sinusoid_dtype)
    scheduler = SelfForcingScheduler(shift=meta["schedule"]["timestep_shift"])
    pipe = WanAutoregressivePipeline(None, None, transformer, None, scheduler)
    rollout = new_rollout(pipe, meta, videos, {**settings_of(meta, videos), **changes})
    recorder = Recorder(meta["kv_layer"])
    with recorder.recording(), torch.no_grad():
        chunks = list(rollout)
        # The clean pass of the last chunk, which a rollout has no use for.
        sampler = rollout.sampler
        past = Past(rollout.config, rollout.denoiser, rollout.history, sampler.recache_window, rollout.frames_done)
        rollout.switching.policy.cache_past(past, sampler.cache_past)
    latents = torch.cat([chunk.latents for chunk in chunks], dim=2)

    sigmas = meta["schedule"]["sigmas"]
    steps = len(sigmas) - 1
    names = [f"c{index // steps:02}.s{index % steps}" for index in range(len(recorder.predictions))]
    found = {
        "latents": largest_difference([latents], [videos["latents"]]),
        "x0": largest_difference(
            [prediction.x0(sigmas[index % steps]) for index, prediction in enumerate(recorder.predictions)],
            in_order(videos, "x0."),
        ),
    }
    inputs = {f"input.{name}": p.latents for name, p in zip(names, recorder.predictions, strict=True)}
    recorded = [key for key in sorted(videos) if key.startswith("input.")]
    if recorded:
        found["inputs"] = largest_difference([inputs[key] for key in recorded], [videos[key] for key in recorded])
    return found | _kv_difference(meta, tensors, recorder)


def settings_of(meta: dict[str, Any], videos: dict[str, torch.Tensor]) -> dict[str, Any]:
    frames, height, width = videos["latents"].shape[2:]
    settings = {
        "height": 16 * height,
        "width": 16 * width,
        "num_frames": 4 * (frames - 1) + 1,
        "chunk_frames": meta["num_frame_per_block"],
        "first_chunk_frames": 1 if meta["independent_first_frame"] and "initial_latent" not in videos else None,
        "window_frames": meta["local_attn_size"],
        "sink_frames": meta["sink_size"],
        "given_in_chunk": meta["independent_first_frame"],
        "solver": "unipc",
        "num_inference_steps": meta["schedule"]["steps"],
        "guidance_scale": meta["guidance_scale"],
        "context_noise": meta["context_noise"],
        "position_mode": "relative" if meta["use_relative_rope"] else "absolute",
        "switch_policy": "cross_attention",
        "output_type": "latent",
    }
    if meta["scene_cut_chunks"]:
        options = {
            "position_offset": meta["multi_shot_rope_offset"],
            "pin": meta["multi_shot_sink"],
            "clean_recache": meta["shot_clean_recache"],
            "words": CUT_WORDS,
        }
        settings |= {"switch_policy": "scene_cut", "switch_options": options}
    return settings


def new_rollout(
    pipe: WanAutoregressivePipeline, meta: dict[str, Any], videos: dict[str, torch.Tensor], settings: dict[str, Any]
) -> WanRollout:
    """With prompts that are words and recorded embeddings at once, which a pipeline has only with a text encoder."""
    embeds = padded_embeds(videos, meta["text_len"])
    given = videos.get("initial_latent")
    components, config = pipe.wan_components(), RolloutConfig(**settings)
    grid = components.frame_grid(config, 0 if given is None else given.shape[2])
    schedule, known = {}, None
    generated = [chunk for chunk in grid if not chunk.given]
    for index, chunk in enumerate(generated):
        names = [prompts[index] for prompts in meta["prompt_of_chunk"]]
        is_cut = index in meta["scene_cut_chunks"]
        if names != known or is_cut:
            text = [CUT_WORDS + name if is_cut else name for name in names]
            schedule[chunk.start if index else 0] = PromptState(torch.cat([embeds[name] for name in names]), text)
        known = names
    negative = meta["negative_prompt"]
    return WanRollout(
        components,
        config,
        prompt=schedule.pop(0),
        negative_prompt_embeds=None if negative is None else embeds[negative].expand(meta["batch"], -1, -1),
        prompt_schedule=schedule,
        latents=videos["noise"],
        given_latents=given,
    )


def _kv_difference(meta: dict[str, Any], tensors: dict[str, torch.Tensor], recorder: Recorder) -> dict[str, float]:
    forwards = [forward for forward in meta["forwards"] if forward["branch"] == "cond"]
    if len(recorder.key_values) != len(forwards):
        return {"kv": math.inf}
    got, expected = [], []
    for forward, key_values in zip(forwards, recorder.key_values, strict=True):
        for of, held in zip(("k", "v"), key_values, strict=True):
            if forward.get("kv_snapshot"):
                got.append(held[:, -forward["num_frames"] * meta["frame_seq_length"] :])
                expected.append(tensors[f"{forward['kv_snapshot']}.{of}"])
            if forward.get("kv_cache_snapshot"):
                got.append(held)
                expected.append(tensors[f"{forward['kv_cache_snapshot']}.{of}"])
    return {"kv": largest_difference(got, expected)} if expected else {}
