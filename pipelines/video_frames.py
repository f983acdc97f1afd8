"""Pixel frames in the forms that callers use: arrays, tensors and images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image

_PROCESSOR = VideoProcessor()


def as_unit_floats(video: Any) -> Any:
    """uint8 arrays as [0, 1] floats, which diffusers' video processor takes; anything else as it is."""
    if isinstance(video, np.ndarray) and video.dtype == np.uint8:
        video = video.astype(np.float32) / 255
    if isinstance(video, np.ndarray | torch.Tensor):
        return list(video) if video.ndim == 5 else [video]
    if isinstance(video, Sequence) and video and isinstance(video[0], np.ndarray):
        return [as_unit_floats(frame)[0] for frame in video]
    return video


def as_pil(image: Any) -> Image.Image:
    """One image: PIL as it is, `(height, width, 3)` arrays and `(3, height, width)` tensors, uint8 or in [0, 1]."""
    if isinstance(image, Image.Image):
        return image
    is_tensor = isinstance(image, torch.Tensor)
    pixels = image.detach().cpu().numpy().transpose(1, 2, 0) if is_tensor else np.asarray(image)
    if pixels.dtype != np.uint8:
        pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels)


def count_video_frames(video: Any) -> int:
    """Frames per video of a clip or of a batch of clips."""
    if isinstance(video, np.ndarray | torch.Tensor):
        return int(video.shape[-4])
    if not isinstance(video, Sequence) or not video:
        raise ValueError(f"video is a {type(video).__name__}; it must be an array, a tensor or a list of frames")
    first = video[0]
    if isinstance(first, Sequence) or getattr(first, "ndim", 0) == 4:
        return len(first)
    return len(video)


def pixels_as(output_type: str, pixels: torch.Tensor) -> Any:
    """Pixels `(batch, 3, frames, height, width)` in [-1, 1] in the form that `output_type` names.

    Returns:
        `np` and `uint8`: arrays `(batch, frames, height, width, 3)`, floats in [0, 1] or whole numbers 0 to 255 made
        on the device. `pt`: `(batch, frames, 3, height, width)`. `pil`: lists of images.
    """
    if output_type != "uint8":
        return _PROCESSOR.postprocess_video(pixels, output_type=output_type)
    unit = (pixels * 0.5 + 0.5).clamp(0, 1).float()
    return (unit * 255).round_().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()


def join_frames(parts: list[Any]) -> Any:
    """Frames of consecutive chunks as one video, in the form they have."""
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis=1)
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts, dim=1)
    return [[frame for part in parts for frame in part[i]] for i in range(len(parts[0]))]


def cut_frames(video: Any, num_frames: int | None) -> Any:
    """The first `num_frames` frames of a batch of videos."""
    if isinstance(video, list):
        return [frames[:num_frames] for frames in video]
    return video[:, :num_frames]
