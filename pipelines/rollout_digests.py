"""What must be the same on all ranks of a video, as digests to compare.

Ranks that differ in it give a wrong video without any error: with another prompt on one of them they even agree with
each other. So what goes in is compared, not what comes out.
"""

import hashlib
import json
from typing import Any

import torch

from wan_autoregressive._version import __version__
from wan_autoregressive.pipelines.components import WanComponents
from wan_autoregressive.pipelines.model_identity import model_identity
from wan_autoregressive.pipelines.state_values import pack


def rollout_digests(components: WanComponents, state: dict[str, Any]) -> dict[str, str]:
    """Of a rollout's `state_dict`, each under a name for the user. Keys and values are not looked at, and only one
    rank has pixels."""
    denoiser, config, noise = state["denoiser"], state["config"] | {"output_type": None}, state["noise"]
    generator = noise["generator"] and noise["generator"] | {"devices": None}
    told = {
        "version of this library or of torch": [__version__, torch.__version__],
        "transformer": model_identity(components, with_vae=False),
        "config": [config, state["scheduler"], [expert["attention_kwargs"] for expert in denoiser["experts"]]],
        "prompt": [denoiser["prompt"], denoiser["negative_prompt_embeds"], state["switching"]],
        "noise": {**noise, "generator": generator},
        "past": [state[name] for name in ("counters", "given_latents", "sampler", "history")],
    }
    return {name: _digest(value) for name, value in told.items()}


def _digest(value: Any) -> str:
    tensors: dict[str, torch.Tensor] = {}
    digest = hashlib.sha256(json.dumps(pack(value, tensors), sort_keys=True).encode())
    for tensor in tensors.values():
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
