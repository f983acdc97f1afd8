"""A viewer and a video: what the engine has to know to decide who is next, and what may be dropped."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from wan_autoregressive.server.live_video import LiveVideo
from wan_autoregressive.server.made_chunk import MadeChunk
from wan_autoregressive.server.messages import ChangePrompt, ChangeSettings, Error, Fork, ServerMessage, Start
from wan_autoregressive.server.timeline import TimelineChunk

Emit = Callable[[ServerMessage, bytes | None], None]
"""Takes a message to the viewer, with the frames of a chunk; called from any thread, and never waits."""

_MOST_COMMANDS = 16
_COST_SHARE = 0.3  # of the newest chunk in the moving average


def nobody(message: ServerMessage, body: bytes | None) -> None:
    """The viewer has left."""


class LiveSession:
    """Guarded by the engine's lock.

    Args:
        cost_s: Seconds from a command to a chunk on its way, until some have been measured.
    """

    def __init__(self, key: str, video: LiveVideo, cost_s: float) -> None:
        self.id, self.video, self.cost_s = key, video, cost_s
        self.emit: Emit = nobody
        self.ahead = 1
        self.state: Literal["waiting", "active", "leaving", "gone"] = "waiting"
        self.commands: deque[ChangePrompt | Fork | ChangeSettings] = deque(maxlen=_MOST_COMMANDS)
        self.to_encode: deque[MadeChunk] = deque()
        self.encoding = False
        self.transport: Literal["mp4", "images"] = "mp4"
        self.paused = self.told_of_limit = False
        self.unsaved = 0
        """Chunks since the last checkpoint."""
        self.unsent = 0
        """Chunks that no socket has taken yet."""
        self.made = self.played = len(video.timeline.branch_path()) - 1
        """Index of the newest chunk, and of the newest that the viewer has reached."""
        self.served = time.monotonic()

    @property
    def lead(self) -> int:
        """Chunks in front of the viewer."""
        return self.made - self.played

    @property
    def wants_chunk(self) -> bool:
        """Whether there is room for one: neither far ahead of the viewer nor of what the socket takes."""
        has_room = self.lead < self.ahead and self.unsent < self.ahead
        return (
            has_room
            and self.video.plan.has_frames
            and not (self.paused or self.told_of_limit or self.video.is_complete)
        )

    @property
    def in_background(self) -> bool:
        """Whether nobody watches while it is made: it takes no slot, and its turn is last."""
        return self.video.stop_frame is not None

    @property
    def urgency(self) -> tuple[bool, int, float]:
        """Least first: who runs dry next, and whoever waited longest. A command is worth an empty buffer."""
        return (self.in_background, 0 if self.commands else self.lead, self.served)

    def attach(self, emit: Emit, start: Start) -> None:
        """A viewer comes who has, or can fetch, all that is made."""
        self.emit, self.ahead, self.transport = emit, start.ahead, start.transport
        self.played, self.unsent, self.paused = self.made, 0, False

    def take(self, command: ChangePrompt | Fork | ChangeSettings) -> None:
        """Line a command up; of prompts in a row only the last counts."""
        if isinstance(command, ChangePrompt) and self.commands and isinstance(self.commands[-1], ChangePrompt):
            self.commands.pop()
        self.commands.append(command)

    def was_sent(self) -> None:
        """A chunk is off, or never will be."""
        self.unsent = max(0, self.unsent - 1)

    def mark_played(self, chunk: int) -> None:
        """The viewer says so; what is not part of the present video counts for nothing."""
        with self.video.lock:
            path = self.video.timeline.branch_path()
        index = next((part.index for part in path if part.id == chunk), -1)
        self.played = max(self.played, index)

    def stand_after(self, path: list[TimelineChunk]) -> None:
        """The video now ends with this path."""
        self.made = len(path) - 1
        self.played = min(self.played, self.made)

    def measured(self, seconds: float) -> None:
        """A chunk took so long from the start of its step to its way out."""
        self.cost_s += _COST_SHARE * (seconds - self.cost_s)

    def fail(self, code: str, message: str) -> None:
        self.emit(Error(code=code, message=message), None)


def cut_point(path: list[TimelineChunk], played: int, frame: float | None) -> int | None:
    """The chunk after which a new prompt sets in: the first that ends after `frame`, never before what is on screen.

    Args:
        path: The video.
        played: Index of the chunk that the viewer has reached, -1 for none.
        frame: Pixel frame that the viewer will be at when a new chunk can be there; None keeps all that is made.
    """
    if not path:
        return None
    due = len(path) - 1
    if frame is not None:
        due = next((part.index for part in path if part.stop_frame > frame), due)
    return path[max(due, played, 0)].id
