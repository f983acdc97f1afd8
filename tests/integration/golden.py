"""Recordings of the original implementations and the model they were made with."""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from wan_autoregressive import CausalWanTransformer3DModel
from wan_autoregressive.models.conversion import convert_wan_state_dict

FOLDER = Path(__file__).parents[1] / "data" / "golden"
CASES = sorted(path.stem for path in (FOLDER / "open").glob("*.json"))


@dataclass
class GoldenCase:
    """One recorded run. Video tensors are turned to (batch, channels, frames, height, width)."""

    meta: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    rollout_arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_frame(self) -> int:
        return self.meta["frame_seq_length"]


def load_case(name: str) -> GoldenCase:
    meta = json.loads((FOLDER / "open" / f"{name}.json").read_text())
    tensors = load_file(FOLDER / "open" / f"{name}.safetensors")
    embeds = {}
    for key in [key for key in tensors if key.startswith("prompt_embeds")]:
        unpadded = tensors.pop(key)
        embeds[key.removesuffix("_unpadded")] = F.pad(unpadded, (0, 0, 0, meta["text_len"] - unpadded.shape[1]))
    tensors = {key: t.permute(0, 2, 1, 3, 4) if t.ndim == 5 else t for key, t in tensors.items()}

    arguments: dict[str, Any] = {"latents": tensors["noise"], "context_noise": meta["context_noise"]}
    arguments["chunk_frames"] = meta["num_frame_per_block"]
    arguments["first_chunk_frames"] = 1 if meta["independent_first_frame"] else None
    if meta["local_attn_size"] != -1:
        arguments |= {"window_frames": meta["local_attn_size"], "sink_frames": meta["sink_size"]}
    if "initial_latent" in tensors:
        arguments["video_latents"] = tensors["initial_latent"]
    if "switch_frame_indices" in meta:
        starts = [0, *meta["switch_frame_indices"]]
        arguments["prompt_schedule"] = {start: embeds[f"prompt_embeds.{i}"] for i, start in enumerate(starts)}
        arguments["recache_sink"] = "keep" if meta["global_sink"] else "refresh"
    else:
        arguments["prompt_embeds"] = embeds["prompt_embeds"]
    return GoldenCase(meta, tensors, arguments)


@cache
def golden_transformer() -> CausalWanTransformer3DModel:
    """The recorded model, through the real conversion of the published checkpoint layout."""
    original = torch.load(FOLDER / "weights" / "tiny_self_forcing.pt", weights_only=True)["generator_ema"]
    model = CausalWanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=20, ffn_dim=192, num_layers=3, text_dim=32, freq_dim=64
    )
    model.load_state_dict(convert_wan_state_dict(original))
    return model.eval()
