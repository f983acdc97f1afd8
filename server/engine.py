"""One model and many viewers: who comes in, what they ask for, and what is kept. Knows no sockets.

Sessions share weights and nothing else. Slots bound how many are watched at the same time, since fairness alone makes
everybody stall where the model is too slow for all; the others wait in a queue and are told their place. A viewer who
leaves frees the slot at once, and the video is saved so that it can be gone on with.
"""

from __future__ import annotations

import logging
import secrets
import threading
from pathlib import Path
from typing import Any

from PIL import Image

from wan_autoregressive.pipelines.heap import HEAP
from wan_autoregressive.server.chunk_encoders import ChunkEncoders
from wan_autoregressive.server.figures import Figures
from wan_autoregressive.server.limits import EngineLimits, UnknownSessionError
from wan_autoregressive.server.live_model import LiveModel
from wan_autoregressive.server.live_session import Emit, LiveSession, nobody
from wan_autoregressive.server.live_video import LiveVideo
from wan_autoregressive.server.messages import ChangePrompt, Command, Error, Fork, Pause, Played, Resume, Start
from wan_autoregressive.server.model_thread import ModelThread, save
from wan_autoregressive.server.pace import Pace
from wan_autoregressive.server.parked_videos import ParkedVideos
from wan_autoregressive.server.seats import Seats
from wan_autoregressive.server.video_plan import VideoPlan

logger = logging.getLogger(__name__)

_ID_BYTES = 16  # 22 characters; whoever knows a session's id may see it


class Engine:
    """Makes the chunks of all sessions on one thread, and encodes them on others. Its methods are for any thread.

    Args:
        folder: Where the sessions are; what an earlier engine saved there can be gone on with.
        cost_s: Seconds that a chunk takes, until it has been measured.
        chunk_s: Seconds of video in it.
    """

    def __init__(
        self, model: LiveModel, folder: Path, limits: EngineLimits, cost_s: float = 0.5, chunk_s: float = 0.75
    ) -> None:
        self.model, self.limits, self.folder = model, limits, folder
        self._cost_s = cost_s
        self._changed = threading.Condition(threading.RLock())
        self._figures = Figures()
        pace = Pace(cost_s, chunk_s)
        self._seats = Seats(limits.slots or pace.viewers, limits.queue)
        self._parked = ParkedVideos(folder, limits.parked)
        self._encoders = ChunkEncoders(model, self._changed, self._figures, self._failed)
        self._thread = ModelThread(
            *(self._changed, self._seats, self._encoders, self._figures, pace, limits, model.fps),
            on_failure=self._failed,
            on_left=self._left,
        )

    def open(
        self, start: Start, emit: Emit, image: Image.Image | None = None, stop_frame: int | None = None
    ) -> LiveSession:
        """A new session, or one to go on with; it is told whether it has a slot or waits.

        Args:
            stop_frame: Make a video of so many pixel frames in the background, without a slot.

        Raises:
            QueueFullError, UnknownSessionError, PromptError
            ValueError: there is neither a prompt nor a session to go on with, or that is damaged.
            OSError: there is no room on the disk.
        """
        for prompt in (start.prompt, *(start.prompt_changes or {}).values()):
            if prompt is not None:
                self.model.check_prompt(prompt)
        with self._changed:
            session = None if start.resume is None else self._seats.find(start.resume)
            if session is not None:
                session.fail("taken_over", "this video goes on in another window")
                session.attach(emit, start)
                self._seats.tell(session)
                return session
            if stop_frame is None:
                self._seats.check_room()
            if start.resume is None:
                session = self._new(start, image, stop_frame)
            else:
                session = self._take_up(start.resume, stop_frame)
            session.attach(emit, start)
            self._seats.take(session)
            self._changed.notify_all()
            return session

    def command(self, session: LiveSession, command: Command) -> None:
        """What a viewer asks for. What changes the video happens between two steps. Raises `PromptError`."""
        if isinstance(command, ChangePrompt | Fork) and command.prompt is not None:
            self.model.check_prompt(command.prompt)
        with self._changed:
            if isinstance(command, Pause | Resume):
                session.paused = isinstance(command, Pause)
            elif isinstance(command, Played):
                session.mark_played(command.chunk)
            else:
                session.take(command)
            self._changed.notify_all()

    def camera_frame(self, session: LiveSession, image: bytes) -> None:
        """A frame of the viewer's camera. Raises `ValueError` if the video is not made from one."""
        source = session.video.plan.source
        if source is None:
            raise ValueError("frames are taken where the video was started with camera: true")
        source.put(image)
        with self._changed:
            self._changed.notify_all()

    def sent(self, session: LiveSession) -> None:
        """The socket took a chunk."""
        with self._changed:
            session.was_sent()
            self._changed.notify_all()

    def leave(self, session: LiveSession, emit: Emit) -> None:
        """The viewer with this `emit` is gone: the slot is free at once, the video is saved."""
        with self._changed:
            if session.emit == emit:
                self._part(session)

    def forget(self, key: str) -> None:
        """End a session and remove its files. Raises `UnknownSessionError`."""
        with self._changed:
            session = self._find(key)
            if session is not None:
                session.emit = nobody
                self._seats.remove(session)
            self._parked.remove(key)
            self._changed.notify_all()
        self._parked.folder(key).remove()
        HEAP.expect_less()

    def describe(self, key: str) -> dict[str, Any]:
        """The timeline of a session. Raises `UnknownSessionError`."""
        with self._changed:
            session = self._find(key)
        values = self._parked.folder(key).read_description() if session is None else session.video.describe()
        return {"session": key, "model": self.model.name, **values}

    def chunk_path(self, key: str, chunk: int, kind: str) -> Path:
        """A file of a chunk, see `VideoFolder.chunk_path`, which may not be there (yet)."""
        return self._parked.folder(key).chunk_path(chunk, kind)

    def image_path(self, key: str) -> Path:
        """The picture that a session starts from, which may not be there."""
        return self._parked.folder(key).image_path

    @property
    def slots(self) -> int:
        """Sessions that are watched at the same time, as of now."""
        with self._changed:
            return self._seats.slots

    def figures(self) -> dict[str, float]:
        """Counts and seconds since the start, and who is there now."""
        with self._changed:
            now = {
                "slots": self._seats.slots,
                "active": self._seats.num_watched,
                "queued": len(self._seats.waiting),
                "leaving": len(self._seats.leaving),
                "parked": len(self._parked),
            }
        return {**self._figures.as_dict(), **now}

    def shutdown(self) -> int:
        """End after the step under way and save all videos; gives how many."""
        self._thread.stop()
        self._encoders.close()
        return sum(save(session) for session in self._seats.all())

    # Under the lock.

    def _new(self, start: Start, image: Image.Image | None, stop_frame: int | None) -> LiveSession:
        if start.prompt is None:
            raise ValueError("a new video needs a prompt")
        key = secrets.token_urlsafe(_ID_BYTES)
        seed = secrets.randbelow(2**32) if start.seed is None else start.seed
        folder, plan = self._parked.folder(key).path, VideoPlan.from_start(self.model, start)
        video = LiveVideo(
            *(self.model, folder, start.prompt, seed, image), self.limits.snapshots, plan, stop_frame=stop_frame
        )
        return LiveSession(key, video, self._cost_s)

    def _take_up(self, key: str, stop_frame: int | None) -> LiveSession:
        session = self._find(key)
        if session is not None:  # it is on its way to the disk
            self._seats.remove(session)
            return session
        video = LiveVideo.load(self.model, self._parked.folder(key).path, self.limits.snapshots, stop_frame)
        self._parked.remove(key)
        return LiveSession(key, video, self._cost_s)

    def _find(self, key: str) -> LiveSession | None:
        """A session in memory; None for one on the disk. Raises `UnknownSessionError`."""
        session = self._seats.find(key) or self._seats.leaving.get(key)
        if session is None and key not in self._parked:
            raise UnknownSessionError(f"there is no session '{key}'; it may have been the oldest of too many")
        return session

    def _part(self, session: LiveSession) -> None:
        session.emit = nobody
        self._seats.leave(session)
        self._changed.notify_all()

    # From the model's and the encoders' threads.

    def _failed(self, session: LiveSession, error: Exception) -> None:
        if session.state == "gone":  # it was forgotten meanwhile
            session.video.folder.remove()
            return
        logger.error("session failed", exc_info=error)
        self._figures.add({"failures": 1})
        with self._changed:
            session.emit(Error(code="failed", message=f"the video cannot go on: {error}"), None)
            self._part(session)

    def _left(self, session: LiveSession, is_saved: bool) -> None:
        with self._changed:
            if self._seats.leaving.get(session.id) is not session:  # taken up again meanwhile, or forgotten
                return
            self._seats.remove(session)
            too_many = self._parked.put(session.id) if is_saved else []
        HEAP.expect_less()
        if not is_saved and not session.video.timeline.chunks:
            session.video.folder.remove()
        for folder in too_many:
            folder.remove()
