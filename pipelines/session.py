"""A rollout that is driven by commands: what a live page, a server or any program with a thread sits on.

Commands come from any thread and are taken one after the other at chunk boundaries. Chunks wait in a bounded queue:
the session is never more than `max_ahead` chunks in front of who takes them. It knows neither sockets nor encoders.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self

from wan_autoregressive.pipelines.outputs import WanVideoChunk
from wan_autoregressive.pipelines.prompts import Prompt
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.pipelines.snapshots import Snapshots
from wan_autoregressive.pipelines.source_video import SourceEndedError


class SessionClosedError(RuntimeError):
    """The session takes no more commands."""


@dataclass(frozen=True)
class SessionChunk:
    """A chunk, and which branch of the video it belongs to: a seek starts a new one."""

    chunk: WanVideoChunk
    branch: int


class RolloutSession:
    """Drives one rollout, on a thread of its own or by calls of `advance`.

    ```python
    with RolloutSession(pipe.rollout("a fox in the snow", window_frames=12), snapshots=2) as session:
        for made in session:
            show(made.chunk.frames)
            if made.chunk.index == 4:
                session.set_prompt("it rains")
            if made.chunk.index == 8 and made.branch == 0:
                session.seek(7, prompt="the sun comes out")  # chunks 7 and 8 are made anew
    ```

    Args:
        rollout: The session's own from now on.
        max_ahead: Chunks that may wait to be taken; then no more are made.
        snapshots: Chunk boundaries, the newest ones, that a seek or a fork can go back to, beside the start of the
            video. Each holds a copy of the keys and values.
    """

    def __init__(self, rollout: WanRollout, max_ahead: int = 2, snapshots: int = 0) -> None:
        if max_ahead < 1 or snapshots < 0:
            raise ValueError(f"max_ahead is {max_ahead} and snapshots {snapshots}; at least 1 and 0 are needed")
        self.branch = 0
        self._rollout = rollout
        self._max_ahead = max_ahead
        self._snapshots = Snapshots(rollout.chunks_done, snapshots)
        self._changed = threading.Condition()
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._ready: deque[SessionChunk] = deque()
        self._driver = threading.Lock()
        self._thread: threading.Thread | None = None
        self._paused = self._closed = self._ended = False
        self._error: BaseException | None = None
        self._take_snapshot()

    # Commands, from any thread.

    def set_prompt(self, prompt: Prompt) -> "Future[None]":
        """Use another prompt from the next chunk on."""
        return self._submit(lambda: self._rollout.set_prompt(prompt))

    def change(self, **settings: Any) -> "Future[None]":
        """Use other settings from the next chunk on, see [`WanRollout.change`]."""
        return self._submit(lambda: self._rollout.change(**settings))

    def seek(self, num_chunks: int, prompt: Prompt | None = None) -> "Future[int]":
        """Go on from where the video had its first `num_chunks` chunks, to the bit; later ones are forgotten, those
        that wait to be taken too. Gives the number of the branch that starts.

        Raises (the future):
            ValueError: there is no snapshot of that boundary.
        """
        return self._submit(lambda: self._seek(num_chunks, prompt))

    def fork(self, num_chunks: int | None = None) -> "Future[WanRollout]":
        """A rollout of its own that goes on from here, or from where the video had its first `num_chunks` chunks."""
        return self._submit(lambda: self._rollout.fork() if num_chunks is None else self._snapshot(num_chunks))

    def call(self, function: Callable[[WanRollout], Any]) -> "Future[Any]":
        """Run a function on the rollout at the next chunk boundary: `session.call(lambda r: r.save(folder))`."""
        return self._submit(lambda: function(self._rollout))

    def pause(self) -> None:
        """Make no more chunks; commands are still taken."""
        self._set_paused(True)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._set_paused(False)

    def close(self, at_once: bool = False) -> WanRollout:
        """End, wait for the thread, and give the rollout back. Commands that wait are refused; chunks that are made
        can still be taken.

        Args:
            at_once: Stop after the denoising step under way and drop its chunk, instead of finishing it; the rollout
                is of no use then, but for `reset`.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if at_once:
            self._rollout.interrupt()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._driver:  # whoever calls `advance` may be in a step
            self._refuse_commands()
            return self._rollout

    # Chunks.

    def get(self, timeout: float | None = None) -> SessionChunk | None:
        """The next chunk; `None` once the video has ended or the session was closed.

        Raises:
            TimeoutError: none came within `timeout` seconds.
            BaseException: what a step raised, once the chunks before it are taken.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._ready or self._ended or self._closed, timeout):
                raise TimeoutError(f"no chunk within {timeout} s")
            if self._ready:
                made = self._ready.popleft()
                self._changed.notify_all()
                return made
            if self._error is not None:
                raise self._error
            return None

    def __iter__(self) -> Iterator[SessionChunk]:
        while (made := self.get()) is not None:
            yield made

    @property
    def num_ready(self) -> int:
        """Chunks that wait to be taken."""
        return len(self._ready)

    @property
    def num_chunks(self) -> int:
        """Chunks that the video has."""
        return self._rollout.chunks_done

    @property
    def snapshots(self) -> list[int]:
        """Boundaries, in chunks, that `seek` and `fork` can go back to."""
        return sorted(self._snapshots.places)

    @property
    def can_advance(self) -> bool:
        """Whether `advance` would do something."""
        if self._closed:
            return False
        return bool(self._commands) or not (self._paused or self._ended or len(self._ready) >= self._max_ahead)

    # The driver: a thread, or whoever calls `advance`.

    def start(self) -> Self:
        """Drive the session on a thread of its own. Raises `RuntimeError` if it is or was."""
        with self._changed:
            if self._thread is not None or self._closed:
                raise RuntimeError("this session is or was driven by a thread; make a new one")
            self._thread = threading.Thread(target=self._drive, name="wan-session", daemon=True)
        self._thread.start()
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()

    def advance(self) -> bool:
        """Take the commands that wait; then, where there is room, make one chunk. Whether anything was done.

        What a step raises ends the session and is raised by `get`.
        """
        with self._driver:
            worked = self._take_commands()
            with self._changed:
                if not self.can_advance:
                    return worked
            try:
                made = SessionChunk(self._rollout.step(), self.branch)
                self._take_snapshot()
            except SourceEndedError:
                self._end(None)
            except BaseException as error:
                self._end(error)
            else:
                with self._changed:
                    if not self._rollout.interrupted:
                        self._ready.append(made)
                    self._ended = self._rollout.done
                    self._changed.notify_all()
            return True

    def _drive(self) -> None:
        while not self._closed:
            if not self.advance():
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self.can_advance)

    def _take_commands(self) -> bool:
        taken = False
        while True:
            with self._changed:
                if not self._commands or self._closed:
                    return taken
                command, future = self._commands.popleft()
            taken = True
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(command())
                except BaseException as error:
                    future.set_exception(error)

    def _submit(self, command: Callable[[], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        with self._changed:
            if self._closed:
                raise SessionClosedError("this session is closed")
            self._commands.append((command, future))
            self._changed.notify_all()
        return future

    def _refuse_commands(self) -> None:
        with self._changed:
            commands, self._commands = list(self._commands), deque()
            self._changed.notify_all()
        for _, future in commands:
            if future.set_running_or_notify_cancel():
                future.set_exception(SessionClosedError("this session was closed before the command was taken"))

    def _set_paused(self, paused: bool) -> None:
        with self._changed:
            self._paused = paused
            self._changed.notify_all()

    def _end(self, error: BaseException | None) -> None:
        with self._changed:
            self._error, self._ended = error, True
            self._changed.notify_all()

    def _seek(self, num_chunks: int, prompt: Prompt | None) -> int:
        rollout = self._snapshot(num_chunks)
        if prompt is not None:
            rollout.set_prompt(prompt)
        with self._changed:
            self._rollout = rollout
            self._snapshots.drop(at for at in self._snapshots.places if at > num_chunks)
            self._ready = deque(made for made in self._ready if made.chunk.index < num_chunks)
            self.branch += 1
            self._error, self._ended = None, rollout.done
            self._changed.notify_all()
            return self.branch

    def _snapshot(self, num_chunks: int) -> WanRollout:
        if num_chunks not in self._snapshots:
            raise ValueError(f"there is no snapshot after {num_chunks} chunks; there are some after {self.snapshots}")
        return self._snapshots.fork(num_chunks)

    def _take_snapshot(self) -> None:
        """Unless the video is made from a source, which cannot be read twice."""
        if self._rollout.source is None:
            self._snapshots.keep(self._rollout.chunks_done, self._rollout)
