"""What an image that a transformer is conditioned on costs, once for each video, before its first chunk."""

from __future__ import annotations

import torch

from wan_autoregressive.models.codec import codec_of
from wan_autoregressive.pipelines import WanAutoregressivePipeline
from wan_autoregressive.pipelines.image_condition import most_frames
from wan_autoregressive.scripts.costs.allocations import FusedAttention, flop_counter
from wan_autoregressive.scripts.costs.workload import Workload


@torch.no_grad()
def image_flops(pipe: WanAutoregressivePipeline, workload: Workload) -> dict[str, int]:
    """Floating-point operations by model; nothing for one that is conditioned on no image.

    Of the VAE those of as many latent frames as it may take until it has forgotten the image; a video that is shorter
    takes exactly so many.

    Args:
        pipe: Of `build_pipeline` on the meta device.
    """
    components, rollout = pipe.wan_components(), workload.rollout
    flops = {}
    if pipe.image_encoder is not None:
        config = pipe.image_encoder.config
        pixels = torch.empty(1, config.num_channels, config.image_size, config.image_size, device="meta")
        with FusedAttention(), flop_counter() as counter:
            pipe.image_encoder(pixels.to(pipe.image_encoder.dtype), output_hidden_states=True)
        flops["image_encoder"] = counter.get_total_flops()
    if components.condition_channels and workload.with_vae:
        encoder, per_frame = codec_of(pipe.vae).encoder(), []
        for frames in (1, workload.model.temporal_factor):
            with FusedAttention(), flop_counter() as counter:
                encoder.encode(torch.empty(1, 3, frames, rollout.height, rollout.width, device="meta"))
            per_frame.append(counter.get_total_flops())
        first, later = per_frame
        flops["vae"] = first + (most_frames(components.frame_grid(rollout).total_frames) - 1) * later
    return flops
