"""A video as one picture: frames from start to end, row by row."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from wan_autoregressive.atomic_file import replaced_file
from wan_autoregressive.media.ffmpeg import INPUT_LIMITS, count_video_frames, file_url, run_ffmpeg, time_limit_s

GAP_PIXELS = 2
_GRAY = 128


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
        OSError: the picture could not be written.
    """
    source = Path(video)
    frames = count_video_frames(source)
    every = math.ceil(frames / (columns * rows))
    shown = math.ceil(frames / every)
    words = [*INPUT_LIMITS, "-i", file_url(source), "-map", "0:v:0", "-fps_mode", "passthrough"]
    words += ["-vf", f"select=not(mod(n\\,{every})),scale={width}:-2:flags=neighbor"]
    output, problem = run_ffmpeg([*words, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], time_limit_s(source))
    if problem is not None:
        raise ValueError(f"cannot read '{source}' for a contact sheet: {problem}")
    save_contact_sheet(np.frombuffer(output, np.uint8).reshape(shown, -1, width, 3), sheet, columns)
    return shown


def save_contact_sheet(
    frames: npt.NDArray[np.uint8], sheet: str | os.PathLike[str], columns: int = 8, scale: int = 1
) -> None:
    """Write frames (frames, height, width, 3) to the PNG `sheet`, in reading order, in rows of `columns`.

    Args:
        scale: integer factor by which every pixel is repeated.

    Raises:
        OSError: the picture could not be written.
    """
    count, height, width, _ = frames.shape
    columns = min(columns, count)
    cell = np.array((height, width)) + GAP_PIXELS
    pixels = np.full((*(cell * (math.ceil(count / columns), columns) + GAP_PIXELS), 3), _GRAY, np.uint8)
    for number, frame in enumerate(frames):
        top, left = cell * divmod(number, columns) + GAP_PIXELS
        pixels[top : top + height, left : left + width] = frame
    with replaced_file(Path(sheet)) as part:
        Image.fromarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1)).save(part, format="PNG")
