"""`wan-ar generate --share`: any number of runs make a list between them, whatever becomes of any of them."""

import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from saved_runs import assert_refused, contents, frames_of, slowly, start, wait_until, words

from wan_autoregressive.scripts import cli, video_list
from wan_autoregressive.scripts.output_files import OutputFiles
from wan_autoregressive.scripts.output_lease import OutputLeases

PROMPTS = ["a red fox", "rain", "a blue fox", "snow"]


@pytest.fixture(scope="module", autouse=True)
def quiet_tokenizers() -> Iterator[None]:
    """A warning about forks would go to stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


def list_words(model: Path, folder: Path, *more: str) -> list[str]:
    """A list of `PROMPTS`, beside its folder."""
    prompts = folder.with_suffix(".txt")
    prompts.write_text("\n".join(PROMPTS))
    arguments = words(model, folder, "--prompts", str(prompts), "--num-frames", "21", *more)
    at = arguments.index("--prompt")
    return arguments[:at] + arguments[at + 2 :]


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path, tmp_path_factory) -> Path:
    """The videos as one run makes them."""
    folder = tmp_path_factory.mktemp("alone") / "videos"
    assert cli.main(list_words(tiny_checkpoint, folder)) == 0
    return folder


def assert_same_videos(folder: Path, expected: Path) -> None:
    """Every video with the same pixels, and nothing half made or held beside them."""
    assert sorted(contents(folder)) == sorted(contents(expected))
    for path in expected.glob("*.mp4"):
        assert np.array_equal(frames_of(folder / path.name), frames_of(path))


def held_by(folder: Path, process: object) -> list[Path]:
    """The unfinished videos with a saved state that a process holds."""
    videos = (folder / f"{number:04}.mp4" for number in range(1, len(PROMPTS) + 1))
    leases = {video: OutputFiles(video).lease for video in videos}
    held = []
    for video, lease in leases.items():
        try:
            ours = f"pid={process.pid}\n" in lease.read_text()  # type: ignore[attr-defined]
        except FileNotFoundError:
            continue
        if ours and (OutputFiles(video).resume_folder / "state.json").exists():
            held.append(video)
    return held


def made(out: str) -> list[str]:
    """The videos that any run says it made."""
    return sorted(line.split(": ")[0].rsplit("/", 1)[1] for line in out.splitlines() if " frames of " in line)


@pytest.mark.slow
def test_one_of_two_runs_is_killed_inside_a_video(tiny_checkpoint: Path, alone: Path, tmp_path: Path, capfd) -> None:
    folder = tmp_path / "videos"
    arguments = list_words(tiny_checkpoint, folder, "--share")
    first, second = start(arguments, slowly), start(arguments, slowly)
    assert wait_until(lambda: held_by(folder, first), first)
    first.kill()
    (video,) = held_by(folder, first)
    first.join()
    second.join()
    assert (first.exitcode, second.exitcode) == (-signal.SIGKILL, 0)
    assert_same_videos(folder, alone)
    out = capfd.readouterr().out
    assert made(out) == [f"{number:04}.mp4" for number in range(1, len(PROMPTS) + 1)]  # each once
    assert video.name in made(out)


@pytest.mark.slow
def test_a_run_that_stood_still_writes_nothing_into_what_was_taken_over(
    tiny_checkpoint: Path, alone: Path, tmp_path: Path, capfd, monkeypatch
) -> None:
    monkeypatch.setattr(video_list, "OutputLeases", partial(OutputLeases, lease_s=2.0))  # in both, which are forked
    folder = tmp_path / "videos"
    arguments = list_words(tiny_checkpoint, folder, "--share")
    first = start(arguments, slowly)
    assert wait_until(lambda: held_by(folder, first), first)
    os.kill(first.pid, signal.SIGSTOP)
    second = start(arguments)
    second.join(60)
    assert second.exitcode == 0
    assert_same_videos(folder, alone)
    written = {path: path.stat() for path in folder.iterdir()}
    os.kill(first.pid, signal.SIGCONT)
    first.join(60)
    assert first.exitcode == 0
    assert {path: path.stat() for path in folder.iterdir()} == written
    assert len(made(capfd.readouterr().out)) == len(PROMPTS)


def test_what_failed_here_is_said_and_the_rest_is_made(tiny_checkpoint: Path, tmp_path: Path, capfd) -> None:
    folder = tmp_path / "videos"
    arguments = list_words(tiny_checkpoint, folder, "--share")
    folder.with_suffix(".txt").write_text("a red fox\n" + "rain " * 600)
    assert cli.main(arguments) == 1
    err = capfd.readouterr().err
    assert "0002.mp4: prompt is too long" in err
    assert "1 of 2 videos failed: 0002.mp4" in err
    assert sorted(contents(folder)) == ["0001.json", "0001.mp4"]


def test_without_ray_workers_are_refused(tiny_checkpoint: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code = cli.main(list_words(tiny_checkpoint, tmp_path / "videos", "--workers", "2"))
    assert_refused(code, capfd, "--workers needs Ray, which is not here: pip install 'wan-autoregressive[ray]'")
    assert not (tmp_path / "videos").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--share"], "--share is for a list of videos; give --prompts"),
        (["--share", "--prompts", "p.txt"], "--share needs --seed"),
        (["--workers", "2", "--prompts", "p.txt"], "--workers needs --seed"),
        (["--workers", "0", "--prompts", "p.txt", "--seed", "1"], "--workers must be at least 1, got 0"),
        (["--workers", "2", "--share", "--prompts", "p.txt", "--seed", "1"], "give one of them"),
        (["--gpus-per-video", "2", "--prompts", "p.txt"], "--gpus-per-video says where workers run; give --workers"),
        (["--workers", "2", "--gpus-per-video", "-1", "--prompts", "p.txt"], "must not be negative, got -1"),
    ],
)
def test_what_does_not_go_together_is_refused(more: list[str], message: str, tmp_path: Path, capfd) -> None:
    assert_refused(cli.main(["generate", "--output", str(tmp_path / "o.mp4"), *more]), capfd, message)
    assert list(tmp_path.iterdir()) == []
