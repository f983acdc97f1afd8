"""Videos that nobody watches while they are made: one after the other, each a session that yields to viewers.

A job that a restart interrupts goes on where its session was saved, or else begins again with the same seed: the same
video either way.
"""

from __future__ import annotations

import logging
import queue
import secrets
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from PIL import Image

from wan_autoregressive.media.segments import join_segments
from wan_autoregressive.server.engine import Engine
from wan_autoregressive.server.limits import QueueFullError, UnknownSessionError
from wan_autoregressive.server.live_session import Emit, LiveSession
from wan_autoregressive.server.messages import ChunkReady, Error, Played, ServerMessage, Start
from wan_autoregressive.server.video_job import JobFolder, VideoJob

logger = logging.getLogger(__name__)

_AHEAD = 2


class VideoJobs:
    """The jobs of a server, on a thread of their own. Methods are for any thread.

    Args:
        most_waiting: Jobs that may wait.
        most_kept: Jobs that are over and kept; the oldest are removed.
    """

    def __init__(self, engine: Engine, most_waiting: int = 32, most_kept: int = 256) -> None:
        self._engine, self._most_waiting, self._most_kept = engine, most_waiting, most_kept
        self._folder = JobFolder(engine.folder / "jobs")
        self._jobs = {job.id: job for job in self._folder.load()}
        self._changed = threading.Condition()
        self._stopped = False
        self._messages: queue.Queue[ServerMessage | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="wan-jobs", daemon=True)
        self._thread.start()

    def create(self, prompt: str, seconds: float, seed: int | None, image: Image.Image | None) -> VideoJob:
        """Line a video up.

        Raises:
            QueueFullError, PromptError
            OSError: there is no room on the disk.
        """
        model = self._engine.model
        model.check_prompt(prompt)
        job = VideoJob(
            id=f"video_{secrets.token_hex(12)}",
            prompt=prompt,
            seconds=seconds,
            seed=secrets.randbelow(2**32) if seed is None else seed,
            from_image=image is not None,
            model=model.name,
            size=model.size,
            created_at=time.time(),
        )
        with self._changed:
            if self.num_waiting >= self._most_waiting:
                raise QueueFullError(f"{self._most_waiting} videos wait to be made; come back later")
            self._folder.save(job, image)
            self._jobs[job.id] = job
            self._changed.notify_all()
        return job

    def get(self, key: str) -> VideoJob:
        """Raises `KeyError`."""
        return self._jobs[key]

    def all(self) -> list[VideoJob]:
        """The oldest first."""
        with self._changed:
            return list(self._jobs.values())

    @property
    def num_waiting(self) -> int:
        """Jobs that are not over."""
        return sum(not job.is_over for job in self.all())

    def delete(self, key: str) -> None:
        """Forget a job and its video; one that is under way ends. Raises `KeyError`."""
        with self._changed:
            job = self._jobs.pop(key)
            if job.status == "in_progress":
                self._messages.put(None)  # its thread looks whether it is still wanted, and removes what there is
                return
        self._folder.remove(job)

    def path(self, job: VideoJob, variant: Literal["video", "thumbnail"]) -> Path:
        """Its mp4 or its WebP, once it is completed."""
        return self._folder.video(job) if variant == "video" else self._folder.thumbnail(job)

    def close(self) -> None:
        """End; the job under way stays where it is, its session is the engine's to save."""
        with self._changed:
            self._stopped = True
            self._messages.put(None)
            self._changed.notify_all()
        self._thread.join()

    # The jobs' thread.

    def _run(self) -> None:
        while (job := self._wait_for_job()) is not None:
            try:
                self._make(job)
            except Exception as error:  # whatever it is, it is this job's
                logger.error("a job failed", exc_info=error)
                self._forget_session(job)
                self._end(job, {"code": "failed", "message": str(error) or type(error).__name__})
            if job.id not in self._jobs:
                self._folder.remove(job)

    def _wait_for_job(self) -> VideoJob | None:
        with self._changed:
            while not self._stopped:
                job = next((job for job in self._jobs.values() if not job.is_over), None)
                if job is not None:
                    job.status, self._messages = "in_progress", queue.Queue()
                    return job
                self._changed.wait()
            return None

    def _make(self, job: VideoJob) -> None:
        session = self._open(job, self._emit_to(self._messages))
        job.session = session.id
        self._folder.save(job)
        made, frames = session.video.timeline.total_frames, self._frames(job)
        while made < frames:
            message = self._messages.get()
            if self._stopped:
                return
            if job.id not in self._jobs:
                self._forget_session(job)
                return
            if isinstance(message, Error) and message.code != "not_saved":
                raise RuntimeError(message.message)
            if isinstance(message, ChunkReady):
                made = message.start_frame + message.frames
                job.progress = min(99, 100 * made // frames)
                self._engine.sent(session)
                self._engine.command(session, Played(chunk=message.chunk))
        folder = session.video.folder
        parts = [chunk.id for chunk in session.video.timeline.branch_path()]
        join_segments([folder.chunk_path(part, "mp4") for part in parts], self._folder.video(job))
        shutil.copy(folder.chunk_path(parts[0], "webp"), self._folder.thumbnail(job))
        self._forget_session(job)
        self._end(job)

    def _forget_session(self, job: VideoJob) -> None:
        if job.session is not None:
            with suppress(UnknownSessionError):
                self._engine.forget(job.session)

    def _open(self, job: VideoJob, emit: Emit) -> LiveSession:
        frames = self._frames(job)
        if job.session is not None:
            try:
                return self._engine.open(Start(resume=job.session, ahead=_AHEAD), emit, stop_frame=frames)
            except (UnknownSessionError, ValueError) as error:
                logger.warning("job %s begins again: %s", job.id, error)
        image = None
        if job.from_image:
            with Image.open(self._folder.image(job), formats=("PNG",)) as file:
                image = file.convert("RGB")
        return self._engine.open(Start(prompt=job.prompt, seed=job.seed, ahead=_AHEAD), emit, image, frames)

    def _end(self, job: VideoJob, error: dict[str, str] | None = None) -> None:
        """Keep how it went, and drop what is too old."""
        with self._changed:
            job.finish(error)
            over = [other for other in self._jobs.values() if other.is_over]
            too_old = over[: max(0, len(over) - self._most_kept)]
            for old in too_old:
                del self._jobs[old.id]
        if job.id in self._jobs:
            self._folder.save(job)
        for old in too_old:
            self._folder.remove(old)

    def _frames(self, job: VideoJob) -> int:
        return max(1, round(job.seconds * self._engine.model.fps))

    @staticmethod
    def _emit_to(messages: queue.Queue[ServerMessage | None]) -> Emit:
        return lambda message, body: messages.put(message)
