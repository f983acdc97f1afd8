"""`wan-ar pull`: a published checkpoint by name, downloaded and converted to a folder that the pipeline loads."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from huggingface_hub import constants

from wan_autoregressive.configs import load_preset
from wan_autoregressive.configs.checkpoints import (
    CACHE_VARIABLE,
    PublishedCheckpoint,
    gigabytes,
    published_checkpoint,
    published_checkpoints,
    pulled_folder,
)
from wan_autoregressive.scripts.hub_files import HubFile, download, list_files

# What conversion reads of a Wan model in diffusers layout; its transformer's weights are replaced.
_OF_THE_BASE = ("model_index.json", "transformer/config.json", "tokenizer/*", "text_encoder/*", "vae/*")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds `pull` to the command's subparsers; the parsed arguments carry `run` as `args.run`."""
    parser = subparsers.add_parser(
        "pull",
        help="get a published checkpoint by name",
        description="Download a published checkpoint and what it needs of its Wan model, and convert them to a folder "
        "for `wan-ar generate --model NAME`. The downloads stay in the Hub's cache, which `hf cache` manages.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="one of those that --list shows")
    parser.add_argument("--list", action="store_true", help="list the names, sizes and licences")
    parser.add_argument(
        "--to",
        metavar="DIR",
        help=f"folder to write (default: NAME in ${CACHE_VARIABLE}, or in ~/.cache/wan-autoregressive)",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs `wan-ar pull`; returns 0, raises as `pull_checkpoint` does."""
    if args.list:
        print(_listing())
        return 0
    if args.name is None:
        raise ValueError("give the name of a checkpoint; `wan-ar pull --list` shows them")
    entry = published_checkpoint(args.name)
    entry.check_supported()
    folder = pulled_folder(entry.name) if args.to is None else Path(args.to).expanduser()
    if (folder / "model_index.json").is_file():
        print(f"{folder} holds a checkpoint already; remove it to pull this one anew.")
        return 0
    pull_checkpoint(entry, folder)
    print(f"Wrote {folder}.")
    model = entry.name if args.to is None else f"{folder} --config {entry.preset}"
    print(f'Next: wan-ar generate --model {model} --prompt "a fox runs through fresh snow" --output fox.mp4')
    return 0


def pull_checkpoint(entry: PublishedCheckpoint, folder: Path) -> None:
    """Download a checkpoint and write it, converted, as `folder`, which appears only when it is whole.

    Raises:
        ValueError: the folder is occupied, there is not enough space, or the checkpoint is not what its entry says.
        DownloadError: see `hub_files`.
        OSError: the disk is full or not writable.
    """
    # The slow imports come after all that a wrong name would end.
    from wan_autoregressive.scripts.checkpoint_layout import refuse_occupied
    from wan_autoregressive.scripts.convert import convert_checkpoint

    refuse_occupied(folder, overwrite=False)
    own_files = list_files(entry.repo, entry.files)
    of_a_pair = ("transformer_2/config.json",) if entry.second is not None else ()
    base_files = list_files(entry.base, (*_OF_THE_BASE, *of_a_pair))
    _check_space(own_files, base_files, folder)
    _print_terms(entry, [*own_files, *base_files])
    paths = {(file.repo, file.path): download(file) for file in (*own_files, *base_files)}

    def own(path: str | None) -> Path | None:
        return None if path is None else paths[entry.repo, path]

    recipe = load_preset(str(entry.preset))
    convert_checkpoint(
        paths[entry.repo, entry.file],
        paths[entry.base, "model_index.json"].parent,
        folder,
        weights=entry.weights,
        denoising_steps=recipe["denoising_steps"],
        shift=recipe["shift"],
        warp=recipe["warp"],
        lora=own(entry.lora),
        lora_scale=entry.lora_scale,
        second=own(entry.second),
        second_lora=own(entry.second_lora),
        second_lora_scale=entry.second_lora_scale,
    )


def _print_terms(entry: PublishedCheckpoint, files: list[HubFile]) -> None:
    missing = sum(file.size for file in files if not file.is_cached)
    print(f"{entry.title}, from {entry.repo} and {entry.base}")
    print(f"Download: {gigabytes(missing)} of {gigabytes(sum(file.size for file in files))}")
    print(f"Licence: {entry.license_text}; of the Wan model: {entry.base_model.license}", flush=True)


def _check_space(own_files: list[HubFile], base_files: list[HubFile], folder: Path) -> None:
    """Raise `ValueError` unless there is room for the downloads and for what is made of them.

    The new transformer takes no more than the checkpoint; all else is linked where the file system can.
    """
    cache, target = _existing(Path(constants.HF_HUB_CACHE)), _existing(folder)
    to_download = sum(file.size for file in (*own_files, *base_files) if not file.is_cached)
    to_write = sum(file.size for file in own_files)
    if cache.stat().st_dev == target.stat().st_dev:
        _check_free(target, to_download + to_write)
    else:
        _check_free(cache, to_download)
        _check_free(target, to_write + sum(file.size for file in base_files))


def _check_free(place: Path, needed: int) -> None:
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"not enough space at '{place}': {gigabytes(needed)} needed, {gigabytes(free)} free; make room, or choose "
            "other places with --to and HF_HUB_CACHE"
        )


def _existing(path: Path) -> Path:
    """The path itself or the nearest of its parents that is there."""
    path = path.expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _listing() -> str:
    """A line per checkpoint: its name, what is to be downloaded, the licence, and what it is or lacks."""
    rows = []
    for entry in published_checkpoints().values():
        remark = entry.title if entry.needs is None else f"{entry.title} (not yet: it needs {entry.needs})"
        rows.append((entry.name, entry.size_text, entry.license_text, remark))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join(map(str.ljust, row, [*widths, 0])) for row in rows)
