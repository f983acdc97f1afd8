"""Writing weights to safetensors files with one file's worth of them in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

_FILE = "diffusion_pytorch_model{suffix}.safetensors"


def write_sharded(
    folder: Path,
    described: Mapping[str, torch.Tensor],
    make: Callable[[str], torch.Tensor],
    max_shard_size: int | str = "5GB",
) -> None:
    """Write weights as diffusers' `save_pretrained` does, making each of them when its file is written.

    Args:
        described: for each weight a tensor of its shape and dtype; on the `meta` device they need no memory.
        make: gives the weight of a name, of that shape and dtype, on the CPU.
        max_shard_size: of one file. More memory than that is not taken.
    """
    plan = split_torch_state_dict_into_shards(dict(described), filename_pattern=_FILE, max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        # safetensors refuses tensors that share memory, and views would be written with all that they look into.
        weights = {}
        for name in names:
            weight = make(name).detach().contiguous()
            is_view = weight.untyped_storage().nbytes() != weight.nbytes
            weights[name] = weight.clone() if is_view else weight
        path = folder / file
        path.touch()
        mode = path.stat().st_mode  # what the user's files have; safetensors makes one that only the owner may read
        save_file(weights, path, metadata={"format": "pt"})
        path.chmod(mode)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / _FILE.format(suffix="")).with_suffix(".safetensors.index.json").write_text(text, encoding="utf-8")
