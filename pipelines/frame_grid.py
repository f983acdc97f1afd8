"""How a video is cut into chunks, in latent frames. Pure integers."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """Latent frames `[start, stop)` that are denoised together."""

    index: int
    start: int
    stop: int
    given: bool
    """Whether the frames were given by the caller instead of being generated."""
    fixed_frames: int = 0
    """Of a chunk to generate, the first ones that were given and stay as they are."""

    @property
    def num_frames(self) -> int:
        return self.stop - self.start

    @property
    def frames(self) -> range:
        return range(self.start, self.stop)


@dataclass(frozen=True)
class FrameGrid:
    """A grid of chunks from frame 0: one of `first_chunk_frames`, then of `chunk_frames` each.

    Given frames fill the grid from its start; where they end inside a chunk, that chunk is split there and its
    remainder is generated, or it is generated whole around them. The last chunk ends with the video.
    """

    chunk_frames: int
    first_chunk_frames: int
    given_frames: int = 0
    total_frames: int | None = None
    """Latent frames of the whole video; `None` for one without end."""
    split_at_given: bool = True
    """Whether a chunk is split where given frames end inside of it."""

    def chunk(self, index: int, start: int) -> Chunk:
        """The chunk that starts at latent frame `start`."""
        if start < self.first_chunk_frames:
            stop = self.first_chunk_frames
        else:
            done = (start - self.first_chunk_frames) // self.chunk_frames
            stop = self.first_chunk_frames + (done + 1) * self.chunk_frames
        given = start < self.given_frames and (self.split_at_given or stop <= self.given_frames)
        if given:
            stop = min(stop, self.given_frames)
        if self.total_frames is not None:
            stop = min(stop, self.total_frames)
        return Chunk(index, start, stop, given, 0 if given else max(0, self.given_frames - start))

    def __iter__(self) -> Iterator[Chunk]:
        index, start = 0, 0
        while self.total_frames is None or start < self.total_frames:
            chunk = self.chunk(index, start)
            yield chunk
            index, start = index + 1, chunk.stop

    @property
    def first_generated_frame(self) -> int:
        """Where the first chunk to generate starts."""
        return next((chunk.start for chunk in self if not chunk.given), self.given_frames)

    @property
    def num_generated_chunks(self) -> int:
        """Chunks to generate, given ones not counted. Only for a video with an end."""
        if self.total_frames is None:
            raise ValueError("a video without end has no number of chunks")
        return sum(not chunk.given for chunk in self)

    @property
    def num_given_chunks(self) -> int:
        """Chunks of given frames alone, with which the video starts."""
        return sum(1 for _ in itertools.takewhile(lambda chunk: chunk.given, self))


def latent_frames_of(num_frames: int, scale_factor_temporal: int) -> int:
    """Latent frames that hold `num_frames` pixel frames: 1 for the first, then one per `scale_factor_temporal`."""
    return -(-(num_frames - 1) // scale_factor_temporal) + 1


def pixel_frames_of(latent_frames: int, scale_factor_temporal: int) -> int:
    """Pixel frames that the VAE makes of `latent_frames` from the start of a video."""
    return (latent_frames - 1) * scale_factor_temporal + 1 if latent_frames else 0
