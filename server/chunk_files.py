"""A chunk as a browser takes it: a whole little fragmented mp4 of its own, and a thumbnail.

One run of ffmpeg per chunk holds no state, so branches share their past, any chunk can be fetched again, and
`media.segments.join_segments` makes the download of the very same bytes.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from wan_autoregressive.media.ffmpeg import run_ffmpeg
from wan_autoregressive.media.reading import load_video
from wan_autoregressive.media.video_writer import VideoWriteError

_ENCODE_LIMIT_S = 60
_THUMBNAIL_PIXELS = 160
_LOSSLESS_PIXELS = 256 * 256  # of a frame: larger ones would be megabytes a chunk
IMAGES_CODEC = "images"
"""What a chunk's header calls `encode_images`."""


def encode_mp4(frames: npt.NDArray[np.uint8], fps: float, scale: int, crf: int = 18) -> bytes:
    """An mp4 of `(frames, height, width, 3)`: header and one fragment, the first frame a keyframe, no B-frames.

    Raises:
        VideoWriteError: ffmpeg failed.
    """
    count, height, width, _ = frames.shape
    filters = f"scale=iw*{scale}:ih*{scale}:flags=neighbor:out_color_matrix=bt709:out_range=tv"
    words = [
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:.6g}", "-i", "-"),
        *("-an", "-vf", filters, "-pix_fmt", "yuv420p", "-c:v", "libx264", "-preset", "veryfast"),
        # Without B-frames every chunk starts at time 0, so the places where they are joined are exact.
        *("-tune", "zerolatency", "-threads", "1", "-crf", str(crf), "-profile:v", "high", "-g", str(count)),
        *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"),
        *("-movflags", "+frag_keyframe+empty_moov+default_base_moof", "-f", "mp4", "-"),
    ]
    body, problem = run_ffmpeg(words, _ENCODE_LIMIT_S, given=frames.tobytes())
    if problem is not None or not body:
        raise VideoWriteError(f"could not encode a chunk of {count} frames: {problem or 'ffmpeg gave nothing'}")
    return body


def codec_of(mp4: bytes) -> str:
    """What `MediaSource.isTypeSupported` calls the H.264 in a file, `avc1.64001f` say; from its avcC box."""
    at = mp4.index(b"avcC")
    return f"avc1.{mp4[at + 5 : at + 8].hex()}"


def encode_thumbnail(frame: npt.NDArray[np.uint8]) -> bytes:
    """A small WebP of a frame `(height, width, 3)`."""
    image = Image.fromarray(frame)
    image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80, method=2)
    return file.getvalue()


def encode_images(frames: npt.NDArray[np.uint8]) -> bytes:
    """`(frames, height, width, 3)` as one image after the other, each after its length as a 32-bit big-endian number.

    Small ones are lossless WebP, large ones JPEG.
    """
    parts = []
    for frame in frames:
        file = io.BytesIO()
        if frame.shape[0] * frame.shape[1] <= _LOSSLESS_PIXELS:
            Image.fromarray(frame).save(file, "WEBP", lossless=True, method=0)
        else:
            Image.fromarray(frame).save(file, "JPEG", quality=90, subsampling=0)
        parts.append(struct.pack(">I", file.tell()) + file.getvalue())
    return b"".join(parts)


def images_of_mp4(path: Path, height: int, width: int) -> bytes:
    """What `encode_images` gives for the frames of a chunk's mp4, which are close to those that went into it.

    Raises:
        ValueError: the file cannot be read.
    """
    return encode_images(load_video(path, height, width))
