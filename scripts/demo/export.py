"""Writes the finished demo checkpoint: a folder in the stock diffusers layout."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import T5Tokenizer, UMT5EncoderModel

from wan_autoregressive.scripts.demo.sampling import DENOISING_STEPS

MODEL_INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.42.0",
    "tokenizer": ["transformers", "T5Tokenizer"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
}
# Unwarped steps with shift 1 make each sigma exactly its timestep / 1000, as in training.
SCHEDULER = {
    "_class_name": "SelfForcingScheduler",
    "_diffusers_version": "0.42.0",
    "denoising_steps": [int(step) for step in DENOISING_STEPS],
    "shift": 1.0,
    "warp": False,
    "num_train_timesteps": 1000,
}


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
    _write_json(folder / "model_index.json", MODEL_INDEX)
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
