"""One transformer of a converted checkpoint: its weights read and checked, a LoRA merged, written shard by shard."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from wan_autoregressive.models.conversion import check_state_dict, convert_wan_state_dict, load_checkpoint
from wan_autoregressive.models.lora import LoraFactors, load_lora
from wan_autoregressive.models.sharded_weights import write_sharded
from wan_autoregressive.scripts.load_pipeline import check_layers


@dataclass(frozen=True)
class LoraSource:
    """Where a LoRA is, and how strongly it counts: 1 as it was trained, 0 not at all."""

    path: str | Path
    scale: float = 1.0

    @classmethod
    def given(cls, path: str | Path | None, scale: float) -> LoraSource | None:
        """None for none; ValueError for the strength of one that is not given."""
        if path is None and scale != 1:
            raise ValueError(
                f"The strength of a LoRA is {scale}, and no LoRA is given; name its file, or leave it out"
            )
        return None if path is None else cls(path, scale)

    def read(self, state_dict: dict[str, torch.Tensor]) -> dict[str, LoraFactors]:
        """Its factors by the weights that they go into; ValueError where they do not fit these."""
        if not math.isfinite(self.scale):
            raise ValueError(f"The strength of the LoRA is {self.scale}; it must be a number (1 as it was trained)")
        factors = load_lora(self.path)
        unknown = [name for name in factors if name not in state_dict]
        if unknown:
            raise ValueError(
                f"The LoRA {self.path} is for weights that the model does not have ({', '.join(unknown[:3])})"
            )
        for name, factor in factors.items():
            try:
                factor.check_fits(state_dict[name])
            except ValueError as error:
                raise ValueError(f"The LoRA {self.path} does not fit the model: {name} has {error}") from error
        return factors


@dataclass(frozen=True)
class ConvertedTransformer:
    """Weights in diffusers' names, memory-mapped where the format allows, and what is merged into them."""

    config: dict[str, Any]
    state_dict: dict[str, torch.Tensor]
    factors: dict[str, LoraFactors] = field(default_factory=dict)
    lora_scale: float = 1.0

    @classmethod
    def read(
        cls,
        name: str,
        checkpoint: str | Path,
        weights: str,
        lora: LoraSource | None,
        config: dict[str, Any],
        config_path: Path,
    ) -> ConvertedTransformer:
        """Read and check all of it before anything is written.

        Args:
            name: of the component, for messages.
            weights: the entry of the checkpoint, see `load_checkpoint`.
            config, config_path: what the weights must look like, and where that stands.

        Raises:
            ValueError: weights or LoRA are not usable, or not of this model.
        """
        state_dict = convert_wan_state_dict(load_checkpoint(checkpoint, weights))
        check_layers(name, config, state_dict, config_path)
        check_state_dict(state_dict, _skeleton(config, config_path))
        if lora is None:
            return cls(config, state_dict)
        return cls(config, state_dict, lora.read(state_dict), lora.scale)

    def write(self, folder: Path, dtype: torch.dtype | None, max_shard_size: str) -> None:
        """Config and weights. What is memory-mapped stays so: a 14B model is never whole in memory."""
        _skeleton(self.config, folder / "config.json").save_config(folder)
        described = {
            name: tensor.to("meta", _stored_dtype(name, tensor, dtype)) for name, tensor in self.state_dict.items()
        }

        def make(name: str) -> torch.Tensor:
            weight = self.state_dict[name]
            if name in self.factors:
                weight = self.factors[name].merged_into(weight, self.lora_scale)
            return weight.to(described[name].dtype)

        write_sharded(folder, described, make, max_shard_size)


def _skeleton(config: dict[str, Any], config_path: Path) -> WanTransformer3DModel:
    """The transformer on the `meta` device: names and shapes, no memory."""
    try:
        with torch.device("meta"):
            return WanTransformer3DModel.from_config(config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"The file {config_path} describes no Wan model: {error}") from error


def _stored_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype a weight has after loading in `dtype`: diffusers keeps some modules in float32."""
    if dtype is None:
        return tensor.dtype
    keep_float32 = WanTransformer3DModel._keep_in_fp32_modules
    return torch.float32 if any(part in keep_float32 for part in name.split(".")) else dtype
