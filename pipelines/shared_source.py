"""A source video that one rank reads and all ranks see."""

from dataclasses import replace

import torch

from wan_autoregressive.pipelines.ranks import Ranks
from wan_autoregressive.pipelines.source_video import SourceEndedError, SourceFrames, SourceVideo


class SharedSource(SourceVideo):
    """What rank 0 reads of a source, on every rank at the same time.

    Args:
        source: On rank 0.
    """

    def __init__(self, ranks: Ranks, device: torch.device, source: SourceVideo | None = None) -> None:
        self._ranks, self._device, self._source = ranks, device, source

    def next_frames(self, num_frames: int, normalized: bool = True) -> SourceFrames:
        """As [`SourceVideo.next_frames`]."""
        frames = None
        if self._source is not None:
            try:
                frames = self._source.next_frames(num_frames, normalized)
            except SourceEndedError:
                frames = None
        told = self._ranks.share(None if frames is None else _moved(frames, torch.device("cpu")))
        if told is None:
            raise SourceEndedError("the source video has no frames left")
        return frames or _moved(told, self._device)


def _moved(frames: SourceFrames, device: torch.device) -> SourceFrames:
    return replace(frames, latents=frames.latents.to(device), pixels=frames.pixels.to(device))
