"""What is said on a connection and what is understood, without the connection."""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field

from wan_autoregressive.client.connection import LiveError
from wan_autoregressive.server.messages import PROTOCOL, ChunkReady, Played, Start, unpack
from wan_autoregressive.server.timeline import Timeline, TimelineChunk


class LiveChunk(ChunkReady):
    """A chunk of the video: an mp4 of its own with `frames` pixel frames, to be shown from `start_frame` on.

    One that does not begin where the last one ended takes the place of all from there on: of what a prompt cut off,
    what a fork left, or what a server that crashed has made again.
    """

    mp4: bytes = Field(repr=False)


class Conversation:
    """One video of one client: takes what the server says, and knows how things stand."""

    def __init__(self) -> None:
        self.hello: dict[str, Any] = {}
        """What the server says of itself: `model`, `fps`, `width`, `height`."""
        self.session: str | None = None
        self.seed: int | None = None
        self.branch = 0
        self.queue_place = 0
        """1 is the next to come in; 0 with a slot."""
        self.ahead = 2
        self.lacks_chunks = False
        """Whether chunks may have come to nobody while the connection was lost; until `lacking` is asked."""
        self._returns = False
        self._num_before = 0  # chunks that the session held when the client took it up
        self._taken: set[int] = set()
        self._unplayed: int | None = None

    def take(self, message: str | bytes) -> LiveChunk | None:
        """The chunk in a message, if it is one that has not been taken.

        Raises:
            LiveError: the server says so; the connection may go on.
        """
        if isinstance(message, bytes):
            header, body = unpack(message)
            return self.take_chunk(LiveChunk(**header, mp4=body))
        header = json.loads(message)
        match header["type"]:
            case "hello":
                self.hello = header
                if header["protocol"] != PROTOCOL:
                    raise LiveError("protocol", f"the server speaks protocol {header['protocol']}, not {PROTOCOL}")
            case "queued":
                self.queue_place = header["position"]
            case "started":
                self._start(header)
            case "cut":
                self.branch = header["branch"]
            case "error" if header["code"] != "not_saved":
                raise LiveError(header["code"], header["message"])
        return None

    def take_chunk(self, made: LiveChunk) -> LiveChunk | None:
        """A chunk that came, however it came; None if it has come before."""
        if made.chunk in self._taken:
            return None
        self._taken.add(made.chunk)
        self._unplayed = made.chunk
        return made

    def returning(self) -> str | None:
        """What to say on a new connection; None where there is no video yet to go on with."""
        if self.session is None:
            return None
        self._returns = True
        return Start(resume=self.session, ahead=self.ahead).model_dump_json()

    def lacking(self, described: dict[str, Any]) -> list[TimelineChunk]:
        """Of what `GET /v1/sessions/{id}` says: the end of the present branch, as far as it has come to nobody."""
        self.lacks_chunks = False
        timeline = Timeline.from_dict(described)
        self.branch = timeline.branch
        had = self._taken | set(sorted(timeline.chunks)[: self._num_before])
        path = timeline.branch_path()
        last = max((chunk.index for chunk in path if chunk.id in had), default=-1)
        return path[last + 1 :]

    def fetched(self, chunk: TimelineChunk, mp4: bytes) -> LiveChunk:
        """One of `lacking`, whose file was fetched; what it took to make is not known any more."""
        unknown = {"codec": "", "step_s": 0.0, "encode_s": 0.0, "timings": {}}
        own = {"session": self.session, "chunk": chunk.id, "mp4": mp4}
        return LiveChunk.model_validate({**vars(chunk), **unknown, **own})

    def played(self) -> str | None:
        """What to say before the next chunk: that the last one has been seen."""
        chunk, self._unplayed = self._unplayed, None
        return None if chunk is None else Played(chunk=chunk).model_dump_json()

    def _start(self, header: dict[str, Any]) -> None:
        if not self._returns:
            self._num_before = header["num_chunks"]
        self.lacks_chunks |= self._returns
        self._returns, self.queue_place = False, 0
        self.session, self.seed, self.branch = header["session"], header["seed"], header["branch"]
