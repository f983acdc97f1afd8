"""One model and many viewers: a thread that makes the chunk of whoever runs dry next. Knows no sockets.

Sessions share weights and nothing else. Slots bound how many are watched at the same time, since fairness alone makes
everybody stall where the model is too slow for all; the others wait in a queue and are told their place. A viewer who
leaves frees the slot at once, and the video is saved so that it can be gone on with.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from wan_autoregressive.server.chunk_files import IMAGES_CODEC, codec_of, encode_images, encode_mp4, encode_thumbnail
from wan_autoregressive.server.live_model import LiveModel
from wan_autoregressive.server.live_session import Emit, LiveSession, cut_point, nobody
from wan_autoregressive.server.live_video import LiveVideo, MadeChunk, read_description, remove_chunk
from wan_autoregressive.server.messages import (
    ChangePrompt,
    ChangeSettings,
    ChunkReady,
    Command,
    Cut,
    Error,
    Fork,
    LiveSettings,
    Pause,
    Played,
    Queued,
    Resume,
    Start,
    Started,
)
from wan_autoregressive.server.video_plan import VideoPlan

logger = logging.getLogger(__name__)

_ID_BYTES = 16  # 22 characters; whoever knows a session's id may see it
_ENCODERS = 2


class QueueFullError(RuntimeError):
    """There is no place left, not even to wait in."""


class UnknownSessionError(ValueError):
    """There is no session of that name."""


@dataclass(frozen=True)
class EngineLimits:
    """How much may go on."""

    slots: int = 1
    """Sessions that are served at the same time."""
    queue: int = 8
    """Sessions that may wait."""
    max_seconds: float = 600.0
    """Video of one session, all branches together."""
    snapshots: int = 8
    """Places of a video, beside its start, that are held in memory to go back to at once."""
    parked: int = 64
    """Videos without a viewer that are kept on the disk."""


class Engine:
    """Makes the chunks of all sessions on one thread, and encodes them on others.

    Args:
        folder: Where the sessions are; what an earlier engine saved there can be gone on with.
        cost_s: Seconds that a chunk takes, until it has been measured.
    """

    def __init__(self, model: LiveModel, folder: Path, limits: EngineLimits, cost_s: float = 0.5) -> None:
        self.model, self.limits = model, limits
        self._folder, self._cost_s = folder, cost_s
        self._active: dict[str, LiveSession] = {}
        self._waiting: deque[LiveSession] = deque()
        self._parking: dict[str, LiveSession] = {}
        self._parked: OrderedDict[str, Path] = OrderedDict()
        self._changed = threading.Condition(threading.RLock())
        self._stopped = False
        self._figures = {"steps": 0, "repeated": 0, "step_s": 0.0, "encode_s": 0.0, "bytes": 0, "failures": 0}
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._find_parked()
        self._encoders = ThreadPoolExecutor(_ENCODERS, thread_name_prefix="wan-encode")
        self._thread = threading.Thread(target=self._run, name="wan-model", daemon=True)
        self._thread.start()

    # For the server, from any thread.

    def open(self, start: Start, emit: Emit, image: Image.Image | None = None) -> LiveSession:
        """A new session, or one to go on with; it is told whether it has a slot or waits.

        Raises:
            QueueFullError, UnknownSessionError
            ValueError: there is neither a prompt nor a session to go on with.
        """
        with self._changed:
            if start.resume is not None:
                running = self._active.get(start.resume) or self._find_waiting(start.resume)
                if running is not None:
                    running.fail("taken_over", "this video goes on in another window")
                    running.attach(emit, start.ahead)
                    running.transport = start.transport
                    self._tell(running)
                    return running
            if len(self._active) >= self.limits.slots and len(self._waiting) >= self.limits.queue:
                raise QueueFullError(f"all {self.limits.slots} slots are taken and {self.limits.queue} viewers wait")
            session = self._new(start, emit, image) if start.resume is None else self._take_up(start.resume)
            session.attach(emit, start.ahead)
            session.transport = start.transport
            session.state = "waiting"
            self._waiting.append(session)
            self._admit()
            if session.state == "waiting":
                self._tell(session)
            return session

    def command(self, session: LiveSession, command: Command) -> None:
        """What a viewer asks for. What changes the video happens between two steps."""
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
        if session.video.plan.source is None:
            raise ValueError("frames are taken where the video was started with camera: true")
        session.video.plan.source.put(image)
        with self._changed:
            self._changed.notify_all()

    def sent(self, session: LiveSession) -> None:
        """The socket took a chunk."""
        with self._changed:
            session.unsent = max(0, session.unsent - 1)
            self._changed.notify_all()

    def leave(self, session: LiveSession, emit: Emit) -> None:
        """The viewer with this `emit` is gone: the slot is free at once, the video is saved."""
        with self._changed:
            if session.emit == emit:
                self._part(session)

    def forget(self, key: str) -> None:
        """End a session and remove its files. Raises `UnknownSessionError`."""
        with self._changed:
            session = self._active.pop(key, None) or self._find_waiting(key) or self._parking.pop(key, None)
            if session is None and key not in self._parked:
                raise UnknownSessionError(f"there is no session '{key}'")
            if session is not None:
                if session.state == "waiting":
                    self._waiting.remove(session)
                session.state, session.emit = "gone", nobody
            self._parked.pop(key, None)
            self._admit()
        shutil.rmtree(self._folder / key, ignore_errors=True)

    def describe(self, key: str) -> dict[str, Any]:
        """The timeline of a session. Raises `UnknownSessionError`."""
        with self._changed:
            session = self._active.get(key) or self._find_waiting(key) or self._parking.get(key)
            if session is None and key not in self._parked:
                raise UnknownSessionError(f"there is no session '{key}'")
        values = read_description(self._folder / key) if session is None else session.video.describe()
        return {"session": key, "model": self.model.name, **values}

    def session_folder(self, key: str) -> Path:
        """Of a session that there is."""
        return self._folder / key

    def chunk_path(self, key: str, chunk: int, kind: str) -> Path:
        """The mp4 or webp of a chunk, which may not be there (yet)."""
        return self._folder / key / "chunks" / f"{chunk}.{kind}"

    def figures(self) -> dict[str, float]:
        """Counts and seconds since the start, and who is there now."""
        with self._changed:
            now = {"active": len(self._active), "queued": len(self._waiting), "parked": len(self._parked)}
            return {**self._figures, **now}

    def shutdown(self) -> int:
        """End after the step under way and save all videos; gives how many."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
        self._encoders.shutdown(wait=True)
        left = [*self._active.values(), *self._waiting, *self._parking.values()]
        return sum(self._save(session) for session in left)

    # Who is where; under the lock.

    def _new(self, start: Start, emit: Emit, image: Image.Image | None) -> LiveSession:
        if start.prompt is None:
            raise ValueError("a new video needs a prompt")
        key = secrets.token_urlsafe(_ID_BYTES)
        seed = secrets.randbelow(2**32) if start.seed is None else start.seed
        plan = VideoPlan.from_start(self.model, start)
        video = LiveVideo(self.model, self._folder / key, start.prompt, seed, image, self.limits.snapshots, plan)
        return LiveSession(key, video, emit, start.ahead, self._cost_s)

    def _take_up(self, key: str) -> LiveSession:
        if (session := self._parking.pop(key, None)) is not None:
            return session
        if key not in self._parked:
            raise UnknownSessionError(f"there is no session '{key}'; it may have been the oldest of too many")
        video = LiveVideo.load(self.model, self._parked[key], self.limits.snapshots)
        del self._parked[key]
        return LiveSession(key, video, nobody, 1, self._cost_s)

    def _find_waiting(self, key: str) -> LiveSession | None:
        return next((session for session in self._waiting if session.id == key), None)

    def _find_parked(self) -> None:
        """Sessions that an earlier engine saved, by age; only under names that this class gives."""
        saved = [path for path in self._folder.iterdir() if len(path.name) == 22 and (path / "session.json").is_file()]
        for path in sorted(saved, key=lambda path: (path / "session.json").stat().st_mtime):
            self._parked[path.name] = path

    def _admit(self) -> None:
        before = len(self._waiting)
        while self._waiting and len(self._active) < self.limits.slots:
            session = self._waiting.popleft()
            session.state, session.served = "active", time.monotonic()
            self._active[session.id] = session
            self._tell(session)
        if len(self._waiting) != before:
            for session in self._waiting:
                self._tell(session)
        self._changed.notify_all()

    def _tell(self, session: LiveSession) -> None:
        if session.state == "waiting":
            session.emit(Queued(position=self._waiting.index(session) + 1), None)
            return
        with session.video.lock:
            timeline = session.video.timeline
            branch, count = timeline.branch, len(timeline.chunks)
        session.emit(Started(session=session.id, branch=branch, seed=session.video.seed, num_chunks=count), None)

    def _part(self, session: LiveSession) -> None:
        session.emit = nobody
        if session.state not in ("active", "waiting"):
            return
        if session.state == "waiting":
            self._waiting.remove(session)
            for other in self._waiting:
                self._tell(other)
        else:
            del self._active[session.id]
        session.state = "parking"
        self._parking[session.id] = session
        self._admit()

    # The model's thread.

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopped and not self._parking and (session := self._next()) is None:
                    self._changed.wait()
                if self._stopped:
                    return
                leaving = next(iter(self._parking.values()), None)
            if leaving is not None:
                self._park(leaving)
                continue
            assert session is not None
            try:
                self._serve(session)
            except Exception as error:
                self._failed(session, error)

    def _next(self) -> LiveSession | None:
        ready = [session for session in self._active.values() if session.commands or session.wants_chunk]
        return min(ready, key=lambda session: session.urgency, default=None)

    def _serve(self, session: LiveSession) -> None:
        with self._changed:
            commands = list(session.commands)
            session.commands.clear()
            session.served = time.monotonic()
        for command in commands:
            self._obey(session, command)
        if session.video.timeline.total_frames >= self.limits.max_seconds * self.model.fps:
            if not session.told_of_limit:
                session.told_of_limit = True
                session.fail("limit", f"a session may have {self.limits.max_seconds:g} s of video, branches included")
            return
        if session.state != "active" or not session.wants_chunk:
            return
        started = time.perf_counter()
        made = session.video.advance()
        took = time.perf_counter() - started
        with self._changed:
            self._figures["step_s"] += took
            self._figures["steps" if made else "repeated"] += 1
            if made is None:
                return
            session.made = made.entry.index
            session.unsent += 1
            session.to_encode.append(made)
            begin, session.encoding = not session.encoding, True
        if begin:
            self._encoders.submit(self._encode_all, session)

    def _obey(self, session: LiveSession, command: ChangePrompt | Fork | ChangeSettings) -> None:
        video = session.video
        dropped: list[int] = []
        if isinstance(command, ChangeSettings):
            self._change_settings(session, command.settings)
            return
        if isinstance(command, ChangePrompt):
            frame = None
            if command.playhead is not None and video.plan.source is None:
                frame = (command.playhead + session.cost_s) * self.model.fps
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
            self._change_settings(session, command.settings)
        with self._changed:
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
                    repeating=video.num_to_repeat,
                ),
                None,
            )

    def _change_settings(self, session: LiveSession, settings: LiveSettings) -> None:
        try:
            session.video.change_settings(settings.given())
        except ValueError as error:
            session.fail("bad_settings", str(error))

    def _failed(self, session: LiveSession, error: Exception) -> None:
        logger.error("session failed", exc_info=error)
        with self._changed:
            self._figures["failures"] += 1
            session.emit(Error(code="failed", message=f"the video cannot go on: {error}"), None)
            self._part(session)

    def _park(self, session: LiveSession) -> None:
        saved = self._save(session)
        with self._changed:
            if self._parking.get(session.id) is not session:  # taken up again meanwhile, or forgotten
                return
            del self._parking[session.id]
            session.state = "gone"
            if saved:
                self._parked[session.id] = session.video.folder
            oldest = []
            while len(self._parked) > self.limits.parked:
                oldest.append(self._parked.popitem(last=False)[1])
        for folder in oldest:
            shutil.rmtree(folder, ignore_errors=True)

    def _save(self, session: LiveSession) -> bool:
        """Whether there is something to go on with, and it could be saved."""
        try:
            if session.video.timeline.chunks:
                session.video.save()
                return True
            shutil.rmtree(session.video.folder, ignore_errors=True)
        except (OSError, RuntimeError, ValueError) as error:
            logger.error("a session could not be saved", exc_info=error)
        return False

    # The encoders' threads: several over all sessions, one at a time for a session, since their order counts.

    def _encode_all(self, session: LiveSession) -> None:
        while True:
            with self._changed:
                if not session.to_encode:
                    session.encoding = False
                    return
                made = session.to_encode.popleft()
            try:
                self._encode(session, made)
            except Exception as error:
                if session.state != "gone":
                    self._failed(session, error)

    def _encode(self, session: LiveSession, made: MadeChunk) -> None:
        started = time.perf_counter()
        entry, folder = made.entry, session.video.chunk_folder
        body = encode_mp4(made.frames, self.model.fps, self.model.scale)
        (folder / f"{entry.id}.mp4").write_bytes(body)
        (folder / f"{entry.id}.webp").write_bytes(encode_thumbnail(made.frames[0]))
        sent, codec = body, codec_of(body)
        if session.transport == "images":
            sent, codec = encode_images(made.frames), IMAGES_CODEC
            (folder / f"{entry.id}.images").write_bytes(sent)
        took = time.perf_counter() - started
        timings = {name: round(seconds, 4) for name, seconds in made.chunk.timings.as_dict().items()}
        step_s = sum(timings.values())
        message = ChunkReady(
            session=session.id,
            chunk=entry.id,
            parent=entry.parent,
            branch=entry.branch,
            index=entry.index,
            start_frame=entry.start_frame,
            frames=entry.frames,
            prompt=entry.prompt,
            codec=codec,
            step_s=round(step_s, 4),
            encode_s=round(took, 4),
            timings=timings,
        )
        with self._changed:
            self._figures["encode_s"] += took
            self._figures["bytes"] += len(sent)
            session.measured(step_s + took)
        with session.video.lock:  # so that no chunk follows the cut that drops it
            kept = entry.id in session.video.timeline.chunks
            if kept:
                session.emit(message, sent)
        if not kept:
            remove_chunk(folder, entry.id)
            self.sent(session)
