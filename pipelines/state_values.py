"""Python values with tensors in them, as JSON and a dict of tensors.

JSON has neither tensors nor tuples nor keys that are numbers: those become objects with one key that starts with `$`.
"""

from typing import Any

import torch

from wan_autoregressive.pipelines.prompts import PromptState


def pack(value: Any, tensors: dict[str, torch.Tensor], name: str = "") -> Any:
    """JSON for a value whose tensors are put into `tensors`, under the path that leads to them."""
    if isinstance(value, torch.Tensor):
        known = next((key for key, tensor in tensors.items() if tensor is value), None)
        tensors.setdefault(known or name, value)
        return {"$tensor": known or name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, PromptState):
        return {"$prompt": pack(vars(value), tensors, name)}
    if isinstance(value, list | tuple):
        packed = [pack(entry, tensors, f"{name}.{i}") for i, entry in enumerate(value)]
        return {"$tuple": packed} if isinstance(value, tuple) else packed
    if isinstance(value, dict):
        pairs = {key: pack(entry, tensors, f"{name}.{key}".lstrip(".")) for key, entry in value.items()}
        return pairs if all(isinstance(key, str) for key in pairs) else {"$dict": [[*pair] for pair in pairs.items()]}
    raise ValueError(f"{name} holds a {type(value).__name__}, which cannot be saved with a rollout")


def unpack(value: Any, tensors: dict[str, torch.Tensor], device: torch.device) -> Any:
    """The value that `pack` gave, with its tensors on `device`."""
    if isinstance(value, list):
        return [unpack(entry, tensors, device) for entry in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]].to(device)
    if "$prompt" in value:
        return PromptState(**unpack(value["$prompt"], tensors, device))
    if "$tuple" in value:
        return tuple(unpack(value["$tuple"], tensors, device))
    if "$dict" in value:
        return {key: unpack(entry, tensors, device) for key, entry in value["$dict"]}
    return {key: unpack(entry, tensors, device) for key, entry in value.items()}
