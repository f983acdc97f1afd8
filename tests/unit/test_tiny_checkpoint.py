"""The tiny checkpoint: complete, small, repeatable, and every input of the models shows in its pixels."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from tiny_checkpoint import make_tiny_checkpoint
from transformers import AutoTokenizer

from wan_autoregressive.schedulers import SelfForcingScheduler

PROMPTS = ["a red circle moving left on a black background", "a blue square moving left on a black background"]
VISIBLE = 0.01  # mean absolute difference of pixels in [0, 1]


@pytest.fixture(scope="module", params=["wan2.1", "wan2.2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", vae=request.param)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> WanPipeline:
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def render(pipe: WanPipeline, prompt: str, seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    size: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4}
    return pipe(prompt, guidance_scale=1.0, generator=generator, **size).frames[0]  # (frames, height, width, 3)


def difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first - second).mean())


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_prompt_and_seed_are_visible(pipe: WanPipeline) -> None:
    video = render(pipe, PROMPTS[0], seed=0)
    assert video.shape == (9, 64, 64, 3)
    assert np.array_equal(video, render(pipe, PROMPTS[0], seed=0))
    assert difference(video, render(pipe, PROMPTS[0], seed=1)) > VISIBLE
    assert difference(video, render(pipe, PROMPTS[1], seed=0)) > VISIBLE
    assert difference(video, render(pipe, PROMPTS[0].replace("left", "right"), seed=0)) > VISIBLE


def test_picture_has_structure(pipe: WanPipeline) -> None:
    video = render(pipe, PROMPTS[0], seed=0)
    assert video.std(axis=(1, 2)).mean() > 0.05  # within a frame, not a flat colour
    assert difference(video[1:], video[:-1]) > VISIBLE  # it moves
    assert np.mean((video <= 0) | (video >= 1)) < 0.2  # and is not burnt out
    # Neighbouring pixels are alike: shapes, not noise.
    assert difference(video[:, :, 1:], video[:, :, :-1]) < 0.35 * video.std()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_weights_see_prompt_and_seed_too(seed: int, tmp_path: Path) -> None:
    pipe = WanPipeline.from_pretrained(make_tiny_checkpoint(tmp_path / "x", seed=seed))
    pipe.set_progress_bar_config(disable=True)
    video = render(pipe, PROMPTS[0], seed=0)
    assert difference(video, render(pipe, PROMPTS[0], seed=1)) > VISIBLE
    assert difference(video, render(pipe, PROMPTS[1], seed=0)) > VISIBLE
    assert video.std(axis=(1, 2)).mean() > 0.02


@torch.no_grad()
def test_earlier_frames_show_in_later_ones(pipe: WanPipeline) -> None:
    """A transformer cache or a VAE state that is lost must change the video, or no test would notice."""
    channels = pipe.transformer.config.in_channels
    latents = torch.randn(1, channels, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    other = latents.clone()
    other[:, :, 0] += torch.randn(other[:, :, 0].shape, generator=torch.Generator().manual_seed(1))
    text = torch.randn(1, 512, 32, generator=torch.Generator().manual_seed(2))

    def flow(x: torch.Tensor) -> torch.Tensor:
        return pipe.transformer(x, torch.tensor([500.0]), text).sample[:, :, 2]

    assert (flow(other) - flow(latents)).abs().mean() > 0.05 * flow(latents).abs().mean()
    pixels = [pipe.vae.decode(x).sample for x in (latents, other)]
    assert (pixels[0][:, :, 1:5] - pixels[1][:, :, 1:5]).abs().mean() > VISIBLE


@torch.no_grad()
def test_encoder_sees_the_image_and_keeps_the_stated_statistics(pipe: WanPipeline) -> None:
    video = torch.rand(2, 3, 5, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = pipe.vae.config
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    latents = (pipe.vae.encode(video).latent_dist.mean - mean) / std
    assert latents.shape == (2, config.z_dim, 2, 64 // config.scale_factor_spatial, 64 // config.scale_factor_spatial)
    assert (latents[0] - latents[1]).abs().mean() > 0.05
    assert 0.3 < latents.std() < 3


def test_scheduler_config_is_read_by_both_schedulers(folder: Path, pipe: WanPipeline) -> None:
    scheduler = SelfForcingScheduler.from_pretrained(folder, subfolder="scheduler")
    assert list(scheduler.config.denoising_steps) == [1000, 750, 500, 250]
    assert scheduler.config.shift == pipe.scheduler.config.shift == 5.0


def test_tokenizer_keeps_texts_apart(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    printable = "".join(chr(code) for code in range(33, 127))
    texts = [*PROMPTS, "A Red Circle", "Zebras quickly juggle 12 jars (oddly)!", printable]
    ids = [tuple(tokenizer(text).input_ids) for text in texts]
    assert len(set(ids)) == len(texts)
    assert all(tokenizer.unk_token_id not in row for row in ids)
    assert all(row[-1] == tokenizer.eos_token_id for row in ids)
    assert tokenizer.decode(ids[3], skip_special_tokens=True) == texts[3]
    batch = tokenizer(PROMPTS, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    assert batch.input_ids.shape == (2, 512)


def test_same_seed_same_bytes_and_global_random_state_untouched(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    first = digest(make_tiny_checkpoint(tmp_path / "a", seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)  # the global state has no influence
    assert digest(make_tiny_checkpoint(tmp_path / "b", seed=3)) == first
    other = digest(make_tiny_checkpoint(tmp_path / "c", seed=4))
    assert all(first[name] != other[name] for name in first if name.endswith(".safetensors"))


def test_small(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2_000_000


def test_wrong_arguments_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'wan3'; it must be one of wan2\.1, wan2\.2"):
        make_tiny_checkpoint(tmp_path / "x", vae="wan3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed is -1"):
        make_tiny_checkpoint(tmp_path / "x", seed=-1)
    assert not any(tmp_path.iterdir())


def test_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "new" / "tiny"
    first = digest(make_tiny_checkpoint(target))
    with pytest.raises(ValueError, match="not empty"):
        make_tiny_checkpoint(target, seed=1)
    assert digest(target) == first
    assert digest(make_tiny_checkpoint(target, seed=1, overwrite=True)) != first
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]


def test_overwrite_spares_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        make_tiny_checkpoint(tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        make_tiny_checkpoint(tmp_path / "diary.txt", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]
