"""From a made chunk to files and a message: on several threads over all sessions, on one at a time for a session."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from wan_autoregressive.server.chunk_files import IMAGES_CODEC, codec_of, encode_images, encode_mp4, encode_thumbnail
from wan_autoregressive.server.figures import Figures
from wan_autoregressive.server.live_model import LiveModel
from wan_autoregressive.server.live_session import LiveSession
from wan_autoregressive.server.live_video import MadeChunk
from wan_autoregressive.server.messages import ChunkReady

_THREADS = 2


class ChunkEncoders:
    """Guards sessions by the engine's lock.

    Args:
        on_failure: Told of a session whose chunk could not be encoded or written, with the error.
    """

    def __init__(
        self,
        model: LiveModel,
        lock: threading.Condition,
        figures: Figures,
        on_failure: Callable[[LiveSession, Exception], None],
    ) -> None:
        self._model, self._lock, self._figures, self._on_failure = model, lock, figures, on_failure
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="wan-encode")

    def encode(self, session: LiveSession, made: MadeChunk) -> None:
        """Line a chunk up; those of a session come out in their order."""
        with self._lock:
            session.to_encode.append(made)
            begin, session.encoding = not session.encoding, True
        if begin:
            self._pool.submit(self._encode_all, session)

    def close(self) -> None:
        """Wait until all that is lined up is encoded."""
        self._pool.shutdown(wait=True)

    def _encode_all(self, session: LiveSession) -> None:
        while True:
            with self._lock:
                if not session.to_encode:
                    session.encoding = False
                    self._lock.notify_all()
                    return
                made = session.to_encode.popleft()
            try:
                self._encode(session, made)
            except Exception as error:
                self._on_failure(session, error)

    def _encode(self, session: LiveSession, made: MadeChunk) -> None:
        started = time.perf_counter()
        entry, folder, transport = made.entry, session.video.folder, session.transport
        files = {"webp": encode_thumbnail(made.frames[0])}
        if transport == "images":
            files["images"] = encode_images(made.frames)
        files["mp4"] = encode_mp4(made.frames, self._model.fps, self._model.scale)  # last: it makes a chunk count
        try:
            for kind, data in files.items():
                folder.chunk_path(entry.id, kind).write_bytes(data)
        except OSError:  # no half of an mp4
            folder.remove_chunk(entry.id)
            raise
        body = files[transport]
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
            near=entry.near,
            codec=codec_of(body) if transport == "mp4" else IMAGES_CODEC,
            step_s=round(step_s, 4),
            encode_s=round(took, 4),
            timings=timings,
        )
        self._figures.add({**timings, "video_s": took, "frames": entry.frames, "bytes": len(body)})
        with self._lock:
            session.measured(step_s + took)
        with session.video.lock:  # so that no chunk follows the cut that drops it
            kept = entry.id in session.video.timeline.chunks
            if kept:
                session.emit(message, body)
        if not kept:
            folder.remove_chunk(entry.id)
            with self._lock:
                session.was_sent()
                self._lock.notify_all()
