"""What one live video has on the disk: chunks, thumbnails, latents, its timeline, and a rollout that can go on.

Names are made of numbers that the server counts; nothing that a visitor sends is part of one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from wan_autoregressive.atomic_file import write_text
from wan_autoregressive.pipelines.rollout import WanRollout

FORMAT = 1
IMAGE_NAME = "image.png"
"""The picture that a video starts from."""
_KINDS = ("mp4", "webp", "images", "latents")


@dataclass(frozen=True)
class VideoFolder:
    """The folder of a session."""

    path: Path

    def make(self) -> None:
        """Readable by this user alone. Raises `OSError`."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._chunks.mkdir(mode=0o700, exist_ok=True)

    @property
    def is_one(self) -> bool:
        """Whether `make` made it."""
        return self._chunks.is_dir()

    @property
    def saved_at(self) -> float | None:
        """When it was saved, in seconds since the epoch; None if never."""
        try:
            return self._description.stat().st_mtime
        except FileNotFoundError:
            return None

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def chunk_path(self, chunk: int, kind: str) -> Path:
        """Its `mp4`, its frames as `images`, its thumbnail (`webp`) or `latents`, which may not be there (yet)."""
        return self._chunks / f"{chunk}.{kind}"

    def remove_chunk(self, chunk: int) -> None:
        """Remove the files of a chunk, as far as there are any."""
        for kind in _KINDS:
            self.chunk_path(chunk, kind).unlink(missing_ok=True)

    @property
    def chunks(self) -> set[int]:
        """Numbers of the chunks that can be shown."""
        return {int(path.stem) for path in self._chunks.glob("*.mp4") if path.stem.isdecimal()}

    @property
    def numbers(self) -> set[int]:
        """Numbers of which there is any file, such as what a chunk was to be decoded from."""
        return {int(path.stem) for path in self._chunks.iterdir() if path.stem.isdecimal()}

    def write_latents(self, chunk: int, latents: torch.Tensor, noise: torch.Tensor) -> None:
        """Keep what a chunk was decoded from.

        Args:
            latents: `(1, channels, frames, height, width)`.
            noise: State of the generator behind the chunk.
        """
        tensors = {"latents": latents.detach().cpu().contiguous(), "noise": noise}
        try:
            save_file(tensors, self.chunk_path(chunk, "latents"))
        except SafetensorError as error:
            raise OSError(f"the latents of a chunk could not be written: {error}") from error

    def has_latents(self, chunk: int) -> bool:
        return self.chunk_path(chunk, "latents").is_file()

    def read_latents(self, chunks: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents of chunks in a row, joined along their frames, and the generator's state behind the last.

        Raises:
            ValueError: some are not there, or damaged.
        """
        try:
            parts = [load_file(self.chunk_path(chunk, "latents")) for chunk in chunks]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"the latents of a chunk cannot be read: {error}") from error
        return torch.cat([part["latents"] for part in parts], dim=2), parts[-1]["noise"]

    def write_image(self, image: Image.Image) -> None:
        """Keep the picture that the video starts from; it never changes."""
        if not self.image_path.exists():
            image.save(self.image_path)

    def read_image(self) -> Image.Image:
        with Image.open(self.image_path, formats=("PNG",)) as file:
            return file.convert("RGB")

    def write_description(self, values: dict[str, Any]) -> None:
        write_text(self._description, json.dumps({"format": FORMAT, **values}))

    def read_description(self) -> dict[str, Any]:
        """What was written last; `ValueError` if that cannot be read."""
        try:
            values: dict[str, Any] = json.loads(self._description.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise ValueError(f"it has format {values['format']}, this version reads {FORMAT}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the session in '{self.path}' cannot be read: {error}") from error
        return values

    def has_rollout(self, chunk: int | None) -> bool:
        """Whether a rollout was saved that stands behind this chunk."""
        return self.rollout_path(chunk).is_dir()

    def rollout_path(self, chunk: int | None) -> Path:
        """Named after the chunk that it stands behind, so that it never fits to another timeline."""
        return self.path / f"rollout-{chunk}"

    def save_rollout(self, chunk: int | None, rollout: WanRollout) -> None:
        rollout.save(self.rollout_path(chunk))

    def remove_rollouts(self, but: int | None) -> None:
        """Remove all that stand behind another chunk."""
        for old in set(self.path.glob("rollout-*")) - {self.rollout_path(but)}:
            shutil.rmtree(old, ignore_errors=True)

    @property
    def _chunks(self) -> Path:
        return self.path / "chunks"

    @property
    def _description(self) -> Path:
        return self.path / "session.json"

    @property
    def image_path(self) -> Path:
        """The picture that the video starts from, where there is one."""
        return self.path / IMAGE_NAME
