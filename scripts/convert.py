"""`wan-ar convert`: a published transformer checkpoint and a Wan diffusers folder become a folder the pipeline loads.

Self-Forcing, LongLive, CausVid and others publish the transformer alone, in the original names. Tokenizer, text
encoder and VAE are those of the Wan model they were trained from (`base`), and are linked or copied from there.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from wan_autoregressive.configs.checkpoints import check_loras
from wan_autoregressive.scripts.checkpoint_layout import new_checkpoint_folder, write_model_index, write_scheduler
from wan_autoregressive.scripts.converted_transformer import ConvertedTransformer, LoraSource
from wan_autoregressive.scripts.load_pipeline import read_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COPIED_COMPONENTS = ("tokenizer", "text_encoder", "vae")
_OF_AN_IMAGE = ("image_encoder", "image_processor")  # of models that see one, not of all
_IMAGE_PIPELINE = "WanImageToVideoPipeline"
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
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    second: str | Path | None = None,
    second_lora: str | Path | None = None,
    second_lora_scale: float = 1.0,
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
        max_shard_size: of one safetensors file, and with it of the memory that this takes.
        lora: a LoRA to merge into the weights, see `load_lora`.
        lora_scale: its strength: 1 as it was trained, 0 without it.
        second: weights of the second transformer, for steps below the boundary, where the base has two; as
            `checkpoint`, and of the same entry.
        second_lora, second_lora_scale: the LoRA that is merged into these. `lora` goes into the first transformer
            alone, so that a pair takes it with a `second_lora` only: the same file again, or any with strength 0.

    Returns:
        `output` as a path.

    Raises:
        ValueError: the checkpoint, the base or the recipe is not usable, or `output` is occupied.
        OSError: the disk is full or not writable.
    """
    base, output = Path(base).expanduser(), Path(output)
    config_path = base / "transformer" / "config.json"
    index, config = _read_base(base)
    _check_pair(index, base, second)
    check_loras(second, lora, second_lora)
    loras = LoraSource.given(lora, lora_scale), LoraSource.given(second_lora, second_lora_scale)
    sources = {"base": base, "checkpoint": checkpoint, "second": second, "LoRA": lora, "second LoRA": second_lora}
    for role, source in sources.items():
        if source is not None:
            _refuse_overlap(role, Path(source), output)
    if base.resolve() in output.expanduser().resolve().parents:
        raise ValueError(f"The output {output} lies in the base folder {base}; name a folder apart from the base")
    with new_checkpoint_folder(output, overwrite) as partial:
        # First what is quick to refuse, then the gigabytes.
        write_scheduler(partial, denoising_steps, shift, warp)
        copied = [name for name in (*_COPIED_COMPONENTS, *_OF_AN_IMAGE) if _class_of(index, name) is not None]
        kept = ("boundary_ratio", "transformer_2", *_OF_AN_IMAGE)
        write_model_index(
            partial,
            index["tokenizer"][1],
            index["text_encoder"][1],
            bool(index.get("expand_timesteps", False)),
            pipeline_class="WanPipeline"
            if config.get("in_channels") == config.get("out_channels")
            else _IMAGE_PIPELINE,
            others={name: index[name] for name in kept if name in index},
        )
        transformers = {
            name: ConvertedTransformer.read(name, file, weights, merged, config, config_path)
            for name, file, merged in zip(("transformer", "transformer_2"), (checkpoint, second), loras, strict=True)
            if file is not None
        }
        for name, transformer in transformers.items():
            transformer.write(partial / name, dtype, max_shard_size)
        for name in copied:
            shutil.copytree(base / name, partial / name, copy_function=_link_or_copy)
    return output


def _class_of(index: dict[str, Any], name: str) -> str | None:
    """Of a component, by the model index; `None` for one that is not there."""
    entry = index.get(name)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 and entry[1] else None


def _check_pair(index: dict[str, Any], base: Path, second: str | Path | None) -> None:
    """Raise `ValueError` unless there are weights for as many transformers as the base has."""
    is_pair = _class_of(index, "transformer_2") is not None
    if is_pair and second is None:
        raise ValueError(
            f"The base {base} has two transformers (transformer_2, as in Wan2.2-A14B); give the weights of the second "
            "with --second"
        )
    if second is not None and not is_pair:
        raise ValueError(f"The base {base} has one transformer; leave out --second, or give a Wan2.2-A14B folder")
    first, other = (_sizes(base / name) for name in ("transformer", "transformer_2" if is_pair else "transformer"))
    if first != other:
        raise ValueError(f"The two transformers of the base {base} have other sizes each; a pair is of one size")


def _sizes(folder: Path) -> dict[str, Any]:
    """What a component's config says of the model, and not of who wrote it."""
    return {name: value for name, value in read_json(folder / "config.json").items() if not name.startswith("_")}


def _read_base(base: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model index and the transformer config of a Wan folder in diffusers layout."""
    if not base.is_dir():
        raise ValueError(f"The base {base} is not a folder; give a downloaded Wan model in diffusers layout")
    index = read_json(base / "model_index.json")
    config = read_json(base / "transformer" / "config.json")
    if not str(config.get("_class_name", "")).endswith("WanTransformer3DModel"):
        raise ValueError(
            f"The base {base} is not a Wan model: its transformer is a {config.get('_class_name')}, expected a "
            "WanTransformer3DModel"
        )
    for name in (*_COPIED_COMPONENTS, *(part for part in _OF_AN_IMAGE if _class_of(index, part) is not None)):
        if _class_of(index, name) is None or not (base / name).is_dir():
            raise ValueError(f"The base {base} has no {name}; give a complete Wan model in diffusers layout")
    return index, config


def _refuse_overlap(role: str, source: Path, output: Path) -> None:
    """Replacing `output` must not delete what is read."""
    read, target = source.expanduser().resolve(), output.expanduser().resolve()
    if read == target or target in read.parents:
        raise ValueError(f"The {role} {read} lies in the output folder {target}; name another output")


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
    parser.add_argument("--second", metavar="FILE", help="weights of the second transformer, where the base has two")
    parser.add_argument("--lora", metavar="FILE", help="a LoRA to merge into the weights, as peft saves it")
    parser.add_argument(
        "--lora-scale", type=float, default=1.0, metavar="X", help="strength of the LoRA (default: 1, as trained)"
    )
    parser.add_argument("--second-lora", metavar="FILE", help="a LoRA to merge into the weights of --second")
    parser.add_argument("--second-lora-scale", type=float, default=1.0, metavar="X", help="its strength (default: 1)")
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
        lora=args.lora,
        lora_scale=args.lora_scale,
        second=args.second,
        second_lora=args.second_lora,
        second_lora_scale=args.second_lora_scale,
    )
    print(f"Wrote {output}.")
    return 0
