"""What is said on a connection and what is understood, without the connection."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from wan_autoregressive.server.messages import PROTOCOL, Played, unpack

MAX_CHUNK_BYTES = 256 * 2**20


class LiveError(RuntimeError):
    """The server says that something did not work. `code` is that of `docs/API_LIVE.md`, or `closed`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class LiveChunk:
    """A chunk of the video: an mp4 of its own with `frames` pixel frames, to be shown from `start_frame` on."""

    session: str
    chunk: int
    """Its number in the session, to fork from."""
    parent: int | None
    branch: int
    index: int
    """Chunks before it."""
    start_frame: int
    frames: int
    prompt: str
    near: bool
    """Right before it the past was made anew from latents: near to what it was, not the same."""
    step_s: float
    encode_s: float
    timings: Mapping[str, float]
    mp4: bytes = dataclasses.field(repr=False)


_FIELDS = tuple(field.name for field in dataclasses.fields(LiveChunk) if field.name != "mp4")


@dataclass(frozen=True)
class Address:
    """Where a server is.

    Args:
        url: As the server prints it, `http://host:8000/`, with or without its `?token=`.
        token: Instead of the one in `url`.
    """

    url: str
    token: str | None = None

    @property
    def http(self) -> str:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"the address of a server looks like http://127.0.0.1:8000, got '{self.url}'")
        return f"{parts.scheme}://{parts.netloc}"

    @property
    def live(self) -> str:
        return "ws" + self.http.removeprefix("http") + "/v1/live"

    @property
    def headers(self) -> dict[str, str]:
        given = parse_qs(urlsplit(self.url).query).get("token", [None])[0]
        token = self.token or given
        return {} if token is None else {"Authorization": f"Bearer {token}"}


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
        self._unplayed: int | None = None

    def take(self, message: str | bytes) -> LiveChunk | None:
        """The chunk in a message, if it is one.

        Raises:
            LiveError: the server says so; the connection may go on.
        """
        if isinstance(message, bytes):
            header, body = unpack(message)
            made = LiveChunk(**{name: header[name] for name in _FIELDS}, mp4=body)
            self._unplayed = made.chunk
            return made
        header = json.loads(message)
        match header["type"]:
            case "hello":
                self.hello = header
                if header["protocol"] != PROTOCOL:
                    raise LiveError("protocol", f"the server speaks protocol {header['protocol']}, not {PROTOCOL}")
            case "queued":
                self.queue_place = header["position"]
            case "started":
                self.session, self.seed, self.branch = header["session"], header["seed"], header["branch"]
                self.queue_place = 0
            case "cut":
                self.branch = header["branch"]
            case "error" if header["code"] != "not_saved":
                raise LiveError(header["code"], header["message"])
        return None

    def played(self) -> str | None:
        """What to say before the next chunk: that the last one has been seen."""
        chunk, self._unplayed = self._unplayed, None
        return None if chunk is None else Played(chunk=chunk).model_dump_json()

    def closed(self, code: int | None) -> LiveError:
        """What to raise where the server hung up."""
        why = {
            1012: "it restarts; come back with resume",
            1013: "its queue is full",
            4408: "nothing was said for long",
        }
        return LiveError("closed", f"the server ended the connection: {why.get(code or 0, f'code {code}')}")
