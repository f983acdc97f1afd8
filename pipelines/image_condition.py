"""What a transformer that is conditioned on an image sees of it in every forward.

As in diffusers' `WanImageToVideoPipeline`: the image and grey frames behind it are encoded as a video, and a mask says
which frame is the image. Both are channels beside those of the noisy latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.models.codec import ChunkEncoder
from wan_autoregressive.pipelines.components import WanComponents
from wan_autoregressive.pipelines.prompts import expand_to_batch

_MOST_FRAMES = 64
"""Latent frames after which no VAE remembers the image."""


@dataclass(frozen=True)
class ImageCondition:
    """The image of one video, for all of its frames and under every prompt."""

    channels: torch.Tensor
    """`(batch, mask and latent channels, frames, height, width)` of the video's first frames; float32. Every later
    frame has those of the last one."""
    embeds: torch.Tensor | None = None
    """`(batch, image_tokens, image_dim)` for cross-attention, in a transformer that has it."""

    def of(self, frames: range) -> torch.Tensor:
        """The channels of some frames of the video, `(batch, channels, frames, height, width)`."""
        last = self.channels.shape[2] - 1
        known = self.channels[:, :, min(frames.start, last + 1) : min(frames.stop, last + 1)]
        missing = len(frames) - known.shape[2]
        if not missing:
            return known
        return torch.cat([known, self.channels[:, :, last:].expand(-1, -1, missing, -1, -1)], dim=2)

    @property
    def nbytes(self) -> int:
        return self.channels.nbytes + (0 if self.embeds is None else self.embeds.nbytes)


def most_frames(total_frames: int | None) -> int:
    """Latent frames that are encoded for a video of so many (`None`: no end), unless the VAE forgets before."""
    return min(total_frames or _MOST_FRAMES, _MOST_FRAMES)


def blank_image_condition(
    components: WanComponents, config: RolloutConfig, batch_size: int, device: torch.device | str
) -> ImageCondition | None:
    """As large as the condition of any image can be, on `device`; `None` for a transformer that sees none."""
    if not components.condition_channels:
        return None
    frames = most_frames(components.frame_grid(config).total_frames)
    size = components.geometry.latent_size(config.height, config.width)
    channels = torch.zeros(batch_size, components.condition_channels, frames, *size, device=device)
    embeds, encoder, transformer = None, components.image_encoder, components.transformer
    if encoder is not None and components.attends_to_image:
        shape = batch_size, encoder.num_tokens, transformer.config.image_dim
        embeds = torch.zeros(shape, dtype=transformer.dtype, device=device)
    return ImageCondition(channels, embeds)


@torch.no_grad()
def encode_image_condition(
    components: WanComponents, image: Any, height: int, width: int, batch_size: int, total_frames: int | None
) -> ImageCondition:
    """The condition of a video that begins with `image`; VAE and image encoder run here and never again.

    Args:
        image: One image (PIL, array or tensor); resized to `height` x `width` for the VAE, as it is for the encoder.
        total_frames: Latent frames of the video, if it has an end.
    """
    codec, geometry = components.codec, components.geometry
    assert codec is not None
    pixels = components.preprocess_pixels([image], height, width)
    latents = _image_then_grey(codec.encoder(), pixels, geometry.scale_factor_temporal, total_frames)
    mask = latents.new_zeros(len(latents), geometry.scale_factor_temporal, *latents.shape[2:])
    mask[:, :, 0] = 1  # a channel for each pixel frame of a later latent frame; the first one is all image
    channels = expand_to_batch(torch.cat([mask, latents], dim=1), batch_size, "image").to(components.device)
    embeds, encoder = None, components.image_encoder
    if encoder is not None and components.attends_to_image:
        embeds = expand_to_batch(encoder.encode(image), batch_size, "image")
        embeds = embeds.to(components.device, components.transformer.dtype)
    return ImageCondition(channels, embeds)


def _image_then_grey(
    encoder: ChunkEncoder, image: torch.Tensor, temporal_factor: int, total_frames: int | None
) -> torch.Tensor:
    """Latents of a video that is grey behind its first frame, as far as they differ from each other.

    A causal encoder forgets: once its state stays the same, so do its latents.
    """
    grey = image.new_zeros(*image.shape[:2], temporal_factor, *image.shape[3:])
    latents, state = [encoder.encode(image)], encoder.state()
    for _ in range(most_frames(total_frames) - 1):
        latents.append(encoder.encode(grey))
        before, state = state, encoder.state()
        if len(before) == len(state) and all(torch.equal(one, two) for one, two in zip(before, state, strict=True)):
            break
    return torch.cat(latents, dim=2)
