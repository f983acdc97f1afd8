"""A small random folder in the layout of Wan2.2-TI2V-5B-Diffusers, saved by diffusers itself."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from tiny_checkpoint import make_tiny_checkpoint


def make_wan22_folder(folder: Path) -> Path:
    """48 latent channels of 16 x 16 pixels, a decoder wider than the encoder, UniPC and `expand_timesteps`."""
    pipe = WanPipeline.from_pretrained(make_tiny_checkpoint(folder.with_name("tiny"), vae="wan2.2"))
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLWan(**{**pipe.vae.config, "decoder_base_dim": 12}).eval()
    pipe.register_modules(scheduler=scheduler, vae=vae)
    pipe.register_to_config(expand_timesteps=True)
    pipe.save_pretrained(folder)
    return folder
