"""Runs of `wan-ar generate` in processes of their own, and what it means for two videos to be the same."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np

from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.scripts import cli

FRAMES, EVERY = 37, 3  # 10 chunks of 1 latent frame: 3 checkpoints and a rest of 1
STOP = 7  # chunks done in runs that fail: two checkpoints and a chunk beyond
CHUNK_STARTS = [0, *range(1, FRAMES, 4)]


def words(model: Path, output: Path, *more: str) -> list[str]:
    settings = {"prompt": "a red fox", "height": 32, "width": 48, "num-frames": FRAMES, "chunk-frames": 1, "seed": 3}
    settings |= {"window-frames": 4, "steps": 2, "device": "cpu", "scale": 2, "checkpoint-every": EVERY}
    if "--prompt" in more:
        del settings["prompt"]  # given twice it would be a change of the prompt
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["generate", "--model", str(model), "--output", str(output), *flags, *more]


def frames_of(path: Path) -> np.ndarray:
    return iio.imread(path, plugin="FFMPEG").astype(int)


def start(arguments: list[str], before: Callable[[], object] = lambda: None) -> Any:
    """The command in a process of its own. Forked, because importing takes longer than the whole test."""

    def run() -> None:
        os.setsid()
        before()
        os._exit(cli.main(arguments))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def wait_until(condition: Callable[[], object], process: Any) -> bool:
    """Whether the condition came true before the process ended."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        if not process.is_alive():
            return False
        time.sleep(0.002)
    return True


def slowly() -> None:
    """Make chunks take a while, so that there is time to hit them."""
    step = WanRollout.step

    def slow(self, *args, **kwargs):
        time.sleep(0.05)
        return step(self, *args, **kwargs)

    WanRollout.step = slow  # type: ignore[method-assign]


def assert_same_video(path: Path, expected: Path, exact: bool) -> None:
    """As many frames, and each chunk is the one that belongs there; encoders started elsewhere may differ a little."""
    found, wanted = frames_of(path), frames_of(expected)
    assert found.shape == wanted.shape
    if exact:
        assert np.array_equal(found, wanted)
    assert np.abs(found - wanted).mean(axis=(1, 2, 3)).max() < 3
    chunk_means = np.stack([wanted[begin : begin + 4].mean(axis=0) for begin in CHUNK_STARTS])
    for index, begin in enumerate(CHUNK_STARTS):
        distances = np.abs(chunk_means - found[begin : begin + 4].mean(axis=0)).mean(axis=(1, 2, 3))
        assert distances.argmin() == index
    report = json.loads(path.with_suffix(".json").read_text())
    assert (report["frames"], report["chunks"], report["seed"]) == (FRAMES, len(CHUNK_STARTS), 3)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(code: int, capfd, message: str = "") -> None:
    out, err = capfd.readouterr()
    assert code == 2
    assert err.startswith("wan-ar: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
