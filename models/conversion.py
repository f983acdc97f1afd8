"""Names of Wan transformer weights: the original ones to diffusers' `WanTransformer3DModel`, and a check that all fit.

The original names are those of Wan-Video/Wan2.1 (`wan/modules/model.py`); checkpoints trained with Self-Forcing and
its successors put `model.` before them and may carry the prefixes of FSDP, DDP, activation checkpointing or
`torch.compile`. Reading files is in `checkpoint_files`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import nn

from wan_autoregressive.models.checkpoint_files import load_checkpoint

__all__ = ["check_state_dict", "convert_wan_state_dict", "load_checkpoint"]

# Wrapper modules add a level anywhere in a name; it holds no weights of its own.
_WRAPPER_LEVELS = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_LEADING_LEVELS = re.compile(r"^(?:(?:model|module|diffusion_model)\.)+")
# What occurs in diffusers' names only; `patch_embedding.weight` and a few others occur in both schemes. Of the norms
# only that of the cross-attention has weights: the original calls it `norm3`, diffusers `norm2`.
_IN_DIFFUSERS = re.compile(
    r"^(?:condition_embedder|proj_out)\.|(?:^|\.)scale_shift_table$|\.(?:attn[12]|ffn\.net|norm2|norm_added_k)\."
)
# Of first-and-last-frame models; diffusers' converter does not know it.
_POSITIONS = {"img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed"}
_OF_OTHER_MODELS = ("motion_encoder.", "face_adapter.")  # whose values the converter changes


def convert_wan_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames a Wan transformer's weights to the names of diffusers' `WanTransformer3DModel`.

    Takes original names and diffusers names (which pass through, so converting twice changes nothing), each with or
    without `model.` and wrapper prefixes. A name of neither scheme passes through without its prefixes;
    `check_state_dict` then lists it. The order is kept, and the values are the same tensor objects: nothing is
    copied.

    Returns:
        A new dict, `{diffusers name: tensor}`.

    Raises:
        ValueError: two names become one (for example `model.x` beside `x`), or original and diffusers names are
            mixed, which no single training run writes.
    """
    converted: dict[str, torch.Tensor] = {}
    source_of: dict[str, str] = {}
    first_original = first_diffusers = ""
    for source, tensor in state_dict.items():
        plain = _LEADING_LEVELS.sub("", _WRAPPER_LEVELS.sub("", source))
        target = _diffusers_name(plain)
        if target in source_of:
            raise ValueError(
                f"Both {source_of[target]!r} and {source!r} hold the weight {target!r}; "
                "the state dict mixes two models, pass only one of them"
            )
        if target != plain:
            first_original = first_original or source
        elif _IN_DIFFUSERS.search(plain):
            first_diffusers = first_diffusers or source
        source_of[target] = source
        converted[target] = tensor
    if first_original and first_diffusers:
        raise ValueError(
            f"The state dict mixes original Wan names (such as {first_original!r}) with diffusers names (such as "
            f"{first_diffusers!r}); pass weights that use one of the two"
        )
    return converted


def _diffusers_name(name: str) -> str:
    """One original parameter name, prefixes removed, to diffusers; any other name unchanged."""
    if name in _POSITIONS:
        return _POSITIONS[name]
    if _IN_DIFFUSERS.search(name) or name.startswith(_OF_OTHER_MODELS):
        return name
    (renamed,) = convert_wan_transformer_to_diffusers({name: None})
    return renamed


def check_state_dict(
    state_dict: Mapping[str, torch.Tensor], expected: nn.Module | Mapping[str, torch.Size | tuple[int, ...]]
) -> None:
    """Raises unless `state_dict` holds exactly the expected weights, in floating point and in the expected shapes.

    Args:
        state_dict: weights in diffusers names.
        expected: the model to be filled (one on the `meta` device will do) or `{name: shape}`.

    Raises:
        ValueError: one line that counts the missing, extra, misshapen and non-float weights and names the first few.
    """
    if isinstance(expected, nn.Module):
        shapes = {name: tuple(tensor.shape) for name, tensor in expected.state_dict().items()}
    else:
        shapes = {name: tuple(shape) for name, shape in expected.items()}
    shared = [name for name in shapes if name in state_dict]
    misshapen = [
        f"{name} is {list(state_dict[name].shape)}, expected {list(shapes[name])}"
        for name in shared
        if tuple(state_dict[name].shape) != shapes[name]
    ]
    not_float = [f"{name} is {state_dict[name].dtype}" for name in shared if not state_dict[name].is_floating_point()]
    problems = [
        _count("missing", [name for name in shapes if name not in state_dict]),
        _count("extra", [name for name in state_dict if name not in shapes]),
        _count("misshapen", misshapen),
        _count("not floating point", not_float),
    ]
    found = "; ".join(problem for problem in problems if problem)
    if found:
        raise ValueError(f"The weights do not fit the model of {len(shapes)} tensors: {found}")


def _count(kind: str, entries: Iterable[str], shown: int = 5) -> str:
    """`"7 missing (a, b, c, d, e, and 2 more)"`, or an empty string for none."""
    listed = list(entries)
    if not listed:
        return ""
    more = f", and {len(listed) - shown} more" if len(listed) > shown else ""
    return f"{len(listed)} {kind} ({', '.join(listed[:shown])}{more})"
