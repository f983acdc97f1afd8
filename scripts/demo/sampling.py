"""Chunk-by-chunk generation during training: the cached path of the library, in latents."""

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from wan_autoregressive.cache import WanKVCache
from wan_autoregressive.models.causal_wan_transformer import CausalWanTransformer3DModel
from wan_autoregressive.scripts.demo.latent_pool import CHUNK_FRAMES, latent_statistics
from wan_autoregressive.scripts.demo.text import pad_embeddings

DENOISING_STEPS = (1000.0, 750.0, 500.0, 250.0)
LATENT_CHANNELS, LATENT_SIZE = 16, 8


@torch.no_grad()
def generate_latents(
    transformer: WanTransformer3DModel,
    text: torch.Tensor,
    chunks: int,
    generator: torch.Generator,
    window_chunks: int = 4,
) -> torch.Tensor:
    """Roll out `chunks` chunks for embeddings `text` (B, tokens, dim): latents (B, 16, 3 * chunks, 8, 8), normalised.

    The weights of `transformer` are copied into the causal model of the library.
    """
    causal = CausalWanTransformer3DModel(**transformer.config).eval()
    causal.load_state_dict(transformer.state_dict())
    tokens = (LATENT_SIZE // 2) ** 2
    cache = WanKVCache(len(causal.blocks), window_size=window_chunks * CHUNK_FRAMES * tokens)
    text = pad_embeddings(text)
    shape = (len(text), LATENT_CHANNELS, CHUNK_FRAMES, LATENT_SIZE, LATENT_SIZE)
    done = []
    for chunk in range(chunks):
        x0 = torch.zeros(shape)
        cache.enable_append_mode()
        for timestep in DENOISING_STEPS:
            sigma = timestep / 1000
            x0 = (1 - sigma) * x0 + sigma * torch.randn(shape, generator=generator)
            x0 = x0 - sigma * _forward(causal, x0, timestep, text, chunk, cache)
            cache.enable_overwrite_mode()
        _forward(causal, x0, 0.0, text, chunk, cache)
        done.append(x0)
    return torch.cat(done, dim=2)


@torch.no_grad()
def decode_normalized(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents (B, 16, F, 8, 8) -> clips (B, 3, 4F - 3, 64, 64) in -1..1."""
    mean, std = latent_statistics(vae)
    return vae.decode(latents * std + mean).sample


def _forward(
    causal: CausalWanTransformer3DModel,
    latents: torch.Tensor,
    timestep: float,
    text: torch.Tensor,
    chunk: int,
    cache: WanKVCache,
) -> torch.Tensor:
    timesteps = torch.full((len(latents), CHUNK_FRAMES), timestep)
    return causal(
        latents,
        timesteps,
        text,
        frame_offset=chunk * CHUNK_FRAMES,
        attention_kwargs={"kv_cache": cache},
        return_dict=False,
    )[0]
