"""What strangers send: only their own connection suffers, and a viewer beside them goes on."""

import asyncio
import itertools
import json
import socket
import time
from contextlib import suppress

import pytest
from live_viewer import RED, new_engine, until
from live_web import WebViewer, running
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from wan_autoregressive.server.images import ImageShelf
from wan_autoregressive.server.limits import PromptError
from wan_autoregressive.server.live_socket import LiveSocket

REQUEST = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.fixture(scope="module")
def engine(pipe, tmp_path_factory):
    return new_engine(pipe, tmp_path_factory.mktemp("attacked") / "state", slots=3, queue=1)


@pytest.fixture(scope="module")
def port(engine):
    with running(engine, header_s=0.5, body_s=0.7, ping_s=0.5) as port:
        yield port


@pytest.fixture
def bystander(port):
    """A viewer who goes on, whatever happens in the test."""
    viewer = WebViewer(port, prompt=RED, ahead=1)
    viewer.watch(1)
    yield viewer
    viewer.watch(1)
    viewer.close()


def what_comes(live) -> tuple[list[str], int]:
    """Codes of the errors until the connection ends, and the code that it ends with."""
    found = []
    try:
        while True:
            message = live.recv(timeout=30)
            if isinstance(message, str) and json.loads(message)["type"] == "error":
                found.append(json.loads(message)["code"])
    except ConnectionClosed as closed:
        return found, closed.rcvd.code if closed.rcvd else 1006


def test_ten_thousand_messages(port, bystander):
    with connect(f"ws://127.0.0.1:{port}/v1/live", max_size=2**24) as live:
        live.send(json.dumps({"type": "start", "prompt": RED}))
        with suppress(ConnectionClosed):
            for _ in range(10_000):
                live.send(json.dumps({"type": "pause"}))
        assert what_comes(live) == (["too_many_messages"], 4429)


@pytest.mark.parametrize("size", [65 * 1024, 1 << 20])
def test_huge_messages(port, bystander, size):
    with connect(f"ws://127.0.0.1:{port}/v1/live") as live:
        live.send("x" * size)
        assert what_comes(live) == ([], 1009)


@pytest.mark.parametrize("frame", [b"\xff\x80\0\0\0\0", b"\x81\x05hello", b"\x81\xfe\0"])
def test_malformed_frames(port, bystander, frame):
    """An unknown opcode, text without a mask, and a frame that never ends, which a ping finds out."""
    with connect(f"ws://127.0.0.1:{port}/v1/live", ping_interval=None) as live:
        live.socket.sendall(frame)
        _, code = what_comes(live)
        assert code in (1002, 1011)


def test_bytes_are_no_message(port, bystander):
    with connect(f"ws://127.0.0.1:{port}/v1/live") as live:
        live.send(b"\0" * 100)
        assert what_comes(live) == (["bad_message"], 4400)


def ended(connection: socket.socket, seconds: float = 10) -> bool:
    """Whether the server hangs up, and says nothing but refusals before."""
    connection.settimeout(seconds)
    try:
        while data := connection.recv(4096):
            assert data.startswith((b"HTTP/1.1 4", b"Invalid", b"content", b"connection")), data
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    "sent",
    [
        *(b"", b"G", REQUEST, b"\x16\x03\x01\x02\0\x01"),
        REQUEST.replace(b"GET /health", b"POST /v1/images") + b"Content-Length: 1000\r\n\r\nfew",
    ],
    ids=["nothing", "a letter", "half a header", "tls", "half a body"],
)
def test_half_open_connections_end(port, bystander, sent):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(sent)
        assert ended(connection)


def test_a_header_that_comes_letter_by_letter_ends(port, bystander):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(REQUEST + b"\r\n")  # a good one first, on the same connection
        assert b"200 OK" in connection.recv(4096)
        connection.sendall(REQUEST + b"X-Slow: ")
        assert any(not took_letter(connection) for _ in range(1000))


def took_letter(connection: socket.socket) -> bool:
    time.sleep(0.01)
    with suppress(OSError):
        connection.sendall(b"x")
        return True
    return False


def test_a_header_of_a_megabyte(port, bystander):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        try:
            connection.sendall(REQUEST + b"X-Bomb: " + b"x" * 2**20 + b"\r\n\r\n")
        except OSError:
            return
        assert ended(connection)


def test_a_gigabyte_is_not_read(port, bystander):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(REQUEST.replace(b"GET /health", b"POST /v1/images") + b"Content-Length: 1073741824\r\n\r\n")
        assert b"413" in connection.recv(4096)


def test_a_viewer_who_has_gone_without_a_word_leaves_the_slot(engine, port, bystander):
    """No close, no FIN, no answer to a ping: as after a network loss."""
    with connect(f"ws://127.0.0.1:{port}/v1/live", ping_interval=None, close_timeout=0.1) as live:
        live.send(json.dumps({"type": "start", "prompt": RED}))
        until(lambda: engine.figures()["active"] == 2)
        live.protocol.receive_data = lambda data: None  # deaf from now on
        until(lambda: engine.figures()["active"] == 1, 20)


def test_only_so_many_connections_of_an_address(pipe, tmp_path):
    with running(new_engine(pipe, tmp_path / "state"), per_address=3) as port:
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        with socket.create_connection(("127.0.0.1", port)) as one_more:
            assert ended(one_more)
        held.pop().close()
        time.sleep(0.1)
        with socket.create_connection(("127.0.0.1", port)) as again:
            again.sendall(REQUEST + b"\r\n")
            assert b"200 OK" in again.recv(4096)
        for connection in held:
            connection.close()


class DeafSocket:
    """Says what it is told to, and takes nothing: every send waits for ever."""

    def __init__(self, messages) -> None:
        self.messages, self.closed = iter(messages), None

    async def accept(self) -> None:
        pass

    async def receive(self) -> dict:
        await asyncio.sleep(0)
        return {"type": "websocket.receive", "text": json.dumps(next(self.messages))}

    async def send_text(self, text: str) -> None:
        await asyncio.Event().wait()

    send_bytes = send_text

    async def close(self, code: int) -> None:
        self.closed = code


def test_a_viewer_who_takes_nothing_cannot_pile_messages_up(engine, monkeypatch):
    def refuse(self, prompt):
        if prompt != RED:
            raise PromptError("it is too long")

    monkeypatch.setattr("wan_autoregressive.server.live_socket._MOST_OUTGOING", 8)
    monkeypatch.setattr("wan_autoregressive.server.live_model.LiveModel.check_prompt", refuse)
    started = engine.figures()["active"]
    prompts = itertools.repeat({"type": "prompt", "prompt": "too long"}, 150)
    deaf = DeafSocket(itertools.chain([{"type": "start", "prompt": RED}], prompts))
    asyncio.run(LiveSocket(engine, ImageShelf(), idle_s=30).serve(deaf))
    assert deaf.closed == 1008
    assert engine.figures()["active"] == started
