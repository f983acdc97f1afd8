"""Read what a video starts from: an image or a clip, as uint8 pixels of the size that is generated."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from wan_autoregressive.ffmpeg import QUIET, describe_exit, ffmpeg_executable, file_url


def load_image(path: str | os.PathLike[str], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Read an image as (1, height, width, 3) uint8: scaled to cover the size, then cropped at the centre.

    The orientation that a camera noted in the file is applied; transparency is laid over white.

    Raises:
        ValueError: the file is missing, is no image, or is damaged.
    """
    source = _existing_file(path, "image")
    try:
        with Image.open(source) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = ImageOps.fit(image.convert("RGB"), (width, height), method=Image.Resampling.LANCZOS)
    # Pillow's decoders raise many kinds (OSError, SyntaxError, struct.error, DecompressionBombError) for a bad file.
    except Exception as error:
        raise ValueError(f"cannot read '{source}' as an image: {_one_line(error)}") from error
    return np.asarray(image, dtype=np.uint8)[None]


def load_video(
    path: str | os.PathLike[str],
    height: int,
    width: int,
    max_frames: int | None = None,
    fps: float | None = None,
) -> npt.NDArray[np.uint8]:
    """Read a clip as (frames, height, width, 3) uint8: scaled to cover the size, then cropped at the centre.

    Args:
        path: any file that ffmpeg reads.
        height, width: size of the returned frames in pixels.
        max_frames: stop after so many frames; everything when None.
        fps: resample to this rate (frames repeated or left out), so that motion keeps its speed; None takes every
            frame as it is.

    Raises:
        ValueError: the file is missing, is no video, or is damaged before `max_frames` are read.
    """
    source = _existing_file(path, "video")
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames must be at least 1, got {max_frames}")
    filters = [f"scale={width}:{height}:force_original_aspect_ratio=increase:flags=lanczos", f"crop={width}:{height}"]
    if fps is not None:
        filters.insert(0, f"fps={fps:.6g}")
    # -xerror: a damaged clip must not pass for a shorter one. Only local files, whatever a playlist inside may name.
    command = [ffmpeg_executable(), *QUIET, "-xerror", "-protocol_whitelist", "file", "-i", file_url(source)]
    command += ["-map", "0:v:0", "-vf", ",".join(filters), "-fps_mode", "passthrough"]
    command += ["-frames:v", str(max_frames)] if max_frames is not None else []
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    frame_bytes = height * width * 3
    if result.returncode != 0 or not result.stdout or len(result.stdout) % frame_bytes:
        reason = describe_exit(result.returncode, result.stderr) if result.returncode else "it holds no whole frame"
        raise ValueError(f"cannot read '{source}' as a video: {reason}")
    return np.frombuffer(bytearray(result.stdout), dtype=np.uint8).reshape(-1, height, width, 3)


def _existing_file(path: str | os.PathLike[str], kind: str) -> Path:
    source = Path(path)
    if not source.is_file():
        state = "is not a file" if source.exists() else "does not exist"
        raise ValueError(f"cannot read the {kind} '{source}': it {state}")
    return source


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
