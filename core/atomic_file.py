"""Files that appear whole or not at all. Knows nothing of what is in them."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replaced_file(target: Path, part: Path | None = None) -> Iterator[Path]:
    """Yield a new empty file beside `target`, which takes its place in one step when the block ends without an error.

    What stands at `target` is untouched until then, and links are replaced, never followed. The content is on the
    disk, not only in the system's memory, before the name changes. After an error nothing is left.

    Args:
        part: the name to write under; one of its own that nobody else writes to when None. Give one where a killed
            process must not leave a large file behind that nothing would ever remove.

    Raises:
        OSError: the file cannot be made, synced or moved.
    """
    if part is None:
        part = _part_of(target)
    else:
        part.unlink(missing_ok=True)  # a new file: a process that was killed may still have the old one open
    with _naming(target):
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield part
        with _naming(target):
            sync_file(part)
            os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Replace `target` by a file that holds `text` in UTF-8; OSError when that cannot be done."""
    with replaced_file(target) as part:
        part.write_text(text, encoding="utf-8")


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk; some file systems report a full disk only here."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_replaceable(target: Path) -> None:
    """Raise OSError unless `replaced_file` may put a file under this name; touches nothing.

    Refused are folders, named pipes, devices and sockets, and names that are too long.
    """
    try:
        # exists() would hide a name that is too long; the file that is written first has the longer one.
        with suppress(FileNotFoundError):
            _part_of(target).lstat()
        mode = target.stat().st_mode
    except FileNotFoundError:
        return  # also a link that leads nowhere
    except OSError as error:
        raise type(error)(f"cannot write '{target}': {error.strerror or error}") from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"'{target}' is a folder; give the name of a file")
    if not stat.S_ISREG(mode):
        raise OSError(f"'{target}' is a pipe, a device or a socket; give the name of a file")


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Let an OSError of the block name `target`, which the caller knows, and not the file beside it."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(target)) from error


def _part_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
