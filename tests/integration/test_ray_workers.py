"""`wan-ar generate --workers`: whatever becomes of workers, every job ends, and every video is there, whole."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from ray_cluster import assert_on_the_loopback_alone, import_ray, local_ray
from ray_makers import make_by_writing, make_in_group, no_maker
from test_shared_list import PROMPTS, assert_same_videos, list_words

from wan_autoregressive.scripts import cli, deaths
from wan_autoregressive.scripts.deaths import MOST_DEATHS
from wan_autoregressive.scripts.generate_inputs import Job
from wan_autoregressive.scripts.output_files import OutputFiles
from wan_autoregressive.scripts.ray_workers import MANIFEST, Crews
from wan_autoregressive.scripts.render_job import Outcome

ray = import_ray()
pytestmark = pytest.mark.slow


def owner_of(lock: Path) -> int | None:
    """The process that holds a file's lock, as the system says."""
    try:
        inode = str(lock.stat().st_ino)
    except FileNotFoundError:
        return None
    lines = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    return next((int(words[4]) for words in lines if words[5].rsplit(":", 1)[1] == inode), None)


def stop_inside_a_video(folder: Path, driver: subprocess.Popen[str]) -> tuple[int, Path]:
    """Stop a worker that has saved a part of its video; its process and the video."""
    while driver.poll() is None:
        for state in folder.glob("*.resume/state.json"):
            video = state.parent.with_suffix(".mp4")
            pid = owner_of(OutputFiles(video).lock)
            if pid is None:
                continue
            os.kill(pid, signal.SIGSTOP)
            if state.exists() and not video.exists() and owner_of(OutputFiles(video).lock) == pid:
                return pid, video
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.005)
    raise AssertionError(f"the run ended first: {driver.communicate()}")


def test_a_worker_is_killed_inside_a_video(tiny_checkpoint: Path, tmp_path: Path) -> None:
    alone, folder = tmp_path / "alone", tmp_path / "videos"
    more = ("--num-frames", "61")
    assert cli.main(list_words(tiny_checkpoint, alone, *more)) == 0
    command = [sys.executable, "-m", "wan_autoregressive.scripts.cli"]
    command += list_words(tiny_checkpoint, folder, *more, "--workers", "2")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as driver:
        pid, video = stop_inside_a_video(folder, driver)
        assert_on_the_loopback_alone(driver.pid)
        os.kill(pid, signal.SIGKILL)
        out, err = driver.communicate()
    assert driver.returncode == 0, err
    assert f"{video}: worker" in err
    assert "its process died; it is tried again" in err
    records = [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]
    (folder / MANIFEST).unlink()
    assert_same_videos(folder, alone)
    assert Counter(record["state"] for record in records) == {"made": len(PROMPTS)}
    assert {record["prompt"] for record in records} == set(PROMPTS)
    assert {(record["seed"], record["frames"]) for record in records} == {(3, 61)}
    made_by = {Path(record["output"]).name: record["worker"] for record in records}
    assert not made_by[video.name].endswith(f":{pid}")
    assert [line for line in out.splitlines() if " frames of " not in line] == []
    assert len(out.splitlines()) == len(PROMPTS)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        with local_ray(num_cpus=4, num_gpus=2):
            yield


def jobs_of(folder: Path, *prompts: str) -> list[Job]:
    return [Job(prompt, folder / f"{number:04}.mp4") for number, prompt in enumerate(prompts, start=1)]


def outcomes_of(crews: Crews) -> list[Outcome]:
    outcomes = []
    try:
        for outcome in crews.outcomes():
            outcomes.append(outcome)
            assert_on_the_loopback_alone(os.getpid())
        return sorted(outcomes, key=lambda outcome: outcome.job.output)
    finally:
        crews.close()


def test_every_job_ends_and_failures_are_outcomes(cluster: None, tmp_path: Path, capfd) -> None:
    prompts = ("a fox", "die always", "die-once", "refuse", "raise", "held", "warn", "rain")
    jobs = jobs_of(tmp_path, *prompts)
    outcomes = outcomes_of(Crews(make_by_writing, jobs, workers=2, gpus=0))
    assert [outcome.job for outcome in outcomes] == jobs
    states = {outcome.job.prompt.split()[0]: outcome.state for outcome in outcomes}
    assert states == dict.fromkeys(("a", "die-once", "held", "warn", "rain"), "made") | dict.fromkeys(
        ("die", "refuse", "raise"), "failed"
    )
    reasons = {outcome.job.prompt.split()[0]: outcome.reason for outcome in outcomes}
    assert reasons["refuse"] == "no such thing"
    assert f"its process died ({MOST_DEATHS} times in a row)" in reasons["die"]
    assert "unexpected KeyError: 'lost'" in reasons["raise"]
    tries = {job.prompt.split()[0]: len(job.output.with_suffix(".begun").read_text()) for job in jobs}
    assert tries == {
        "a": 1,
        "refuse": 1,
        "warn": 1,
        "rain": 1,
        "die-once": 2,
        "held": 2,
        "die": MOST_DEATHS,
        "raise": MOST_DEATHS,
    }
    assert all(outcome.worker for outcome in outcomes if outcome.state == "made")
    assert "warning: a strange word" in capfd.readouterr().err


def test_a_video_that_gets_on_may_lose_any_number_of_workers(cluster: None, tmp_path: Path, monkeypatch) -> None:
    segments = iter(range(100))
    monkeypatch.setattr(deaths, "count_segments", lambda output: min(next(segments), MOST_DEATHS + 2))
    job = Job("die always", tmp_path / "x.mp4")
    (outcome,) = outcomes_of(Crews(make_by_writing, [job], workers=1, gpus=0))
    assert outcome.state == "failed"
    # The first death, those that it got on in between, and then in a row.
    assert len(job.output.with_suffix(".begun").read_text()) == (MOST_DEATHS + 2) + MOST_DEATHS


def test_workers_that_cannot_start_end_the_run(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no worker can be started: the model folder is gone"):
        outcomes_of(Crews(no_maker, jobs_of(tmp_path, "a fox", "rain"), workers=2, gpus=0))


def test_two_gpus_make_a_video_together_and_a_rank_that_dies_is_a_worker_that_dies(
    cluster: None, tmp_path: Path
) -> None:
    jobs = jobs_of(tmp_path, "a fox", "die-once", "rain")
    outcomes = outcomes_of(Crews(partial(make_in_group, tmp_path), jobs, workers=1, gpus=2))
    assert [outcome.state for outcome in outcomes] == ["made"] * 3
    assert [job.output.read_text() for job in jobs] == ["[3, 4]"] * 3
    assert jobs[1].output.with_suffix(".died").exists()
    assert len({outcome.worker for outcome in outcomes}) == 2
    deadline = time.monotonic() + 60
    while ray.available_resources().get("GPU") != 2:  # given back
        assert time.monotonic() < deadline
        time.sleep(0.1)
