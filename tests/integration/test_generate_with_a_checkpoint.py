"""`wan-ar generate` on a real, small checkpoint: what it renders, and every kind of broken checkpoint."""

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import yaml

from wan_autoregressive.scripts import cli

SMALL = ["--height", "32", "--width", "48", "--num-frames", "14", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Path:
    return tiny_checkpoint


def generate(model: Path, output: Path, *more: str, prompt: str = "a red fox") -> int:
    return cli.main(["generate", "--model", str(model), "--prompt", prompt, "--output", str(output), *SMALL, *more])


def frames_of(path: Path) -> np.ndarray:
    return iio.imread(path, plugin="FFMPEG").astype(int)


@pytest.mark.slow
def test_what_changes_a_video_and_what_does_not(checkpoint: Path, tmp_path: Path) -> None:
    variants = {
        "plain": [],
        "again": [],
        "seed": ["--seed", "2"],
        "steps": ["--steps", "2"],
        "shift": ["--shift", "3"],
    }
    videos = {}
    for name, more in variants.items():
        assert generate(checkpoint, tmp_path / f"{name}.mp4", "--seed", "1", *more) == 0
        videos[name] = frames_of(tmp_path / f"{name}.mp4")
    assert generate(checkpoint, tmp_path / "prompt.mp4", "--seed", "1", prompt="rain") == 0
    videos["prompt"] = frames_of(tmp_path / "prompt.mp4")
    assert videos["plain"].shape == (14, 32, 48, 3)
    assert (videos["plain"] == videos["again"]).all()
    for name in ("seed", "steps", "shift", "prompt"):
        assert np.abs(videos["plain"] - videos[name]).mean() > 0.5, name
    report = json.loads((tmp_path / "shift.json").read_text())
    assert report["config"]["shift"] == 3
    assert report["config"]["denoising_steps"] == [1000, 750, 500, 250]


def test_a_video_can_be_continued_from_its_own_first_frames(checkpoint: Path, tmp_path: Path) -> None:
    assert generate(checkpoint, tmp_path / "a.mp4", "--seed", "1") == 0
    more = ["--video", str(tmp_path / "a.mp4"), "--num-frames", "25", "--seed", "2"]
    assert generate(checkpoint, tmp_path / "b.mp4", *more) == 0
    assert len(frames_of(tmp_path / "b.mp4")) == 25
    assert json.loads((tmp_path / "b.json").read_text())["seconds"]["given"] > 0


def test_a_dry_run_says_what_the_run_then_takes(checkpoint: Path, tmp_path: Path, capsys) -> None:
    assert generate(checkpoint, tmp_path / "a.mp4", "--dry-run") == 0
    plan = yaml.safe_load(capsys.readouterr().out)["each_video"]
    assert list(tmp_path.iterdir()) == []
    # 14 pixel frames are 5 latent frames, so chunks of 3 and 2: four steps each and one clean pass between.
    assert (plan["latent_frames"], plan["chunks"], plan["forwards"]) == (5, 2, 9)
    assert plan["kv_cache_bytes"] > 0
    assert plan["vae_state_bytes"] > 0
    assert generate(checkpoint, tmp_path / "a.mp4") == 0
    assert json.loads((tmp_path / "a.json").read_text())["chunks"] == plan["chunks"]


def remove_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def break_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def become_another_model(folder: Path) -> None:
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))


def become_another_transformer(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))


def lose_the_vae(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def weights_of(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


def cut_the_weights(folder: Path) -> None:
    path = weights_of(folder, "transformer")
    path.write_bytes(path.read_bytes()[:-1000])


def leave_a_pointer(folder: Path) -> None:
    weights_of(folder, "text_encoder").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def lose_the_weights(folder: Path) -> None:
    weights_of(folder, "transformer").unlink()


class Harmful:
    """Unpickled carelessly this makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def become_a_pickle(folder: Path) -> None:
    lose_the_weights(folder)
    payload = pickle.dumps({"weight": Harmful(folder / "harmed")})
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(payload)


def break_the_config(folder: Path) -> None:
    (folder / "transformer" / "config.json").write_text("not json")


def edit_config(folder: Path, part: str, **changes: object) -> None:
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def claim_a_million_blocks(folder: Path) -> None:
    edit_config(folder, "transformer", num_layers=1_000_000)  # to build them would take minutes and gigabytes


def claim_a_million_text_layers(folder: Path) -> None:
    edit_config(folder, "text_encoder", num_layers=1_000_000)


def null_the_vae_config(folder: Path) -> None:
    (folder / "vae" / "config.json").write_text("null")


def lose_the_tokenizer_files(folder: Path) -> None:
    for path in (folder / "tokenizer").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist"),
        (remove_index, "has no model_index.json"),
        (break_index, "cannot read"),
        (become_another_model, "is a checkpoint of another model (FluxPipeline)"),
        (become_another_transformer, "its transformer is FluxTransformer2DModel, a Wan model has"),
        (lose_the_vae, "there is no folder 'vae' in it"),
        (cut_the_weights, "are damaged or cut off"),
        (leave_a_pointer, "are damaged or cut off"),
        (lose_the_weights, "cannot load the model"),
        (become_a_pickle, "cannot load the model"),
        (break_the_config, "cannot read"),
        (null_the_vae_config, "must hold a JSON object"),
        (claim_a_million_blocks, "says num_layers is 1000000, and there are weights for"),
        (claim_a_million_text_layers, "says num_layers is 1000000, and there are weights for"),
        (lose_the_tokenizer_files, "holds neither tokenizer.json nor spiece.model"),
    ],
)
def test_a_broken_checkpoint_is_one_line_and_nothing_written(
    checkpoint: Path, tmp_path: Path, capfd, damage: Callable[[Path], None], message: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    damage(model)
    assert generate(model, tmp_path / "x.mp4") == 2
    err = capfd.readouterr().err
    assert err.startswith("wan-ar: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("x*"))
    assert not (model / "harmed").exists()


def test_a_file_as_the_model_points_to_convert(checkpoint: Path, tmp_path: Path, capfd) -> None:
    assert generate(weights_of(checkpoint, "transformer"), tmp_path / "x.mp4") == 2
    assert "is a file; `wan-ar convert` makes a folder of it" in capfd.readouterr().err


def test_a_prompt_far_too_long_names_the_counts(checkpoint: Path, tmp_path: Path, capfd) -> None:
    assert generate(checkpoint, tmp_path / "x.mp4", prompt="rain " * 2000) == 2
    err = capfd.readouterr().err
    assert "tokens, and max_sequence_length is 512" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_is_one_line_and_code_2(checkpoint: Path, tmp_path: Path, capfd) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        assert generate(checkpoint, tmp_path / "x.mp4", "--scale", "16") == 2
        err = capfd.readouterr().err
        assert "No space left on device" in err
        assert err.count("\n") == 1
        assert not (tmp_path / "x.mp4").exists()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
