"""The page of a server with a preview VAE."""

import pytest
from live_server import ServerProcess


@pytest.mark.slow
def test_a_page_shows_previews_and_what_is_seen_again_in_full(visit, tmp_path):
    server = ServerProcess("--preview-vae", "tiny_vae", log=tmp_path / "log")
    page = visit(server.link)
    page.show_red_then_green()
    session = page.js("wanLive.session")
    page.plays_on()
    assert "a preview" in page.page.inner_text("#figures")
    fetched = []
    page.page.on("request", lambda request: fetched.append(request.url))
    page.page.press("#prompt", "Escape")
    page.page.keyboard.press("Home")
    page.shows("red", "green")
    page.plays_on()
    for chunk in (0, 1):  # before it plays, the next one is there too
        assert f"{server.link}v1/sessions/{session}/chunks/{chunk}.mp4" in fetched
    assert page.problems == []
    server.stop()
