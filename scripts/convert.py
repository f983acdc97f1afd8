"""`wan-ar convert`: a published transformer checkpoint and a Wan diffusers folder become a folder the pipeline loads.

Self-Forcing, LongLive, CausVid and others publish the transformer alone, in the original names. Tokenizer, text
encoder and VAE are those of the Wan model they were trained from (`base`), and are linked or copied from there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from wan_autoregressive.models.conversion import check_state_dict, convert_wan_state_dict, load_checkpoint
from wan_autoregressive.scripts.checkpoint_layout import (
    new_checkpoint_folder,
    write_model_index,
    write_scheduler,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COPIED_COMPONENTS = ("tokenizer", "text_encoder", "vae")
# Files that people edit by hand (configs, vocabularies) are copied, so that an edit of one folder stays there.
_LINKED_SUFFIXES = (".safetensors", ".bin")


def convert_checkpoint(
    checkpoint: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    weights: str = "auto",
    dtype: torch.dtype | None = None,
    denoising_steps: Sequence[float] = (1000, 750, 500, 250),
    shift: float = 5.0,
    warp: bool = True,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """Writes a complete pipeline folder from transformer weights and the folder of the Wan model they belong to.

    Args:
        checkpoint: see `load_checkpoint`; original or diffusers names.
        base: a Wan folder in diffusers layout. Its `transformer/config.json` says what the weights must look like;
            its transformer weights are not read and may be absent.
        output: the folder to write: in stock `WanPipeline` layout, with a `SelfForcingScheduler` config. It
            appears only when it is whole.
        weights: the entry of the checkpoint, such as `generator_ema`.
        dtype: of the stored weights; `None` keeps theirs. Modules that diffusers keeps in float32 (norms, the time
            embedder, modulation tables) are stored so whatever the dtype.
        denoising_steps, shift, warp: the recipe the checkpoint was trained for.
        overwrite: replace an existing checkpoint at `output`.
        max_shard_size: of one safetensors file.

    Returns:
        `output` as a path.

    Raises:
        ValueError: the checkpoint, the base or the recipe is not usable, or `output` is occupied.
        OSError: the disk is full or not writable.
    """
    base, output = Path(base).expanduser(), Path(output)
    index, transformer_config = _read_base(base)
    _refuse_overlap(base, Path(checkpoint), output)
    transformer = _skeleton(transformer_config, base)
    with new_checkpoint_folder(output, overwrite) as partial:
        # First what is quick to refuse, then the gigabytes.
        write_scheduler(partial, denoising_steps, shift, warp)
        write_model_index(
            partial, index["tokenizer"][1], index["text_encoder"][1], bool(index.get("expand_timesteps", False))
        )
        state_dict = convert_wan_state_dict(load_checkpoint(checkpoint, weights))
        check_state_dict(state_dict, transformer)
        # assign keeps the tensors as they are, memory-mapped if they were: a 14B model is never whole in memory
        # unless its dtype changes.
        transformer.load_state_dict(_storable(state_dict, dtype), assign=True)
        transformer.save_pretrained(partial / "transformer", max_shard_size=max_shard_size)
        for name in _COPIED_COMPONENTS:
            shutil.copytree(base / name, partial / name, copy_function=_link_or_copy)
    return output


def _read_base(base: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model index and the transformer config of a Wan folder in diffusers layout."""
    if not base.is_dir():
        raise ValueError(f"The base {base} is not a folder; give a downloaded Wan model in diffusers layout.")
    index = _read_json(base / "model_index.json")
    config = _read_json(base / "transformer" / "config.json")
    if not str(config.get("_class_name", "")).endswith("WanTransformer3DModel"):
        raise ValueError(
            f"The base {base} is not a Wan model: its transformer is a {config.get('_class_name')}, expected a "
            "WanTransformer3DModel."
        )
    if (index.get("transformer_2") or [None])[0] is not None:
        raise ValueError(
            f"The base {base} has two transformers (transformer_2, as in Wan2.2-A14B); only models with one work here."
        )
    for name in _COPIED_COMPONENTS:
        entry = index.get(name)
        if not (isinstance(entry, list) and len(entry) == 2 and entry[1]) or not (base / name).is_dir():
            raise ValueError(f"The base {base} has no {name}; give a complete Wan model in diffusers layout.")
    return index, config


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"The base has no {path}; give a complete Wan model in diffusers layout.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The file {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"The file {path} holds a {type(content).__name__}, expected a JSON object.")
    return content


def _refuse_overlap(base: Path, checkpoint: Path, output: Path) -> None:
    """Replacing `output` must not delete what is read, and `base` must not change."""
    target = output.expanduser().resolve()
    for role, source in (("base", base.resolve()), ("checkpoint", checkpoint.expanduser().resolve())):
        if source == target or target in source.parents:
            raise ValueError(f"The {role} {source} lies in the output folder {target}; name another output.")
    if base.resolve() in target.parents:
        raise ValueError(f"The output {target} lies in the base folder {base}; name a folder apart from the base.")


def _skeleton(config: dict[str, Any], base: Path) -> WanTransformer3DModel:
    """The transformer on the `meta` device: names and shapes, no memory."""
    try:
        with torch.device("meta"):
            return WanTransformer3DModel.from_config(config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"The file {base / 'transformer' / 'config.json'} describes no Wan model: {error}") from error


def _storable(state_dict: dict[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The weights in `dtype`, each owning its memory: safetensors refuses views that share a buffer."""
    keep_float32 = WanTransformer3DModel._keep_in_fp32_modules
    storable = {}
    for name, tensor in state_dict.items():
        if dtype is not None:
            tensor = tensor.to(torch.float32 if any(part in keep_float32 for part in name.split(".")) else dtype)
        is_view = tensor.untyped_storage().nbytes() != tensor.nbytes
        storable[name] = tensor.detach().clone() if is_view else tensor.detach()
    return storable


def _link_or_copy(source: str, target: str) -> None:
    """Hard-links a weight file (gigabytes for the text encoder) where the file system can, else copies it."""
    # A Hub download is a folder of links into a blob store; what is linked is the blob.
    real = os.path.realpath(source)
    if source.endswith(_LINKED_SUFFIXES):
        try:
            os.link(real, target)
            return
        except OSError:  # another file system, or one without hard links
            pass
    shutil.copyfile(real, target)


def _steps(text: str) -> tuple[float, ...]:
    try:
        numbers = [float(step) for step in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1000,750,500,250") from error
    return tuple(int(number) if number.is_integer() else number for number in numbers)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds `convert` to the command's subparsers; the parsed arguments carry `run` as `args.run`."""
    parser = subparsers.add_parser(
        "convert",
        help="turn a published checkpoint into a folder the pipeline loads",
        description="Turn transformer weights (Self-Forcing and relatives) plus the Wan model they were trained from "
        "into a folder for `wan-ar generate`, which stock diffusers loads too.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=".pt, .pth, .bin, .safetensors, index or folder")
    parser.add_argument("--base", required=True, metavar="DIR", help="the Wan model in diffusers layout")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--weights",
        default="auto",
        metavar="NAME",
        help="entry of the checkpoint, such as generator_ema or generator (default: generator_ema if there is one)",
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="dtype of the stored weights (default: keep)")
    parser.add_argument(
        "--steps",
        type=_steps,
        default=(1000, 750, 500, 250),
        metavar="LIST",
        help="denoising steps the checkpoint was trained for (default: 1000,750,500,250)",
    )
    parser.add_argument("--shift", type=float, default=5.0, help="timestep shift of the recipe (default: 5.0)")
    parser.add_argument("--no-warp", action="store_true", help="use the steps as timesteps, without the shift's warp")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint folder")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs `wan-ar convert`; returns 0, raises ValueError or OSError as `convert_checkpoint` does."""
    output = convert_checkpoint(
        args.checkpoint,
        args.base,
        args.output,
        weights=args.weights,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        denoising_steps=args.steps,
        shift=args.shift,
        warp=not args.no_warp,
        overwrite=args.overwrite,
    )
    print(f"Wrote {output}.")
    return 0
