"""A video that is made without a viewer, as OpenAI's video API describes it, and its folder. Pure data."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from wan_autoregressive.atomic_file import write_text

_ID = re.compile(r"video_[0-9a-f]{24}")
_FORMAT = 1


@dataclass
class VideoJob:
    """What was asked for, and how far it is. Guarded by the jobs' lock."""

    id: str
    prompt: str
    seconds: float
    seed: int
    from_image: bool
    model: str
    size: str
    created_at: float
    """Seconds since the epoch; finer than the API's, for the order."""
    status: Literal["queued", "in_progress", "completed", "failed"] = "queued"
    progress: int = 0
    """Percent."""
    completed_at: int | None = None
    error: dict[str, str] | None = None
    session: str | None = None
    """That makes it."""

    @property
    def is_over(self) -> bool:
        return self.status in ("completed", "failed")

    def finish(self, error: dict[str, str] | None = None) -> None:
        """It is done, or has failed."""
        self.error, self.session = error, None
        self.status = "completed" if error is None else "failed"
        self.progress = 100 if error is None else self.progress
        self.completed_at = int(time.time())

    def as_openai(self) -> dict[str, Any]:
        """The object `video` of the API, and the seed."""
        return {
            "id": self.id,
            "object": "video",
            "model": self.model,
            "status": self.status,
            "progress": self.progress,
            "created_at": int(self.created_at),
            "completed_at": self.completed_at,
            "expires_at": None,
            "prompt": self.prompt,
            "seconds": f"{self.seconds:g}",
            "size": self.size,
            "seed": self.seed,
            "remixed_from_video_id": None,
            "error": self.error,
        }


@dataclass(frozen=True)
class JobFolder:
    """Where jobs are kept, each in a folder of its own."""

    path: Path

    def load(self) -> list[VideoJob]:
        """All that can be read, the oldest first."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        jobs = [self._read(path) for path in self.path.iterdir() if _ID.fullmatch(path.name)]
        return sorted((job for job in jobs if job is not None), key=lambda job: job.created_at)

    def save(self, job: VideoJob, image: Image.Image | None = None) -> None:
        """Raises `OSError`."""
        (self.path / job.id).mkdir(mode=0o700, exist_ok=True)
        if image is not None:
            image.save(self.image(job))
        write_text(self.path / job.id / "job.json", json.dumps({"format": _FORMAT, **dataclasses.asdict(job)}))

    def image(self, job: VideoJob) -> Path:
        return self.path / job.id / "image.png"

    def video(self, job: VideoJob) -> Path:
        return self.path / job.id / "video.mp4"

    def thumbnail(self, job: VideoJob) -> Path:
        return self.path / job.id / "thumbnail.webp"

    def remove(self, job: VideoJob) -> None:
        shutil.rmtree(self.path / job.id, ignore_errors=True)

    def _read(self, path: Path) -> VideoJob | None:
        try:
            values = json.loads((path / "job.json").read_text(encoding="utf-8"))
            return VideoJob(**values) if values.pop("format") == _FORMAT and values["id"] == path.name else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
