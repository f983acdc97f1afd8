"""What encoding pixels costs: of an image that a transformer is conditioned on, or of frames that a sampler needs."""

from __future__ import annotations

import torch

from wan_autoregressive.configs.registry import SAMPLERS
from wan_autoregressive.models.codec import codec_of
from wan_autoregressive.pipelines import WanAutoregressivePipeline
from wan_autoregressive.pipelines.image_condition import most_frames
from wan_autoregressive.scripts.costs.allocations import FusedAttention, flop_counter
from wan_autoregressive.scripts.costs.workload import Workload


@torch.no_grad()
def image_flops(pipe: WanAutoregressivePipeline, workload: Workload) -> dict[str, int]:
    """Floating-point operations of encoding an image before the first chunk, by model; nothing without an image.

    Of the VAE those of as many latent frames as it may take until it has forgotten the image; a video that is shorter
    takes exactly so many.

    Args:
        pipe: Of `build_pipeline` on the meta device.
    """
    components = pipe.wan_components()
    flops = {}
    if pipe.image_encoder is not None:
        config = pipe.image_encoder.config
        pixels = torch.empty(1, config.num_channels, config.image_size, config.image_size, device="meta")
        with FusedAttention(), flop_counter() as counter:
            pipe.image_encoder(pixels.to(pipe.image_encoder.dtype), output_hidden_states=True)
        flops["image_encoder"] = counter.get_total_flops()
    if components.condition_channels and workload.with_vae:
        first, later = _encode_flops(pipe, workload, (1, workload.model.temporal_factor))
        flops["vae"] = first + (most_frames(components.frame_grid(workload.rollout).total_frames) - 1) * later
    return flops


@torch.no_grad()
def context_flops(pipe: WanAutoregressivePipeline, workload: Workload) -> int:
    """Of the pixel frame that a sampler encodes again for every chunk, if it does."""
    if not SAMPLERS.load(workload.rollout.sampler).needs_pixels(workload.rollout):
        return 0
    return _encode_flops(pipe, workload, (1,))[0]


def _encode_flops(pipe: WanAutoregressivePipeline, workload: Workload, frames: tuple[int, ...]) -> list[int]:
    """Of pieces of one video, by their pixel frames."""
    encoder, flops = codec_of(pipe.vae).encoder(), []
    for count in frames:
        pixels = torch.empty(1, 3, count, workload.rollout.height, workload.rollout.width, device="meta")
        with FusedAttention(), flop_counter() as counter:
            encoder.encode(pixels)
        flops.append(counter.get_total_flops())
    return flops
