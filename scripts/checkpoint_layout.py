"""Writing a checkpoint folder in the layout of a stock diffusers `WanPipeline`, whole or not at all.

The index names stock classes on purpose: the same folder then loads in plain diffusers, from the Hub too, and
`WanAutoregressivePipeline.from_pretrained` swaps in the classes of this package.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers

from wan_autoregressive.schedulers import SelfForcingScheduler

_STOCK_INDEX = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


@contextmanager
def new_checkpoint_folder(output: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `output` and renames it to `output` when the block ends without an error.

    On any error (Ctrl-C included) that folder and the parents made for it are removed, and what stood at `output`
    before is untouched. A folder is only ever replaced with `overwrite=True`, and only if it is a checkpoint
    (holds a `model_index.json`), so that a mistyped path cannot cost more than a checkpoint.

    Raises:
        ValueError: `output` is a file, or a non-empty folder that may not be replaced.
        OSError: the place is not writable.
    """
    target = Path(output).expanduser().resolve()
    refuse_occupied(target, overwrite)
    made_parents = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir()
        yield partial
        _replace_folder(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made_parents:  # innermost first
            parent.rmdir()
        raise


def refuse_occupied(target: Path, overwrite: bool) -> None:
    """Raise `ValueError` where `new_checkpoint_folder` would."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"The output {target} is a file; give the name of a new folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"The output folder {target} exists and is not empty; name another or pass --overwrite")
    if not (target / "model_index.json").is_file():
        raise ValueError(
            f"The output folder {target} is not empty and holds no model_index.json, so it is not a checkpoint and "
            "--overwrite does not remove it; name another folder"
        )


def _replace_folder(partial: Path, target: Path) -> None:
    """Renames `partial` to `target`; an old `target` is put back if that fails and removed only afterwards."""
    if not target.exists():
        os.replace(partial, target)
        return
    retired = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    os.replace(target, retired)
    try:
        os.replace(partial, target)
    except BaseException:
        os.replace(retired, target)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def write_scheduler(folder: Path, denoising_steps: Sequence[float], shift: float = 5.0, warp: bool = True) -> None:
    """Writes `folder/scheduler/scheduler_config.json` for `SelfForcingScheduler`.

    `shift` and `num_train_timesteps` are also read by diffusers' flow-matching schedulers, so the folder keeps its
    shift when a stock pipeline loads it.

    Raises:
        ValueError: the steps or the shift are not allowed (see `SelfForcingScheduler`).
    """
    if not math.isfinite(shift):
        raise ValueError(f"The shift is {shift}; it must be a positive number (the published recipes use 5 or 8)")
    scheduler = SelfForcingScheduler(denoising_steps=list(denoising_steps), shift=shift, warp=warp)
    scheduler.save_pretrained(folder / "scheduler")


def write_model_index(
    folder: Path,
    tokenizer_class: str,
    text_encoder_class: str,
    expand_timesteps: bool = False,
    pipeline_class: str = "WanPipeline",
    others: Mapping[str, Any] | None = None,
) -> None:
    """Writes `folder/model_index.json` as `save_pretrained` of a stock pipeline would.

    `expand_timesteps` is Wan2.2-TI2V's flag: stock pipelines then give every token its own timestep. `others` are
    entries as they are: of a second transformer, of what encodes images.
    """
    index: dict[str, Any] = {
        "_class_name": pipeline_class,
        "_diffusers_version": diffusers.__version__,
        "boundary_ratio": None,
        "expand_timesteps": expand_timesteps,
        **_STOCK_INDEX,
        "text_encoder": ["transformers", text_encoder_class],
        "tokenizer": ["transformers", tokenizer_class],
        **(others or {}),
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model_index.json").write_text(text, encoding="utf-8")
