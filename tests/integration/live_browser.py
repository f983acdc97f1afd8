"""What the tests of the page stand on: a Chromium that plays it, and a network that can be cut."""

import importlib
import shutil
import socket
import threading
from contextlib import contextmanager, suppress

from live_page import GREEN, RED, LivePage, missing

from benchmarks.live_page import CHROMIUM_NAMES

__all__ = ["GREEN", "RED", "Network", "Page", "launched_chromium"]


@contextmanager
def launched_chromium():
    """A browser, with a camera that shows a moving picture. Skips or fails the test if there is none."""
    try:
        playwright = importlib.import_module("playwright.sync_api")
    except ModuleNotFoundError:
        missing("REQUIRE_BROWSER", "playwright is not there (the extra `browser`, or `make test-browser`)")
    path = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if path is None:
        missing("REQUIRE_BROWSER", "there is no Chromium (`apt-get install chromium`)")
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=camera)
        yield browser
        browser.close()


class Page(LivePage):
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

    def fill(self, text: str) -> None:
        self.page.fill("#prompt", text)

    def press_enter(self) -> None:
        self.page.press("#prompt", "Enter")

    def click(self, selector: str) -> None:
        self.page.locator(selector).first.click()

    def rest(self, seconds: float) -> None:
        self.page.wait_for_timeout(1000 * seconds)

    def reload(self) -> None:
        self.page.reload()

    @property
    def chunks(self):
        """Buttons of the timeline."""
        return self.page.locator("#timeline button")

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
