"""The ffmpeg binary that comes with `imageio-ffmpeg`: found, run within a time limit, failures put in words."""

from __future__ import annotations

import re
import signal
import subprocess
from functools import lru_cache
from pathlib import Path

import imageio_ffmpeg

QUIET = ("-hide_banner", "-nostdin", "-loglevel", "error")

# Containers that hold their own content. Others (ffconcat, HLS, DASH, image lists) are texts that name further files.
CONTAINERS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "ogg", "asf", "gif", "ivf", "mxf")
# Nothing but local files in such containers, whatever a file says of itself.
INPUT_LIMITS = ("-protocol_whitelist", "file", "-format_whitelist", ",".join(CONTAINERS))


def ffmpeg_executable() -> str:
    """Return the path of the ffmpeg binary; RuntimeError when the wheel has none for this platform."""
    return imageio_ffmpeg.get_ffmpeg_exe()


def file_url(path: Path) -> str:
    """Return `path` so that ffmpeg takes it for a file whatever it is called (`a:b.mp4` would name a protocol)."""
    return f"file:{path}"


def time_limit_s(*paths: Path) -> float:
    """Seconds after which reading these files through counts as hung: a minute, and 100 kB a second."""
    return 60 + sum(path.stat().st_size for path in paths if path.is_file()) / 100_000


def run_ffmpeg(words: list[str], limit_s: float, given: bytes = b"") -> tuple[bytes, str | None]:
    """Run ffmpeg to its end, or kill it after `limit_s` seconds.

    Args:
        words: of the command, without the executable.
        given: what it reads from its input.

    Returns:
        What it wrote to its output, and what went wrong in one line, or None.
    """
    command = [ffmpeg_executable(), *QUIET, *words]
    try:
        # Its own session: Ctrl-C is for us, and must not make a whole file look damaged.
        done = subprocess.run(
            command, input=given, capture_output=True, check=False, start_new_session=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired:  # killed by SIGKILL: it ignores gentler signals while it is busy
        return b"", f"ffmpeg was not done after {limit_s:.0f} seconds and was killed"
    except MemoryError:
        return b"", "there is not enough memory for what ffmpeg gives"
    except OSError as error:
        return b"", f"ffmpeg could not be started: {error.strerror or error}"
    return done.stdout, None if done.returncode == 0 else describe_exit(done.returncode, done.stderr)


@lru_cache(maxsize=4)
def has_hybrid_fragmented(executable: str) -> bool:
    """Whether the mp4 muxer knows `hybrid_fragmented` (fragments while writing, a regular mp4 after a clean close)."""
    command = [executable, "-hide_banner", "-h", "muxer=mp4"]
    answer = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False, timeout=60)
    return b"hybrid_fragmented" in answer.stdout


def count_video_frames(path: Path) -> int:
    """Count the frames that `path` holds by reading it through without decoding; ValueError if it does not open."""
    words = ["-progress", "-", *INPUT_LIMITS, "-i", file_url(path), "-map", "0:v:0", "-c", "copy", "-f", "null", "-"]
    output, problem = run_ffmpeg(words, time_limit_s(path))
    counts = re.findall(rb"^frame=\s*(\d+)", output, flags=re.MULTILINE)
    if problem is not None or not counts:
        raise ValueError(f"{path} is not a readable video: {problem or 'it holds no frames'}")
    return int(counts[-1])


def describe_exit(returncode: int, stderr: bytes) -> str:
    """Say in one line how ffmpeg ended, with the most telling line of what it wrote."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    if any("not on whitelist" in line for line in lines):
        return f"it is in none of the containers that are read ({', '.join(CONTAINERS)})"
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
