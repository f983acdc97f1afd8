"""A folder that holds tensors and JSON as one unit: whole or not there, and every damaged bit noticed.

`state.json` names the safetensors file it belongs to, with its size and SHA-256. A save writes a new tensor file
beside the old one and then replaces `state.json` in one atomic step: a crash at any moment leaves the old state or the
new one, which renaming whole folders could not promise.
This module knows nothing of rollouts.
"""

import errno
import hashlib
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from wan_autoregressive.atomic_file import replaced_file, sync_file

FORMAT_VERSION = 2
_INDEX = "state.json"
# The last one is what safetensors writes to before it renames: it stays behind where a save was killed.
_PARTS = re.compile(r"state-[0-9a-f]{16}\.safetensors|\.state-\d+\.(json|safetensors)\.part|\.tmp[A-Za-z0-9]{6}")


def has_state(folder: str | os.PathLike[str]) -> bool:
    """Whether a state was ever completed in `folder`; it may be damaged all the same."""
    return (Path(folder) / _INDEX).is_file()


def write_state(folder: str | os.PathLike[str], content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Replace the state in `folder` (made if it is not there) by another. Other files in it are left alone, but for
    what safetensors leaves of a killed save.

    Args:
        content: anything that JSON holds, under keys other than `format`, `tensors` and `checksum`.
        tensors: on any device; they may share memory.

    Raises:
        OSError: it could not be written. The state that was there before is still whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # A name of its own: until the index names it, it belongs to nobody, and the next save removes it.
    path = folder / f"state-{secrets.token_hex(8)}.safetensors"
    try:
        _save_tensors(path, tensors)
        described = {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    document = {"format": FORMAT_VERSION, **content, "tensors": described}
    document["checksum"] = _checksum(document)
    with replaced_file(folder / _INDEX, part=folder / f".state-{os.getpid()}.json.part") as part:
        part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    _sync_folder(folder)
    _remove_parts(folder, keep=path)


def remove_state(folder: str | os.PathLike[str]) -> None:
    """Remove the state in `folder`, and what killed saves left of others. Other files in it are left alone."""
    (Path(folder) / _INDEX).unlink(missing_ok=True)  # first: without it the rest belongs to nobody
    _remove_parts(Path(folder))


def _remove_parts(folder: Path, keep: Path | None = None) -> None:
    for path in folder.iterdir():
        if path != keep and _PARTS.fullmatch(path.name):
            path.unlink(missing_ok=True)


def read_content(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON part of a state, checked; the tensors are neither read nor checked.

    Raises:
        ValueError: there is none, it is damaged or was edited, or its format is of another version.
    """
    path = Path(folder) / _INDEX
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no saved state in '{folder}': it holds no {_INDEX}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is damaged or cannot be read: {error}") from error
    if not isinstance(document, dict) or "format" not in document:
        raise ValueError(f"'{path}' is damaged: it does not say which format it has")
    if document["format"] != FORMAT_VERSION:
        raise ValueError(
            f"'{path}' has format {document['format']!r}, written by version {document.get('package_version')!r}; "
            f"this version reads format {FORMAT_VERSION}"
        )
    if document.pop("checksum", None) != _checksum(document):
        raise ValueError(f"'{path}' is damaged or was edited: its checksum does not match")
    return document


def read_state(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A whole state: what `write_state` was given, tensors on the CPU.

    Raises:
        ValueError: as `read_content`, or the tensor file is missing, cut off or damaged.
    """
    content = read_content(folder)
    described = content["tensors"]
    path = Path(folder) / described["file"]
    try:
        found_bytes = path.stat().st_size
        if found_bytes != described["bytes"]:
            raise ValueError(f"'{path}' is cut off or damaged: {found_bytes} bytes instead of {described['bytes']}")
        if file_sha256(path) != described["sha256"]:
            raise ValueError(f"'{path}' is damaged: its SHA-256 is not the one in {_INDEX}")
        return content, load_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"the saved state in '{folder}' is incomplete: '{path.name}' is missing") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read '{path}': {error}") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write and sync; OSError also for what safetensors reports in its own way."""
    # safetensors refuses tensors that share memory, and views would be written with all that they look into.
    copies = {
        name: torch.empty_like(t, device="cpu", memory_format=torch.contiguous_format) for name, t in tensors.items()
    }
    for name, tensor in tensors.items():
        copies[name].copy_(tensor)
    try:
        save_file(copies, path)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        code = int(found[1]) if found else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    sync_file(path)


def _sync_folder(folder: Path) -> None:
    """Make the renames last through a power cut, where the system lets a folder be synced."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
