"""The page in a browser, with the demo model: typed, played, changed, taken back. Needs Chromium and playwright,
and for the first test Firefox too.
"""

import numpy as np
import pytest
from live_browser import GREEN, RED

from wan_autoregressive.media.reading import load_video

pytestmark = pytest.mark.slow

# The pixels at a time of the video, once it is there.
PIXELS_AT = """async (seconds) => {
  const video = document.querySelector('#stage video.screen');
  const there = new Promise((done) => video.requestVideoFrameCallback((now, frame) => done(frame.mediaTime)));
  video.currentTime = seconds;
  const at = await there;
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight), context = canvas.getContext('2d');
  context.drawImage(video, 0, 0);
  return { at, pixels: Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data) };
}"""


@pytest.mark.parametrize("browser", ["chromium", "firefox"], indirect=True)
@pytest.mark.parametrize("player", ["", "?player=images"], ids=["mp4", "images"])
def test_a_prompt_plays_changes_and_is_taken_back(visit, live_server, player):
    page = visit(live_server.link + player)
    page.ask(RED)
    page.shows("red", "green")
    has_h264 = page.js("MediaSource.isTypeSupported('video/mp4; codecs=\"avc1.64001f\"')")
    tag = page.js("document.querySelector('#stage .screen').tagName")
    assert tag == ("VIDEO" if has_h264 and not player else "CANVAS")
    first_frame_s = page.seconds_between("submit", "firstframe")
    page.plays_on()
    page.ask(GREEN)
    page.shows("green", "red")
    change_s = page.seconds_between("submit", "shown", f"e.prompt === '{GREEN}'")
    print(f"Enter to first frame {first_frame_s:.2f} s, prompt change to visible change {change_s:.2f} s")
    assert page.count("li.changed") == 1

    # Back to the first chunk, and on with what the box says: a branch, and the one that was left stays as a tab.
    page.fill(RED)
    page.click("#timeline button")
    page.until(lambda: page.js("wanLive.events.some(e => e.kind === 'cut' && e.after === 0)"))
    page.shows("red", "green")
    page.until(lambda: page.count("#timeline button") >= 3)
    assert page.count("#branches button") == 2
    page.click("#branches button")
    page.shows("green", "red")

    # Paused, nothing moves; a reload finds the video again.
    page.click("#pause")
    assert page.status == "Paused"
    shown = page.js("wanLive.frames")
    page.rest(0.7)
    assert page.js("wanLive.frames") <= shown + 1
    session = page.js("wanLive.session")
    page.reload()
    page.until(lambda: page.js("window.wanLive?.frames ?? 0") > 5)
    assert page.js("wanLive.session") == session
    assert page.count("#branches button") == 2
    assert page.problems == []


def test_a_new_prompt_may_wait_for_what_is_made(visit, live_server):
    page = visit(live_server.link)
    page.ask(RED)
    page.until(lambda: page.chunks.count() >= 4)
    page.page.uncheck("#now")
    page.ask(GREEN)
    page.until(lambda: page.js("wanLive.events.some(e => e.kind === 'cut')"))
    made = page.js("wanLive.events.filter(e => e.kind === 'chunk').map(e => e.chunk)")
    page.shows("green", "red")
    # None of them was made in vain: each is still part of the video.
    assert [int(page.chunks.nth(i).get_attribute("data-chunk")) for i in range(len(made))] == made
    assert page.problems == []


def test_the_download_holds_the_frames_that_were_shown(visit, live_server, tmp_path):
    page = visit(live_server.link)
    page.show_red_then_green()
    page.page.click("#pause")
    page.page.click("#files summary")
    with page.page.expect_download() as download:
        page.page.click("#download")
    frames = load_video(download.value.path(), 256, 256).astype(np.int16)
    for number in (0, 5, 9, 20, 30):
        shown = page.js(f"({PIXELS_AT})", (number + 0.5) / 16)
        assert shown["at"] == pytest.approx(number / 16, abs=1e-3)
        pixels = np.array(shown["pixels"], np.int16).reshape(256, 256, 4)[..., :3]
        apart = np.abs(frames - pixels).mean(axis=(1, 2, 3))
        # The same frame in another decoder, and nearer to it than to any other.
        assert apart.argmin() == number, apart
        assert apart[number] < 3
    assert page.problems == []


def test_two_pages_are_not_mixed(visit, live_server):
    pages = [visit(live_server.link), visit(live_server.link)]
    for page, prompt in zip(pages, (RED, GREEN), strict=True):
        page.ask(prompt)
    for _ in range(3):
        pages[0].shows("red", "green")
        pages[1].shows("green", "red")
        pages[0].page.wait_for_timeout(500)
    assert pages[0].js("wanLive.session") != pages[1].js("wanLive.session")

    # A third one waits, and is told so in words.
    third = visit(live_server.link)
    third.ask("a yellow square moving up on a black background")
    third.until(lambda: "number 1 in the queue" in third.status)
    pages[0].close()
    third.until(lambda: third.js("wanLive.frames") > 0)
    assert [page.problems for page in (pages[1], third)] == [[], []]


def test_branches_are_compared_side_by_side(visit, live_server):
    page = visit(live_server.link)
    page.ask(RED)
    page.until(lambda: page.chunks.count() >= 3)
    page.page.fill("#prompt", GREEN)
    page.chunks.first.click()
    page.until(lambda: page.page.locator("#branches button").count() == 2 and page.chunks.count() >= 4)
    page.page.keyboard.press("Escape")
    page.page.keyboard.press("c")
    left, right = (f"figure:nth-of-type({side}) .screen" for side in (1, 2))
    page.shows("red", "green", left)
    page.shows("green", "red", right)
    page.page.click("#comparison-play")
    page.page.wait_for_timeout(300)
    times = page.js("[...document.querySelectorAll('figure .screen')].map((screen) => screen.currentTime)")
    assert abs(times[0] - times[1]) < 0.5
    page.page.keyboard.press("Escape")
    assert page.page.locator("figure .screen").count() == 0
    assert page.problems == []
