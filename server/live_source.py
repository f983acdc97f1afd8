"""A viewer's camera as the source of a video: the newest frames, never a backlog of old ones."""

from __future__ import annotations

import threading
from collections import deque

from PIL import Image

from wan_autoregressive.configs.prompt_times import LATENT_PIXEL_FRAMES
from wan_autoregressive.server.images import read_upload

_MOST_PIXELS = 2**20  # of a frame: it is unpacked on the model's thread


class LiveSource:
    """Frames come in at the camera's rate and leave a chunk at a time, at the model's.

    As many are kept as a chunk takes: where the model is slower than the camera, the oldest go unseen. It is an
    iterator that never waits and never ends: where there are none left, the last one comes again.

    Args:
        height, width: Pixels that the model makes.
        chunk_frames: Latent frames of the largest chunk.
    """

    def __init__(self, height: int, width: int, chunk_frames: int) -> None:
        self._size = height, width
        self._waiting: deque[bytes] = deque(maxlen=chunk_frames * LATENT_PIXEL_FRAMES)
        self._last: Image.Image | None = None
        self._lock = threading.Lock()

    @property
    def ready(self) -> bool:
        """Whether there is enough for a chunk."""
        return len(self._waiting) == self._waiting.maxlen

    def put(self, image: bytes) -> None:
        """A PNG, JPEG or WebP that was just taken; from any thread."""
        with self._lock:
            self._waiting.append(image)

    def __iter__(self) -> LiveSource:
        return self

    def __next__(self) -> Image.Image:
        """Raises `ValueError` for what is no picture."""
        with self._lock:
            image = self._waiting.popleft() if self._waiting else None
        if image is not None:
            self._last = read_upload(image, *self._size, most_pixels=_MOST_PIXELS)
        if self._last is None:
            raise ValueError("no frame of the camera has come yet")
        return self._last
