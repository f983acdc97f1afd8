"""A chunk between its first step and its pixels."""

from dataclasses import dataclass, field

import torch

from wan_autoregressive.pipelines.frame_grid import Chunk
from wan_autoregressive.pipelines.prompts import PromptState
from wan_autoregressive.pipelines.timings import StageTimings


@dataclass
class ChunkInFlight:
    """What the caller has set for a chunk, then its latents, which pixels are still to be made of."""

    timings: StageTimings
    next_prompt: PromptState | None
    """What the caller has set for it."""
    chunk: Chunk = field(init=False)
    latents: torch.Tensor = field(init=False)
    prompt_text: list[str] | None = field(init=False)
    steps_finite: list[torch.Tensor] = field(default_factory=list)
    """For each denoising step whether its latents are finite, as the device says once it gets there."""
