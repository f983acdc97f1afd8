"""A visitor's page of the live server, in whichever browser: what tests do with it and see on it."""

import os
import time
from typing import Any

import pytest

RED, GREEN = "a red circle moving right on a navy background", "a green cross moving left on a navy background"

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


def missing(variable: str, told: str) -> None:
    """Skip the test; or fail it, where an environment variable says that the browser has to be there."""
    (pytest.fail if os.environ.get(variable) == "1" else pytest.skip)(told)


class LivePage:
    """What a browser gives: `js`, `fill`, `press_enter`, `click`, `rest`, `reload`, `close`."""

    problems: list[str]
    """Errors of scripts and on the console."""

    def js(self, code: str, *arguments) -> Any:
        """The value of an expression, or what a function gives for the arguments."""
        raise NotImplementedError

    def fill(self, text: str) -> None:
        """Write into the prompt box, in place of what is there."""
        raise NotImplementedError

    def press_enter(self) -> None:
        """In the prompt box."""
        raise NotImplementedError

    def click(self, selector: str) -> None:
        """The first of what it matches."""
        raise NotImplementedError

    def rest(self, seconds: float) -> None:
        raise NotImplementedError

    def until(self, condition, seconds: float = 90) -> None:
        """Not by a condition in the page: its policy refuses the eval in that."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (
                *(self.status, self.js("document.querySelector('#problem').innerText")),
                *(self.js("wanLive.events"), self.problems),
            )
            self.rest(0.05)

    def ask(self, prompt: str) -> None:
        self.fill(prompt)
        self.press_enter()

    def show_red_then_green(self) -> None:
        """Begin a video of at least three chunks and change its prompt."""
        self.ask(RED)
        self.until(lambda: self.count("#timeline button") >= 3)
        self.ask(GREEN)
        self.shows("green", "red")

    @property
    def status(self) -> str:
        return self.js("document.querySelector('#status').innerText")

    def count(self, selector: str) -> int:
        return self.js("(selector) => document.querySelectorAll(selector).length", selector)

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
        """From the last event of a kind to the first one of another after it that meets the condition.

        It waits for that one: a frame can be seen a moment before the page hears of it.
        """
        found = (
            f"(() => {{ const from = wanLive.events.findLast(e => e.kind === '{kind}').t;"
            f" const to = wanLive.events.find(e => e.kind === '{later}' && e.t > from && {where});"
            " return to ? (to.t - from) / 1000 : null })()"
        )
        self.until(lambda: self.js(found) is not None, 5)
        return self.js(found)
