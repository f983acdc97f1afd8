"""Names of Wan transformer weights: the original ones to diffusers' `WanTransformer3DModel`, and a check that all fit.

The original names are those of Wan-Video/Wan2.1 (`wan/modules/model.py`); checkpoints trained with Self-Forcing and
its successors put `model.` before them and may carry the prefixes of FSDP, DDP, activation checkpointing or
`torch.compile`. Reading files is in `checkpoint_files`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from wan_autoregressive.models.checkpoint_files import load_checkpoint

__all__ = ["check_state_dict", "convert_wan_state_dict", "load_checkpoint"]

# Wrapper modules add a level anywhere in a name; it holds no weights of its own.
_WRAPPER_LEVELS = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_LEADING_LEVELS = re.compile(r"^(?:(?:model|module|diffusion_model)\.)+")
_BLOCK = re.compile(r"^(blocks\.\d+)\.(.+)$")

# Modules: the parameter's own name (`weight`, `bias`) stays.
_MODULES = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
}
_PARAMETERS = {
    "head.modulation": "scale_shift_table",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
}
_ATTENTION_MODULES = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}
# The original numbers its norms self-attention, feed-forward, cross-attention; diffusers in order of use. Only the
# cross-attention norm has weights, so `norm3` in a state dict is always an original name and `norm2` diffusers'.
_BLOCK_MODULES = {
    **{f"self_attn.{old}": f"attn1.{new}" for old, new in _ATTENTION_MODULES.items()},
    **{f"cross_attn.{old}": f"attn2.{new}" for old, new in _ATTENTION_MODULES.items()},
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_BLOCK_PARAMETERS = {"modulation": "scale_shift_table"}

_DIFFUSERS_MODULES = frozenset(_MODULES.values())
_DIFFUSERS_BLOCK_MODULES = frozenset(_BLOCK_MODULES.values())


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
                "the state dict mixes two models, pass only one of them."
            )
        if target != plain:
            first_original = first_original or source
        elif _is_diffusers_name(plain):
            first_diffusers = first_diffusers or source
        source_of[target] = source
        converted[target] = tensor
    if first_original and first_diffusers:
        raise ValueError(
            f"The state dict mixes original Wan names (such as {first_original!r}) with diffusers names (such as "
            f"{first_diffusers!r}); pass weights that use one of the two."
        )
    return converted


def _diffusers_name(name: str) -> str:
    """One original parameter name, prefixes removed, to diffusers; any other name unchanged."""
    block = _BLOCK.match(name)
    prefix, local = (f"{block[1]}.", block[2]) if block else ("", name)
    parameters, modules = (_BLOCK_PARAMETERS, _BLOCK_MODULES) if block else (_PARAMETERS, _MODULES)
    module, _, leaf = local.rpartition(".")
    if local in parameters:
        return prefix + parameters[local]
    if module in modules:
        return f"{prefix}{modules[module]}.{leaf}"
    return name


def _is_diffusers_name(name: str) -> bool:
    """Whether the name occurs in diffusers' scheme only (`patch_embedding.weight` occurs in both)."""
    block = _BLOCK.match(name)
    local = block[2] if block else name
    if local == "scale_shift_table" or name in _PARAMETERS.values():
        return True
    return local.rpartition(".")[0] in (_DIFFUSERS_BLOCK_MODULES if block else _DIFFUSERS_MODULES)


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
        raise ValueError(f"The weights do not fit the model of {len(shapes)} tensors: {found}.")


def _count(kind: str, entries: Iterable[str], shown: int = 5) -> str:
    """`"7 missing (a, b, c, d, e, and 2 more)"`, or an empty string for none."""
    listed = list(entries)
    if not listed:
        return ""
    more = f", and {len(listed) - shown} more" if len(listed) > shown else ""
    return f"{len(listed)} {kind} ({', '.join(listed[:shown])}{more})"
