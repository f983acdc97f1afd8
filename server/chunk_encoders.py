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
from wan_autoregressive.server.made_chunk import MadeChunk
from wan_autoregressive.server.messages import ChunkReady
from wan_autoregressive.server.timeline import TimelineChunk
from wan_autoregressive.server.video_folder import VideoFolder

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
        """A preview is sent and not kept, what follows it is kept and not sent, any other chunk is both."""
        started = time.perf_counter()
        transport, message = session.transport, None
        files = self._files(made, transport)
        body = files[transport]
        _write(session.video.folder, made, files)
        took = time.perf_counter() - started
        timings = _seconds(made)
        self._figures.add({"video_s": took})
        if not made.is_preview:
            self._figures.add({**timings, "frames": made.entry.frames})
        if not made.was_shown:
            codec = codec_of(body) if transport == "mp4" else IMAGES_CODEC
            message = self._message(session, made, timings, took, codec)
            self._figures.add({"bytes": len(body)})
            with self._lock:
                session.measured(sum(timings.values()) + took)
        self._send(session, made.entry, message, body)

    def _files(self, made: MadeChunk, transport: str) -> dict[str, bytes]:
        """By kind; the mp4 last, since it makes a chunk count."""
        files = {} if made.was_shown else {"webp": encode_thumbnail(made.frames[0])}
        if transport == "images":
            files["images"] = encode_images(made.frames)
        if transport == "mp4" or not made.is_preview:
            files["mp4"] = encode_mp4(made.frames, self._model.fps, self._model.scale)
        return files

    def _send(self, session: LiveSession, entry: TimelineChunk, message: ChunkReady | None, body: bytes) -> None:
        with session.video.lock:  # so that no chunk follows the cut that drops it
            kept = entry.id in session.video.timeline.chunks
            if kept and message is not None:
                session.emit(message, body)
        if kept:
            return
        session.video.folder.remove_chunk(entry.id)
        if message is not None:
            with self._lock:
                session.was_sent()
                self._lock.notify_all()

    def _message(
        self, session: LiveSession, made: MadeChunk, timings: dict[str, float], encode_s: float, codec: str
    ) -> ChunkReady:
        entry = made.entry
        return ChunkReady(
            session=session.id,
            chunk=entry.id,
            parent=entry.parent,
            branch=entry.branch,
            index=entry.index,
            start_frame=entry.start_frame,
            frames=entry.frames,
            prompt=entry.prompt,
            near=entry.near,
            preview=made.is_preview,
            codec=codec,
            step_s=round(sum(timings.values()), 4),
            encode_s=round(encode_s, 4),
            timings=timings,
        )


def _write(folder: VideoFolder, made: MadeChunk, files: dict[str, bytes]) -> None:
    """Of a preview only the thumbnail."""
    try:
        for kind, data in files.items():
            if kind == "webp" or not made.is_preview:
                folder.chunk_path(made.entry.id, kind).write_bytes(data)
    except OSError:  # no half of an mp4
        folder.remove_chunk(made.entry.id)
        raise


def _seconds(made: MadeChunk) -> dict[str, float]:
    """By stage; those of a preview without the full decode, which goes on meanwhile."""
    timings = made.chunk.timings
    seconds = {**timings.as_dict(), "preview_s": timings.preview_s}
    if made.is_preview:
        seconds["decode_s"] = 0.0
    return {name: round(value, 4) for name, value in seconds.items()}
