"""The page when something goes away: the server, its process, the network."""

import itertools
import os
import signal

import pytest
from live_browser import GREEN, RED, Network
from live_page import LivePage
from live_server import ServerProcess
from live_web import WebViewer

pytestmark = pytest.mark.slow


def story(page: LivePage) -> list[tuple[float, str]]:
    """Where the chunks of the timeline begin, and their prompts; none is missing between two others."""
    labels = page.js("[...document.querySelectorAll('#timeline button')].map((one) => one.ariaLabel.split(': '))")
    starts = [float(place.removeprefix("Go on from ").removesuffix(" s")) for place, _ in labels]
    assert starts[:1] == [0.0]
    for before, after in itertools.pairwise(starts):
        assert after - before == pytest.approx(0.75 if before else 9 / 16, abs=0.11)
    return list(zip(starts, (prompt for _, prompt in labels), strict=True))


def but_lost_connections(problems: list[str]) -> list[str]:
    """Browsers themselves write a line for every WebSocket and request that came to nothing."""
    return [problem for problem in problems if not any(sign in problem for sign in ("WebSocket", "ERR_", "ws://"))]


def test_a_page_outlives_its_server(visit, tmp_path):
    words = ("--state", str(tmp_path / "state"), "--port")
    server = ServerProcess(*words, "0", log=tmp_path / "first.log")
    page = visit(server.link)
    page.show_red_then_green()
    session, seen = page.js("wanLive.session"), story(page)
    server.stop()
    page.until(lambda: "Trying again" in page.status)
    server = ServerProcess(*words, str(server.port), log=tmp_path / "second.log")
    page.until(lambda: page.chunks.count() >= len(seen) + 2)
    page.plays_on()
    # The same video: what was there before the end still is, in its place, and more after it.
    assert page.js("wanLive.session") == session
    kept = [chunk for chunk in story(page)[: len(seen)] if chunk in seen]
    assert len(kept) >= len(seen) - 1  # one was perhaps on its way to be cut
    page.shows("green", "red")

    # A process that is killed saves nothing more: the page goes on with what there is, or says what is gone.
    os.kill(server.process.pid, signal.SIGKILL)
    server.stop()
    page.until(lambda: "Trying again" in page.status)
    server = ServerProcess(*words, str(server.port), log=tmp_path / "third.log")
    page.until(lambda: page.status == "Live" or page.page.is_visible("#problem"))
    page.ask(RED)
    page.shows("red", "green")
    story(page)
    assert not but_lost_connections(page.problems)
    server.stop()


@pytest.mark.parametrize("browser", ["chromium", "firefox"], indirect=True)
def test_a_network_that_is_lost_for_some_seconds(visit, live_server):
    network = Network(live_server.port)
    page = visit(network.link)
    page.ask(RED)
    page.until(lambda: page.count("#timeline button") >= 3)
    session, seen = page.js("wanLive.session"), story(page)
    network.cut()
    page.until(lambda: "Trying again" in page.status)
    page.rest(3)
    network.mend()
    page.until(lambda: page.count("#timeline button") >= len(seen) + 3)
    page.plays_on()
    assert page.js("wanLive.session") == session
    assert story(page)[: len(seen)] == seen
    page.ask(GREEN)
    page.shows("green", "red")
    assert not but_lost_connections(page.problems)
    network.close()


def test_a_network_that_swallows_everything(visit, live_server):
    """Nothing ends the connection: the page itself notices that it has waited too long."""
    network = Network(live_server.port)
    page = visit(network.link)
    page.ask(RED)
    page.until(lambda: page.chunks.count() >= 3)
    session, count = page.js("wanLive.session"), page.chunks.count()
    network.swallow()
    page.until(lambda: page.js("wanLive.events.some(e => e.kind === 'lost')"))
    network.mend()
    page.until(lambda: page.chunks.count() >= count + 4)
    assert page.js("wanLive.session") == session
    story(page)
    network.close()


def test_a_video_that_another_window_took_comes_back_on_enter(visit, live_server):
    page = visit(live_server.link)
    page.ask(RED)
    page.until(lambda: page.chunks.count() >= 2)
    session = page.js("wanLive.session")
    other = WebViewer(live_server.port, resume=session)
    other.wait_for("started")
    page.until(lambda: "another window" in page.status)
    other.close()
    page.ask(GREEN)
    page.shows("green", "red")
    assert page.js("wanLive.session") == session
    story(page)
    assert page.problems == []
