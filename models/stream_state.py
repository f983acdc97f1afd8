"""What the state of any stream through a VAE needs: copies that are parked, and a JSON text among the tensors."""

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from diffusers.utils.torch_utils import get_module_execution_device


def copied_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device`; one between the CPU and CUDA may still be under way."""
    # To the CPU, `non_blocking` takes pinned memory on CUDA; on other devices the copy could be read too early.
    return tensor.to(device, non_blocking="cuda" in (tensor.device.type, device.type), copy=True)


def wait_for_copies(vae: torch.nn.Module) -> None:
    """Until those that a VAE's stream has started are done."""
    if (device := get_module_execution_device(vae)).type == "cuda":
        torch.cuda.synchronize(device)


def pack_meta(meta: Mapping[str, Any]) -> torch.Tensor:
    """Plain values as a small JSON text in a uint8 tensor on the CPU."""
    return torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)


def read_meta(state: Mapping[str, torch.Tensor], keys: Collection[str], of: str) -> dict[str, Any]:
    """What `pack_meta` gave, under `meta` in a whole state.

    Args:
        keys: that it must have.
        of: whose state it should be, for messages.

    Raises:
        ValueError: there is none, or it has other keys.
    """
    try:
        meta = json.loads(bytes(state["meta"].tolist()))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not the state of a {of}: it has no readable 'meta' entry") from error
    if not isinstance(meta, dict) or set(meta) != set(keys):
        raise ValueError(f"not the state of a {of}: 'meta' must hold {', '.join(sorted(keys))}")
    return meta


def check_tensors(state: Mapping[str, torch.Tensor], names: Collection[str]) -> None:
    """Raise `ValueError` unless a state holds just these tensors, beside its `meta`."""
    different = set(state) ^ {"meta", *names}
    if different:
        raise ValueError(f"tensors missing from or unknown to this state: {', '.join(sorted(different)[:4])}")


def through_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """As values come back from a stored state: tuples become lists."""
    stored: dict[str, Any] = json.loads(json.dumps(values))
    return stored
