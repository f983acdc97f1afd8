"""Rolling Forcing: a window of chunks at rising noise."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from golden_kinds.recording import (
    Prediction,
    Recorder,
    channels_first,
    in_order,
    largest_difference,
    prompts_of,
    transformer_of,
)
from wan_autoregressive import CausalWanTransformer3DModel, SelfForcingScheduler, WanAutoregressivePipeline
from wan_autoregressive.cache.rotary import apply_rotary_emb
from wan_autoregressive.pipelines.denoiser import Denoiser

KIND = "rf"
WEIGHTS = "tiny_self_forcing.pt"

KeyValue = tuple[torch.Tensor, torch.Tensor]


def matches(name: str, meta: dict[str, Any]) -> bool:
    return str(meta.get("upstream")).startswith("TencentARC/RollingForcing")


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
    videos, schedule = channels_first(tensors), meta["schedule"]
    transformer = transformer_of(meta, weights_folder / WEIGHTS, "generator_ema")
    transformer.set_sinusoid_dtype(sinusoid_dtype)
    scheduler = SelfForcingScheduler(
        denoising_steps=schedule["denoising_step_list_arg"],
        shift=schedule["timestep_shift"],
        warp=schedule["warp_denoising_step"],
    )
    pipe = WanAutoregressivePipeline(None, None, transformer, None, scheduler)
    pipe.set_progress_bar_config(disable=True)
    arguments = {**rollout_arguments(meta, videos), **changes}
    recorder, passes = Recorder(meta["kv_layer"]), _ContextPasses(meta["kv_layer"])
    with recorder.recording(_draws(meta, videos)), passes.recording():
        latents = pipe(**arguments, output_type="latent").frames

    sigmas = dict(zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False))
    timesteps = [torch.tensor([p.timesteps] * meta["batch"]) for p in recorder.predictions]
    found = {
        "latents": largest_difference([latents], [videos["latents"]]),
        "timesteps": largest_difference(timesteps, in_order(tensors, "timestep.")),
        "x0": largest_difference([_x0(p, sigmas) for p in recorder.predictions], in_order(videos, "x0.")),
    }
    if in_order(videos, "input."):
        found["inputs"] = largest_difference([p.latents for p in recorder.predictions], in_order(videos, "input."))
    found |= _key_value_differences(meta, tensors, passes, transformer)
    if "draw_seed" in meta:
        generator = torch.Generator().manual_seed(meta["draw_seed"])
        arguments["sampler_options"] = {**arguments["sampler_options"], "reference_draws": True}
        redrawn = pipe(**arguments, output_type="latent", generator=generator).frames
        found["redrawn"] = largest_difference([redrawn], [videos["latents"]])
    return found


def rollout_arguments(meta: dict[str, Any], videos: dict[str, torch.Tensor]) -> dict[str, Any]:
    chunk = meta["num_frame_per_block"]
    return {
        "sampler": "rolling",
        "sampler_options": {"attended_frames": meta["max_attention_frames"]},
        "position_mode": "sink_relative",
        "chunk_frames": chunk,
        "window_frames": meta["kv_cache_frames"],
        "sink_frames": meta["sink_blocks"] * chunk,
        "context_noise": meta["context_noise"],
        "latents": videos["noise"],
        "prompt_embeds": prompts_of(videos, meta)[0],
    }


class _ContextPasses:
    """What the prompt's cache holds after each context pass, in order of time, and where the sink is then."""

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self.held: list[KeyValue] = []
        self.sink_starts: list[int] = []

    def recording(self) -> Any:
        cache_context = Denoiser.cache_context

        def recording_pass(denoiser: Denoiser, *args: Any) -> None:
            cache_context(denoiser, *args)
            cache = denoiser.experts[0].caches[0]
            block = cache.block_caches[self._layer]
            assert block.cached_key is not None
            assert block.cached_value is not None
            self.held.append((block.cached_key.clone(), block.cached_value.clone()))
            self.sink_starts.append(cache.positions.sink_start)  # type: ignore[attr-defined]

        return patch.object(Denoiser, "cache_context", recording_pass)


def _draws(meta: dict[str, Any], videos: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [videos[draw["name"]] for draw in sorted(meta["draws"], key=lambda draw: draw["order"])]


def _x0(prediction: Prediction, sigmas: dict[float, float]) -> torch.Tensor:
    sigma = torch.tensor([sigmas[timestep] for timestep in prediction.timesteps]).view(1, 1, -1, 1, 1)
    return prediction.latents - sigma * prediction.flow


def _key_value_differences(
    meta: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    passes: _ContextPasses,
    transformer: CausalWanTransformer3DModel,
) -> dict[str, float]:
    """The original makes a context pass in every tick. We leave out those before the first chunk is finished and the
    last one, which change nothing. It keeps the sink's keys without rotary embedding."""
    size, chunk = meta["frame_seq_length"], meta["num_frame_per_block"]
    sink = meta["sink_blocks"] * chunk * size
    first, last = meta["window_blocks"] - 1, meta["num_ticks"] - 1
    if len(passes.held) != last - first:
        return {"kv": float("inf")}

    def rotated(keys: torch.Tensor, start: int) -> torch.Tensor:
        """Un-roped keys of the first frames of the video, at the positions from `start` on."""
        frames = keys.shape[1] // size
        table = transformer.rope.at([(start, start + frames)], meta["height"] // 2, meta["width"] // 2)
        return apply_rotary_emb(keys, *table)

    written: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    whole: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for tick, held, sink_start in zip(range(first, last), passes.held, passes.sink_starts, strict=True):
        for got, of in zip(held, ("k", "v"), strict=True):
            expected = tensors[f"kv.context.t{tick:02}.{of}"]
            if of == "k" and tick == first:
                expected = rotated(expected, 0)
            written[0].append(got[:, -chunk * size :])
            written[1].append(expected)
            cached = tensors.get(f"kv.cache.context.t{tick:02}.{of}")
            if cached is not None:
                if of == "k":
                    cached = torch.cat([rotated(cached[:, :sink], sink_start), cached[:, sink:]], dim=1)
                whole[0].append(got)
                whole[1].append(cached)
    found = {"kv": largest_difference(*written)}
    if whole[1]:
        found["kv_cache"] = largest_difference(*whole)
    return found
