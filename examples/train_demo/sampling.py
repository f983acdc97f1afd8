"""Chunk-by-chunk generation during training: the pipeline of the library, in latents."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from examples.train_demo import world
from examples.train_demo.latent_pool import CHUNK_FRAMES, latent_statistics, pixel_frames
from examples.train_demo.text import pad_embeddings
from wan_autoregressive import CausalWanTransformer3DModel, SelfForcingScheduler, WanAutoregressivePipeline

DENOISING_STEPS = (1000.0, 750.0, 500.0, 250.0)


@torch.no_grad()
def generate_latents(
    transformer: WanTransformer3DModel,
    text: torch.Tensor,
    chunks: int,
    generator: torch.Generator,
    **settings: Any,
) -> torch.Tensor:
    """Roll out `chunks` chunks for embeddings `text` (B, tokens, dim): latents (B, 16, 3 * chunks, 8, 8), normalised.

    The weights of `transformer` are copied into the causal model of the library. `settings`: further arguments of the
    pipeline.
    """
    causal = CausalWanTransformer3DModel(**transformer.config).eval()
    causal.load_state_dict(transformer.state_dict())
    # Unwarped steps with shift 1 make each sigma exactly its timestep / 1000, as in training.
    scheduler = SelfForcingScheduler(denoising_steps=DENOISING_STEPS, shift=1.0, warp=False)
    pipe = WanAutoregressivePipeline(None, None, causal, None, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=pad_embeddings(text),
        height=world.SIZE,
        width=world.SIZE,
        num_frames=pixel_frames(chunks * CHUNK_FRAMES),
        chunk_frames=CHUNK_FRAMES,
        generator=generator,
        output_type="latent",
        **{"window_frames": 4 * CHUNK_FRAMES, **settings},
    ).frames


@torch.no_grad()
def decode_normalized(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents (B, 16, F, 8, 8) -> clips (B, 3, 4F - 3, 64, 64) in -1..1."""
    mean, std = latent_statistics(vae)
    return vae.decode(latents * std + mean).sample
