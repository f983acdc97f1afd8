"""Fixtures of saved rollouts, unfinished runs and small models that work as large ones do."""

import shutil
from pathlib import Path

import pytest
import torch
from live_browser import Page, launched_chromium
from live_firefox import Firefox, FirefoxPage, launched_firefox
from live_page import LivePage
from live_server import ServerProcess
from saved_rollouts import start
from saved_runs import CHUNK_STARTS, FRAMES, STOP, frames_of, words

from wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.models.in_place_layers import InPlaceRMSNorm
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.scripts import cli


@pytest.fixture
def short_tiles(monkeypatch):
    """Norms work tile by tile, in as many as the tokens of a real model are."""
    monkeypatch.setattr(InPlaceRMSNorm, "_TOKENS_AT_ONCE", 4)


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory) -> Path:
    """A state after two chunks. Tests copy it."""
    folder = tmp_path_factory.mktemp("saved") / "state"
    rollout = start(pipe, window_frames=5)
    rollout.step()
    rollout.step()
    rollout.save(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def other_pipe(tiny_checkpoint) -> WanAutoregressivePipeline:
    return WanAutoregressivePipeline.from_pretrained(tiny_checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def uninterrupted(tiny_checkpoint: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "x.mp4"
    assert cli.main(words(tiny_checkpoint, output)) == 0
    assert sorted(path.name for path in output.parent.iterdir()) == ["x.json", "x.mp4"]
    assert len(frames_of(output)) == FRAMES
    return output


@pytest.fixture(scope="module")
def stopped(tiny_checkpoint: Path, tmp_path_factory) -> Path:
    """A folder with `x.resume` in it, after 2 checkpoints. Tests copy it."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        step = WanRollout.step

        def fail(self):
            if self.chunks_done == STOP:
                raise RuntimeError("the card caught fire")
            return step(self)

        patch.setattr(WanRollout, "step", fail)
        assert cli.main(words(tiny_checkpoint, folder / "x.mp4")) == 1
    assert len(frames_of(folder / "x.part.mp4")) == CHUNK_STARTS[STOP]
    return folder


@pytest.fixture
def unfinished(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def browser(request, tmp_path_factory):
    """A headless Chromium, or the Firefox that a test asks for; without it the test is skipped, or fails where it is
    required.
    """
    if getattr(request, "param", "chromium") == "firefox":
        launched = launched_firefox(tmp_path_factory.mktemp("firefox"))
    else:
        launched = launched_chromium()
    with launched as browser:
        yield browser


@pytest.fixture
def visit(browser):
    """Opens pages, and closes them after the test, so that none holds a slot."""
    pages: list[LivePage] = []

    def open_page(link: str, **context) -> LivePage:
        kind = FirefoxPage if isinstance(browser, Firefox) else Page
        pages.append(kind(browser, link, **context))
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()


@pytest.fixture(scope="module")
def live_server(browser, tmp_path_factory):
    """`wan-ar serve` with the demo model and two slots, once there is a browser for it."""
    server = ServerProcess("--slots", "2", log=tmp_path_factory.mktemp("server") / "log")
    yield server
    server.stop()
