"""What our code computes at the places where the originals were recorded, and how far apart the two are."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from wan_autoregressive import CausalWanTransformer3DModel, WanKVCache
from wan_autoregressive.models.conversion import convert_wan_state_dict
from wan_autoregressive.pipelines.denoiser import Denoiser, Window
from wan_autoregressive.schedulers import self_forcing_scheduler


@dataclass
class Prediction:
    """One denoising step of the transformer."""

    timesteps: tuple[float, ...]
    latents: torch.Tensor
    """Its input, `(batch, channels, frames, height, width)`."""
    flow: torch.Tensor
    """With guidance the combined one."""

    def x0(self, sigma: float) -> torch.Tensor:
        return self.latents - sigma * self.flow


@dataclass
class Recorder:
    """Everything that is computed inside of `recording`, in order.

    Args:
        layer: Whose keys and values are kept.
    """

    layer: int

    def __post_init__(self) -> None:
        self.predictions: list[Prediction] = []
        self.key_values: list[tuple[torch.Tensor, torch.Tensor]] = []
        """All that the prompt's cache holds after each forward, in order of time, `(batch, tokens, heads, head_dim)`.
        """

    @contextmanager
    def recording(self, draws: Sequence[torch.Tensor] = ()) -> Iterator[None]:
        """Record, and let the scheduler draw these gaussians `(batch, channels, frames, height, width)`, frame after
        frame. Raises `ValueError` if it does not draw just as many."""
        predict, end_forward, caches = Denoiser.predict, WanKVCache.end_forward, []
        frames = [frame for draw in draws for frame in draw.split(1, dim=2)]

        def recorded_draw(shape: tuple[int, ...], **_: Any) -> torch.Tensor:
            if shape[2] > len(frames):
                raise ValueError("more noise was drawn than in the original")
            drawn = torch.cat(frames[: shape[2]], dim=2)
            del frames[: shape[2]]
            return drawn

        def recording_predict(denoiser: Denoiser, latents: torch.Tensor, window: Window) -> torch.Tensor:
            flow = predict(denoiser, latents, window)
            self.predictions.append(Prediction(window.timesteps, latents.clone(), flow.clone()))
            return flow

        def recording_end(cache: WanKVCache) -> None:
            end_forward(cache)
            caches.append(cache)
            if cache is caches[0] and cache.num_tokens:  # with guidance the negative prompt's cache comes second
                block = cache.block_caches[self.layer]
                assert block.cached_key is not None
                assert block.cached_value is not None
                self.key_values.append((block.cached_key.clone(), block.cached_value.clone()))

        with (
            patch.object(Denoiser, "predict", recording_predict),
            patch.object(WanKVCache, "end_forward", recording_end),
            patch.object(self_forcing_scheduler, "randn_tensor", recorded_draw),
        ):
            yield
        if frames:
            raise ValueError(f"the original drew {len(frames)} frames of noise more")


def largest_difference(got: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> float:
    """Over all tensors; `inf` for another count, another shape or anything that is not finite."""
    got, expected = list(got), list(expected)
    if [tensor.shape for tensor in got] != [tensor.shape for tensor in expected]:
        return math.inf
    pairs = zip(got, expected, strict=True)
    worst = max((float((a.double() - b.double()).abs().max()) for a, b in pairs), default=0.0)
    return worst if math.isfinite(worst) else math.inf


def in_order(tensors: dict[str, torch.Tensor], prefix: str) -> list[torch.Tensor]:
    """The tensors under a prefix; numbers in their names have leading zeros."""
    return [tensors[key] for key in sorted(tensors) if key.startswith(prefix)]


def channels_first(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Videos `(batch, frames, channels, height, width)` turned to `(batch, channels, frames, height, width)`."""
    return {key: t.permute(0, 2, 1, 3, 4) if t.ndim == 5 else t for key, t in tensors.items()}


def padded_embeds(tensors: dict[str, torch.Tensor], text_len: int) -> dict[str, torch.Tensor]:
    """Prompts by what stands behind `prompt_embeds.`, padded with zeros, which are attended to."""
    embeds = {}
    for key, unpadded in tensors.items():
        if key.startswith("prompt_embeds"):
            name = key.removesuffix("_unpadded").removeprefix("prompt_embeds").removeprefix(".")
            embeds[name] = F.pad(unpadded, (0, 0, 0, text_len - unpadded.shape[1]))
    return embeds


def prompts_of(tensors: dict[str, torch.Tensor], meta: dict[str, Any], count: int = 1) -> list[torch.Tensor]:
    """The prompts that follow each other, `(batch, text_tokens, text_dim)` each. Those of a batch were recorded
    together or each by itself.

    Args:
        count: Of prompts that there must be. Raises `ValueError` for others.
    """
    embeds, batch = padded_embeds(tensors, meta["text_len"]), meta.get("batch", 1)
    found = [embeds[name] for name in sorted(embeds, key=_place_in_time)]
    if len(found) == count * batch > count:
        found = [torch.cat(found[i * batch : (i + 1) * batch]) for i in range(count)]
    if len(found) != count:
        raise ValueError(f"there are {len(found)} prompts, {', '.join(sorted(embeds))}, for {count}")
    return [of_one.expand(batch, -1, -1) for of_one in found]


def _place_in_time(name: str) -> tuple[bool, list[int]]:
    """Of a prompt: by the numbers in its name, or as its name has it."""
    return any(word in name for word in ("new", "after", "second", "to")), [int(n) for n in re.findall(r"\d+", name)]


def transformer_of(meta: dict[str, Any], weights: Path, entry: str) -> CausalWanTransformer3DModel:
    """The recorded model, through the real conversion of the published checkpoint layout.

    Args:
        entry: Of the file that holds the weights, `generator` or `generator_ema`.
    """
    config = meta["config"]
    model = _empty_transformer(
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["dim"] // config["num_heads"],
        in_channels=config["in_dim"],
        out_channels=config["out_dim"],
        ffn_dim=config["ffn_dim"],
        num_layers=config["num_layers"],
        text_dim=config["text_dim"],
        freq_dim=config["freq_dim"],
    )
    model.load_state_dict(convert_wan_state_dict(torch.load(weights, weights_only=True)[entry]))
    return model


@cache
def _empty_transformer(**config: int) -> CausalWanTransformer3DModel:
    return CausalWanTransformer3DModel(**config).eval()
