"""A finished video as one picture: frames from start to end, row by row."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from wan_autoregressive.ffmpeg import QUIET, count_video_frames, describe_exit, ffmpeg_executable, file_url

GAP_PIXELS = 2


def write_contact_sheet(
    video: str | os.PathLike[str], sheet: str | os.PathLike[str], columns: int = 8, rows: int = 4, width: int = 160
) -> int:
    """Write evenly spread frames of `video` to the PNG `sheet`, in reading order.

    Args:
        columns, rows: how many frames at most.
        width: of one frame, in pixels; the height follows.

    Returns:
        The number of frames shown.

    Raises:
        ValueError: `video` cannot be read.
        RuntimeError: the picture could not be written.
    """
    source, target = Path(video), Path(sheet)
    frames = count_video_frames(source)
    every = max(1, -(-frames // (columns * rows)))
    shown = -(-frames // every)
    part = target.with_name(f"{target.stem}.part.png")
    filters = [
        f"select=not(mod(n\\,{every}))",
        f"scale={width}:-2:flags=neighbor",
        f"tile={min(columns, shown)}x{-(-shown // columns)}:padding={GAP_PIXELS}:margin={GAP_PIXELS}:color=gray",
    ]
    command = [ffmpeg_executable(), *QUIET, "-y", "-i", file_url(source), "-vf", ",".join(filters)]
    command += ["-frames:v", "1", "-update", "1", file_url(part)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if result.returncode != 0:
        part.unlink(missing_ok=True)
        raise RuntimeError(
            f"could not write the contact sheet '{target}': {describe_exit(result.returncode, result.stderr)}"
        )
    os.replace(part, target)
    return shown
