"""What the server counts, for `/metrics`."""

from __future__ import annotations

import threading
from collections.abc import Mapping

STAGES = ("text", "encode", "clean_pass", "denoise", "preview", "decode", "video")
"""Where a chunk's seconds go: the stages of a rollout, and the mp4."""
_COUNTED = ("steps", "repeated", "step_s", "frames", "bytes", "cuts", "dropped", "failures")


class Figures:
    """Counts and seconds since the start. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = dict.fromkeys((*_COUNTED, *(f"{stage}_s" for stage in STAGES)), 0.0)

    def add(self, amounts: Mapping[str, float]) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._values[name] += amount

    def as_dict(self) -> dict[str, float]:
        with self._lock:
            return dict(self._values)
