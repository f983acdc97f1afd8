"""A baseline on the pipeline itself: query, key and value as one matrix product."""

from __future__ import annotations

import torch

from benchmarks.baselines import BaselineSetup, MakeChunk
from benchmarks.compiled import copy_on_the_same_weights
from wan_autoregressive import WanAutoregressivePipeline


def fused_qkv(setup: BaselineSetup) -> MakeChunk:
    """The pipeline after diffusers' `fuse_qkv_projections()`, with a second copy of these weights."""
    transformer = copy_on_the_same_weights(setup.transformer)
    transformer.fuse_qkv_projections()
    pipe = WanAutoregressivePipeline(None, None, transformer, None, setup.scheduler)
    _, _, frames, height, width = setup.latents_shape
    rollout = pipe.rollout(
        prompt_embeds=setup.prompt_embeds,
        height=height * pipe.vae_scale_factor_spatial,
        width=width * pipe.vae_scale_factor_spatial,
        num_frames=None,
        chunk_frames=frames,
        window_frames=setup.window_frames,
        num_inference_steps=len(setup.scheduler.timesteps),
        output_type="latent",
        generator=torch.Generator().manual_seed(setup.seed),
    )
    return lambda index: rollout.step().latents
