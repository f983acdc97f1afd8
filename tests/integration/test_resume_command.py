"""`wan-ar generate --checkpoint-every --resume`: whatever ends a run, the same command goes on to the same video."""

import os
import random
import signal
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from saved_runs import CHUNK_STARTS, EVERY, STOP, assert_same_video, frames_of, slowly, start, wait_until, words

from wan_autoregressive.pipelines.noise import NoiseSource
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.scripts import cli


@pytest.fixture(scope="module", autouse=True)
def quiet_tokenizers():
    """A warning about forks would go to stderr, which must hold one line."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    yield
    os.environ.pop("TOKENIZERS_PARALLELISM")
    if before is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = before


def num_segments(folder: Path) -> int:
    try:
        return sum(name.startswith("segment-") for name in os.listdir(folder))
    except FileNotFoundError:  # not there yet, or removed at the end
        return 0


@pytest.mark.slow
def test_killed_again_and_again(tiny_checkpoint: Path, uninterrupted: Path, tmp_path: Path) -> None:
    seed = time.time_ns()
    print(f"seed of the moments: {seed}")
    dice = random.Random(seed)
    output, kills = tmp_path / "x.mp4", 0
    folder = tmp_path / "x.resume"
    for _ in range(60):
        seen = (folder / "state.json").read_bytes() if (folder / "state.json").exists() else b""
        process = start(words(tiny_checkpoint, output, "--resume"), slowly)
        begun = num_segments(folder)
        # At any moment: while loading, in a chunk, while a segment is closed, saved, joined.
        moved = wait_until(lambda begun=begun: num_segments(folder) > begun, process)
        if moved and kills < 7:
            time.sleep(dice.uniform(0, 0.2))
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL) if dice.random() < 0.5 else process.kill()
                kills += 1
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert not output.exists() or (folder / "state.json").read_bytes() == seen or kills
    assert kills >= 3
    assert_same_video(output, uninterrupted, exact=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.mp4"]


def test_what_a_killed_save_leaves_is_removed(tiny_checkpoint: Path, unfinished: Path) -> None:
    for name in (".tmpa1B2c3", ".state-77.json.part", "segment-000009.part.mp4"):
        (unfinished / "x.resume" / name).write_bytes(b"half")
    assert cli.main(words(tiny_checkpoint, unfinished / "x.mp4", "--resume")) == 0
    assert sorted(path.name for path in unfinished.iterdir()) == ["x.json", "x.mp4"]


def test_sigterm_stops_after_the_chunk_and_says_how_to_go_on(
    tiny_checkpoint: Path, uninterrupted: Path, tmp_path: Path, capfd
) -> None:
    output, folder = tmp_path / "x.mp4", tmp_path / "x.resume"
    process = start(words(tiny_checkpoint, output), slowly)
    assert wait_until((folder / f"segment-{EVERY - 2:06}.mp4").exists, process)
    time.sleep(0.07)  # into the third segment
    os.killpg(process.pid, signal.SIGTERM)  # as a container that is stopped: to ffmpeg too
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    part = tmp_path / "x.part.mp4"
    done = len(frames_of(part))
    assert done in CHUNK_STARTS
    assert done >= CHUNK_STARTS[2 * EVERY]
    assert capfd.readouterr().err.splitlines()[1:] == [
        "wan-ar: stopping after this chunk; a second signal (Ctrl-C again) stops at once",
        f"wan-ar: error: stopped by SIGTERM; {done} frames are in '{part}'; {done} frames are saved; run the same "
        "command with --resume to go on from there",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.part.mp4", "x.resume"]
    # Every chunk that was begun counts; the interval may be another one.
    assert cli.main(words(tiny_checkpoint, output, "--resume", "--checkpoint-every", "7")) == 0
    assert_same_video(output, uninterrupted, exact=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.mp4"]


def test_a_second_signal_stops_at_once(tiny_checkpoint: Path, uninterrupted: Path, tmp_path: Path, capfd) -> None:
    def hang() -> None:
        step = WanRollout.step
        WanRollout.step = lambda self: step(self) if self.chunks_done < STOP else time.sleep(60)  # type: ignore

    output, folder = tmp_path / "x.mp4", tmp_path / "x.resume"
    process = start(words(tiny_checkpoint, output), hang)
    assert wait_until((folder / "segment-000002.part.mp4").exists, process)
    time.sleep(0.3)  # in the chunk after the second checkpoint's first
    begun = time.monotonic()
    for number in (signal.SIGINT, signal.SIGHUP):
        os.killpg(process.pid, number)  # as a terminal does: to ffmpeg too
        time.sleep(0.1)
    process.join()
    assert process.exitcode == 128 + signal.SIGHUP
    assert time.monotonic() - begun < 10
    saved, done = CHUNK_STARTS[2 * EVERY], CHUNK_STARTS[STOP]
    assert len(frames_of(tmp_path / "x.part.mp4")) == done
    assert f"{done} frames are in '{tmp_path / 'x.part.mp4'}'; {saved} frames are saved" in capfd.readouterr().err
    assert cli.main(words(tiny_checkpoint, output, "--resume")) == 0
    assert_same_video(output, uninterrupted, exact=True)


def test_a_terminal_that_closes_leaves_what_is_done(tiny_checkpoint: Path, tmp_path: Path, capfd) -> None:
    arguments = words(tiny_checkpoint, tmp_path / "x.mp4")
    del arguments[arguments.index("--checkpoint-every") :]
    process = start(arguments, slowly)
    assert wait_until((tmp_path / "x.part.mp4").exists, process)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGHUP)
    process.join()
    assert process.exitcode == 128 + signal.SIGHUP
    assert "wan-ar: error: stopped by SIGHUP; " in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.part.mp4"]
    assert len(frames_of(tmp_path / "x.part.mp4")) > 0


def test_a_failure_is_resumed(tiny_checkpoint: Path, uninterrupted: Path, unfinished: Path, capfd) -> None:
    assert cli.main(words(tiny_checkpoint, unfinished / "x.mp4", "--resume")) == 0
    assert_same_video(unfinished / "x.mp4", uninterrupted, exact=True)
    assert "nothing is saved" not in capfd.readouterr().err
    assert sorted(path.name for path in unfinished.iterdir()) == ["x.json", "x.mp4"]


def test_latents_that_are_no_numbers(tiny_checkpoint: Path, uninterrupted: Path, tmp_path: Path, capfd) -> None:
    output = tmp_path / "x.mp4"
    with pytest.MonkeyPatch.context() as patch:
        noise = NoiseSource.initial

        def spoiled(self, first, count):
            return noise(self, first, count) * (float("nan") if first == STOP else 1)

        patch.setattr(NoiseSource, "initial", spoiled)
        assert cli.main(words(tiny_checkpoint, output)) == 1
    err = capfd.readouterr().err
    assert f"the latents of chunk {STOP} (latent frames {STOP} to {STOP}) hold NaN or infinite values from" in err
    assert f"{CHUNK_STARTS[STOP]} frames are in '{tmp_path / 'x.part.mp4'}'" in err
    assert err.count("\n") == 1
    assert len(frames_of(tmp_path / "x.part.mp4")) == CHUNK_STARTS[STOP]
    assert not output.exists()
    assert cli.main(words(tiny_checkpoint, output, "--resume")) == 0
    assert_same_video(output, uninterrupted, exact=True)


def test_a_failure_before_the_first_checkpoint_leaves_nothing_to_resume(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanRollout, "step", lambda self: 1 / 0)
        assert cli.main(words(tiny_checkpoint, tmp_path / "x.mp4")) == 1
    assert list(tmp_path.iterdir()) == []
    assert cli.main(words(tiny_checkpoint, tmp_path / "x.mp4", "--prompt", "rain " * 600)) == 2
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_right_after_a_save_loses_nothing(tiny_checkpoint: Path, uninterrupted: Path, tmp_path) -> None:
    output = tmp_path / "x.mp4"
    with pytest.MonkeyPatch.context() as patch:
        save = WanRollout.save

        def interrupted(*args, **kwargs):
            save(*args, **kwargs)
            raise KeyboardInterrupt

        patch.setattr(WanRollout, "save", interrupted)
        assert cli.main(words(tiny_checkpoint, output)) == 130
    assert len(frames_of(tmp_path / "x.part.mp4")) == CHUNK_STARTS[EVERY]
    assert len(list((tmp_path / "x.resume").iterdir())) == 3
    assert cli.main(words(tiny_checkpoint, output, "--resume")) == 0
    assert_same_video(output, uninterrupted, exact=True)


def test_a_prompts_file_goes_on_where_it_was(tiny_checkpoint: Path, tmp_path: Path, capfd) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    arguments = words(tiny_checkpoint, tmp_path / "out", "--prompts", str(tmp_path / "p.txt"), "--num-frames", "21")
    at = arguments.index("--prompt")
    del arguments[at : at + 2]
    with pytest.MonkeyPatch.context() as patch:
        step = WanRollout.step

        def fail(self):
            if self.prompt.text == ["two"] and self.chunks_done == 5:
                raise RuntimeError("the card caught fire")
            return step(self)

        patch.setattr(WanRollout, "step", fail)
        assert cli.main(arguments) == 1
    err = capfd.readouterr().err.splitlines()
    assert err[0].startswith("wan-ar: error: 0002.mp4: the card caught fire; 17 frames are in ")
    assert err[1] == "wan-ar: error: 1 of 3 videos failed: 0002.mp4"
    first = (tmp_path / "out" / "0001.mp4").stat()
    assert cli.main([*arguments, "--resume"]) == 0
    out = capfd.readouterr().out.splitlines()
    assert [line.split(": ")[1].split(" ")[0] for line in out] == ["already", "21", "already"]
    names = [f"{number:04}{suffix}" for number in (1, 2, 3) for suffix in (".json", ".mp4")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert (tmp_path / "out" / "0001.mp4").stat() == first
    # Other settings make other videos.
    assert cli.main([*arguments, "--num-frames", "5"]) == 0
    assert [line.split(": ")[1].split(" ")[0] for line in capfd.readouterr().out.splitlines()] == ["5", "5", "5"]


def test_prompt_changes_and_given_frames_are_resumed(tiny_checkpoint: Path, tmp_path: Path, capfd) -> None:
    clip = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    iio.imwrite(tmp_path / "image.png", clip)
    more = ["--image", str(tmp_path / "image.png"), "--num-frames", "21"]
    more += ["--prompt", "0: a red fox", "--prompt", "4: rain"]
    assert cli.main(words(tiny_checkpoint, tmp_path / "a.mp4", *more)) == 0
    with pytest.MonkeyPatch.context() as patch:
        step = WanRollout.step
        patch.setattr(WanRollout, "step", lambda self: step(self) if self.chunks_done < EVERY + 1 else 1 / 0)
        assert cli.main(words(tiny_checkpoint, tmp_path / "b.mp4", *more)) == 1
    assert cli.main(words(tiny_checkpoint, tmp_path / "b.mp4", *more, "--resume")) == 0
    assert np.array_equal(frames_of(tmp_path / "a.mp4"), frames_of(tmp_path / "b.mp4"))


def test_threads_are_single() -> None:
    """Forked processes above rely on it: a pool of threads does not survive a fork."""
    assert torch.get_num_threads() == 1
