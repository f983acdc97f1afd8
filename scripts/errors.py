"""What a command says when something goes wrong: one line, whatever became of stderr."""

from __future__ import annotations

import contextlib
import errno
import os
import sys

from wan_autoregressive.scripts.interrupts import Stopped

# OSErrors that say the machine gave out, rather than that a name was wrong.
_MACHINE_ERRNOS = {errno.EDQUOT, errno.EIO, errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


class VideoIsWholeError(RuntimeError):
    """Something failed after the video was finished: it is there, what should come with it is not."""


def print_error(message: str) -> None:
    """Write one line to stderr, if there is somebody."""
    print_note(f"error: {message}")


def print_note(message: str) -> None:
    """Write one line to stderr, if there is somebody."""
    with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
        print(f"wan-ar: {message}", file=sys.stderr, flush=True)


def describe_error(error: BaseException) -> str:
    """Say in one line what happened, with the notes that were added on the way."""
    words = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        words = words or "interrupted"
    elif isinstance(error, MemoryError):
        words = f"there is not enough memory{': ' if words else ''}{words}"
    elif isinstance(error, OSError) and error.strerror and error.filename is not None:
        words = f"{error.filename}: {error.strerror}"
    elif not isinstance(error, (ValueError, OSError, RuntimeError)):
        words = f"unexpected {type(error).__name__}: {words or 'no message'} (--debug shows where)"
    return "; ".join([words or type(error).__name__, *getattr(error, "__notes__", [])])


def exit_code(error: BaseException) -> int:
    """Return the exit code for an error that a command raised."""
    if isinstance(error, KeyboardInterrupt):
        return error.exit_code if isinstance(error, Stopped) else 130
    if isinstance(error, VideoIsWholeError):
        return 1
    # A full disk is for the caller to mend, whether Python or ffmpeg ran into it.
    if os.strerror(errno.ENOSPC) in str(error):
        return 2
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRNOS:
        return 1
    return 2 if isinstance(error, (ValueError, OSError)) else 1
