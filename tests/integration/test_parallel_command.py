"""`wan-ar generate` under torchrun: one video, one line, and no wrong one where a rank is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from saved_runs import frames_of

from wan_autoregressive.scripts import cli

pytestmark = pytest.mark.slow

WORDS = [
    *("generate", "--prompt", "a red circle moving right on a navy background", "--seed", "3"),
    *("--height", "32", "--width", "32", "--window-frames", "7", "--steps", "1000,500"),
]


def start_ranks(count: int, *words: str) -> subprocess.Popen:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [*run, "-m", "wan_autoregressive.scripts.cli", *WORDS, *words]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def process_of_rank(launcher: int, rank: int) -> int:
    """Among the children of torchrun."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent == launcher and f"RANK={rank}" in (folder / "environ").read_text().split("\0"):
                    return int(folder.name)
            except OSError:
                continue
    raise LookupError(f"torchrun {launcher} has no rank {rank}")


def test_three_ranks_write_what_one_process_does(tmp_path):
    """Two denoise, the third one decodes."""
    words = ["--num-frames", "45", "--output"]
    ranks = start_ranks(3, *words, str(tmp_path / "ranks.mp4"), "--decode-rank")
    out, err = ranks.communicate(timeout=300)
    assert ranks.returncode == 0, err
    assert len(out.splitlines()) == 1
    assert f"{tmp_path / 'ranks.mp4'}: 45 frames" in out
    assert cli.main([*WORDS, *words, str(tmp_path / "one.mp4")]) == 0
    got, expected = (frames_of(tmp_path / f"{name}.mp4") for name in ("ranks", "one"))
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 4  # H.264 of pixels that differ by 1 at most


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process of a rank in /proc")
def test_a_killed_rank_is_named_and_the_run_resumes_alone(tmp_path):
    words = ["--num-frames", "189", "--checkpoint-every", "1", "--output", str(tmp_path / "x.mp4")]
    ranks = start_ranks(2, *words, "--rank-timeout", "60")
    try:
        state = tmp_path / "x.resume" / "state.json"
        end = time.monotonic() + 240
        while not state.is_file():
            assert ranks.poll() is None, ranks.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        killed = process_of_rank(ranks.pid, 1)
        os.kill(killed, signal.SIGKILL)
        _, err = ranks.communicate(timeout=120)
    finally:
        if ranks.poll() is None:
            os.killpg(ranks.pid, signal.SIGKILL)
    assert ranks.returncode != 0
    named = [line for line in err.splitlines() if line.startswith(f"wan-ar: error: rank 1 (process {killed} on ")]
    assert len(named) == 1, err
    assert "frames are saved; run the same command with --resume" in named[0]
    assert not (tmp_path / "x.mp4").exists()
    assert cli.main([*WORDS, *words, "--resume"]) == 0
    assert len(frames_of(tmp_path / "x.mp4")) == 189
