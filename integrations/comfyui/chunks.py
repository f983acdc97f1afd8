"""Chunks of a rollout under ComfyUI's progress bar, previews and Cancel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from wan_autoregressive.pipelines import WanRollout

PREVIEW_PIXELS = 512
Host = tuple[Callable[[], None], Any]


def make_chunks(rollout: WanRollout, num_chunks: int) -> torch.Tensor:
    """Make so many chunks and return their frames, `(frames, height, width, 3)` float32 in [0, 1] on the CPU.

    Raises:
        comfy.model_management.InterruptProcessingException: Cancel was pressed; the rollout is spoilt.
    """
    check_cancelled, bar = _host(num_chunks)
    made = []
    rollout.on_progress = check_cancelled  # after every denoising step
    try:
        for number in range(num_chunks):
            check_cancelled()
            frames = rollout.step().frames[0].movedim(1, -1).float().cpu()
            made.append(frames)
            bar.update_absolute(number + 1, num_chunks, ("JPEG", _preview(frames), PREVIEW_PIXELS))
    finally:
        rollout.on_progress = None
    return torch.cat(made)


def _host(num_chunks: int) -> Host:
    """What raises once Cancel was pressed, and a progress bar. Imported here: only ComfyUI has them."""
    import comfy.model_management  # pyright: ignore[reportMissingImports]
    import comfy.utils  # pyright: ignore[reportMissingImports]

    return comfy.model_management.throw_exception_if_processing_interrupted, comfy.utils.ProgressBar(num_chunks)


def _preview(frames: torch.Tensor) -> Image.Image:
    """The last frame of a chunk."""
    return Image.fromarray((frames[-1] * 255).round().clamp(0, 255).byte().numpy())
