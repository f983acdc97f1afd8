"""`wan-ar generate --decode-alongside`: the same video, alone and with checkpoints, and no hang at Ctrl-C."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from saved_runs import CHUNK_STARTS, EVERY, assert_same_video, frames_of, start, wait_until, words

from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.scripts import cli


def slowly() -> None:
    """Make decoding take a while, so that there is time to hit it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # OpenMP's others are gone after a fork, and a second thread would wait for them
    decode = WanRollout.decode_chunk

    def slow(self, in_flight):
        time.sleep(0.05)
        return decode(self, in_flight)

    WanRollout.decode_chunk = slow  # type: ignore[method-assign]


@pytest.mark.parametrize("checkpoints", [True, False])
def test_the_same_video(tiny_checkpoint: Path, uninterrupted: Path, tmp_path: Path, checkpoints: bool) -> None:
    output = tmp_path / "x.mp4"
    arguments = words(tiny_checkpoint, output)
    if not checkpoints:
        del arguments[arguments.index("--checkpoint-every") :]
    assert cli.main([*arguments, "--decode-alongside"]) == 0
    assert_same_video(output, uninterrupted, exact=checkpoints)  # without, one encoder makes all of it
    assert json.loads(output.with_suffix(".json").read_text())["decode_alongside"] is True
    assert json.loads(uninterrupted.with_suffix(".json").read_text())["decode_alongside"] is False


def test_ctrl_c_saves_what_is_done_and_resume_goes_on(
    tiny_checkpoint: Path, uninterrupted: Path, tmp_path: Path, capfd
) -> None:
    output, folder = tmp_path / "x.mp4", tmp_path / "x.resume"
    process = start(words(tiny_checkpoint, output, "--decode-alongside"), slowly)
    assert wait_until((folder / "segment-000001.mp4").exists, process)
    time.sleep(0.07)  # into the third segment
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to ffmpeg too
    process.join(60)
    assert process.exitcode == 130
    done = len(frames_of(tmp_path / "x.part.mp4"))
    assert done in CHUNK_STARTS
    assert done >= CHUNK_STARTS[2 * EVERY]
    assert f"{done} frames are saved; run the same command with --resume" in capfd.readouterr().err
    assert cli.main(words(tiny_checkpoint, output, "--decode-alongside", "--resume")) == 0
    assert_same_video(output, uninterrupted, exact=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.mp4"]


def test_ctrl_c_without_checkpoints_ends_the_program(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = words(tiny_checkpoint, tmp_path / "x.mp4")
    del arguments[arguments.index("--checkpoint-every") :]
    process = start([*arguments, "--decode-alongside"], slowly)
    assert wait_until((tmp_path / "x.part.mp4").exists, process)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["x.part.mp4"]
