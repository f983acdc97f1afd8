"""The page in a browser, with the demo model: typed, played, changed, taken back. Needs Chromium and playwright."""

import time
from pathlib import Path

import pytest
from live_server import ServerProcess

CHROMIUM = Path("/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not there (the extra `browser`)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM} (apt-get install chromium)"),
]

RED, GREEN = "a red circle moving right on a navy background", "a green cross moving left on a navy background"
# Pixels of the video that are clearly red and clearly green, in percent.
COLOURS = """() => {
  const canvas = new OffscreenCanvas(32, 32), context = canvas.getContext('2d');
  context.drawImage(document.getElementById('video'), 0, 0, 32, 32);
  const data = context.getImageData(0, 0, 32, 32).data;
  let red = 0, green = 0;
  for (let i = 0; i < data.length; i += 4) {
    if (data[i] > 150 && data[i + 1] < 110 && data[i + 2] < 110) red++;
    if (data[i + 1] > 90 && data[i] < 110 && data[i + 2] < 110) green++;
  }
  return { red: red / 10.24, green: green / 10.24 };
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = ServerProcess("--slots", "2", log=tmp_path_factory.mktemp("server") / "log")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM))
        yield browser
        browser.close()


class Page:
    def __init__(self, browser, link: str, **context) -> None:
        context = {"viewport": {"width": 1060, "height": 860}, **context}
        self.context, self.problems = browser.new_context(**context), []
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda line: line.type == "error" and self.problems.append(line.text))
        self.page.goto(link)

    def js(self, code: str):
        return self.page.evaluate(f"() => {code}")

    def until(self, condition, seconds: float = 60) -> None:
        """Not `wait_for_function`: the page's policy refuses the eval in it."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (self.page.inner_text("#status"), self.js("wanLive.events"), self.problems)
            self.page.wait_for_timeout(30)

    def ask(self, prompt: str) -> None:
        self.page.fill("#prompt", prompt)
        self.page.press("#prompt", "Enter")

    def shows(self, colour: str, other: str) -> None:
        def seen() -> bool:
            found = self.page.evaluate(COLOURS)
            return found[colour] > 2 and found[other] == 0

        self.until(seen)

    def seconds_between(self, kind: str, later: str, where: str = "true") -> float:
        """From the last event of a kind to the first one of another after it that meets the condition."""
        return self.js(
            f"(() => {{ const from = wanLive.events.findLast(e => e.kind === '{kind}').t;"
            f" return (wanLive.events.find(e => e.kind === '{later}' && e.t > from && {where}).t - from) / 1000 }})()"
        )


def test_a_prompt_plays_changes_and_is_taken_back(browser, server, tmp_path):
    page = Page(browser, server.link)
    page.ask(RED)
    page.shows("red", "green")
    first_frame_s = page.seconds_between("submit", "firstframe")
    at = page.js("document.getElementById('video').currentTime")
    page.until(lambda: page.js("document.getElementById('video').currentTime") > at + 1)
    page.ask(GREEN)
    page.shows("green", "red")
    change_s = page.seconds_between("submit", "shown", f"e.prompt === '{GREEN}'")
    print(f"Enter to first frame {first_frame_s:.2f} s, prompt change to visible change {change_s:.2f} s")
    assert page.page.locator("li.changed").count() == 1

    # Back to the first chunk, and on with what the box says: a branch, and the one that was left stays as a tab.
    page.page.fill("#prompt", RED)
    page.page.locator("#timeline button").first.click()
    page.until(lambda: page.js("wanLive.events.some(e => e.kind === 'cut' && e.after === 0)"))
    page.shows("red", "green")
    page.until(lambda: page.page.locator("#timeline button").count() >= 3)
    assert page.page.locator("#branches button").count() == 2
    page.page.screenshot(path=tmp_path / "page.png")
    page.page.locator("#branches button").first.click()
    page.shows("green", "red")

    # Paused, nothing moves; a reload finds the video again.
    page.page.locator("#video").focus()
    page.page.locator("#status").click()
    page.page.keyboard.press(" ")
    page.until(lambda: page.page.inner_text("#status") == "Paused")
    with page.page.expect_download() as download:
        page.page.click("#download")
    assert download.value.path().stat().st_size > 10_000
    session = page.js("wanLive.session")
    page.page.reload()
    page.until(lambda: page.js("wanLive.frames") > 5)
    assert page.js("wanLive.session") == session
    assert page.page.locator("#branches button").count() == 2
    assert page.problems == []
    page.context.close()


def test_two_pages_are_not_mixed(browser, server):
    pages = [Page(browser, server.link), Page(browser, server.link)]
    for page, prompt in zip(pages, (RED, GREEN), strict=True):
        page.ask(prompt)
    pages[0].shows("red", "green")
    pages[1].shows("green", "red")
    assert pages[0].js("wanLive.session") != pages[1].js("wanLive.session")

    # A third one waits, and is told so in words.
    third = Page(browser, server.link)
    third.ask("a yellow square moving up on a black background")
    third.until(lambda: "number 1 in the queue" in third.page.inner_text("#status"))
    pages[0].context.close()
    third.until(lambda: third.js("wanLive.frames") > 0)
    assert [page.problems for page in (pages[1], third)] == [[], []]
    for page in (pages[1], third):
        page.context.close()


def test_a_phone_in_the_dark(browser, server, tmp_path):
    small = {"viewport": {"width": 390, "height": 780}, "color_scheme": "dark", "has_touch": True}
    page = Page(browser, server.link, **small)
    page.page.click("#go")
    page.until(lambda: page.js("(wanLive.chunks ?? 0) >= 3"))
    assert page.js("document.documentElement.scrollWidth <= innerWidth")
    page.page.screenshot(path=tmp_path / "phone.png")
    assert page.problems == []
    page.context.close()
