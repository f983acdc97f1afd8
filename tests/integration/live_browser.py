"""What the tests of the page stand on: a Chromium that plays it, and a network that can be cut."""

import importlib
import os
import shutil
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest

RED, GREEN = "a red circle moving right on a navy background", "a green cross moving left on a navy background"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
REQUIRED = os.environ.get("REQUIRE_BROWSER") == "1"
"""Set where a missing browser is a failure and no reason to skip."""

# Pixels of what is on screen that are clearly red and clearly green, in percent.
COLOURS = """(selector) => {
  const canvas = new OffscreenCanvas(32, 32), context = canvas.getContext('2d');
  const screen = document.querySelector(selector);
  if (!screen || !(screen.videoWidth ?? screen.width)) return { red: 0, green: 0 };
  context.drawImage(screen, 0, 0, 32, 32);
  const data = context.getImageData(0, 0, 32, 32).data;
  let red = 0, green = 0;
  for (let i = 0; i < data.length; i += 4) {
    if (data[i] > 150 && data[i + 1] < 110 && data[i + 2] < 110) red++;
    if (data[i + 1] > 90 && data[i] < 110 && data[i + 2] < 110) green++;
  }
  return { red: red / 10.24, green: green / 10.24 };
}"""


@contextmanager
def launched_chromium():
    """A browser, with a camera that shows a moving picture. Skips or fails the test if there is none."""
    missing = pytest.fail if REQUIRED else pytest.skip
    try:
        playwright = importlib.import_module("playwright.sync_api")
    except ModuleNotFoundError:
        missing("playwright is not there (the extra `browser`, or `make test-browser`)")
    path = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if path is None:
        missing("there is no Chromium (`apt-get install chromium`)")
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=camera)
        yield browser
        browser.close()


class Page:
    """One visitor, with cookies and a cache of its own."""

    def __init__(self, browser, link: str, **context) -> None:
        context = {"viewport": {"width": 1060, "height": 900}, **context}
        self.context, self.problems = browser.new_context(**context), []
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda line: line.type == "error" and self.problems.append(line.text))
        self.page.goto(link)
        self.page.wait_for_selector("#go:enabled")

    def js(self, code: str, *arguments):
        return self.page.evaluate(code if code.startswith("(") else f"() => {code}", *arguments)

    def until(self, condition, seconds: float = 90) -> None:
        """Not `wait_for_function`: the page's policy refuses the eval in it."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (
                *(self.page.inner_text("#status"), self.page.inner_text("#problem")),
                *(self.js("wanLive.events"), self.problems),
            )
            self.page.wait_for_timeout(50)

    def ask(self, prompt: str) -> None:
        self.page.fill("#prompt", prompt)
        self.page.press("#prompt", "Enter")

    def show_red_then_green(self) -> None:
        """Begin a video of at least three chunks and change its prompt."""
        self.ask(RED)
        self.until(lambda: self.chunks.count() >= 3)
        self.ask(GREEN)
        self.shows("green", "red")

    @property
    def status(self) -> str:
        return self.page.inner_text("#status")

    @property
    def chunks(self):
        """Buttons of the timeline."""
        return self.page.locator("#timeline button")

    def shows(self, colour: str, other: str, selector: str = "#stage .screen") -> None:
        def seen() -> bool:
            found = self.js(COLOURS, selector)
            return found[colour] > 2 and found[other] == 0

        self.until(seen)

    def plays_on(self, seconds: float = 1.0) -> None:
        """More frames come on screen than are buffered."""
        shown = self.js("wanLive.frames")
        self.until(lambda: self.js("wanLive.frames") > shown + 16 * seconds)

    def seconds_between(self, kind: str, later: str, where: str = "true") -> float:
        """From the last event of a kind to the first one of another after it that meets the condition."""
        return self.js(
            f"(() => {{ const from = wanLive.events.findLast(e => e.kind === '{kind}').t;"
            f" return (wanLive.events.find(e => e.kind === '{later}' && e.t > from && {where}).t - from) / 1000 }})()"
        )

    def close(self) -> None:
        self.context.close()


class Network:
    """Between a page and a server, on a port of its own: it can be cut, and mended."""

    def __init__(self, port: int) -> None:
        self._target, self._ends = ("127.0.0.1", port), []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.link = f"http://127.0.0.1:{self._listening.getsockname()[1]}/"
        self.is_cut = False
        self._swallowed: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End what is open, and let nothing through until it is mended."""
        self.is_cut = True
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._ends.clear()

    def swallow(self) -> None:
        """Let nothing more of what is open through, and tell nobody."""
        self._swallowed |= set(self._ends)

    def mend(self) -> None:
        """Let new connections through."""
        self.is_cut = False

    def close(self) -> None:
        self._listening.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                visitor, _ = self._listening.accept()
                if self.is_cut:
                    visitor.close()
                    continue
                server = socket.create_connection(self._target)
                self._ends += [visitor, server]
                for one, other in ((visitor, server), (server, visitor)):
                    threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                if one not in self._swallowed:
                    other.sendall(data)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
