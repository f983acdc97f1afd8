"""Who is watching, who waits for a slot, and whose turn it is. Knows no models."""

from __future__ import annotations

import time
from collections import deque

from wan_autoregressive.server.limits import QueueFullError
from wan_autoregressive.server.live_session import LiveSession
from wan_autoregressive.server.messages import Queued, Started


class Seats:
    """The sessions in memory. Guarded by the engine's lock; tells viewers when their place changes.

    Args:
        slots: Sessions that are watched at the same time.
        queue: Sessions that may wait.
    """

    def __init__(self, slots: int, queue: int) -> None:
        self.slots, self._queue = slots, queue
        self.active: dict[str, LiveSession] = {}
        """With a slot, or at work in the background."""
        self.waiting: deque[LiveSession] = deque()
        self.leaving: dict[str, LiveSession] = {}
        """Without a viewer, still to be saved."""

    def find(self, key: str) -> LiveSession | None:
        """A session that has a slot or waits for one."""
        return self.active.get(key) or next((session for session in self.waiting if session.id == key), None)

    def all(self) -> list[LiveSession]:
        return [*self.active.values(), *self.waiting, *self.leaving.values()]

    @property
    def num_watched(self) -> int:
        """Slots that are taken."""
        return sum(not session.in_background for session in self.active.values())

    def check_room(self) -> None:
        """Raise `QueueFullError` if nobody can come in, not even to wait."""
        if self.num_watched >= self.slots and len(self.waiting) >= self._queue:
            raise QueueFullError(f"all {self.slots} slots are taken and {self._queue} viewers wait")

    def resize(self, slots: int) -> None:
        """Have so many slots from now on. Whoever has one keeps it."""
        self.slots = slots
        self.admit()

    def take(self, session: LiveSession) -> None:
        """Give a session a slot, or a place in the queue."""
        if session.in_background:
            self._seat(session)
            return
        session.state = "waiting"
        self.waiting.append(session)
        self.admit()
        if session.state == "waiting":
            self.tell(session)

    def leave(self, session: LiveSession) -> None:
        """Its slot or place is free from now on; it is to be saved."""
        if session.state in ("active", "waiting"):
            self._remove(session)
            session.state = "leaving"
            self.leaving[session.id] = session
            self.admit()

    def remove(self, session: LiveSession) -> None:
        """It is gone from here, saved or forgotten."""
        self._remove(session)
        session.state = "gone"
        self.admit()

    def admit(self) -> None:
        """Let those who wait in as far as there are slots, and tell the others how their place changed."""
        before = len(self.waiting)
        while self.waiting and self.num_watched < self.slots:
            self._seat(self.waiting.popleft())
        if len(self.waiting) != before:
            self._tell_waiting()

    def next_to_serve(self) -> LiveSession | None:
        """Whoever runs dry first, among those for whom there is something to do."""
        ready = [session for session in self.active.values() if session.commands or session.wants_chunk]
        return min(ready, key=lambda session: session.urgency, default=None)

    def next_to_save(self) -> LiveSession | None:
        """One that left, once its chunks are encoded."""
        return next((session for session in self.leaving.values() if not session.encoding), None)

    def tell(self, session: LiveSession) -> None:
        """Tell a viewer where the session stands."""
        if session.state == "waiting":
            session.emit(Queued(position=self.waiting.index(session) + 1), None)
            return
        with session.video.lock:
            timeline = session.video.timeline
            branch, count = timeline.branch, len(timeline.chunks)
        session.emit(Started(session=session.id, branch=branch, seed=session.video.seed, num_chunks=count), None)

    def _seat(self, session: LiveSession) -> None:
        session.state, session.served = "active", time.monotonic()
        self.active[session.id] = session
        self.tell(session)

    def _remove(self, session: LiveSession) -> None:
        self.active.pop(session.id, None)
        self.leaving.pop(session.id, None)
        if session in self.waiting:
            self.waiting.remove(session)
            self._tell_waiting()

    def _tell_waiting(self) -> None:
        for session in self.waiting:
            self.tell(session)
