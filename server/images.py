"""Pictures that visitors send: looked at before they are unpacked, and never given to ffmpeg."""

from __future__ import annotations

import io
import threading
import warnings
from collections import OrderedDict

from PIL import Image

from wan_autoregressive.media.reading import fit_image

MAX_BYTES = 8 * 2**20
MAX_PIXELS = 16_000_000
FORMATS = ("PNG", "JPEG", "WEBP")
_MOST_WAITING = 64


def read_upload(data: bytes, height: int, width: int, most_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture of the size that is generated: upright, over white, scaled to cover and cropped at the centre.

    Raises:
        ValueError: it is no PNG, JPEG or WebP with one frame, has too many pixels, or is damaged.
    """
    try:
        # Opening reads the header only; what Pillow warns of is an error here or of no consequence.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            if opened.width * opened.height > most_pixels:
                raise ValueError(f"it has {opened.width}x{opened.height} pixels, more than {most_pixels:,}")
            if getattr(opened, "n_frames", 1) != 1:
                raise ValueError("it is an animation")
            return fit_image(opened, height, width)
    # Pillow's decoders raise many kinds (OSError, SyntaxError, struct.error, DecompressionBombError) for a bad file.
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else "it is of another kind, or damaged"
        raise ValueError(f"this is not a picture that can be used (PNG, JPEG or WebP): {reason}") from error


class ImageShelf:
    """Pictures that wait for the video that starts from them: the newest few, each taken once."""

    def __init__(self) -> None:
        self._images: OrderedDict[str, Image.Image] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, key: str, image: Image.Image) -> None:
        with self._lock:
            self._images[key] = image
            while len(self._images) > _MOST_WAITING:
                self._images.popitem(last=False)

    def take(self, key: str) -> Image.Image:
        """`ValueError` if it is not there (any more)."""
        with self._lock:
            if key not in self._images:
                raise ValueError("the picture is not there any more; send it again")
            return self._images.pop(key)
