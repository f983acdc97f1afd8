"""Self-Forcing, and LongLive 1.0 with its prompt switch."""

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

KIND = "self_forcing"
WEIGHTS = "tiny_self_forcing.pt"


def matches(name: str, meta: dict[str, Any]) -> bool:
    upstream = str(meta.get("upstream"))
    return upstream.startswith(("guandeh17/Self-Forcing", "NVlabs/LongLive")) and "solver" not in meta["schedule"]


def differences(
    meta: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    weights_folder: Path,
    sinusoid_dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> dict[str, float]:
    """Args:
    sinusoid_dtype: float32 as diffusers, float64 as the original.
    changes: Arguments of the rollout that are to differ from the original's.
    """
    videos = channels_first(tensors)
    transformer = transformer_of(meta, weights_folder / WEIGHTS, "generator_ema")
    transformer.set_sinusoid_dtype(sinusoid_dtype)
    pipe = WanAutoregressivePipeline(None, None, transformer, None, scheduler_of(meta))
    pipe.set_progress_bar_config(disable=True)
    recorder, arguments = Recorder(meta["kv_layer"]), {**rollout_arguments(meta, videos), **changes}
    with recorder.recording(in_order(videos, "renoise")):
        latents = pipe(**arguments, output_type="latent").frames
    sigmas = dict(zip(pipe.scheduler.timesteps.tolist(), pipe.scheduler.sigmas.tolist(), strict=False))
    x0 = [prediction.x0(sigmas.get(prediction.timesteps[0], 0.0)) for prediction in recorder.predictions]
    found = {
        "latents": largest_difference([latents], [videos["latents"]]),
        "x0": largest_difference(x0, in_order(videos, "x0.")),
    }
    return found | _kv_difference(meta, tensors, recorder)


def scheduler_of(meta: dict[str, Any]) -> SelfForcingScheduler:
    schedule = meta["schedule"]
    # By keyword: diffusers takes what is passed by position for a default, and leaves it out of copies.
    return SelfForcingScheduler(
        denoising_steps=schedule["denoising_step_list_arg"],
        shift=schedule["timestep_shift"],
        warp=schedule["warp_denoising_step"],
    )


def rollout_arguments(meta: dict[str, Any], videos: dict[str, torch.Tensor]) -> dict[str, Any]:
    embeds = padded_embeds(videos, meta["text_len"])
    arguments: dict[str, Any] = {"latents": videos["noise"], "context_noise": meta["context_noise"]}
    arguments["chunk_frames"] = meta["num_frame_per_block"]
    arguments["first_chunk_frames"] = 1 if meta["independent_first_frame"] else None
    if meta["local_attn_size"] != -1:
        arguments |= {"window_frames": meta["local_attn_size"], "sink_frames": meta["sink_size"]}
    if "initial_latent" in videos:
        arguments["video_latents"] = videos["initial_latent"]
    if "switch_frame_indices" in meta:
        starts = [0, *meta["switch_frame_indices"]]
        arguments["prompt_schedule"] = {start: embeds[str(i)] for i, start in enumerate(starts)}
        arguments["recache_sink"] = "keep" if meta["global_sink"] else "refresh"
    else:
        arguments["prompt_embeds"] = embeds[""]
    return arguments


def _kv_difference(meta: dict[str, Any], tensors: dict[str, torch.Tensor], recorder: Recorder) -> dict[str, float]:
    """Our forwards are the original's without what changes nothing: the clean pass before a re-cache or at the end."""
    forwards = meta["forwards"]
    needless = [
        i
        for i, forward in enumerate(forwards)
        if forward["kind"] == "context" and (i + 1 == len(forwards) or forwards[i + 1]["kind"] == "recache")
    ]
    ours = [forward for i, forward in enumerate(forwards) if i not in needless]
    if len(recorder.key_values) != len(ours):
        return {"kv": math.inf}
    got, expected = [], []
    for forward, key_values in zip(ours, recorder.key_values, strict=True):
        if "kv_snapshot" in forward:
            got += key_values
            expected += [tensors[f"{forward['kv_snapshot']}.{of}"] for of in ("k", "v")]
    return {"kv": largest_difference(got, expected)} if expected else {}
