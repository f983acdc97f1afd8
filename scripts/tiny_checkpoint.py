"""`wan-ar tiny-checkpoint`: a complete small Wan checkpoint with random weights, for tests and first tries.

It is made of the real classes in the real folder layout, so everything that loads a published Wan checkpoint loads
it too. The weights are random but not arbitrary: `tiny_weights` scales them so that the picture has structure and
visibly depends on the prompt, on the seed, on earlier chunks and on earlier frames. A mistake in any of these
paths then changes pixels.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal, get_args

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from wan_autoregressive.scripts.checkpoint_layout import (
    new_checkpoint_folder,
    write_model_index,
    write_scheduler,
)
from wan_autoregressive.scripts.tiny_vocabulary import tiny_vocabulary
from wan_autoregressive.scripts.tiny_weights import init_text_encoder, init_transformer, init_vae

VaeKind = Literal["wan2.1", "wan2.2"]

TEXT_DIM = 32
# Seeds differ in how lively their pictures are; the default gets a lively one.
_FIRST_SEED = 1
LATENT_CHANNELS: dict[str, int] = {"wan2.1": 16, "wan2.2": 48}


def make_tiny_checkpoint(folder: str | Path, seed: int = 0, vae: VaeKind = "wan2.1", overwrite: bool = False) -> Path:
    """Writes a random checkpoint of less than 2 MB into `folder` and returns its path.

    The same `seed` and `vae` write the same bytes; torch's global random state is left as it was. Geometry:

    - `wan2.1`: 16 latent channels, 8 pixels per latent cell, so 64 x 64 pixels are 16 tokens per latent frame.
    - `wan2.2`: 48 latent channels, 16 pixels per cell (residual VAE with 2 x 2 patches), as in Wan2.2-TI2V-5B.

    Both have 4 pixel frames per latent frame after the first.

    Raises:
        ValueError: `vae` or `seed` is not allowed, or `folder` is occupied (see `new_checkpoint_folder`).
    """
    if vae not in get_args(VaeKind):
        raise ValueError(f"The vae is {vae!r}; it must be one of {', '.join(get_args(VaeKind))}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"The seed is {seed}; it must be in 0 .. 2**32 - 1.")
    generator = torch.Generator().manual_seed(seed + _FIRST_SEED)
    with new_checkpoint_folder(folder, overwrite) as partial, torch.random.fork_rng(devices=[]):
        tokenizer = T5Tokenizer(vocab=tiny_vocabulary(), extra_ids=0, model_max_length=512)
        tokenizer.save_pretrained(partial / "tokenizer")
        _tiny_text_encoder(len(tokenizer), generator).save_pretrained(partial / "text_encoder")
        _tiny_transformer(LATENT_CHANNELS[vae], generator).save_pretrained(partial / "transformer")
        _tiny_vae(vae, generator).save_pretrained(partial / "vae")
        write_scheduler(partial, denoising_steps=(1000, 750, 500, 250), shift=5.0)
        write_model_index(partial, "T5Tokenizer", "UMT5EncoderModel")
    return Path(folder)


def _tiny_text_encoder(vocab_size: int, generator: torch.Generator) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=32,
    )
    encoder = UMT5EncoderModel(config).eval()
    init_text_encoder(encoder, generator)
    return encoder


def _tiny_transformer(latent_channels: int, generator: torch.Generator) -> WanTransformer3DModel:
    transformer = WanTransformer3DModel(
        # A head of 20 splits into 8/6/6 rotary channels for time, height, width: uneven, as the real 44/42/42.
        num_attention_heads=4,
        attention_head_dim=20,
        in_channels=latent_channels,
        out_channels=latent_channels,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=160,
        num_layers=2,
    )
    init_transformer(transformer, generator)
    return transformer


def _tiny_vae(kind: VaeKind, generator: torch.Generator) -> AutoencoderKLWan:
    z_dim = LATENT_CHANNELS[kind]
    # Statistics far from 0 and 1, as the real ones: a forgotten or doubled normalisation then shows.
    mean = torch.randn(z_dim, generator=generator).mul(0.8)
    std = torch.rand(z_dim, generator=generator).mul(2).add(1)
    residual = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=z_dim,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[round(value, 4) for value in mean.tolist()],
        latents_std=[round(value, 4) for value in std.tolist()],
        scale_factor_spatial=16 if kind == "wan2.2" else 8,
        **(residual if kind == "wan2.2" else {}),
    )
    init_vae(vae, generator)
    return vae


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds `tiny-checkpoint` to the command's subparsers; the parsed arguments carry `run` as `args.run`."""
    parser = subparsers.add_parser(
        "tiny-checkpoint",
        help="write a small random checkpoint for tests and first tries",
        description="Write a complete small Wan checkpoint with random weights (under 2 MB).",
    )
    parser.add_argument("folder", metavar="DIR", help="folder to write; it must not exist or be empty")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    parser.add_argument("--vae", choices=get_args(VaeKind), default="wan2.1", help="VAE layout (default: wan2.1)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint folder")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs `wan-ar tiny-checkpoint`; returns 0, raises ValueError or OSError as `make_tiny_checkpoint` does."""
    transformers_logging.disable_progress_bar()  # a bar for a hundred kilobytes is noise
    folder = make_tiny_checkpoint(args.folder, seed=args.seed, vae=args.vae, overwrite=args.overwrite)
    size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"Wrote {folder} ({size_bytes / 1e6:.1f} MB, random weights, seed {args.seed}, {args.vae} VAE).")
    return 0
