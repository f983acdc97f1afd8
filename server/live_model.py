"""A loaded pipeline with the settings that every live video has."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wan_autoregressive.pipelines.pipeline_wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.pipelines.rollout import WanRollout

_WARM_UP_STEPS = 3
_OWN_SETTINGS = ("num_frames", "output_type", "strength")


@dataclass(frozen=True)
class LiveModel:
    """What rollouts are begun with.

    Args:
        pipe: Its own from now on; only one thread may use it.
        settings: Fields of a `RolloutConfig`; length and output type are the server's.
        fps: Frames per second that the model was trained for.
        scale: How often every pixel is repeated in the video.
        name: For the reader.
    """

    pipe: WanAutoregressivePipeline
    settings: dict[str, Any]
    fps: float = 16.0
    scale: int = 1
    name: str = ""

    @property
    def height(self) -> int:
        """Pixels that the model makes."""
        return int(self.settings["height"])

    @property
    def width(self) -> int:
        return int(self.settings["width"])

    def rollout_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """All of a video's, where these are given instead of the server's own."""
        own = {name: value for name, value in self.settings.items() if name not in _OWN_SETTINGS}
        if settings.get("num_inference_steps") is not None:
            own["denoising_steps"] = None
        return {**own, **settings, "output_type": "uint8"}

    def start(
        self,
        prompt: str,
        seed: int,
        image: Any = None,
        settings: Mapping[str, Any] | None = None,
        source: Iterator[Any] | None = None,
    ) -> WanRollout:
        """Begin an endless video: from nothing, from an image, or made anew from the frames of a source."""
        generator = torch.Generator().manual_seed(seed)
        values = self.rollout_settings(settings or {})
        return self.pipe.rollout(prompt, image=image, video=source, generator=generator, **values)

    def resume(self, folder: Path) -> WanRollout:
        """Go on with a saved one; `ValueError` if it was made by another model."""
        return self.pipe.resume(folder)

    def measure(self) -> tuple[float, float]:
        """Run a few steps, so that no visitor waits for the first: seconds of video in a chunk, seconds to make it."""
        rollout = self.start("a red circle moving right on a navy background", 0)
        for _ in range(_WARM_UP_STEPS):
            started = time.perf_counter()
            frames = rollout.step().frames.shape[1]
            took = time.perf_counter() - started
        return frames / self.fps, took
