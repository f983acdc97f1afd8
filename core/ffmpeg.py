"""The ffmpeg binary that comes with `imageio-ffmpeg`: finding it, asking what it can do, saying why it failed."""

from __future__ import annotations

import re
import signal
import subprocess
from functools import lru_cache
from pathlib import Path

import imageio_ffmpeg

QUIET = ("-hide_banner", "-nostdin", "-loglevel", "error")


def ffmpeg_executable() -> str:
    """Return the path of the ffmpeg binary; RuntimeError when the wheel has none for this platform."""
    return imageio_ffmpeg.get_ffmpeg_exe()


def file_url(path: Path) -> str:
    """Return `path` so that ffmpeg takes it for a file whatever it is called (`a:b.mp4` would name a protocol)."""
    return f"file:{path}"


@lru_cache(maxsize=4)
def has_hybrid_fragmented(executable: str) -> bool:
    """Whether the mp4 muxer knows `hybrid_fragmented` (fragments while writing, a regular mp4 after a clean close)."""
    answer = subprocess.run(
        [executable, "-hide_banner", "-h", "muxer=mp4"], capture_output=True, stdin=subprocess.DEVNULL, check=False
    )
    return b"hybrid_fragmented" in answer.stdout


def count_video_frames(path: Path) -> int:
    """Count the frames that `path` holds by reading it through without decoding; ValueError if it does not open."""
    command = [ffmpeg_executable(), *QUIET, "-progress", "-", "-i", file_url(path)]
    command += ["-map", "0:v:0", "-c", "copy", "-f", "null", "-"]
    # Its own session: Ctrl-C is for us, and must not make a whole file look damaged.
    result = subprocess.run(
        command, capture_output=True, stdin=subprocess.DEVNULL, check=False, start_new_session=True
    )
    counts = re.findall(rb"^frame=\s*(\d+)", result.stdout, flags=re.MULTILINE)
    if result.returncode != 0 or not counts:
        raise ValueError(f"{path} is not a readable video: {describe_exit(result.returncode, result.stderr)}")
    return int(counts[-1])


def describe_exit(returncode: int, stderr: bytes) -> str:
    """Say in one line how ffmpeg ended, with the most telling line of what it wrote."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    # A full disk is reported once by the muxer and then hidden under lines about the consequences.
    reason = next((line for line in lines if "No space left" in line), lines[-1] if lines else "")
    reason = re.sub(r"^(\[[^\]]*\] ?)+", "", reason)
    if returncode < 0:
        try:
            ending = f"ffmpeg was killed by {signal.Signals(-returncode).name}"
        except ValueError:
            ending = f"ffmpeg was killed by signal {-returncode}"
    else:
        ending = f"ffmpeg ended with exit code {returncode}"
    return f"{ending} ({reason})" if reason else ending
