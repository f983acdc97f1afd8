"""MemFlow: chunk after chunk with a memory bank."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from golden_kinds.recording import (
    Recorder,
    channels_first,
    in_order,
    largest_difference,
    prompts_of,
    transformer_of,
)
from golden_kinds.self_forcing import scheduler_of
from wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.cache import memory_bank
from wan_autoregressive.pipelines.denoiser import Denoiser

KIND = "memflow"
WEIGHTS = "tiny_self_forcing.pt"


def matches(name: str, meta: dict[str, Any]) -> bool:
    return str(meta.get("upstream")).startswith("KlingTeam/MemFlow")


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
    if meta.get("SMA"):
        raise ValueError("this package does not choose among sink and bank for each head and query (SMA)")
    videos = channels_first(tensors)
    transformer = transformer_of(meta, weights_folder / WEIGHTS, "generator_ema")
    transformer.set_sinusoid_dtype(sinusoid_dtype)
    pipe = WanAutoregressivePipeline(None, None, transformer, None, scheduler_of(meta))
    starts = [0, *(meta.get("switch_frame_indices") or [])]
    prompts = dict(zip(starts, prompts_of(videos, meta, len(starts)), strict=True))
    settings = {**settings_of(meta), **changes}
    rollout = pipe.rollout(prompt_schedule=prompts, latents=videos["noise"], **settings)
    recorder, bank = Recorder(meta["kv_layer"]), _Bank(meta["kv_layer"], _chunks_with_ties(meta))
    with recorder.recording(in_order(videos, "renoise.")), bank.recording(), torch.no_grad():
        latents = torch.cat([chunk.latents for chunk in rollout], dim=2)
        rollout.sampler.cache_past()  # the original makes the last context pass, too

    sigmas = meta["schedule"]["sigmas"]
    x0 = [p.x0(sigmas[index % len(sigmas)]) for index, p in enumerate(recorder.predictions)]
    return {
        "latents": largest_difference([latents], [videos["latents"]]),
        "x0": largest_difference(x0, in_order(videos, "x0.")),
        "kv": _difference(tensors, "kv.context.", dict(enumerate(bank.windows))),
        "recache": _difference(tensors, "kv.recache.", bank.rewritten),
        "bank": _difference(tensors, "bank.context.", dict(enumerate(bank.frames))),
    }


def settings_of(meta: dict[str, Any]) -> dict[str, Any]:
    is_plain = meta.get("pipeline", "plain") == "plain"
    return {
        "sampler": "memory_bank",
        "sampler_options": {
            "bank_interval": meta["record_interval"],
            "bank_candidates": "every_chunk" if is_plain else "every_interval",
        },
        "memory_bank_frames": meta["bank_size"],
        "height": 8 * meta["height"],
        "width": 8 * meta["width"],
        "num_frames": 4 * (meta["num_output_frames"] - 1) + 1,
        "chunk_frames": meta["num_frame_per_block"],
        "window_frames": meta["local_attn_size"],
        "sink_frames": meta["sink_size"],
        "switch_policy": "recache",
        "recache_sink": "keep" if meta["global_sink"] else "refresh",
        "context_noise": meta["context_noise"],
        "output_type": "latent",
    }


def _chunks_with_ties(meta: dict[str, Any]) -> set[int]:
    """Chunks behind a new prompt before which a full bank kept the frames that came first in every layer: the original
    compares them with text keys that are still zero then."""
    size, chunk = meta["bank_size"], meta["num_frame_per_block"]
    switches = {frame // chunk for frame in meta.get("switch_frame_indices") or []}
    before, found = None, set()
    for forward in meta.get("forwards", []):
        banks = forward.get("bank_after_per_layer", before)
        if before is not None and forward["chunk"] in switches and banks != before:
            is_full = not any("empty" in bank for bank in before)
            first_stay = all(new[: size - 1] == old[: size - 1] for new, old in zip(banks, before, strict=True))
            found |= {forward["chunk"]} if is_full and first_stay else set()
        before = banks
    return found


KeyValue = tuple[torch.Tensor, torch.Tensor]


class _Bank:
    """Keys and values of window and bank after every context pass and re-cache, `(batch, tokens, heads, head_dim)`.

    Args:
        ties: Chunks before which all frames of a full bank have equally much to do with the prompt.
    """

    def __init__(self, layer: int, ties: set[int]) -> None:
        self._layer = layer
        self._ties = ties
        self.windows: list[KeyValue] = []
        self.frames: list[KeyValue | tuple[()]] = []
        self.rewritten: dict[int, KeyValue | tuple[()]] = {}
        """By the chunk that follows."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        cache_context, rewrite_context = Denoiser.cache_context, Denoiser.rewrite_context

        def recording_pass(denoiser: Denoiser, *args: Any) -> None:
            cache_context(denoiser, *args)
            self.windows.append(self._held(denoiser))
            key_values = denoiser.experts[0].caches[0].block_caches[self._layer].bank.held
            self.frames.append(() if key_values is None else (key_values[0].clone(), key_values[1].clone()))

        def recording_rewrite(denoiser: Denoiser, *args: Any, **kwargs: Any) -> None:
            rewrite_context(denoiser, *args, **kwargs)
            self.rewritten[len(self.windows)] = self._held(denoiser)

        relevance = memory_bank.relevance

        def tied_relevance(text_key: torch.Tensor, frame_keys: torch.Tensor) -> torch.Tensor:
            found = relevance(text_key, frame_keys)
            return -torch.arange(found.shape[1]).expand(found.shape) if len(self.windows) in self._ties else found

        with (
            patch.object(memory_bank, "relevance", tied_relevance),
            patch.object(Denoiser, "cache_context", recording_pass),
            patch.object(Denoiser, "rewrite_context", recording_rewrite),
        ):
            yield

    def _held(self, denoiser: Denoiser) -> KeyValue:
        block = denoiser.experts[0].caches[0].block_caches[self._layer]
        assert block.cached_key is not None
        assert block.cached_value is not None
        return block.cached_key.clone(), block.cached_value.clone()


def _difference(tensors: dict[str, torch.Tensor], prefix: str, got: Mapping[int, KeyValue | tuple[()]]) -> float:
    """Over the chunks that were recorded. A bank may have been recorded with an empty last place."""
    worst = 0.0
    for key in sorted(tensors):
        if key.startswith(prefix) and key.endswith(".k"):
            name = key.removesuffix(".k")
            chunk = int(name.rsplit(".c", 1)[1])
            if chunk not in got:
                return math.inf
            expected = [
                tensors[f"{name}.{of}"][:, : held.shape[1]] for of, held in zip("kv", got[chunk], strict=False)
            ]
            worst = max(worst, largest_difference(got[chunk], expected))
    return worst
