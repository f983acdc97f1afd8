"""Tell whether two models have the same weights without reading all of them."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_SAMPLES = 64
"""Values looked at in each tensor, evenly spread. Training or fusing a LoRA changes practically all of a tensor."""


@dataclass(frozen=True)
class WeightsFingerprint:
    """Digests, in hex, of what the tensors of a model are called and look like, and of a sample of their values."""

    layout: str
    """Names, shapes, dtypes and formats, and which adapters are active at which strength."""
    values: str | None
    """None where weights are not in memory (sequential offload)."""


_known: "WeakKeyDictionary[torch.nn.Module, tuple[Any, WeightsFingerprint]]" = WeakKeyDictionary()


def weights_fingerprint(model: torch.nn.Module) -> WeightsFingerprint:
    """The fingerprint of a model's parameters and persistent buffers.

    Computed once per model, and again after weights were replaced, changed in place or moved. Of weights that are
    split over several ranks it is that of the whole, which all of these ranks compute at the same time.
    """
    tensors = sorted((name.replace("_orig_mod.", ""), tensor) for name, tensor in _tensors(model).items())
    adapters = _adapters(model)
    own = [(name, tensor.to_local() if isinstance(tensor, DTensor) else tensor) for name, tensor in tensors]
    identity = ([(name, tensor.data_ptr(), _version(tensor)) for name, tensor in own], adapters)
    if model in _known and _known[model][0] == identity:
        return _known[model][1]
    layout = [[name, list(tensor.shape), str(tensor.dtype), *_format(tensor)] for name, tensor in tensors]
    found = WeightsFingerprint(
        layout=hashlib.sha256(json.dumps([layout, adapters]).encode()).hexdigest(),
        values=_digest_values([tensor for _, tensor in tensors]),
    )
    _known[model] = (identity, found)
    return found


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By name; of a quantised weight all that it is made of, such as numbers and scales."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            tensors |= _plain(name, value)
    return tensors


def _plain(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensor itself, split over ranks or not, or what torchao's kind of tensor holds, which has no memory."""
    if isinstance(tensor, DTensor) or not is_traceable_wrapper_subclass(tensor):
        return {name: tensor}
    parts: dict[str, torch.Tensor] = {}
    for part in tensor.__tensor_flatten__()[0]:
        parts |= _plain(f"{name}.{type(tensor).__name__}.{part}", getattr(tensor, part))
    return parts


def _format(tensor: torch.Tensor) -> list[str]:
    """Of GGUF, whose weights are bytes in blocks of one format or another."""
    quant_type = getattr(tensor, "quant_type", None)
    return [] if quant_type is None else [str(quant_type)]


def _adapters(model: torch.nn.Module) -> list[Any]:
    """Strength and state of LoRA layers (peft), which are not among the tensors."""
    return [
        [name, sorted((str(key), float(value)) for key, value in module.scaling.items()), list(module.active_adapters)]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict) and hasattr(module, "active_adapters")
    ]


def _digest_values(tensors: list[torch.Tensor]) -> str | None:
    if any(tensor.is_meta for tensor in tensors):
        return None
    # One copy per device and dtype: one for each tensor would wait for the device a thousand times.
    groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        flat = whole.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)]
        sample = sample if whole is tensor else sample.clone()  # of a whole that is not kept
        groups.setdefault((tensor.dtype, tensor.device), []).append(sample)
    on_cpu = {
        key: iter(torch.cat(samples).cpu().split([sample.numel() for sample in samples]))
        for key, samples in groups.items()
    }
    digest = hashlib.sha256()
    # In the order of names, since the same model may lie on other devices next time.
    for tensor in tensors:
        digest.update(next(on_cpu[tensor.dtype, tensor.device]).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _version(tensor: torch.Tensor) -> int:
    """How often the tensor was changed in place; those made under inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version
