"""The Python client when its connection is lost: it comes back by itself, and its video is the uninterrupted one."""

import inspect
import re
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from live_browser import Network
from live_server import ServerProcess
from live_viewer import GREEN, RED, alone, new_engine, until
from live_web import running

from wan_autoregressive.client import AsyncLiveClient, LiveClient, LiveError, connection
from wan_autoregressive.client.conversation import LiveChunk

ROOT = Path(__file__).parents[2]


@pytest.fixture
def engine(pipe, tmp_path):
    return new_engine(pipe, tmp_path / "state", slots=2)


@pytest.fixture
def network(engine):
    with running(engine) as port:
        network = Network(port)
        yield network
        network.close()


def lose(network: Network, seconds: float) -> None:
    network.cut()
    threading.Timer(seconds, network.mend).start()


def shown(chunks: list[LiveChunk]) -> list[bytes]:
    """The video as somebody has it who puts every chunk where it begins, in place of all from there on."""
    video: dict[int, LiveChunk] = {}
    for chunk in chunks:
        video = {start: part for start, part in video.items() if start < chunk.start_frame}
        video[chunk.start_frame] = chunk
        assert chunk.start_frame == sum(part.frames for part in video.values()) - chunk.frames
    return [chunk.mp4 for chunk in video.values()]


def test_a_network_that_is_lost_for_a_moment_loses_no_chunk(network, engine, pipe):
    with LiveClient(network.link, reconnects=5) as live:
        live.start(RED, seed=3, ahead=2)
        chunks = [live.next_chunk()]
        until(lambda: len(live.describe()["chunks"]) == 2)  # one is on its way, seen by nobody
        session = live.video.session
        lose(network, 0.5)
        until(lambda: engine.figures()["parked"] == 1)
        chunks += [live.next_chunk() for _ in range(2)]
        live.set_prompt(GREEN)
        assert [chunk.chunk for chunk in chunks] == [0, 1, 2]
        while chunks[-1].prompt == RED:
            chunks.append(live.next_chunk())
        assert live.video.session == session
        change = chunks[-1].index
        assert shown(chunks) == alone(pipe, RED, 3, change + 1, {change: GREEN})
        live.forget()


@pytest.mark.slow
def test_a_connection_that_is_lost_again_while_it_catches_up(network, pipe, monkeypatch):
    describe, failures = AsyncLiveClient.describe, [httpx2.ConnectError("no route"), httpx2.ReadTimeout("silence")]

    async def sometimes(self):
        if failures:
            raise failures.pop()
        return await describe(self)

    with LiveClient(network.link, reconnects=5) as live:
        live.start(RED, seed=3, ahead=2)
        chunks = [live.next_chunk()]
        lose(network, 0.0)
        monkeypatch.setattr(AsyncLiveClient, "describe", sometimes)
        chunks += [live.next_chunk() for _ in range(3)]
        assert [chunk.chunk for chunk in chunks] == [0, 1, 2, 3]
        assert shown(chunks) == alone(pipe, RED, 3, 4)
    assert not failures


def test_what_is_asked_for_without_a_connection_is_done_once_there_is_one(network, pipe):
    with LiveClient(network.link) as live:
        live.start(RED, seed=3, ahead=1)
        chunks = [live.next_chunk()]
        lose(network, 0.5)
        live.set_prompt(GREEN)
        while chunks[-1].prompt == RED:
            chunks.append(live.next_chunk())
        change = chunks[-1].index
        assert shown(chunks) == alone(pipe, RED, 3, change + 1, {change: GREEN})


@pytest.mark.slow
def test_without_tries_it_raises_and_the_video_can_be_taken_up_by_hand(network, pipe):
    with LiveClient(network.link, reconnects=0) as live:
        live.start(RED, seed=3, ahead=1)
        first, session = live.next_chunk(), live.video.session
        lose(network, 0.0)
        with pytest.raises(LiveError, match="code 1006") as error:
            list(live)
        assert error.value.code == "closed"
    until(lambda: not network.is_cut)
    with LiveClient(network.link) as live:
        live.start(resume=session, ahead=1)
        later = live.next_chunk()
        lose(network, 0.0)
        # What was there when it was taken up by hand is not handed out, all since then is.
        chunks = [later, live.next_chunk(), live.next_chunk()]
        assert [chunk.index for chunk in chunks] == [later.index + step for step in range(3)]
        assert first.index < later.index
        assert [chunk.mp4 for chunk in chunks] == alone(pipe, RED, 3, chunks[-1].index + 1)[later.index :]


def test_a_server_that_stays_away_is_given_up(network):
    with LiveClient(network.link, reconnects=2) as live:
        live.start(RED, ahead=1)
        live.next_chunk()
        network.cut()
        with pytest.raises(LiveError, match="2 tries to come back failed"):
            list(live)


def test_page_and_client_come_back_by_the_same_rules():
    script = (ROOT / "server" / "page" / "connection.js").read_text()
    rules = dict(re.findall(r"const (\w+) = (.+);", script))
    assert {int(code) for code in rules["LOST"].strip("[]").split(",")} == connection.LOST
    assert int(rules["FIRST_WAIT_MS"]) == 1000 * connection.FIRST_WAIT_S
    assert int(rules["MOST_WAIT_MS"]) == 1000 * connection.MOST_WAIT_S
    assert int(rules["MOST_RETRIES"]) == inspect.signature(LiveClient).parameters["reconnects"].default


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_ends_and_is_started_again_shows_the_same_video(tmp_path, end):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ("--port", str(port), "--state", str(tmp_path / "state"), "--checkpoint-every", "2")
    video = {
        "prompt": "a red circle moving right on a navy background",
        "prompt_changes": {"3s": "a green cross moving left on a navy background"},
        "seed": 9,
    }
    server = ServerProcess(*words, log=tmp_path / "first.log")
    with LiveClient(server.link) as live:
        live.start(**video)
        whole = [live.next_chunk() for _ in range(9)]
        live.forget()
    with ThreadPoolExecutor(1) as beside, LiveClient(server.link) as live:
        live.start(**video)
        chunks = [live.next_chunk() for _ in range(5)]
        server.process.send_signal(end)
        again = beside.submit(start_again, server, words, tmp_path)
        try:
            while chunks[-1].index < 8:
                chunks.append(live.next_chunk())
        finally:
            again.result().stop()
    assert shown(chunks) == [chunk.mp4 for chunk in whole]
    assert whole[0].prompt != whole[-1].prompt


def start_again(server: ServerProcess, words: tuple[str, ...], folder: Path) -> ServerProcess:
    server.stop()
    return ServerProcess(*words, log=folder / "second.log")
