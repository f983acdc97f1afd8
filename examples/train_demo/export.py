"""Writes the finished demo checkpoint: a folder in the stock diffusers layout."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import T5Tokenizer, UMT5EncoderModel

from examples.train_demo.sampling import DENOISING_STEPS
from wan_autoregressive.scripts.checkpoint_layout import write_model_index, write_scheduler


def save_checkpoint(
    folder: Path,
    tokenizer: T5Tokenizer,
    text_encoder: UMT5EncoderModel,
    transformer: WanTransformer3DModel,
    vae: AutoencoderKLWan,
) -> None:
    """Save the parts to `folder`, weights in float16.

    The parts themselves stay float32. The saved classes are stock ones, so the folder also loads in `WanPipeline`.
    """
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, part in (("text_encoder", text_encoder), ("transformer", transformer), ("vae", vae)):
        half = type(part)(part.config) if name == "text_encoder" else type(part)(**part.config)
        half.load_state_dict({key: value.contiguous() for key, value in part.state_dict().items()})
        nn.Module.to(half, torch.float16).save_pretrained(folder / name)  # the parts' own `to` warns about dtypes
    write_model_index(folder, tokenizer_class="T5Tokenizer", text_encoder_class="UMT5EncoderModel")
    # Unwarped steps with shift 1 make each sigma exactly its timestep / 1000, as in training.
    write_scheduler(folder, DENOISING_STEPS, shift=1.0, warp=False)
