"""StreamDiffusionV2: a cache for each denoising step.

The original runs its lanes as one batch, also those that have nothing to do yet, on zeros, and those that have nothing
to do any more, on noise. Here only lanes with a chunk run; they are compared with their row of the batch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from golden_kinds.recording import (
    Recorder,
    channels_first,
    in_order,
    largest_difference,
    padded_embeds,
    transformer_of,
)
from wan_autoregressive import SelfForcingScheduler
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.components import WanComponents
from wan_autoregressive.pipelines.denoiser import Denoiser, Window
from wan_autoregressive.pipelines.prompts import PromptState
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.pipelines.source_video import SourceFrames

KIND = "sdv2"
WEIGHTS = "tiny_self_forcing.pt"


def matches(name: str, meta: dict[str, Any]) -> bool:
    return str(meta.get("upstream")).startswith("chenfengxu714/StreamDiffusionV2")


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
    if meta["adapt_sink_threshold"] > -1 or meta["mode"] != "offline" or meta["batch"] != 1:
        raise ValueError("an adaptive sink, a session and more than one video are not done here")
    videos = channels_first(tensors)
    transformer = transformer_of(meta, weights_folder / WEIGHTS, "generator_ema")
    transformer.set_sinusoid_dtype(sinusoid_dtype)
    scheduler = SelfForcingScheduler(
        denoising_steps=meta["denoising_steps"], shift=meta["schedule"]["shift"], warp=False
    )
    rollout = WanRollout(
        WanComponents(transformer, scheduler),
        RolloutConfig(**{**settings(meta), **changes}),
        prompt=PromptState(padded_embeds(videos, meta["text_len"])[""], None),
        latents=torch.cat([videos["noise.prepare"], *in_order(videos, "noise.call")], dim=2),
        source=_RecordedSource(videos["video_latents"], tensors["frames"].transpose(1, 2)),
    )
    forwards = _forwards(meta)
    recorder, lanes = Recorder(meta["kv_layer"]), _LaneCaches(meta["kv_layer"])
    with recorder.recording(_draws(meta, videos, forwards)), lanes.recording(), torch.no_grad():
        latents = torch.cat([chunk.latents for chunk in rollout], dim=2)

    sigmas = dict(zip(meta["schedule"]["timesteps"], meta["schedule"]["sigmas"], strict=True))
    predictions = recorder.predictions
    return {
        "latents": largest_difference([latents], [videos["latents"]]),
        "timesteps": largest_difference(
            [torch.tensor(prediction.timesteps) for prediction in predictions],
            [torch.tensor([forward.timestep]) for forward in forwards],
        ),
        "x0": largest_difference(
            # A timestep that the original did not use has the sigma of none.
            [p.x0(sigmas.get(p.timesteps[0], float("nan"))) for p in predictions],
            [forward.row(videos, "x0") for forward in forwards],
        ),
        "inputs": largest_difference(
            [prediction.latents for prediction in predictions], [forward.row(videos, "input") for forward in forwards]
        ),
        "kv": lanes.difference(tensors, forwards, meta["frame_seq_length"]),
    }


def settings(meta: dict[str, Any]) -> dict[str, Any]:
    return {
        "sampler": "stream_batch",
        "height": 8 * meta["height"],
        "width": 8 * meta["width"],
        "num_frames": 4 * (meta["num_output_frames"] - 1) + 1,
        "first_chunk_frames": 1 + meta["num_frame_per_block"],
        "chunk_frames": meta["num_frame_per_block"],
        "window_frames": meta["num_kv_cache"],
        "sink_frames": meta["num_sink_tokens"],
        "strength": meta["noise_scale"],
        "switch_policy": "cross_attention",
        "output_type": "latent",
    }


@dataclass
class _Forward:
    """What the original did in one lane of a call."""

    call: int
    lane: int
    timestep: float
    attended: list[int]
    """The video's frame in each slot of the cache."""

    def row(self, videos: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
        return videos[f"{kind}.call{self.call:03}"][self.lane : self.lane + 1]


def _forwards(meta: dict[str, Any]) -> list[_Forward]:
    """Those of the video's chunks, in our order: of a call the oldest chunk, in the last lane, comes first."""
    found = []
    for call in meta["calls"]:
        for lane in reversed(call["lanes"]):
            if not lane["warmup"] and lane["video_frames"][0] < meta["num_output_frames"]:
                slots = [frame for frame, _, _ in lane["attended"]]
                found.append(_Forward(call["call"], lane["lane"], lane["timestep"], slots))
    return found


def _draws(meta: dict[str, Any], videos: dict[str, torch.Tensor], forwards: list[_Forward]) -> list[torch.Tensor]:
    """Of noise between steps; the last lane draws none."""
    steps = len(meta["denoising_steps"])
    first = in_order(videos, "renoise.prepare.")
    streamed = [f for f in forwards if f.call >= steps and f.lane < steps - 1]
    return first + [videos[f"renoise.call{forward.call:03}.lane{forward.lane}"] for forward in streamed]


class _RecordedSource:
    def __init__(self, latents: torch.Tensor, pixels: torch.Tensor) -> None:
        self._latents = latents
        self._pixels = pixels

    def next_frames(self, num_frames: int, normalized: bool) -> SourceFrames:
        left = self._latents.shape[2]
        num_pixels = self._pixels.shape[2] - 4 * (left - num_frames)
        taken = SourceFrames(self._latents[:, :, :num_frames], self._pixels[:, :, :num_pixels])
        self._latents, self._pixels = self._latents[:, :, num_frames:], self._pixels[:, :, num_pixels:]
        return taken


class _LaneCaches:
    """What the cache of a lane holds after each of its forwards, in order of time."""

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def recording(self) -> Any:
        predict = Denoiser.predict

        def recording_predict(
            denoiser: Denoiser, latents: torch.Tensor, window: Window, lane: int = 0
        ) -> torch.Tensor:
            flow = predict(denoiser, latents, window, lane)
            block = denoiser.lanes[lane].caches[0].block_caches[self._layer]
            assert block.cached_key is not None
            assert block.cached_value is not None
            self._held.append((block.cached_key.clone(), block.cached_value.clone()))
            return flow

        return patch.object(Denoiser, "predict", recording_predict)

    def difference(self, tensors: dict[str, torch.Tensor], forwards: list[_Forward], frame_tokens: int) -> float:
        got, expected = [], []
        for held, forward in zip(self._held, forwards, strict=True):
            slots = sorted(range(len(forward.attended)), key=lambda slot: forward.attended[slot])
            for ours, of in zip(held, ("k", "v"), strict=True):
                name = f"kv.call{forward.call:03}.{of}"
                if name in tensors:
                    frames = tensors[name][forward.lane : forward.lane + 1].split(frame_tokens, dim=1)
                    got.append(ours)
                    expected.append(torch.cat([frames[slot] for slot in slots], dim=1))
        return largest_difference(got, expected)
