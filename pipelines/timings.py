"""Seconds per stage of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StageTimings:
    """How long the stages of one step took, in seconds.

    On a CUDA device the stages are marked by events, which are waited for only when a figure is read; measuring adds
    no sync to the loop. Elsewhere it is wall time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: dict[str, list[tuple[Any, Any]]] = {}
        self._fixed_s: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Account for the block, which runs on `device` if that is another one, in the current thread's stream."""
        device = device or self._device
        start = _mark(device)
        yield
        self._marks.setdefault(name, []).append((start, _mark(device)))

    def add_seconds(self, name: str, seconds: float) -> None:
        """Account for work that was measured elsewhere."""
        self._fixed_s[name] = self._fixed_s.get(name, 0.0) + seconds

    @property
    def text_s(self) -> float:
        """Prompt encoding."""
        return self._seconds("text")

    @property
    def encode_s(self) -> float:
        """VAE encoding of given frames, and writing given frames to the cache."""
        return self._seconds("encode")

    @property
    def denoise_s(self) -> float:
        """The denoising steps of the chunk."""
        return self._seconds("denoise")

    @property
    def clean_pass_s(self) -> float:
        """The pass that writes the previous chunk's clean keys and values, or rebuilds them after a prompt switch."""
        return self._seconds("clean_pass")

    @property
    def decode_s(self) -> float:
        """VAE decoding of the chunk."""
        return self._seconds("decode")

    @property
    def preview_s(self) -> float:
        """Decoding by the preview VAE."""
        return self._seconds("preview")

    def as_dict(self) -> dict[str, float]:
        """All of them by name, `text_s` and so on."""
        names = ("text", "encode", "denoise", "clean_pass", "decode")
        return {f"{name}_s": self._seconds(name) for name in names}

    def _seconds(self, name: str) -> float:
        total = self._fixed_s.get(name, 0.0)
        for start, stop in self._marks.get(name, ()):
            if isinstance(stop, float):
                total += stop - start
            else:
                stop.synchronize()
                total += start.elapsed_time(stop) / 1000
        return total


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
