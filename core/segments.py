"""Join mp4 files of one kind to a single one without encoding anew."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from wan_autoregressive.ffmpeg import QUIET, count_video_frames, describe_exit, ffmpeg_executable, file_url
from wan_autoregressive.video_writer import VideoWriteError, check_video_target

# Frames are stored ahead of their time by up to two places (B-frames of B-frames), by fewer in very short segments.
# Left as they are the times of storage jump where such segments meet, and players repeat and drop frames there.
_EVEN_DTS = r"setts=pts=PTS:dts=if(eq(N\,0)\,PTS-2*DURATION\,PREV_OUTDTS+DURATION)"


def join_segments(paths: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> int:
    """Write the frames of `paths`, one after another and bit for bit as they are encoded, to `output`.

    The segments must come from writers with the same settings (size, rate, quality). Nothing appears under the name
    of `output`, and what is there is not touched, until the new file is whole and holds every frame.

    Returns:
        The number of frames.

    Raises:
        ValueError: there are no segments, one is not a readable video, or the name of the output does not end in .mp4.
        VideoWriteError: ffmpeg failed or lost frames. The segments are as they were.
        OSError: the output's folder cannot be written to.
    """
    target = check_video_target(output)
    segments = [Path(path).absolute() for path in paths]
    if not segments:
        raise ValueError(f"there are no segments to make '{target}' of")
    expected = sum(count_video_frames(path) for path in segments)
    part = target.with_name(f"{target.stem}.joining.mp4")
    part.unlink(missing_ok=True)  # a new file: the ffmpeg of a process that was killed may still write to the old one
    try:
        problem = _concatenate(segments, part)
        found = 0 if problem else count_video_frames(part)
        if problem is None and found != expected:
            problem = f"the segments hold {expected} frames and {found} are in the file"
        if problem is not None:
            raise VideoWriteError(f"could not join {len(segments)} segments to '{target}': {problem}")
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return expected


def _concatenate(segments: list[Path], part: Path) -> str | None:
    """Run ffmpeg; return what went wrong, or None."""
    with tempfile.TemporaryDirectory() as folder:
        # Links with plain names: the list's own rules for quoting do not cover every name a file can have.
        lines = ["ffconcat version 1.0"]
        for number, segment in enumerate(segments):
            os.symlink(segment, Path(folder) / f"{number}.mp4")
            lines.append(f"file {number}.mp4")
        listing = Path(folder) / "list.txt"
        listing.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [ffmpeg_executable(), *QUIET, "-y", "-f", "concat", "-i", file_url(listing)]
        command += ["-map", "0:v:0", "-c", "copy", "-bsf:v", _EVEN_DTS, "-f", "mp4", file_url(part)]
        # Its own session: Ctrl-C is for us.
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, start_new_session=True
        )
    return None if result.returncode == 0 else describe_exit(result.returncode, result.stderr)
