"""Krea Realtime: the past made anew for every chunk."""

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from golden_kinds.recording import (
    Recorder,
    channels_first,
    in_order,
    largest_difference,
    padded_embeds,
    prompts_of,
    transformer_of,
)
from wan_autoregressive import CausalWanTransformer3DModel, SelfForcingScheduler
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.components import WanComponents
from wan_autoregressive.pipelines.denoiser import Denoiser, Window
from wan_autoregressive.pipelines.prompts import PromptState
from wan_autoregressive.pipelines.rollout import WanRollout

KIND = "krea"
WEIGHTS = "tiny_self_forcing.pt"


def matches(name: str, meta: dict[str, Any]) -> bool:
    return str(meta.get("upstream")).startswith("krea-ai/realtime-video")


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
    schedules = prompt_schedules(meta, videos)
    each = [_differences_under(schedule, meta, videos, tensors, transformer, changes) for schedule in schedules]
    return min(each, key=lambda found: max(found.values()))


def _differences_under(
    schedule: dict[int, PromptState],
    meta: dict[str, Any],
    videos: dict[str, torch.Tensor],
    tensors: dict[str, torch.Tensor],
    transformer: CausalWanTransformer3DModel,
    changes: dict[str, Any],
) -> dict[str, float]:
    codec = _RecordedCodec(transformer, in_order(videos, "reencoded.") if "initial_latent" in videos else [])
    shift = meta["schedule"]["timestep_shift"]
    components = WanComponents(transformer, SelfForcingScheduler(shift=shift), codec)  # type: ignore[arg-type]
    config = RolloutConfig(**{**settings(meta, videos), **changes})
    later = {frame: prompt for frame, prompt in schedule.items() if frame}
    rollout = WanRollout(
        components,
        config,
        prompt=schedule[0],
        prompt_schedule=later,
        given_latents=videos.get("initial_latent"),
        **_noise_and_source(meta, videos),
    )
    recorder, contexts = Recorder(meta["kv_layer"]), _Contexts()
    with recorder.recording(in_order(videos, "renoise.")), contexts.recording(), torch.no_grad():
        latents = torch.cat([chunk.latents for chunk in rollout], dim=2)

    steps = len(meta["schedule"]["timesteps"])
    sigmas = meta["schedule"]["sigmas_used"]
    x0 = [prediction.x0(sigmas[i % steps]) for i, prediction in enumerate(recorder.predictions)]
    inputs = [prediction.latents for prediction in recorder.predictions[::steps]]
    first_context = [] if "initial_latent" in videos else [0]  # the first chunk has none
    found = {
        "latents": largest_difference([latents], [videos["latents"]]),
        "x0": largest_difference(x0, in_order(videos, "x0.")),
        "contexts": largest_difference(contexts.latents, in_order(videos, "context.")),
        "kv": _key_value_difference(tensors, recorder, first_context + contexts.forwards, steps),
    }
    if in_order(videos, "chunk_input."):
        found["inputs"] = largest_difference(inputs, in_order(videos, "chunk_input."))
    if in_order(videos, "reencoded."):
        found["reencoded"] = largest_difference(codec.encoded, in_order(videos, "reencoded."))
    return found


def settings(meta: dict[str, Any], videos: dict[str, torch.Tensor]) -> dict[str, Any]:
    chunk, context, steps = meta["num_frame_per_block"], meta["kv_cache_num_frames"], meta["num_denoising_steps"]
    return {
        "sampler": "recompute",
        "sampler_options": {"context_frames": context, "keep_first_frame": bool(meta.get("keep_first_frame"))},
        "height": 8 * meta["height"],
        "width": 8 * meta["width"],
        "num_frames": 4 * (videos["latents"].shape[2] - 1) + 1,
        "chunk_frames": chunk,
        "window_frames": context + chunk,
        "switch_policy": "cross_attention",
        "context_noise": meta.get("context_noise", 0),
        # With a source the list only tells how many steps there are.
        "denoising_steps": torch.linspace(1000, 0, steps).int().tolist(),
        "strength": meta["strength"] if _is_from_source(videos) else None,
        "output_type": "latent",
    }


def prompt_schedules(meta: dict[str, Any], videos: dict[str, torch.Tensor]) -> list[dict[int, PromptState]]:
    """Embeddings by latent frame. A new prompt comes in over k chunks with weights linspace(0, 1, k); one schedule for
    each k that what was recorded of it may mean.

    Raises:
        ValueError: a change whose chunk or prompt is not to be found.
    """
    chunk, changes = meta["num_frame_per_block"], prompt_changes(meta)
    given = videos["initial_latent"].shape[2] if "initial_latent" in videos else 0
    named = padded_embeds(videos, meta["text_len"])
    if all(re.fullmatch(r"c\d+", name) for name in named):  # of every chunk from which on there are others
        numbers = {int(name[1:]): prompt for name, prompt in named.items()}
        return [{given * (n > 0) + chunk * n: PromptState(prompt, None) for n, prompt in numbers.items()}]
    embeds = prompts_of(videos, meta, 1 + len(changes))
    schedules = []
    for counts in itertools.product(*(change.counts for change in changes)):
        schedule = {0: embeds[0]}
        for change, count, new in zip(changes, counts, embeds[1:], strict=True):
            start = given + change.chunk * chunk
            schedule = {frame: prompt for frame, prompt in schedule.items() if frame < max(start, 1)}
            old = schedule[max(schedule)]
            for place, weight in enumerate(torch.linspace(0, 1, count).tolist()):
                schedule[start + place * chunk] = torch.lerp(old, new, weight)
        schedules.append({f: PromptState(e, None) for f, e in schedule.items() if f < videos["latents"].shape[2]})
    return schedules


@dataclass(frozen=True)
class PromptChange:
    chunk: int
    """From which on the embeddings change."""
    counts: tuple[int, ...]
    """Of the chunks that it takes, what there may be; the server's own default is 4."""


DEFAULT_COUNT = 4


def prompt_changes(meta: dict[str, Any]) -> list[PromptChange]:
    """In order of time. The readme does not say how they are recorded, so everything that says it is understood: a
    dict by the chunk, or a list of dicts or of lists that begin with it.

    Raises:
        ValueError: for anything else.
    """
    recorded = meta.get("prompt_switches") or {}
    if isinstance(recorded, dict):
        entries = [(int(re.findall(r"\d+", key)[0]), value) for key, value in recorded.items()]
    elif all(isinstance(entry, list) for entry in recorded):
        entries = [(entry[0], entry[1:]) for entry in recorded]
    else:
        entries = [(_chunk_of(entry), entry) for entry in recorded]
    return [PromptChange(chunk, _counts(change)) for chunk, change in sorted(entries, key=lambda entry: entry[0])]


def _chunk_of(change: dict[str, Any]) -> int:
    for word in ("chunk", "at_chunk", "start_chunk", "chunk_index", "block", "at", "start"):
        if isinstance(change.get(word), int):
            return int(change[word])
    raise ValueError(f"this kind does not find the chunk in the prompt change {change!r}")


def _counts(change: Any) -> tuple[int, ...]:
    """Chunks that a prompt change may take: numbers under a word for it, then all others that are there."""
    entries = change if isinstance(change, dict) else dict(enumerate(change if isinstance(change, list) else [change]))
    numbers = {str(key).lower(): value for key, value in entries.items() if type(value) is int and value > 0}
    told = [n for key, n in numbers.items() if any(word in key for word in ("step", "interp", "blend", "chunks"))]
    return tuple(dict.fromkeys([*told, *reversed(numbers.values()), DEFAULT_COUNT]))


def _is_from_source(videos: dict[str, torch.Tensor]) -> bool:
    return any(key.startswith(("video_latents", "v2v_noise")) for key in videos)


def _noise_and_source(meta: dict[str, Any], videos: dict[str, torch.Tensor]) -> dict[str, Any]:
    given = videos["initial_latent"].shape[2] if "initial_latent" in videos else 0
    generated = videos["latents"].shape[2] - given
    if not _is_from_source(videos):
        return {"latents": videos["noise"][:, :, : given + generated][:, :, -generated:]}
    noise = torch.cat(in_order(videos, "v2v_noise"), dim=2)[:, :, :generated]
    recorded = in_order(videos, "video_latents")
    if recorded:
        return {"latents": noise, "source": _RecordedSource(torch.cat(recorded, dim=2))}
    # Of a camera only what chunks started from is recorded.
    sigma, started = meta["schedule"]["sigmas_used"][0], in_order(videos, "chunk_input.")
    mixed = torch.cat(started, dim=2) if started else videos["noise"][:, :, :generated]
    return {"latents": noise, "source": _RecordedSource((mixed - sigma * noise) / max(1 - sigma, 1e-9))}


class _RecordedSource:
    def __init__(self, latents: torch.Tensor) -> None:
        self._left = latents

    def next_latents(self, num_frames: int) -> torch.Tensor:
        taken, self._left = self._left[:, :, :num_frames], self._left[:, :, num_frames:]
        return taken


class _Contexts:
    """Latents of every context, and how many forwards made it."""

    def __init__(self) -> None:
        self.latents: list[torch.Tensor] = []
        self.forwards: list[int] = []

    def recording(self) -> Any:
        cache_context = Denoiser.cache_context

        def recording_pass(denoiser: Denoiser, latents: torch.Tensor, window: Window, *args: Any) -> None:
            cache_context(denoiser, latents, window, *args)
            if window.frames.start == 0:
                self.latents.append(latents)
                self.forwards.append(1)
            else:
                self.latents[-1] = torch.cat([self.latents[-1], latents], dim=2)
                self.forwards[-1] += 1

        return patch.object(Denoiser, "cache_context", recording_pass)


class _RecordedCodec:
    """The stand-in for the VAE that the original was recorded with: colours are latent channels, brighter with every
    pixel frame of a latent.

    Args:
        recorded: What encoding gives, one after the other, instead of what it would; for a video whose start the
            original did not decode.
    """

    latent_channels = 16
    scale_factor_spatial = 8
    scale_factor_temporal = 4

    def __init__(self, vae: torch.nn.Module, recorded: list[torch.Tensor]) -> None:
        self.vae = vae
        self._recorded = iter(recorded)
        self._is_started = False
        self.encoded: list[torch.Tensor] = []

    def decoder(self, parking_device: Any = None) -> "_RecordedCodec":
        return self

    encoder = decoder

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        colours = latents[:, :3].repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)
        frames = []
        for latent in colours.split(1, dim=2):
            frames += [latent * (1 + 0.1 * i) for i in range(4 if self._is_started else 1)]
            self._is_started = True
        return torch.cat(frames, dim=2)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        colours = F.avg_pool2d(pixels[:, :, 0], 8)
        channels = [colours[:, c % 3] * (0.5 + 0.05 * c) - 0.1 for c in range(16)]
        self.encoded.append(next(self._recorded, torch.stack(channels, dim=1).unsqueeze(2)))
        return self.encoded[-1]


def _key_value_difference(
    tensors: dict[str, torch.Tensor], recorder: Recorder, context_forwards: list[int], steps: int
) -> float:
    got, expected = [], []
    call = 0
    for chunk, passes in enumerate(context_forwards):
        call += passes
        places = {f"kv.recompute.c{chunk:02}": call - 1}
        places |= {f"kv.denoise.c{chunk:02}.s{step}": call + step for step in range(steps)}
        call += steps
        for name, place in places.items():
            if f"{name}.k" in tensors:
                got += recorder.key_values[place]
                expected += [tensors[f"{name}.k"], tensors[f"{name}.v"]]
    if call != len(recorder.key_values):
        return math.inf
    return largest_difference(got, expected)
