"""Drives Debian's Firefox by its own protocol, WebDriver BiDi over a WebSocket, which needs no driver beside it."""

import json
import re
import shutil
import subprocess
import time
from contextlib import contextmanager

from live_page import LivePage, missing
from websockets.sync.client import connect

FIREFOX_NAMES = ("firefox-esr", "firefox")
_ENTER, _CONTROL = "\ue007", "\ue009"
_START_S, _ANSWER_S = 60, 60
_MIDDLE = """(selector) => {
  const element = document.querySelector(selector);
  element.scrollIntoView({ block: 'center', inline: 'center' });
  const { left, top, width, height } = element.getBoundingClientRect();
  return [Math.round(left + width / 2), Math.round(top + height / 2)];
}"""


@contextmanager
def launched_firefox(profile):
    """A browser with a profile of its own. Skips or fails the test if there is none."""
    path = next(filter(None, map(shutil.which, FIREFOX_NAMES)), None)
    if path is None:
        missing("REQUIRE_FIREFOX", "there is no Firefox (`tools/install_browser.sh firefox`)")
    words = ["--headless", "--no-remote", "--profile", str(profile), "--remote-debugging-port", "0"]
    log = profile / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen([path, *words], stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        with connect(_address(log) + "/session", max_size=2**24, ping_interval=None) as socket:
            browser = Firefox(socket)
            yield browser
            browser.ask("session.end")
    finally:
        process.terminate()
        process.wait(30)


def _address(log) -> str:
    end = time.monotonic() + _START_S
    while (found := re.search(r"listening on (ws://\S+)", log.read_text())) is None:
        assert time.monotonic() < end, f"Firefox did not start: {log.read_text()}"
        time.sleep(0.1)
    return found[1]


class Firefox:
    """A session; its commands and what it reports meanwhile."""

    def __init__(self, socket) -> None:
        self._socket, self._commands, self.problems = socket, 0, {}
        self.ask("session.new", capabilities={})
        self.ask("session.subscribe", events=["log.entryAdded"])

    def ask(self, method: str, **params):
        self._commands += 1
        self._socket.send(json.dumps({"id": self._commands, "method": method, "params": params}))
        while True:
            answer = json.loads(self._socket.recv(timeout=_ANSWER_S))
            if answer.get("method") == "log.entryAdded" and answer["params"]["level"] == "error":
                self.problems.setdefault(answer["params"]["source"]["context"], []).append(answer["params"]["text"])
            if answer.get("id") == self._commands:
                if answer["type"] == "error":
                    raise RuntimeError(f"{method}: {answer['error']}: {answer['message']}")
                return answer["result"]


class FirefoxPage(LivePage):
    """One visitor, with cookies and a cache of its own."""

    def __init__(self, firefox: Firefox, link: str) -> None:
        self._firefox = firefox
        self._user = firefox.ask("browser.createUserContext")["userContext"]
        self._context = firefox.ask("browsingContext.create", type="tab", userContext=self._user)["context"]
        self.problems = firefox.problems.setdefault(self._context, [])
        firefox.ask("browsingContext.setViewport", context=self._context, viewport={"width": 1060, "height": 900})
        firefox.ask("browsingContext.navigate", context=self._context, url=link, wait="complete")
        self.until(lambda: self.count("#go:enabled") == 1)

    def js(self, code: str, *arguments):
        given = ", ".join(map(json.dumps, arguments))
        call = (
            f"const value = {code}; return JSON.stringify(typeof value === 'function' ? await value({given}) : value)"
        )
        answer = self._firefox.ask(
            "script.evaluate",
            expression=f"(async () => {{ {call} }})()",
            target={"context": self._context},
            awaitPromise=True,
        )
        assert answer["type"] == "success", answer["exceptionDetails"]["text"]
        return json.loads(answer["result"].get("value", "null"))

    def fill(self, text: str) -> None:
        self.click("#prompt")
        self._press(f"{_CONTROL}a", *text)

    def press_enter(self) -> None:
        self._press(_ENTER)

    def click(self, selector: str) -> None:
        x, y = self.js(_MIDDLE, selector)
        steps = [
            {"type": "pointerMove", "x": x, "y": y},
            *({"type": f"pointer{way}", "button": 0} for way in ("Down", "Up")),
        ]
        self._act({"type": "pointer", "id": "mouse", "actions": steps})

    def rest(self, seconds: float) -> None:
        time.sleep(seconds)

    def reload(self) -> None:
        self._firefox.ask("browsingContext.reload", context=self._context, wait="complete")

    def close(self) -> None:
        self._firefox.ask("browsingContext.close", context=self._context)
        self._firefox.ask("browser.removeUserContext", userContext=self._user)

    def _press(self, *chords: str) -> None:
        """Each the keys of a chord, which go down in turn and up again."""
        steps = []
        for keys in chords:
            steps += [{"type": "keyDown", "value": key} for key in keys]
            steps += [{"type": "keyUp", "value": key} for key in reversed(keys)]
        self._act({"type": "key", "id": "keys", "actions": steps})

    def _act(self, source: dict) -> None:
        self._firefox.ask("input.performActions", context=self._context, actions=[source])
