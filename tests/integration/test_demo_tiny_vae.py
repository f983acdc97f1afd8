"""The tiny VAE of the demo checkpoint: it decodes what the full one decodes, and its training runs."""

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from examples.train_demo import train_tiny_vae, world
from examples.train_demo.sampling import decode_normalized
from examples.train_demo.score import score_video, summarize
from wan_autoregressive import WanAutoregressivePipeline, demo_checkpoint
from wan_autoregressive.models import AutoencoderTinyWan


@pytest.fixture(scope="module")
def full():
    return AutoencoderKLWan.from_pretrained(demo_checkpoint() / "vae", dtype=torch.float32)


@pytest.fixture(scope="module")
def tiny():
    return AutoencoderTinyWan.from_pretrained(demo_checkpoint() / "tiny_vae", dtype=torch.float32)


def test_is_small_and_fits_the_full_vae(full, tiny):
    files = [path for path in (demo_checkpoint() / "tiny_vae").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1e6
    for name in ("z_dim", "scale_factor_spatial", "scale_factor_temporal"):
        assert tiny.config[name] == full.config[name]
    assert tiny.config.latent_space == "normalised"


@pytest.mark.slow
def test_pictures_are_close_to_those_of_the_full_vae(full, tiny):
    figures = train_tiny_vae.measure(full, tiny, sheet=None, count=4)
    assert figures["tiny decode against full decode, dB"] > 30
    assert figures["the same on generated latents, dB"] > 30
    assert figures["tiny encode, full decode against true frames, dB"] > 25


def test_the_whole_checkpoint_still_loads_and_takes_the_tiny_vae(tiny):
    """In the stock pipeline: the tiny VAE's statistics make its denormalising leave the latents alone."""
    ours = WanAutoregressivePipeline.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    assert type(ours.vae) is AutoencoderKLWan
    stock = WanPipeline.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    assert type(stock.vae) is AutoencoderKLWan
    stock.set_progress_bar_config(disable=True)
    arguments = {"prompt": "x", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 1}
    arguments |= {"guidance_scale": 1.0}
    latents = stock(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent").frames
    with_tiny = WanPipeline.from_pretrained(demo_checkpoint(), vae=tiny, dtype=torch.float32)
    with_tiny.set_progress_bar_config(disable=True)
    frames = with_tiny(**arguments, generator=torch.Generator().manual_seed(0), output_type="pt").frames
    expected = tiny.decode(latents).sample.transpose(1, 2) / 2 + 0.5
    torch.testing.assert_close(frames, expected.clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_scores_of_generated_videos_hold_up(full, tiny):
    scenes = world.spread(world.held_out_scenes(), 6)
    latents = train_tiny_vae.generate_for(scenes)
    scores = {}
    for name, frames in (
        ("full", decode_normalized(full, latents)),
        ("tiny", tiny.decode(latents).sample),
    ):
        videos = (frames / 2 + 0.5).permute(0, 2, 3, 4, 1)
        scores[name] = summarize([score_video(video, scene) for video, scene in zip(videos, scenes, strict=True)])
    for name in ("background", "color", "direction", "shape"):
        assert scores["tiny"][name] == pytest.approx(scores["full"][name], abs=0.05), name
    assert scores["tiny"]["overlap"] > scores["full"]["overlap"] - 0.05


def errors(vae, lessons) -> tuple[float, float]:
    """Of frames and of latents, on clips that no training saw."""
    with torch.no_grad():
        frames = train_tiny_vae.decode_for_training(vae, lessons.latents) - lessons.frames
        latents = vae.encode(lessons.clips).latent_dist.mode() - lessons.clip_latents
    return frames.abs().mean().item(), latents.square().mean().item()


@pytest.mark.slow
def test_training_runs_and_learns(full, tmp_path):
    phases = (train_tiny_vae.Phase(100, 3e-3, frames=5, clips=8), train_tiny_vae.Phase(5, 1e-3, frames=9, clips=8))
    settings = train_tiny_vae.TinyVaeSettings(encoder_width=8, decoder_widths=(16, 12, 8), blocks=1, phases=phases)
    lessons = train_tiny_vae.make_lessons(full, phases[0], torch.Generator().manual_seed(1))
    untrained = errors(train_tiny_vae.create_tiny_vae(full, settings, seed=0), lessons)
    vae = train_tiny_vae.train_tiny_vae(full, tmp_path, settings, seed=0)
    trained = errors(vae, lessons)
    assert trained[0] < 0.7 * untrained[0]
    assert trained[1] < 0.95 * untrained[1]
    again = train_tiny_vae.train_tiny_vae(full, tmp_path, settings, seed=0)  # finds every phase finished
    assert errors(again, lessons) == trained
    train_tiny_vae.save_half(vae, tmp_path / "tiny_vae")
    loaded = AutoencoderTinyWan.from_pretrained(tmp_path / "tiny_vae", dtype=torch.float32)
    latents = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded.decode(latents).sample, vae.decode(latents).sample, rtol=0, atol=0.02)
