"""The live protocol: what a viewer may say, and what the server says. `docs/API_LIVE.md` explains every message.

Text messages are JSON. A chunk is a binary message: length of its JSON as a 32-bit big-endian number, the JSON, and
the mp4. Header and pixels therefore cannot be separated or reordered.
"""

from __future__ import annotations

import json
import struct
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from wan_autoregressive.server.prompt_text import Prompt

PROTOCOL = 1
MAX_MESSAGE_BYTES = 64 * 1024

Seed = Annotated[int, Field(ge=0, lt=2**53)]  # whole in JavaScript too
Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{22}$")]
ChunkId = Annotated[int, Field(ge=0, lt=2**31)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_Count = Annotated[int, Field(ge=0, le=10_000)]
_Name = Annotated[str, Field(min_length=1, max_length=64)]


class LiveSettings(_Message):
    """Settings of the rollout that a viewer may choose; what is not given stays as it is."""

    window_frames: _Count | None = None
    sink_frames: _Count | None = None
    sampler: _Name | None = None
    num_inference_steps: _Count | None = None
    switch_policy: _Name | None = None
    strength: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """Only for a video that is made from a camera."""

    def given(self) -> dict[str, Any]:
        """As keywords of a rollout."""
        return self.model_dump(exclude_none=True)


class Start(_Message):
    """The first message: a new video, or one to go on with."""

    type: Literal["start"] = "start"
    protocol: int = PROTOCOL
    prompt: Prompt | None = None
    """Needed for a new video."""
    seed: Seed | None = None
    """Drawn when not given."""
    image: Id | None = None
    """To start from, as `POST /v1/images` named it."""
    settings: LiveSettings = LiveSettings()
    """Instead of the server's own."""
    prompt_changes: dict[str, Prompt] | None = None
    """Later prompts by time, as in a settings file: `5s`, or a latent frame. They hold until one comes by hand."""
    camera: bool = False
    """Make the video from frames that the viewer sends, each a binary message with a PNG, JPEG or WebP."""
    resume: Id | None = None
    """A session to go on with, instead of a new one."""
    transport: Literal["mp4", "images"] = "mp4"
    """How the frames of a chunk come; images are for browsers without H.264."""
    ahead: Annotated[int, Field(ge=1, le=8)] = 2
    """Chunks that may be made before the one on screen has been played."""


class ChangePrompt(_Message):
    """Go on with another prompt from the first boundary after the playhead that can be reached in time."""

    type: Literal["prompt"] = "prompt"
    prompt: Prompt
    playhead: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] | None = None
    """Seconds of the video that are played; without it nothing that is made is dropped."""


class Fork(_Message):
    """Go on after a chunk of any branch; null is the start of the video."""

    type: Literal["fork"] = "fork"
    chunk: ChunkId | None
    prompt: Prompt | None = None
    seed: Seed | None = None
    """Start the noise anew, so that what comes next differs although the prompt does not."""
    settings: LiveSettings = LiveSettings()
    """To go on with, as far as a video can change them."""


class ChangeSettings(_Message):
    """Go on with other settings from the next chunk that is made."""

    type: Literal["settings"] = "settings"
    settings: LiveSettings


class Pause(_Message):
    """Make no more chunks until `resume`."""

    type: Literal["pause"] = "pause"


class Resume(_Message):
    """Go on after `pause`."""

    type: Literal["resume"] = "resume"


class Played(_Message):
    """The viewer has reached a chunk: later ones may be made."""

    type: Literal["played"] = "played"
    chunk: ChunkId


class Close(_Message):
    """Forget the video and all its files."""

    type: Literal["close"] = "close"


Command = ChangePrompt | Fork | ChangeSettings | Pause | Resume | Played
ClientMessage = Start | Command | Close

_CLIENT_MESSAGE: TypeAdapter[ClientMessage] = TypeAdapter(Annotated[ClientMessage, Field(discriminator="type")])


def parse_message(text: str) -> ClientMessage:
    """Read what a viewer sent; `ValueError` in one line."""
    try:
        return _CLIENT_MESSAGE.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from error


class ServerMessage(BaseModel):
    """What the server says. Viewers pass over types and fields that they do not know."""

    model_config = ConfigDict(frozen=True)
    type: str

    def as_text(self) -> str:
        return self.model_dump_json()


class Hello(ServerMessage):
    """Right after the connection is open."""

    type: Literal["hello"] = "hello"
    protocol: int = PROTOCOL
    model: str
    fps: float
    width: int
    height: int
    max_seconds: float


class Queued(ServerMessage):
    """All slots are taken; sent again whenever the place changes."""

    type: Literal["queued"] = "queued"
    position: int
    """1 is the next to come in."""


class Started(ServerMessage):
    """The video has a slot."""

    type: Literal["started"] = "started"
    session: str
    branch: int
    seed: int
    num_chunks: int
    """That the session holds already, see `GET /v1/sessions/{id}`."""


class ChunkReady(ServerMessage):
    """Header of a chunk's mp4."""

    type: Literal["chunk"] = "chunk"
    session: str
    chunk: int
    parent: int | None
    branch: int
    index: int
    start_frame: int
    frames: int
    prompt: str
    near: bool
    """Right before it the past was made anew from latents: near to what it was, not the same."""
    preview: bool = False
    """The preview VAE's frames, and nothing that is kept: the file of the chunk will hold the full VAE's."""
    codec: str
    step_s: float
    encode_s: float
    timings: dict[str, float]


class Cut(ServerMessage):
    """From now on the video is what `branch` has up to `after`, and what comes then."""

    type: Literal["cut"] = "cut"
    branch: int
    after: int | None
    frame: int
    """First pixel frame that will be new; the chunk before it may still be on its way."""
    dropped: list[int]
    """Chunks that are forgotten."""
    prompt: str
    near: bool
    """What comes sees a past that is near to what it was, not the same: too much would have to be made again."""
    repeating: int
    """Chunks that have to be made again, unseen, before the next one comes."""


class Error(ServerMessage):
    """Something did not work. The connection stays open unless a close code says otherwise."""

    type: Literal["error"] = "error"
    code: str
    message: str


def pack(header: ServerMessage, body: bytes) -> bytes:
    """Header and payload as one binary message."""
    text = header.as_text().encode()
    return struct.pack(">I", len(text)) + text + body


def unpack(message: bytes) -> tuple[dict[str, Any], bytes]:
    """What `pack` put together."""
    (length,) = struct.unpack_from(">I", message)
    header: dict[str, Any] = json.loads(message[4 : 4 + length])
    return header, message[4 + length :]
