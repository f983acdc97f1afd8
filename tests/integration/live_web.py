"""A live server with real sockets on a thread of this process, and a viewer on one of them."""

import json
import socket
import threading
import time
from contextlib import contextmanager

from websockets.sync.client import connect

from wan_autoregressive.server.app import build_app
from wan_autoregressive.server.guard import Door
from wan_autoregressive.server.messages import unpack
from wan_autoregressive.server.serving import web_server


@contextmanager
def running(engine, door=None, idle_s=60, **limits):
    """The port of a server with limits of `web_server`."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        server = web_server(build_app(engine, door or Door(), idle_s), **limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(60)


class WebViewer:
    def __init__(self, port: int, **start) -> None:
        self.live = connect(f"ws://127.0.0.1:{port}/v1/live", max_size=2**24).__enter__()
        self.chunks, self.bodies = {}, {}
        if start:
            self.say(type="start", **start)

    def say(self, **message) -> None:
        self.live.send(json.dumps(message))

    def wait_for(self, kind: str, seconds: float = 60) -> dict:
        while True:
            message = self.live.recv(timeout=seconds)
            if isinstance(message, str):
                header = json.loads(message)
            else:
                header, body = unpack(message)
                self.bodies[header["chunk"]] = body
                self.chunks[header["chunk"]] = header
            if header["type"] == kind:
                return header

    def watch(self, count: int) -> list[bytes]:
        watched = []
        for _ in range(count):
            chunk = self.wait_for("chunk")["chunk"]
            watched.append(self.bodies[chunk])
            self.say(type="played", chunk=chunk)
        return watched

    def close(self) -> None:
        self.live.close()
