"""Whole-clip forward passes of `AutoencoderKLWan` for training.

The VAE's own `encode` and `decode` walk through a clip one latent frame at a time, with caches. For training the same
function is computed in one pass over all frames, which is faster and keeps the graph small. It runs the very modules
that are saved; only the two places where the first frame is treated apart (temporal down- and upsampling) are written
out here.
"""

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanResample,
    WanResidualDownBlock,
    WanResidualUpBlock,
    patchify,
    unpatchify,
)
from torch import nn


def encode_clip(vae: AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip (B, 3, 1 + 4n, H, W) in -1..1 -> posterior mean and log-variance, each (B, z, 1 + n, h, w).

    Equal to `vae.encode(video)` up to rounding. Only VAEs with residual blocks (`is_residual=True`) are handled.
    """
    hidden = vae.encoder.conv_in(patchify(video, vae.config.patch_size))
    for block in vae.encoder.down_blocks:
        hidden = _down(block, hidden)
    hidden = vae.encoder.mid_block(hidden)
    hidden = vae.encoder.conv_out(vae.encoder.nonlinearity(vae.encoder.norm_out(hidden)))
    mean, log_variance = vae.quant_conv(hidden).chunk(2, dim=1)
    return mean, log_variance


def decode_clip(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, z, 1 + n, h, w), not normalised -> clip (B, 3, 1 + 4n, H, W), not clamped (so gradients flow)."""
    hidden = vae.decoder.mid_block(vae.decoder.conv_in(vae.post_quant_conv(latents)))
    for block in vae.decoder.up_blocks:
        hidden = _up(block, hidden)
    hidden = vae.decoder.conv_out(vae.decoder.nonlinearity(vae.decoder.norm_out(hidden)))
    return unpatchify(hidden, vae.config.patch_size)


def _down(block: WanResidualDownBlock, hidden: torch.Tensor) -> torch.Tensor:
    shortcut = block.avg_shortcut(hidden)
    for resnet in block.resnets:
        hidden = resnet(hidden)
    sampler = block.downsampler
    if sampler is None:
        return hidden + shortcut
    hidden = _per_frame(sampler.resample, hidden)
    if sampler.mode == "downsample3d":
        # The first frame is passed on as it is; the strided kernel starts on it for the frames that follow.
        first = hidden[:, :, :1]
        hidden = first if hidden.shape[2] == 1 else torch.cat([first, sampler.time_conv(hidden)], dim=2)
    return hidden + shortcut


def _up(block: WanResidualUpBlock, hidden: torch.Tensor) -> torch.Tensor:
    before = hidden
    for resnet in block.resnets:
        hidden = resnet(hidden)
    sampler: WanResample | None = block.upsampler
    if sampler is None or block.avg_shortcut is None:  # both are there or neither
        return hidden
    if sampler.mode == "upsample3d" and hidden.shape[2] > 1:
        # The first frame stays one frame; those that follow become two each and do not look back at it.
        later = sampler.time_conv(hidden[:, :, 1:])
        batch, channels, frames, height, width = later.shape
        later = later.view(batch, 2, channels // 2, frames, height, width)
        later = later.permute(0, 2, 3, 1, 4, 5).reshape(batch, channels // 2, 2 * frames, height, width)
        hidden = torch.cat([hidden[:, :, :1], later], dim=2)
    return _per_frame(sampler.resample, hidden) + block.avg_shortcut(before, first_chunk=True)


def _per_frame(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Apply a 2D module to each frame of (B, C, F, H, W)."""
    batch, _, frames = hidden.shape[:3]
    hidden = module(hidden.transpose(1, 2).flatten(0, 1))
    return hidden.unflatten(0, (batch, frames)).transpose(1, 2)
