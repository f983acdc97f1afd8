"""Reading transformer weights from the files people publish, without ever running code from them.

Pickles are read with `torch.load(weights_only=True)` only; a file that asks for more is refused.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

PICKLE_SUFFIXES = (".pt", ".pth", ".bin")
# Where training scripts put a transformer's weights, best first: the moving average is what Self-Forcing publishes
# its results with.
ENTRY_NAMES = ("generator_ema", "generator", "model", "state_dict")

StateDict = dict[str, torch.Tensor]

# How `torch.load` words a refusal; its other unpickling errors are about bytes that are no pickle.
_ASKS_FOR_CODE = re.compile(
    r"unsupported (?:global|class)|unrecognized function|allowed global|is blocked|blocklisted", re.IGNORECASE
)
# What a pickle begins with when `torch.save` did not write it: a newer protocol than its own, 2.
_FOREIGN_PICKLES = (b"\x80\x03", b"\x80\x04", b"\x80\x05")


def load_checkpoint(path: str | Path, weights: str = "auto", entries: Sequence[str] = ENTRY_NAMES) -> StateDict:
    """Loads a state dict on the CPU, in the names it is stored under; memory-mapped where the format allows.

    Args:
        path: a `.pt`, `.pth`, `.bin` or `.safetensors` file, the `.index.json` of a sharded safetensors checkpoint,
            or a folder: a diffusers pipeline or transformer folder, or any with one (sharded) safetensors
            checkpoint or one pickle in it.
        weights: the entry of a file that holds several: `"auto"` takes the first present of `entries`, or the
            file itself when it is a bare state dict; another value must be the name of an entry.
        entries: names to look for, best first.

    Raises:
        ValueError: one line; the path is missing, damaged, of an unknown kind, holds anything but tensors, or has
            no entry `weights`.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"The checkpoint {path} does not exist")
    if path.is_dir():
        path = _checkpoint_in_folder(path)
        if path.is_dir():
            return _bare(_load_shards(path, sorted(path.glob("*.safetensors"))), weights, path)
    if path.name.endswith(".index.json"):
        return _bare(_load_index(path), weights, path)
    if path.suffix == ".safetensors":
        return _bare(_load_safetensors(path), weights, path)
    if path.suffix in PICKLE_SUFFIXES:
        return _pick_weights(_load_pickle(path), weights, entries, path)
    raise ValueError(
        f"The checkpoint {path} has an unknown ending; allowed are {', '.join(PICKLE_SUFFIXES)}, .safetensors, "
        ".safetensors.index.json or a folder"
    )


def _checkpoint_in_folder(folder: Path) -> Path:
    """The one checkpoint in a folder; the folder itself for shards without an index."""
    if (folder / "model_index.json").is_file():
        folder = folder / "transformer"
    for pattern in ("*.safetensors.index.json", "*.safetensors", *(f"*{suffix}" for suffix in PICKLE_SUFFIXES)):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found and pattern == "*.safetensors" and all("-of-" in path.name for path in found):
            return folder
        if found:
            names = ", ".join(path.name for path in found[:5])
            raise ValueError(f"The folder {folder} holds {len(found)} checkpoints ({names}); name one of the files")
    raise ValueError(f"The folder {folder} holds no weights; expected .safetensors, .pt, .pth or .bin files")


def _load_pickle(path: Path) -> Any:
    """`torch.load(weights_only=True)` with every failure turned into one line."""
    is_zip = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        start = file.read(4)
        if not is_zip and start == b"PK\x03\x04":
            raise ValueError(f"The checkpoint {path} is damaged: its zip archive is cut off. Download it again")
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is then refused
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if _ASKS_FOR_CODE.search(str(error)) or start.startswith(_FOREIGN_PICKLES):
            raise ValueError(
                f"The checkpoint {path} holds Python objects other than tensors and is refused, because reading them "
                "could run code. Ask its author for a file of tensors only (.safetensors)"
            ) from error
        raise ValueError(f"The checkpoint {path} is not a torch checkpoint, or is damaged") from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        # Which of these torch raises on a damaged file depends on where the damage is.
        raise ValueError(f"The checkpoint {path} is not a torch checkpoint, or is damaged: {_line(error)}") from error


def _pick_weights(content: Any, weights: str, entries: Sequence[str], path: Path) -> StateDict:
    """The state dict in what a pickle held: an entry such as `generator_ema`, or all of it."""
    if not isinstance(content, dict) or not content:
        raise ValueError(f"The checkpoint {path} holds {_kind(content)}, not a dict of named tensors")
    nested = [name for name, value in content.items() if isinstance(value, dict) and value]
    if weights == "auto":
        present = [name for name in entries if name in nested]
        if not present and nested:
            raise ValueError(
                f"The checkpoint {path} has the entries {_names(content)}; choose one that holds the transformer with "
                "--weights"
            )
        return _only_tensors(content[present[0]] if present else content, path)
    if weights not in nested:
        raise ValueError(
            f"The checkpoint {path} has no weights {weights!r}; it "
            + (f"has the entries {_names(nested)}." if nested else "is a bare state dict: leave --weights out")
        )
    return _only_tensors(content[weights], path)


def _bare(state_dict: StateDict, weights: str, path: Path) -> StateDict:
    """Safetensors files hold one flat state dict, so there is nothing to choose from."""
    if weights != "auto":
        raise ValueError(
            f"The checkpoint {path} has no weights {weights!r}; it is a bare state dict: leave --weights out"
        )
    return state_dict


def _only_tensors(entry: dict[Any, Any], path: Path) -> StateDict:
    for name, value in entry.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"The checkpoint {path} holds {_kind(value)} under {name!r}; expected tensors only")
    return entry


def _load_safetensors(path: Path) -> StateDict:
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"The checkpoint {path} is not a safetensors file, or is damaged: {_line(error)}") from error


def _load_index(path: Path) -> StateDict:
    """A sharded checkpoint by its index, `{"weight_map": {name: file}}`; every named weight must be there."""
    try:
        weight_map: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = [path.parent / name for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The index {path} is damaged; expected JSON with a weight_map of names to files") from error
    if any(shard.parent != path.parent for shard in shards):
        raise ValueError(f"The index {path} names files outside its folder; expected plain file names")
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise ValueError(f"The index {path} names files that do not exist: {_names(absent)}. Download them again")
    state_dict = _load_shards(path.parent, shards)
    lost = [name for name in weight_map if name not in state_dict]
    if lost:
        raise ValueError(f"The index {path} names weights that its files do not hold: {_names(lost)}")
    return state_dict


def _load_shards(folder: Path, shards: list[Path]) -> StateDict:
    state_dict: StateDict = {}
    for shard in shards:
        part = _load_safetensors(shard)
        twice = [name for name in part if name in state_dict]
        if twice:
            raise ValueError(f"The folder {folder} holds {_names(twice)} in more than one file; remove the odd one")
        state_dict.update(part)
    return state_dict


def _names(names: Any, shown: int = 5) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:shown]) + (f" and {len(listed) - shown} more" if len(listed) > shown else "")


def _kind(value: Any) -> str:
    return "an empty dict" if value == {} else f"a value of type {type(value).__name__}"


def _line(error: Exception) -> str:
    """The first line of an error message: torch's run over a page."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]
