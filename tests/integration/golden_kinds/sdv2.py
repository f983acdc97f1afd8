"""StreamDiffusionV2: a cache for each denoising step, or one for all of them.

The original also runs lanes that have nothing to do yet, on zeros, as we do where an adaptive sink looks at them, and
those that have nothing to do any more, on noise. Lanes that run are compared with their row of the batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from wan_autoregressive import SelfForcingScheduler, WanKVCache
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.components import WanComponents
from wan_autoregressive.pipelines.denoiser import Denoiser, Window
from wan_autoregressive.pipelines.prompts import PromptState
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.pipelines.source_video import SourceEndedError, SourceFrames

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
    videos = channels_first(tensors)
    transformer = transformer_of(meta, weights_folder / WEIGHTS, "generator_ema")
    transformer.set_sinusoid_dtype(sinusoid_dtype)
    scheduler = SelfForcingScheduler(
        denoising_steps=meta["denoising_steps"], shift=meta["schedule"]["shift"], warp=False
    )
    rollout = WanRollout(
        WanComponents(transformer, scheduler),
        RolloutConfig(**{**settings(meta, videos), **changes}),
        prompt=PromptState(prompts_of(videos, meta)[0], None),
        latents=torch.cat([videos["noise.prepare"], *_streamed_noise(videos)], dim=2),
        source=_RecordedSource(videos["video_latents"], tensors["frames"].transpose(1, 2)),
    )
    forwards = _forwards(meta, videos)
    recorder, lanes = Recorder(meta["kv_layer"]), _LaneRecorder(meta["kv_layer"])
    expected = videos["latents"]
    with recorder.recording(_draws(meta, videos, forwards)), lanes.recording(), torch.no_grad():
        latents = rollout.step().latents
        while latents.shape[2] < expected.shape[2]:  # a session ends with chunks in the lanes
            latents = torch.cat([latents, rollout.step().latents], dim=2)

    sigmas = dict(zip(meta["schedule"]["timesteps"], meta["schedule"]["sigmas"], strict=True))
    predictions = lanes.predictions
    return {
        "latents": largest_difference([latents], [expected]),
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
        "kv": lanes.difference(tensors, forwards),
    }


def settings(meta: dict[str, Any], videos: dict[str, torch.Tensor]) -> dict[str, Any]:
    chunk, first = _chunk_frames(meta, videos), videos["noise.prepare"].shape[2]
    options: dict[str, Any] = {"sequential": _is_sequential(meta)}
    if _is_adaptive(meta):
        options["adaptive_sink"] = meta["adapt_sink_threshold"]
    restart = meta.get("t_refresh")
    if restart is not None and restart < videos["video_latents"].shape[2]:
        options["restart_positions"] = restart
    return {
        "sampler": "stream_batch",
        "sampler_options": options,
        "height": 8 * meta["height"],
        "width": 8 * meta["width"],
        "first_chunk_frames": first,
        "chunk_frames": chunk,
        "window_frames": meta["num_kv_cache"],
        # The slots that are written twice before the first frame is evicted, which no other sink gives up.
        "sink_frames": max(meta["num_sink_tokens"], 2 * first - 1) if chunk == 1 else meta["num_sink_tokens"],
        "strength": meta["noise_scale"],
        "switch_policy": "cross_attention",
        "output_type": "latent",
    }


def _is_adaptive(meta: dict[str, Any]) -> bool:
    return meta.get("adapt_sink_threshold", -1) > -1 and meta["num_frame_per_block"] == 1 and not _is_sequential(meta)


def _chunk_frames(meta: dict[str, Any], videos: dict[str, torch.Tensor]) -> int:
    """Of what enters in a call, which in a session may be more than a block."""
    return next((noise.shape[2] for noise in _streamed_noise(videos)), meta["num_frame_per_block"])


def _is_sequential(meta: dict[str, Any]) -> bool:
    """Whether the original ran without lanes."""
    return len(meta["denoising_steps"]) > 1 and all(len(call["lanes"]) == 1 for call in meta["calls"])


@dataclass
class _Forward:
    """What the original did in one lane of a call."""

    call: int
    lane: int | None
    """`None` if there is no other."""
    timestep: float

    def row(self, tensors: dict[str, torch.Tensor], kind: str, of: str = "") -> torch.Tensor:
        tensor = tensors[f"{kind}.call{self.call:03}{of}"]
        return tensor if self.lane is None else tensor[self.lane : self.lane + 1]


def _forwards(meta: dict[str, Any], videos: dict[str, torch.Tensor]) -> list[_Forward]:
    """Those that we make as well, lane after lane; behind the clip come chunks that nobody sees."""
    found = []
    for call in meta["calls"]:
        for lane in call["lanes"]:
            is_seen = (
                _is_adaptive(meta)
                if lane.get("warmup")
                else lane["video_frames"][0] < videos["video_latents"].shape[2]
            )
            if is_seen:
                number = None if len(call["lanes"]) == 1 else lane["lane"]
                found.append(_Forward(call["call"], number, lane["timestep"]))
    return found


def _streamed_noise(videos: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Of the chunks behind the first one, recorded by the call or by the chunk."""
    return [tensor for key, tensor in sorted(videos.items()) if key.startswith("noise.") and "prepare" not in key]


def _draws(meta: dict[str, Any], videos: dict[str, torch.Tensor], forwards: list[_Forward]) -> list[torch.Tensor]:
    """Of noise between steps, in our order: of a call the oldest chunk, in the last lane, comes first. The last step
    of a chunk draws none."""
    steps, draws = len(meta["denoising_steps"]), in_order(videos, "renoise.prepare.")
    streamed = [forward for forward in forwards if forward.call >= steps]
    for forward in sorted(streamed, key=lambda forward: (forward.call, -(forward.lane or 0))):
        own = "" if forward.lane is None else f".lane{forward.lane}"
        draws += in_order(videos, f"renoise.call{forward.call:03}{own}")
    return draws


class _RecordedSource:
    def __init__(self, latents: torch.Tensor, pixels: torch.Tensor) -> None:
        self._latents = latents
        self._pixels = pixels

    def next_frames(self, num_frames: int, normalized: bool) -> SourceFrames:
        left = self._latents.shape[2]
        if left == 0:
            raise SourceEndedError("the recording ends here")
        num_pixels = self._pixels.shape[2] - 4 * (left - num_frames)
        taken = SourceFrames(self._latents[:, :, :num_frames], self._pixels[:, :, :num_pixels])
        self._latents, self._pixels = self._latents[:, :, num_frames:], self._pixels[:, :, num_pixels:]
        return taken


class _LaneRecorder:
    """What a lane predicts, and what its cache then holds, slot by slot: forward after forward, lane after lane."""

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self.predictions: list[Prediction] = []
        self._held: list[list[torch.Tensor]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        predict, predict_lanes = Denoiser.predict, Denoiser.predict_lanes

        def recording_predict(denoiser: Denoiser, latents: torch.Tensor, window: Window) -> torch.Tensor:
            flow = predict(denoiser, latents, window)
            self._record(latents, window, flow, denoiser.experts[0].caches[0])
            return flow

        def recording_lanes(
            denoiser: Denoiser, latents: Sequence[torch.Tensor], windows: Sequence[Window], first_lane: int
        ) -> list[torch.Tensor]:
            flows = predict_lanes(denoiser, latents, windows, first_lane)
            caches = denoiser.experts[0].lanes[0].lanes[first_lane:]
            for of_lane in zip(latents, windows, flows, caches, strict=False):  # the last lanes may have nothing to do
                self._record(*of_lane)
            return flows

        with (
            patch.object(Denoiser, "predict", recording_predict),
            patch.object(Denoiser, "predict_lanes", recording_lanes),
        ):
            yield

    def _record(self, latents: torch.Tensor, window: Window, flow: torch.Tensor, cache: WanKVCache) -> None:
        self.predictions.append(Prediction(window.timesteps, latents.clone(), flow.clone()))
        block = cache.block_caches[self._layer].state_dict()
        self._held.append([block["key"].clone(), block["value"].clone()])

    def difference(self, tensors: dict[str, torch.Tensor], forwards: list[_Forward]) -> float:
        got, expected = [], []
        for held, forward in zip(self._held, forwards, strict=True):
            for ours, of in zip(held, (".k", ".v"), strict=True):
                if f"kv.call{forward.call:03}{of}" in tensors:
                    got.append(ours)
                    expected.append(forward.row(tensors, "kv", of)[:, : ours.shape[1]])
        return largest_difference(got, expected)
