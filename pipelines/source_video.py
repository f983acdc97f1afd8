"""The source of video-to-video: frames come in one by one and leave as latents, chunk by chunk."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from wan_autoregressive.pipelines.components import WanComponents
from wan_autoregressive.pipelines.prompts import expand_to_batch


class SourceEndedError(RuntimeError):
    """The source video has no frames left for another chunk."""


@dataclass(frozen=True)
class SourceFrames:
    """Frames of a source that belong together."""

    latents: torch.Tensor
    """`(batch, channels, frames, height, width)`."""
    pixels: torch.Tensor
    """In [-1, 1], `(videos, 3, pixel frames, height, width)`; one video may stand for the whole batch."""


class SourceVideo:
    """Encodes a source video just as far as the rollout needs it.

    Args:
        frames: Frames one after the other, each an image or `(height, width, 3)`; an array or a list, or an iterator
            such as a camera, of which no more is taken than the next chunk needs.
        batch_size: Videos made from it.
    """

    def __init__(
        self, components: WanComponents, frames: Iterable[Any], height: int, width: int, batch_size: int
    ) -> None:
        assert components.codec is not None
        self._components = components
        self._frames: Iterator[Any] = iter(frames)
        self._size = {"height": height, "width": width}
        self._batch_size = batch_size
        self._encoder = components.codec.encoder()

    def next_latents(self, num_frames: int) -> torch.Tensor:
        """The next latents, normalised, `(batch, channels, up to num_frames, height, width)`; fewer at the end.

        Raises:
            SourceEndedError: not even one latent frame is left.
        """
        return self.next_frames(num_frames).latents

    def next_frames(self, num_frames: int, normalized: bool = True) -> SourceFrames:
        """The next latents, up to `num_frames`, with the pixels that they stand for.

        Args:
            normalized: Give latents on the transformer's scale instead of the VAE's.

        Raises:
            SourceEndedError: not even one latent frame is left.
        """
        factor = self._components.geometry.scale_factor_temporal
        first = self._encoder.latent_frames_done == 0
        wanted = num_frames * factor - (factor - 1 if first else 0)
        pixels = list(itertools.islice(self._frames, wanted))
        usable = (len(pixels) - 1) // factor * factor + 1 if first else len(pixels) // factor * factor
        if usable < 1:
            raise SourceEndedError("the source video has no frames left")
        clip: Any = pixels[:usable]
        if isinstance(clip[0], np.ndarray | torch.Tensor):
            clip = np.stack([np.asarray(frame) for frame in clip])
        video = self._components.preprocess_pixels(clip, **self._size)
        latents = self._encoder.encode(video).to(self._components.device)
        if not normalized:
            assert self._components.codec is not None
            latents = self._components.codec.denormalize(latents)
        return SourceFrames(expand_to_batch(latents, self._batch_size, "video"), video)
