"""What the pipeline hands out."""

from dataclasses import dataclass
from typing import Any

import torch

from wan_autoregressive.pipelines.timings import StageTimings


@dataclass(frozen=True)
class WanVideoChunk:
    """One chunk of the video, as soon as it is decoded.

    Args:
        frames: Pixel frames: `(batch, frames, height, width, 3)` in [0, 1] for `np`, `(batch, frames, 3, height,
            width)` for `pt`, a list of lists of images for `pil`, `None` for `latent`. One frame for the video's
            first latent frame, `scale_factor_temporal` for every later one.
        latents: `(batch, channels, latent_frames, height, width)`. Clean, normalised.
        index: Counts chunks from 0, given ones included.
        start_frame: First latent frame of the chunk.
        start_pixel_frame: First pixel frame of the chunk.
        given: Whether the caller gave these frames.
        prompt: The prompts it was made with, `None` if only embeddings are known.
        timings: Seconds of each stage.
        preview: The same frames by the preview VAE, in the form of `frames` (`np` for `latent`); `None` without one.
    """

    frames: Any
    latents: torch.Tensor
    index: int
    start_frame: int
    start_pixel_frame: int
    given: bool
    prompt: list[str] | None
    timings: StageTimings
    preview: Any = None
