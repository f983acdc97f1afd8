"""A LoRA as training scripts save it, and what it adds to the weights it was trained for.

The layer that a LoRA adapts computes `W x + s * B (A x)` (Hu et al., 2021), so that `W + s * B A` in its place gives
the same without the two small matrices. `s` is `alpha / rank` in peft, times a strength that the user chooses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from wan_autoregressive.models.checkpoint_files import load_checkpoint
from wan_autoregressive.models.conversion import convert_wan_state_dict

# Where training scripts put it in a file that holds more: LongLive's name.
_ENTRY_NAMES = ("generator_lora",)
# `blocks.0.self_attn.q.lora_A.default.weight` and its relatives; the adapter's name is peft's and may be absent.
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B|down|up)(?:\.[^.]+)?\.weight")
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
_NOT_MERGED = ("use_dora", "use_rslora", "alpha_pattern")  # of a peft config: other formulas than the one here


@dataclass(frozen=True)
class LoraFactors:
    """What is added to one weight."""

    down: torch.Tensor
    """A: (rank, inputs), or (rank, inputs, *kernel) of a convolution."""
    up: torch.Tensor
    """B: (outputs, rank), or with as many ones behind as the kernel has dimensions."""
    alpha: float

    def check_fits(self, weight: torch.Tensor) -> None:
        """Raise ValueError unless the product has the shape of `weight`."""
        up, down, wanted = ((len(t), t[0].numel()) for t in (self.up, self.down, weight))
        if up[1] != down[0] or (up[0], down[1]) != wanted:
            raise ValueError(
                f"factors of shapes {list(self.up.shape)} and {list(self.down.shape)} for {list(weight.shape)}"
            )

    def merged_into(self, weight: torch.Tensor, strength: float) -> torch.Tensor:
        """`weight` with the product added; new memory, in the dtype of `weight`, computed in float32."""
        change = (self.up.flatten(1).float() @ self.down.flatten(1).float()) * (strength * self.alpha / len(self.down))
        return (weight.float() + change.view(weight.shape)).to(weight.dtype)


def load_lora(path: str | Path) -> dict[str, LoraFactors]:
    """Read a LoRA; `{name of the weight in diffusers: factors}`.

    Args:
        path: as for `load_checkpoint`: a file that peft wrote (original or diffusers names, with any wrapper's
            prefix), one with the entry `generator_lora`, or peft's folder. Where neither the file nor an
            `adapter_config.json` beside it says what alpha is, it is the rank: the factors count as they are.

    Raises:
        ValueError: it is damaged, holds code, is of another kind (DoRA, biases), or lacks a factor.
    """
    tensors = load_checkpoint(path, entries=_ENTRY_NAMES)
    factors: dict[str, dict[str, torch.Tensor]] = {"down": {}, "up": {}}
    alphas = {}
    odd = []
    for name, tensor in tensors.items():
        if found := _FACTOR.fullmatch(name):
            side = "down" if found["side"] in ("A", "down") else "up"
            factors[side][f"{found['module']}.weight"] = tensor
        elif (found := _ALPHA.fullmatch(name)) and tensor.numel() == 1:
            alphas[f"{found['module']}.weight"] = tensor
        else:
            odd.append(name)
    if odd or not factors["down"]:
        what = f"{len(odd)} tensors that are no factors of a LoRA ({', '.join(odd[:3])})" if odd else "no factors"
        raise ValueError(f"the LoRA '{path}' holds {what}; expected names such as blocks.0.self_attn.q.lora_A.weight")
    down, up, alpha = (convert_wan_state_dict(_without_peft(part)) for part in (*factors.values(), alphas))
    alone = sorted(down.keys() ^ up.keys()) + sorted(alpha.keys() - down.keys())
    if alone:
        raise ValueError(f"the LoRA '{path}' has only a part of what {alone[0]} needs; download it again")
    default = _configured_alpha(Path(path).expanduser())
    return {
        name: LoraFactors(down[name], up[name], float(alpha[name]) if name in alpha else default or len(down[name]))
        for name in down
    }


def _without_peft(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names without the levels that peft and diffusers put before them."""
    return {re.sub(r"^(?:base_model\.|transformer\.)", "", name): tensor for name, tensor in tensors.items()}


def _configured_alpha(path: Path) -> float | None:
    """Alpha as an `adapter_config.json` beside the weights has it."""
    config_path = (path if path.is_dir() else path.parent) / "adapter_config.json"
    if not config_path.is_file():
        return None
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        unknown = [name for name in _NOT_MERGED if config.get(name)]
        alpha = float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{config_path}' is damaged: expected JSON with a number lora_alpha") from error
    if unknown:
        raise ValueError(f"'{config_path}' asks for {', '.join(unknown)}; only plain LoRA can be merged")
    return alpha
