"""A loaded pipeline with the settings that every live video has."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from wan_autoregressive.configs.registry import SAMPLERS
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.pipeline_wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.server.limits import PromptError
from wan_autoregressive.server.made_by import made_by

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
        preview_vae: A second VAE, whose frames are shown at once; those of the full one are what is kept.
    """

    pipe: WanAutoregressivePipeline
    settings: dict[str, Any]
    fps: float = 16.0
    scale: int = 1
    name: str = ""
    preview_vae: torch.nn.Module | None = None
    _tokenizer: Any = field(init=False, repr=False)
    _tokenizing: threading.Lock = field(init=False, repr=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        # Its own: tokenizers hold state while they work, and the pipeline's is used by the model's thread.
        object.__setattr__(self, "_tokenizer", copy.deepcopy(self.pipe.tokenizer))

    @cached_property
    def made_by(self) -> dict[str, Any]:
        """What every video of this model is bound to, see `made_by`."""
        return made_by(self)

    @property
    def own_settings(self) -> dict[str, Any]:
        """What videos are begun with where their viewers say nothing else, as JSON."""
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in self.settings.items()}
        if own.get("denoising_steps") is None and own.get("num_inference_steps") is None:
            own["denoising_steps"] = [float(step) for step in self.pipe.scheduler.config.denoising_steps]
        return own

    def with_settings(self, own: Mapping[str, Any]) -> LiveModel:
        """The same model, as it was when `own_settings` were these."""
        twin = copy.copy(self)
        object.__setattr__(twin, "settings", dict(own))
        return twin

    @property
    def height(self) -> int:
        """Pixels that the model makes."""
        return int(self.settings["height"])

    @property
    def width(self) -> int:
        return int(self.settings["width"])

    @property
    def most_tokens(self) -> int:
        """Of a prompt; the text encoder would see no more."""
        return self.config({}).max_sequence_length

    def check_prompt(self, prompt: str) -> None:
        """Raise `PromptError` for one whose end would be cut off. From any thread."""
        with self._tokenizing:
            count = len(self._tokenizer(prompt).input_ids)
        if count > self.most_tokens:
            raise PromptError(f"the prompt has {count} tokens, the model takes {self.most_tokens}; make it shorter")

    def config(self, settings: Mapping[str, Any]) -> RolloutConfig:
        """Of a video with these settings instead of the server's own. `ValueError` where a value cannot work."""
        return RolloutConfig(**self._rollout_settings(settings))

    def start(
        self,
        prompt: str,
        seed: int,
        image: Any = None,
        settings: Mapping[str, Any] | None = None,
        source: Iterator[Any] | None = None,
        preview: bool = True,
    ) -> WanRollout:
        """Begin an endless video: from nothing, from an image, or made anew from the frames of a source.

        Args:
            preview: With the preview VAE, if there is one.
        """
        values = self._rollout_settings(settings or {})
        return self.pipe.rollout(
            prompt,
            image=image,
            video=source,
            generator=torch.Generator().manual_seed(seed),
            preview_vae=self.preview_vae if preview else None,
            **values,
        )

    def run_up_frames(self, settings: Mapping[str, Any]) -> int:
        """Latent frames that `start_behind` takes, which fill three chunks; 0 where that cannot be done.

        Neither a sampler that has several chunks under way can, nor a transformer that is told of the first frame.
        """
        config = self.config(settings)
        if not SAMPLERS.load(config.sampler).denoises_by_chunk or self.pipe.wan_components().condition_channels:
            return 0
        return (config.first_chunk_frames or config.chunk_frames) + 2 * config.chunk_frames

    @property
    def size(self) -> str:
        """Width and height of the video that is shown, `256x256`."""
        return f"{self.width * self.scale}x{self.height * self.scale}"

    def num_chunks(self, latent_frames: int) -> int:
        """Chunks that hold so many latent frames, far from the start of a video."""
        return -(-latent_frames // self.config({}).chunk_frames)

    def start_behind(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        prompt: str,
        settings: Mapping[str, Any],
        preview: bool = True,
    ) -> WanRollout:
        """Begin a video with given latents that goes on nearly as theirs did; they are its first chunks.

        Args:
            latents: `(1, channels, run_up_frames, height, width)`.
            noise: State of the generator.
        """
        generator = torch.Generator()
        generator.set_state(noise)
        return self.pipe.rollout(
            prompt,
            generator=generator,
            video_latents=latents.to(self.pipe.device),
            preview_vae=self.preview_vae if preview else None,
            **self._rollout_settings(settings),
        )

    def resume(self, folder: Path, preview: bool = True) -> WanRollout:
        """Go on with a saved one; `ValueError` if it was made by another model."""
        if preview and self.preview_vae is not None:
            with suppress(ValueError):  # one that was saved without a preview goes on without
                return self.pipe.resume(folder, preview_vae=self.preview_vae)
        return self.pipe.resume(folder)

    def measure(self) -> tuple[float, float]:
        """Run a few steps, so that no visitor waits for the first: seconds of video in a chunk, seconds to make it."""
        grey, _ = None, self.made_by  # which reads weights
        if self.pipe.wan_components().condition_channels:
            grey = Image.new("RGB", (self.width, self.height), "grey")
        rollout = self.start("a red circle moving right on a navy background", 0, grey)
        for _ in range(_WARM_UP_STEPS):
            started = time.perf_counter()
            frames = rollout.step().frames.shape[1]
            took = time.perf_counter() - started
        return frames / self.fps, took

    def _rollout_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        own = {name: value for name, value in self.settings.items() if name not in _OWN_SETTINGS}
        if settings.get("num_inference_steps") is not None:
            own["denoising_steps"] = None
        return {**own, **settings, "output_type": "uint8"}
