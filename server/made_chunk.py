"""What the model's thread hands on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wan_autoregressive.pipelines.outputs import WanVideoChunk
from wan_autoregressive.server.timeline import TimelineChunk


@dataclass(frozen=True)
class MadeChunk:
    """A new chunk of the timeline with its pixels, `(frames, height, width, 3)` in uint8."""

    entry: TimelineChunk
    frames: npt.NDArray[np.uint8]
    chunk: WanVideoChunk
    is_preview: bool = False
    """Its pixels are the preview VAE's; those of the full one follow as another `MadeChunk`."""
    was_shown: bool = False
    """Its preview came before."""
