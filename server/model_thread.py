"""The one thread that uses the model: it does what viewers ask for, makes chunks, and saves videos, one at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from wan_autoregressive.server.chunk_encoders import ChunkEncoders
from wan_autoregressive.server.figures import Figures
from wan_autoregressive.server.limits import EngineLimits
from wan_autoregressive.server.live_session import LiveSession, cut_point
from wan_autoregressive.server.made_chunk import MadeChunk
from wan_autoregressive.server.messages import ChangePrompt, ChangeSettings, Cut, Error, Fork, LiveSettings
from wan_autoregressive.server.pace import Pace
from wan_autoregressive.server.seats import Seats

logger = logging.getLogger(__name__)


class ModelThread:
    """Runs until `stop`.

    Args:
        lock: The engine's, notified when there may be something to do.
        on_failure: Told of a session that raised, with the error.
        on_left: Told of a session that left, and whether it was saved.
    """

    def __init__(
        self,
        lock: threading.Condition,
        seats: Seats,
        encoders: ChunkEncoders,
        figures: Figures,
        pace: Pace,
        limits: EngineLimits,
        fps: float,
        on_failure: Callable[[LiveSession, Exception], None],
        on_left: Callable[[LiveSession, bool], None],
    ) -> None:
        self._lock, self._seats, self._encoders, self._figures = lock, seats, encoders, figures
        self._pace, self._limits, self._fps, self._on_failure, self._on_left = pace, limits, fps, on_failure, on_left
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="wan-model", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the step under way, and wait for that."""
        with self._lock:
            self._stopped = True
            self._lock.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while (session := self._wait_for_work()) is not None:
            if session.state == "leaving":
                self._on_left(session, save(session))
                continue
            try:
                self._serve(session)
            except Exception as error:
                self._on_failure(session, error)
            if session.state == "gone":  # forgotten meanwhile: what it wrote since
                session.video.folder.remove()

    def _wait_for_work(self) -> LiveSession | None:
        """A session that is to be saved, else the one whose turn it is; None at the end."""
        with self._lock:
            while not self._stopped:
                session = self._seats.next_to_save() or self._seats.next_to_serve()
                if session is not None:
                    return session
                self._lock.wait()
            return None

    def _serve(self, session: LiveSession) -> None:
        with self._lock:
            commands = list(session.commands)
            session.commands.clear()
            session.served = time.monotonic()
        for command in commands:
            self._obey(session, command)
        if session.video.timeline.total_frames >= self._limits.max_seconds * self._fps:
            if not session.told_of_limit:
                session.told_of_limit = True
                limit = f"a session may have {self._limits.max_seconds:g} s of video, branches included"
                session.fail("limit", limit)
            return
        if session.state == "active" and session.wants_chunk:
            self._make_chunk(session)

    def _make_chunk(self, session: LiveSession) -> None:
        # Before a chunk, not after it: only what is encoded can be shown again after a crash.
        if 0 < self._limits.checkpoint_every <= session.unsaved:
            with self._lock:
                self._lock.wait_for(lambda: not session.encoding)
            session.unsaved = 0
            save(session)
        started = time.perf_counter()
        made = session.video.advance(lambda preview: self._hand_on(session, preview))
        took = time.perf_counter() - started
        self._figures.add({"step_s": took, "steps" if made else "repeated": 1})
        if made is None:
            return
        self._hand_on(session, made)
        with self._lock:
            self._pace.measured(took, made.entry.frames / self._fps)
            if self._limits.slots is None:
                self._seats.resize(self._pace.viewers)

    def _hand_on(self, session: LiveSession, made: MadeChunk) -> None:
        """A new chunk, its preview, or what follows that."""
        if not made.was_shown:
            with self._lock:
                session.made = made.entry.index
                session.unsent += 1
                session.unsaved += 1
        self._encoders.encode(session, made)

    def _obey(self, session: LiveSession, command: ChangePrompt | Fork | ChangeSettings) -> None:
        video = session.video
        dropped: list[int] = []
        if isinstance(command, ChangeSettings):
            _change_settings(session, command.settings)
            return
        if isinstance(command, ChangePrompt):
            frame = None
            if command.playhead is not None and video.plan.source is None:
                frame = (command.playhead + session.cost_s) * self._fps
            after = cut_point(video.timeline.branch_path(), session.played, frame)
            dropped = video.change_prompt(command.prompt, after)
        else:
            after = command.chunk
            if video.plan.source is not None:
                session.fail("camera", "a video from the camera cannot be taken back: the camera's frames are gone")
                return
            try:
                video.fork(after, command.prompt, command.seed)
            except KeyError:
                session.fail("no_such_chunk", f"there is no chunk {after} in this session")
                return
            _change_settings(session, command.settings)
        self._figures.add({"cuts": 1, "dropped": len(dropped)})
        with self._lock:
            path = video.timeline.branch_path()
            session.stand_after(path)
            if isinstance(command, Fork):
                session.played = session.made
            session.told_of_limit = False
            session.emit(
                Cut(
                    branch=video.timeline.branch,
                    after=after,
                    frame=path[-1].stop_frame if path else 0,
                    dropped=dropped,
                    prompt=video.prompt,
                    near=video.is_near,
                    repeating=video.num_to_repeat,
                ),
                None,
            )


def _change_settings(session: LiveSession, settings: LiveSettings) -> None:
    try:
        session.video.change_settings(settings.given())
    except ValueError as error:
        session.fail("bad_settings", str(error))


def save(session: LiveSession) -> bool:
    """Save what can be gone on with; whether there is something, and it is safe. From the model's thread."""
    try:
        if session.video.timeline.chunks:
            session.video.save()
            return True
    except (OSError, RuntimeError, ValueError) as error:
        logger.error("a session could not be saved: %s", error)
        session.emit(Error(code="not_saved", message=f"the video could not be saved: {error}"), None)
    return False
