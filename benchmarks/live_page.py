"""What a person waits for on the live page, measured in a browser: a Markdown table.

    python -m benchmarks.live_page --visits 10

Needs the extra `browser` and a Chromium (`tools/install_browser.sh`). The page itself notes when Enter was pressed and
when a frame came on screen; every visitor begins a video, changes its prompt after some seconds, and leaves.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.live import GREEN, RED, spread
from benchmarks.live_process import ServerProcess

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
_WATCHED_MS = 4_000  # before the prompt is changed

# Milliseconds from the last Enter to the first event of a kind after it, or null as long as there is none.
_WAITED = """([kind, prompt]) => {
  const from = wanLive.events.findLast((event) => event.kind === 'submit');
  const seen = wanLive.events.find(
    (event) => event.kind === kind && event.t > from.t && (!prompt || event.prompt === prompt));
  return seen ? seen.t - from.t : null;
}"""


def visit(browser: Any, link: str) -> tuple[float, float]:
    """Seconds from Enter to the first frame on screen, and from the change of prompt to a frame with it."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(link)
    page.wait_for_selector("#go:enabled")

    def waited(kind: str, prompt: str | None) -> float:
        while (found := page.evaluate(_WAITED, [kind, prompt])) is None:
            page.wait_for_timeout(20)
        return float(found) / 1000

    page.fill("#prompt", RED)
    page.press("#prompt", "Enter")
    first = waited("firstframe", None)
    page.wait_for_timeout(_WATCHED_MS)
    page.fill("#prompt", GREEN)
    page.press("#prompt", "Enter")
    change = waited("shown", GREEN)
    context.close()
    return first, change


def main(argv: Sequence[str] | None = None) -> None:
    """Measure with the arguments of the command line, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visits", type=int, default=10)
    args = parser.parse_args(argv)
    path = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if path is None:
        raise SystemExit("there is no Chromium; tools/install_browser.sh installs one")
    playwright = importlib.import_module("playwright.sync_api")
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess("--slots", "1", log=Path(folder) / "log") as server,
        playwright.sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(executable_path=path)
        visit(browser, server.link)  # browser and server have done everything once
        waits = [visit(browser, server.link) for _ in range(args.visits)]
        browser.close()
    print(f"| measured with `python -m benchmarks.live_page --visits {args.visits}` | |\n|---|---|")
    for name, seconds in zip(
        ("Enter to the first frame on screen", "change of prompt to a frame with it"),
        zip(*waits, strict=True),
        strict=True,
    ):
        print(f"| {name} | {spread(seconds)} |")


if __name__ == "__main__":
    main()
