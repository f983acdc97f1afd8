"""`wan-ar generate --checkpoint-every --resume`: whatever ends a run, the same command goes on to the same video."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.scripts import cli, resumable_render
from wan_autoregressive.scripts.tiny_checkpoint import make_tiny_checkpoint

FRAMES, EVERY = 85, 4  # 22 chunks of 1 latent frame: 5 checkpoints and a rest of 2
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


@pytest.fixture(scope="module", autouse=True)
def quiet_tokenizers():
    """A warning about forks would go to stderr, which must hold one line."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    yield
    os.environ.pop("TOKENIZERS_PARALLELISM")
    if before is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = before


@pytest.fixture(scope="module")
def uninterrupted(tiny_checkpoint: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "x.mp4"
    assert cli.main(words(tiny_checkpoint, output)) == 0
    assert sorted(path.name for path in output.parent.iterdir()) == ["x.json", "x.mp4"]
    assert len(frames_of(output)) == FRAMES
    return output


def start(arguments: list[str], before: Callable[[], object] = lambda: None) -> multiprocessing.Process:
    """The command in a process of its own. Forked, because importing takes longer than the whole test."""

    def run() -> None:
        os.setsid()
        before()
        os._exit(cli.main(arguments))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def wait_until(condition: Callable[[], object], process: multiprocessing.Process) -> bool:
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


def test_killed_again_and_again(tiny_checkpoint: Path, uninterrupted: Path, tmp_path: Path) -> None:
    dice = random.Random(time.time_ns())
    output, kills = tmp_path / "x.mp4", 0
    folder = tmp_path / "x.resume"
    for _ in range(60):
        seen = (folder / "state.json").read_bytes() if (folder / "state.json").exists() else b""
        process = start(words(tiny_checkpoint, output, "--resume"))
        begun = len(list(folder.glob("segment-*"))) if folder.exists() else 0
        # At any moment: while loading, in a chunk, while a segment is closed, saved, joined.
        moved = wait_until(lambda begun=begun: len(list(folder.glob("segment-*"))) > begun, process)
        if moved and kills < 7:
            time.sleep(dice.uniform(0, 0.4))
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


def test_ctrl_c_stops_after_the_chunk_and_says_how_to_go_on(
    tiny_checkpoint: Path, uninterrupted: Path, tmp_path: Path, capfd
) -> None:
    output, folder = tmp_path / "x.mp4", tmp_path / "x.resume"
    process = start(words(tiny_checkpoint, output), slowly)
    assert wait_until((folder / "segment-000001.mp4").exists, process)
    time.sleep(0.12)  # into the third segment
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    part = tmp_path / "x.part.mp4"
    done = len(frames_of(part))
    assert done in CHUNK_STARTS
    assert done >= CHUNK_STARTS[2 * EVERY]
    assert capfd.readouterr().err.splitlines()[1:] == [
        "wan-ar: stopping after this chunk; Ctrl-C again stops at once",
        f"wan-ar: error: interrupted; {done} frames are in '{part}'; {done} frames are saved; run the same command "
        "with --resume to go on from there",
    ]
    assert not output.exists()
    # Every chunk that was begun counts; the interval may be another one.
    assert cli.main(words(tiny_checkpoint, output, "--resume", "--checkpoint-every", "7")) == 0
    assert_same_video(output, uninterrupted, exact=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.mp4"]


def test_a_second_ctrl_c_stops_at_once(tiny_checkpoint: Path, uninterrupted: Path, tmp_path: Path, capfd) -> None:
    def hang() -> None:
        step = WanRollout.step
        WanRollout.step = lambda self: step(self) if self.chunks_done < 10 else time.sleep(60)  # type: ignore

    output, folder = tmp_path / "x.mp4", tmp_path / "x.resume"
    process = start(words(tiny_checkpoint, output), hang)
    assert wait_until((folder / "segment-000002.part.mp4").exists, process)
    time.sleep(0.5)  # in chunk 10, two chunks after the second checkpoint
    begun = time.monotonic()
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.1)
    process.join()
    assert process.exitcode == 130
    assert time.monotonic() - begun < 10
    saved, done = CHUNK_STARTS[8], CHUNK_STARTS[10]
    assert len(frames_of(tmp_path / "x.part.mp4")) == done
    assert f"{done} frames are in '{tmp_path / 'x.part.mp4'}'; {saved} frames are saved" in capfd.readouterr().err
    assert cli.main(words(tiny_checkpoint, output, "--resume")) == 0
    assert_same_video(output, uninterrupted, exact=True)


def test_ctrl_c_without_checkpoints_is_as_ever(tiny_checkpoint: Path, tmp_path: Path, capfd) -> None:
    arguments = words(tiny_checkpoint, tmp_path / "x.mp4")
    del arguments[arguments.index("--checkpoint-every") :]
    process = start(arguments, slowly)
    assert wait_until((tmp_path / "x.part.mp4").exists, process)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert "wan-ar: error: interrupted; " in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.part.mp4"]
    assert len(frames_of(tmp_path / "x.part.mp4")) > 0


@pytest.fixture(scope="module")
def stopped(tiny_checkpoint: Path, tmp_path_factory) -> Path:
    """A folder with `x.resume` in it, after 2 checkpoints. Tests copy it."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        step = WanRollout.step

        def fail(self):
            if self.chunks_done == 10:
                raise RuntimeError("the card caught fire")
            return step(self)

        patch.setattr(WanRollout, "step", fail)
        assert cli.main(words(tiny_checkpoint, folder / "x.mp4")) == 1
    assert len(frames_of(folder / "x.part.mp4")) == CHUNK_STARTS[10]
    return folder


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "copy")
    return tmp_path / "copy"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(code: int, capfd, message: str = "") -> None:
    out, err = capfd.readouterr()
    assert code == 2
    assert err.startswith("wan-ar: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_failure_is_resumed(tiny_checkpoint: Path, uninterrupted: Path, copied: Path, capfd) -> None:
    assert cli.main(words(tiny_checkpoint, copied / "x.mp4", "--resume")) == 0
    assert_same_video(copied / "x.mp4", uninterrupted, exact=True)
    assert "nothing is saved" not in capfd.readouterr().out
    assert sorted(path.name for path in copied.iterdir()) == ["x.json", "x.mp4"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt", "rain"], "prompt was 'a red fox' and is 'rain' now"),
        (["--seed", "4"], "seed was 3 and is 4 now"),
        (["--num-frames", "89"], "num-frames was 85 and is 89 now"),
        (["--fps", "8", "--guidance-scale", "2"], "fps was 16.0 and is 8.0 now"),
        (["--steps", "3"], "denoising-steps was [1000.0, 500.0] and is [1000.0, 667.0, 333.0] now"),
        (["--window-frames", "5"], "window-frames was 4 and is 5 now"),
        (["--negative-prompt", "gray"], "negative-prompt was not given and is 'gray' now"),
        (["--vae-tiling"], "vae-tiling was False and is True now"),
        (["--image", "{folder}/image.png"], "image was not given and is"),
    ],
)
def test_other_arguments_are_refused(
    tiny_checkpoint: Path, copied: Path, capfd, more: list[str], message: str
) -> None:
    iio.imwrite(copied / "image.png", np.zeros((32, 48, 3), np.uint8))
    before = contents(copied)
    more = [word.replace("{folder}", str(copied)) for word in more]
    code = cli.main(words(tiny_checkpoint, copied / "x.mp4", "--resume", *more))
    assert_refused(code, capfd, f"cannot resume 'x.mp4' with other arguments: {message}")
    assert contents(copied) == before


def test_an_unfinished_video_is_not_overwritten_by_accident(tiny_checkpoint: Path, copied: Path, capfd) -> None:
    before = contents(copied)
    assert_refused(cli.main(words(tiny_checkpoint, copied / "x.mp4")), capfd, "add --resume to go on with it")
    assert contents(copied) == before


@pytest.mark.parametrize("count", ["0", "-1", "x", "1.5", ""])
def test_a_bad_count_of_chunks(tiny_checkpoint: Path, tmp_path: Path, capfd, count: str) -> None:
    with pytest.raises(SystemExit) as leave:
        cli.main(words(tiny_checkpoint, tmp_path / "x.mp4", f"--checkpoint-every={count}"))
    assert_refused(leave.value.code, capfd, "must be a whole number of at least 1")  # type: ignore[arg-type]


def test_resume_needs_checkpoints(tiny_checkpoint: Path, tmp_path: Path, capfd) -> None:
    arguments = words(tiny_checkpoint, tmp_path / "x.mp4", "--resume")
    at = arguments.index("--checkpoint-every")
    del arguments[at : at + 2]
    assert_refused(cli.main(arguments), capfd, "give --checkpoint-every as well")


def test_other_weights_are_refused(copied: Path, capfd) -> None:
    assert cli.main(words(make_tiny_checkpoint(copied / "model", seed=1), copied / "x.mp4", "--resume")) == 2
    assert "model was" in capfd.readouterr().err


def test_other_weights_in_the_same_folder_are_refused(tiny_checkpoint: Path, tmp_path: Path, capfd) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resumable_render, "join_segments", lambda *args: 1 / 0)
        assert cli.main(words(model, tmp_path / "x.mp4", "--num-frames", "9")) == 1
    make_tiny_checkpoint(model, seed=1, overwrite=True)
    capfd.readouterr()
    code = cli.main(words(model, tmp_path / "x.mp4", "--num-frames", "9", "--resume"))
    assert_refused(code, capfd, "is of a transformer with other weights")
    assert not (tmp_path / "x.mp4").exists()


def test_nothing_saved_starts_from_the_beginning_and_says_so(tiny_checkpoint: Path, tmp_path: Path, capfd) -> None:
    output, folder = tmp_path / "x.mp4", tmp_path / "x.resume"
    folder.mkdir()
    (folder / "segment-000000.part.mp4").write_bytes(b"from a run that was killed in its first segment")
    (folder / "notes.txt").write_text("the user's")
    assert cli.main(words(tiny_checkpoint, output, "--resume", "--num-frames", "9")) == 0
    assert "nothing is saved of it; starting from the beginning" in capfd.readouterr().out
    assert len(frames_of(output)) == 9
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_drawn_seed_is_kept(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.mp4"
    arguments = words(tiny_checkpoint, output, "--num-frames", "21")
    del arguments[arguments.index("--seed") : arguments.index("--seed") + 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resumable_render, "join_segments", lambda *args: 1 / 0)
        assert cli.main(arguments) == 1
    notes = json.loads((tmp_path / "x.resume" / "state.json").read_text())["notes"]
    assert cli.main([*arguments, "--resume"]) == 0
    assert json.loads((tmp_path / "x.json").read_text())["seed"] == notes["seed"]


def test_damage_is_one_line_and_nothing_is_touched(tiny_checkpoint: Path, copied: Path, capfd) -> None:
    """Fuzz: cut off, flipped and deleted files of a saved state."""
    folder, dice = copied / "x.resume", random.Random(0)
    files = [path for path in sorted(folder.iterdir()) if ".part" not in path.name]
    assert len(files) == 4  # two segments, tensors, JSON
    for path in files:
        whole = path.read_bytes()
        damages = [whole[: dice.randrange(len(whole))], b"", whole + b"\0" * 9, None]
        for _ in range(3):
            flipped = bytearray(whole)
            flipped[dice.randrange(len(whole) - 3)] ^= 1 << dice.randrange(8)
            damages.append(bytes(flipped))
        for damage in damages:
            if path.name == "state.json" and (damage is None or damage == whole + b"\0" * 9 or _same(whole, damage)):
                continue  # without it nothing is saved, as after a crash before the first checkpoint
            path.unlink(missing_ok=True)
            if damage is not None:
                path.write_bytes(damage)
            before = contents(copied)
            assert_refused(cli.main(words(tiny_checkpoint, copied / "x.mp4", "--resume")), capfd)
            assert contents(copied) == before
            path.write_bytes(whole)
    assert not (copied / "x.mp4").exists()


def _same(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_latents_that_are_no_numbers(tiny_checkpoint: Path, uninterrupted: Path, tmp_path: Path, capfd) -> None:
    output = tmp_path / "x.mp4"
    with pytest.MonkeyPatch.context() as patch:
        noise = WanRollout._noise
        spoiled = lambda self, block: noise(self, block) * (float("nan") if block.index == 6 else 1)  # noqa: E731
        patch.setattr(WanRollout, "_noise", spoiled)
        assert cli.main(words(tiny_checkpoint, output)) == 1
    err = capfd.readouterr().err
    assert (
        "the latents of chunk 6 (latent frames 6 to 6) hold NaN or infinite values from denoising step 1 of 2" in err
    )
    assert f"{CHUNK_STARTS[6]} frames are in '{tmp_path / 'x.part.mp4'}'" in err
    assert err.count("\n") == 1
    assert len(frames_of(tmp_path / "x.part.mp4")) == CHUNK_STARTS[6]
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
    more = ["--image", str(tmp_path / "image.png"), "--num-frames", "33"]
    more += ["--prompt", "0: a red fox", "--prompt", "6: rain"]
    assert cli.main(words(tiny_checkpoint, tmp_path / "a.mp4", *more)) == 0
    with pytest.MonkeyPatch.context() as patch:
        step = WanRollout.step
        patch.setattr(WanRollout, "step", lambda self: step(self) if self.chunks_done < 5 else 1 / 0)
        assert cli.main(words(tiny_checkpoint, tmp_path / "b.mp4", *more)) == 1
    assert cli.main(words(tiny_checkpoint, tmp_path / "b.mp4", *more, "--resume")) == 0
    assert np.array_equal(frames_of(tmp_path / "a.mp4"), frames_of(tmp_path / "b.mp4"))


def test_other_pixels_under_the_same_name_are_refused(tiny_checkpoint: Path, tmp_path: Path, capfd) -> None:
    more = ["--image", str(tmp_path / "image.png"), "--num-frames", "21"]
    iio.imwrite(tmp_path / "image.png", np.zeros((32, 48, 3), np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resumable_render, "join_segments", lambda *args: 1 / 0)
        assert cli.main(words(tiny_checkpoint, tmp_path / "x.mp4", *more)) == 1
    iio.imwrite(tmp_path / "image.png", np.full((32, 48, 3), 99, np.uint8))
    capfd.readouterr()
    code = cli.main(words(tiny_checkpoint, tmp_path / "x.mp4", *more, "--resume"))
    assert_refused(code, capfd, "the given image or clip has other pixels now")


def test_threads_are_single() -> None:
    """Forked processes above rely on it: a pool of threads does not survive a fork."""
    assert torch.get_num_threads() == 1
