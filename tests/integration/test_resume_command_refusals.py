"""`wan-ar generate --resume` with other arguments or a damaged state: one line, exit code 2, nothing touched."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from saved_runs import (
    assert_refused,
    contents,
    frames_of,
    words,
)
from tiny_checkpoint import make_tiny_checkpoint

from wan_autoregressive.scripts import cli, resumable_render


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt", "rain"], "prompt was 'a red fox' and is 'rain' now"),
        (["--seed", "4"], "seed was 3 and is 4 now"),
        (["--num-frames", "41"], "num-frames was 37 and is 41 now"),
        (["--fps", "8", "--guidance-scale", "2"], "fps was 16.0 and is 8.0 now"),
        (["--steps", "3"], "denoising-steps was [1000.0, 500.0] and is [1000.0, 667.0, 333.0] now"),
        (["--window-frames", "5"], "window-frames was 4 and is 5 now"),
        (["--negative-prompt", "gray"], "negative-prompt was not given and is 'gray' now"),
        (["--vae-tiling"], "vae-tiling was False and is True now"),
        (["--image", "{folder}/image.png"], "image was not given and is"),
    ],
)
def test_other_arguments_are_refused(
    tiny_checkpoint: Path, unfinished: Path, capfd, more: list[str], message: str
) -> None:
    iio.imwrite(unfinished / "image.png", np.zeros((32, 48, 3), np.uint8))
    before = contents(unfinished)
    more = [word.replace("{folder}", str(unfinished)) for word in more]
    code = cli.main(words(tiny_checkpoint, unfinished / "x.mp4", "--resume", *more))
    assert_refused(code, capfd, f"cannot resume 'x.mp4' with other arguments: {message}")
    assert contents(unfinished) == before


def test_an_unfinished_video_is_not_overwritten_by_accident(tiny_checkpoint: Path, unfinished: Path, capfd) -> None:
    before = contents(unfinished)
    assert_refused(cli.main(words(tiny_checkpoint, unfinished / "x.mp4")), capfd, "add --resume to go on with it")
    assert contents(unfinished) == before


def test_other_weights_are_refused(unfinished: Path, capfd) -> None:
    assert cli.main(words(make_tiny_checkpoint(unfinished / "model", seed=1), unfinished / "x.mp4", "--resume")) == 2
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
    assert "nothing is saved of it; starting from the beginning" in capfd.readouterr().err
    assert len(frames_of(output)) == 9
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_state_of_something_else_is_refused(tiny_checkpoint: Path, pipe, tmp_path: Path, capfd) -> None:
    rollout = pipe.rollout("a", height=32, width=48, num_frames=9)
    rollout.save(tmp_path / "x.resume")
    empty = dataclasses.asdict(resumable_render.Progress({}, None, 1))
    odd = [{"times": {"stages": {}}}, {"segments": [3]}, {"seed": "x"}, {"arguments": 3}]
    for notes in (
        None,
        {},
        *(empty | change for change in odd),
        {"arguments": {}, "given_sha256": None, "seed": 1, "segments": [{"name": "x"}]},
        {"x": 1},
    ):
        if notes is not None:
            rollout.save(tmp_path / "x.resume", notes)
        before = contents(tmp_path)
        code = cli.main(words(tiny_checkpoint, tmp_path / "x.mp4", "--resume"))
        assert_refused(code, capfd, "holds a state that another version or another program saved")
        assert contents(tmp_path) == before


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


@pytest.mark.slow
def test_damage_is_one_line_and_nothing_is_touched(tiny_checkpoint: Path, unfinished: Path, capfd) -> None:
    """Fuzz: cut off, flipped and deleted files of a saved state."""
    folder, dice = unfinished / "x.resume", random.Random(0)
    files = [path for path in sorted(folder.iterdir()) if ".part" not in path.name]
    assert len(files) == 4  # two segments, tensors, JSON
    for path in files:
        whole = path.read_bytes()
        damages = [whole[: dice.randrange(len(whole))], b"", whole + b"\0" * 9, None]
        for _ in range(2):
            flipped = bytearray(whole)
            flipped[dice.randrange(len(whole) - 3)] ^= 1 << dice.randrange(8)
            damages.append(bytes(flipped))
        for damage in damages:
            if path.name == "state.json" and (damage is None or damage == whole + b"\0" * 9 or _same(whole, damage)):
                continue  # without it nothing is saved, as after a crash before the first checkpoint
            path.unlink(missing_ok=True)
            if damage is not None:
                path.write_bytes(damage)
            before = contents(unfinished)
            assert_refused(cli.main(words(tiny_checkpoint, unfinished / "x.mp4", "--resume")), capfd)
            assert contents(unfinished) == before
            path.write_bytes(whole)
    assert not (unfinished / "x.mp4").exists()


def _same(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


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
