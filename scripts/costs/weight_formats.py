"""Weights in fewer bits, as diffusers' quantizers hold them: which ones, and in how many bytes.

Norms, modulation and the time embedding stay as they are in all formats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from diffusers.hooks._common import _GO_LC_SUPPORTED_PYTORCH_LAYERS
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from wan_autoregressive.scripts.costs.workload import WEIGHT_FORMATS

# Numbers in a block of a GGUF file's format, and its bytes: https://github.com/ggml-org/ggml, ggml-common.h.
_GGUF_BLOCKS = {"q8_0": (32, 34), "q5_0": (32, 22), "q4_0": (32, 18)}


def formatted_bytes(model: ModelMixin, weights: str) -> int:
    """Bytes of all weights of a transformer, on whatever device, in one of `WEIGHT_FORMATS`."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    for parameter in _reached(model, weights):
        total += _bytes_in(parameter, weights) - parameter.nbytes
    return total


def unpacked_bytes(model: ModelMixin, weights: str) -> int:
    """Bytes of the largest weight as it is computed with: formats are scaled back one layer at a time."""
    return max((parameter.nbytes for parameter in _reached(model, weights)), default=0)


def _reached(model: ModelMixin, weights: str) -> Iterator[torch.Tensor]:
    """The parameters that a format holds in fewer bits."""
    if weights not in WEIGHT_FORMATS:
        raise ValueError(f"weights is {weights!r}; allowed are {', '.join(WEIGHT_FORMATS)}")
    kept = model._keep_in_fp32_modules or []
    if weights == "float8":  # `enable_layerwise_casting`
        skipped = (*DEFAULT_SKIP_MODULES_PATTERN, *kept, *(model._skip_layerwise_casting_patterns or ()))
        for name, module in model.named_modules():
            if isinstance(module, _GO_LC_SUPPORTED_PYTORCH_LAYERS) and not any(
                pattern.strip("^$") in name for pattern in skipped if pattern != "^proj_in$"
            ):
                yield from module.parameters(recurse=False)
        return
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or set(kept).intersection(name.split(".")):
            continue
        if weights == "int8" or (name.startswith("blocks.") and not module.in_features % _GGUF_BLOCKS[weights][0]):
            yield module.weight


def _bytes_in(parameter: torch.Tensor, weights: str) -> int:
    if weights == "float8":
        return parameter.numel()
    if weights == "int8":  # and for each row a scale and an int8 zero point
        return parameter.numel() + parameter.shape[0] * (parameter.itemsize + 1)
    numbers, size = _GGUF_BLOCKS[weights]
    return math.prod(parameter.shape) // numbers * size
