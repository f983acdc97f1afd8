"""What the tests of the live server stand on: a small model, and a viewer without a socket."""

import queue
import time

from wan_autoregressive.server.chunk_files import encode_mp4
from wan_autoregressive.server.engine import Engine
from wan_autoregressive.server.limits import EngineLimits
from wan_autoregressive.server.live_model import LiveModel
from wan_autoregressive.server.messages import ChunkReady, Played, Start

RED, GREEN = "a red circle moving right", "a green cross moving up"
SETTINGS = {"height": 32, "width": 32, "window_frames": 6, "sink_frames": 1, "num_inference_steps": 1}


def live_model(pipe) -> LiveModel:
    return LiveModel(pipe, {**SETTINGS, "position_mode": "relative"}, fps=16.0, scale=8, name="tiny")


def new_engine(pipe, folder, **limits) -> Engine:
    return Engine(live_model(pipe), folder, EngineLimits(**limits), cost_s=0.05)


def alone(pipe, prompt: str, seed: int, count: int, changes: dict[int, str] | None = None) -> list[bytes]:
    """The mp4s that a plain rollout gives, whose prompt changes before the chunks that are named."""
    model = live_model(pipe)
    rollout = model.start(prompt, seed)
    chunks = [rollout.step(prompt=(changes or {}).get(index)) for index in range(count)]
    return [encode_mp4(chunk.frames[0], model.fps, model.scale) for chunk in chunks]


class Viewer:
    """Gets what the engine sends, and keeps the chunks by number."""

    def __init__(self, engine: Engine, image=None, **start) -> None:
        self.engine, self.messages, self.chunks = engine, queue.Queue(), {}
        self.session = engine.open(Start(**start), self.emit, image)

    def emit(self, message, body) -> None:
        self.messages.put((message, body))

    def wait_for(self, kind: str, seconds: float = 60):
        """The next message of a kind; chunks on the way are kept."""
        until = time.monotonic() + seconds
        while True:
            message, body = self.messages.get(timeout=max(0.01, until - time.monotonic()))
            if isinstance(message, ChunkReady):
                self.chunks[message.chunk] = (message, body)
                self.engine.sent(self.session)
            if message.type == kind:
                return message

    def watch(self, count: int) -> list[bytes]:
        """The mp4s of the next chunks, each played as soon as it is there."""
        watched = []
        for _ in range(count):
            chunk = self.wait_for("chunk").chunk
            watched.append(self.chunks[chunk][1])
            self.play(chunk)
        return watched

    def play(self, chunk: int) -> None:
        self.engine.command(self.session, Played(chunk=chunk))

    def leave(self) -> None:
        self.engine.leave(self.session, self.emit)


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that in time"
        time.sleep(0.01)
