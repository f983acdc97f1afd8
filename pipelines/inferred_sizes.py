"""Sizes of a video that a call leaves open, from what it gives."""

from typing import Any

import torch

from wan_autoregressive.pipelines.frame_grid import pixel_frames_of
from wan_autoregressive.pipelines.video_frames import count_video_frames


def given_latent_frames(image: Any, video: Any, video_latents: torch.Tensor | None, scale_factor_temporal: int) -> int:
    """Latent frames that a video starts from. Raises `ValueError` for latents of another rank or an empty clip."""
    if video_latents is not None:
        if video_latents.ndim != 5:
            raise ValueError(
                f"video_latents has shape {tuple(video_latents.shape)}; it must be (batch, channels, frames, "
                "height, width)"
            )
        return video_latents.shape[2]
    if video is not None:
        return (count_video_frames(video) - 1) // scale_factor_temporal + 1
    return 0 if image is None else 1


def pixel_size(
    height: int | None, width: int | None, scale_factor_spatial: int, *latents: torch.Tensor | None
) -> tuple[int, int]:
    """Height and width in pixels: as given, else those of the first latents that are given, else 480 x 832."""
    for tensor in latents:
        if tensor is not None and tensor.ndim == 5:
            height = height or tensor.shape[3] * scale_factor_spatial
            width = width or tensor.shape[4] * scale_factor_spatial
    return 480 if height is None else height, 832 if width is None else width


def pixel_frames(
    num_frames: int | None,
    latents: torch.Tensor | None,
    frames_before: int,
    source: Any,
    scale_factor_temporal: int,
) -> int | None:
    """Pixel frames of the video, from the initial noise or the source if they are given and have an end.

    Args:
        frames_before: Latent frames before those that the initial noise is for.
    """
    if source is not None and hasattr(source, "__len__"):
        available = pixel_frames_of(
            given_latent_frames(None, source, None, scale_factor_temporal), scale_factor_temporal
        )
        return available if num_frames is None else min(num_frames, available)
    if num_frames is None and latents is not None:
        return pixel_frames_of(frames_before + latents.shape[2], scale_factor_temporal)
    return num_frames
