"""A source video whose chunks start from a mix of noise and source, with less noise where the picture moves.

After chenfengxu714/StreamDiffusionV2 (`streamv2v/inference.py`, `compute_noise_scale_and_step`).
"""

from dataclasses import dataclass

import torch

from wan_autoregressive.pipelines.frame_grid import Chunk
from wan_autoregressive.pipelines.samplers.base import shortened
from wan_autoregressive.pipelines.source_video import SourceEndedError, SourceVideo

LARGEST_MOTION = 0.2
"""Root mean square of the change from frame to frame, of pixels in [-1, 1], from which on motion counts as 1."""


@dataclass(frozen=True)
class SourceChunk:
    """A chunk of the source that has been read and is not denoised yet."""

    chunk: Chunk
    latents: torch.Tensor
    noise_rate: float


class NoisedSource:
    """Reads chunks ahead of the ones that are made.

    Args:
        strength: Share of noise in a still picture.
        normalized: Whether latents are on the transformer's scale.
    """

    def __init__(self, source: SourceVideo, strength: float, normalized: bool) -> None:
        self._source = source
        self._strength = strength
        self._normalized = normalized
        self.waiting: tuple[SourceChunk, ...] = ()
        """Oldest first."""
        self.ended = False
        self._noise_rate: float | None = None
        """Of the newest chunk that was read."""
        self._last_pixels: torch.Tensor | None = None
        """Newest frame that was read, `(videos, 3, 1, height, width)`."""

    def read(self, chunk: Chunk) -> None:
        """Take the next frames for a chunk, which comes out shorter where the source ends."""
        try:
            frames = self._source.next_frames(chunk.num_frames, self._normalized)
        except SourceEndedError:
            self.ended = True
            return
        if self._noise_rate is None or self._last_pixels is None:
            self._noise_rate = self._strength
        else:
            motion = _motion(torch.cat([self._last_pixels, frames.pixels], dim=2))
            self._noise_rate = 0.9 * (self._strength - 0.1 * motion) + 0.1 * self._noise_rate
        self._last_pixels = frames.pixels[:, :, -1:]
        chunk = shortened(chunk, frames.latents.shape[2])
        self.waiting = (*self.waiting, SourceChunk(chunk, frames.latents, self._noise_rate))

    def take(self) -> SourceChunk:
        """The oldest chunk that waits."""
        oldest, *later = self.waiting
        self.waiting = tuple(later)
        return oldest

    @property
    def nbytes(self) -> int:
        waiting = sum(read.latents.nbytes for read in self.waiting)
        return waiting + (0 if self._last_pixels is None else self._last_pixels.nbytes)


def _motion(pixels: torch.Tensor) -> float:
    """How much frames `(videos, 3, frames, height, width)` in [-1, 1] differ from the one before: 0 (still) to 1."""
    changes = (pixels[:, :, 1:] - pixels[:, :, :-1]).float().square().mean(dim=(0, 1, 3, 4)).sqrt()
    return min(float(changes.max()) / LARGEST_MOTION, 1.0)
