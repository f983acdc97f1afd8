"""Read what a video starts from: an image or a clip, as uint8 pixels of the size that is generated."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from wan_autoregressive.media.ffmpeg import INPUT_LIMITS, file_url, run_ffmpeg, time_limit_s

MOST_PIXELS = 8192 * 8192
"""Of one image or one frame of a clip. A file of a few kB can claim billions, and decoding takes memory for each."""

MOST_CLIP_BYTES = 4 * 2**30
"""Of the pixels of a clip that is read without a limit on its frames."""


def load_image(path: str | os.PathLike[str], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Read an image as (1, height, width, 3) uint8: scaled to cover the size, then cropped at the centre.

    The orientation that a camera noted in the file is applied; transparency is laid over white.

    Raises:
        ValueError: the file is missing, is no image, is damaged, or has more than `MOST_PIXELS` pixels.
    """
    source = _existing_file(path, "image")
    try:
        # What Pillow warns of (large pictures, odd metadata) is either an error here or of no consequence.
        with warnings.catch_warnings(action="ignore"), Image.open(source) as opened:
            if opened.width * opened.height > MOST_PIXELS:  # known before anything is decoded
                raise ValueError(
                    f"it has {opened.width}x{opened.height} pixels, the most that is read is {MOST_PIXELS:,} "
                    "(8192x8192); scale it down first"
                )
            image = fit_image(opened, height, width)
    # Pillow's decoders raise many kinds (OSError, SyntaxError, struct.error, DecompressionBombError) for a bad file.
    except Exception as error:
        raise ValueError(f"cannot read '{source}' as an image: {_one_line(error)}") from error
    return np.asarray(image, dtype=np.uint8)[None]


def fit_image(opened: Image.Image, height: int, width: int) -> Image.Image:
    """An RGB picture of that size: turned as the camera noted, over white, scaled to cover, cropped at the centre."""
    image: Image.Image = ImageOps.exif_transpose(opened)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return ImageOps.fit(image.convert("RGB"), (width, height), method=Image.Resampling.LANCZOS)


def load_video(
    path: str | os.PathLike[str],
    height: int,
    width: int,
    max_frames: int | None = None,
    fps: float | None = None,
) -> npt.NDArray[np.uint8]:
    """Read a clip as (frames, height, width, 3) uint8: scaled to cover the size, then cropped at the centre.

    Args:
        path: a file in one of `ffmpeg.CONTAINERS`.
        height, width: size of the returned frames in pixels.
        max_frames: stop after so many frames; everything when None.
        fps: resample to this rate (frames repeated or left out), so that motion keeps its speed; None takes every
            frame as it is. A gap between the times of two frames is filled with the earlier one.

    Raises:
        ValueError: the file is missing, is no video, is damaged before `max_frames` are read, or, without
            `max_frames`, has more than `MOST_CLIP_BYTES` of pixels.
    """
    source = _existing_file(path, "video")
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames must be at least 1, got {max_frames}")
    frame_bytes = height * width * 3
    most_frames = max_frames or MOST_CLIP_BYTES // frame_bytes + 1
    filters = [f"scale={width}:{height}:force_original_aspect_ratio=increase:flags=lanczos", f"crop={width}:{height}"]
    if fps is not None:
        # The filter fills a gap at once, before anything behind it can stop it: a file may claim one of years. No gap
        # has to be longer than all that will be read.
        gap_s = most_frames / fps
        filters = [f"setpts='if(eq(N,0),PTS,min(PTS,PREV_OUTPTS+{gap_s:.9g}/TB))'", f"fps={fps:.6g}", *filters]
    # -xerror: a damaged clip must not pass for a shorter one.
    words = ["-xerror", "-max_pixels", str(MOST_PIXELS), *INPUT_LIMITS, "-i", file_url(source), "-map", "0:v:0"]
    words += ["-vf", ",".join(filters), "-fps_mode", "passthrough", "-frames:v", str(most_frames)]
    output, problem = run_ffmpeg([*words, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], time_limit_s(source))
    if problem is None and (not output or len(output) % frame_bytes):
        problem = "it holds no whole frame"
    if max_frames is None and len(output) > MOST_CLIP_BYTES:
        problem = f"it has more than {most_frames - 1} frames; give max_frames"
    if problem is not None:
        raise ValueError(f"cannot read '{source}' as a video: {problem}")
    try:
        return np.frombuffer(bytearray(output), dtype=np.uint8).reshape(-1, height, width, 3)
    except MemoryError as error:
        raise ValueError(f"cannot read '{source}' as a video: there is not enough memory for its frames") from error


def _existing_file(path: str | os.PathLike[str], kind: str) -> Path:
    source = Path(path)
    if not source.is_file():
        state = "is not a file" if source.exists() else "does not exist"
        raise ValueError(f"cannot read the {kind} '{source}': it {state}")
    return source


def _one_line(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    return " ".join(str(error).split()) or type(error).__name__
