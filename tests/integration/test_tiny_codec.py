"""The tiny VAE in the place of the full one, in a rollout and in the command."""

import numpy as np
import pytest
import torch
from saved_rollouts import SIZE, assert_same, generator, noise, start

from wan_autoregressive import AutoencoderTinyWan, WanAutoregressivePipeline
from wan_autoregressive.media.reading import load_video
from wan_autoregressive.models import codec_of
from wan_autoregressive.scripts.cli import main

OPTIONS = {"num_frames": 37, "window_frames": 6, "num_inference_steps": 1}  # 10 latent frames in 4 chunks


def small_vae(**config) -> AutoencoderTinyWan:
    torch.manual_seed(0)
    sizes = {"z_dim": 16, "encoder_width": 8, "decoder_widths": (16, 8, 8, 8), "blocks_per_stage": 1}
    return AutoencoderTinyWan(**{**sizes, **config}).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["normalised", "raw"])
def tiny_pipe(request, pipe) -> WanAutoregressivePipeline:
    vae = small_vae(latent_space=request.param)
    made = WanAutoregressivePipeline(pipe.tokenizer, pipe.text_encoder, pipe.transformer, vae, pipe.scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def test_a_rollout_decodes_through_it(tiny_pipe, tmp_path):
    rollout = start(tiny_pipe, **OPTIONS)
    rollout.step()
    rollout.save(tmp_path)
    resumed, fork = tiny_pipe.resume(tmp_path), rollout.fork()
    expected = list(rollout)
    assert_same(list(resumed), expected)
    assert_same(list(fork), expected)
    assert_same(list(start(tiny_pipe, **OPTIONS).chunks(decode_alongside=True))[1:], expected)
    plan = tiny_pipe.estimate(**SIZE, **OPTIONS)
    assert plan.vae_state_bytes == rollout.vae_decoder.state_bytes


def test_its_frames_are_one_decode_of_the_latents(tiny_pipe):
    chunks = list(start(tiny_pipe, **OPTIONS, output_type="pt"))
    latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
    config = tiny_pipe.vae.config
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    whole = tiny_pipe.vae.decode(latents * std + mean).sample.permute(0, 2, 1, 3, 4) * 0.5 + 0.5
    torch.testing.assert_close(torch.cat([chunk.frames for chunk in chunks], dim=1), whole, rtol=0, atol=1e-5)


def test_encodes_in_pieces_but_for_what_it_looks_ahead(tiny_pipe):
    codec, video = codec_of(tiny_pipe.vae), noise(1, 3, 33, 32, 32).clamp(-1, 1)
    whole = codec.encoder().encode(video)
    assert whole.shape == (1, 16, 9, 4, 4)
    encoder = codec.encoder()
    pieces = [encoder.encode(part) for part in video.split([9, 12, 12], dim=2)]
    assert [piece.shape[2] for piece in pieces] == [3, 3, 3]
    assert encoder.latent_frames_done == 9
    looked_ahead = [0, 1, 3, 4, 6, 7, 8]  # 2 and 5 end a piece that another one follows
    joined = torch.cat(pieces, dim=2)
    torch.testing.assert_close(joined[:, :, looked_ahead], whole[:, :, looked_ahead], rtol=0, atol=1e-5)
    assert not torch.allclose(joined[:, :, [2, 5]], whole[:, :, [2, 5]], atol=1e-3)


def test_an_image_and_a_source_video_go_through_it(tiny_pipe):
    clip = np.random.default_rng(0).random((25, 32, 32, 3), np.float32)
    image = tiny_pipe("x", **SIZE, num_frames=13, image=clip[0], generator=generator(), num_inference_steps=1).frames
    assert image.shape == (1, 13, 32, 32, 3)
    source = list(tiny_pipe.stream("x", **SIZE, video=iter(clip), strength=0.6, num_inference_steps=2))
    assert sum(chunk.frames.shape[1] for chunk in source) == 25


def test_one_of_another_model_is_refused_before_anything_runs(pipe):
    vae = small_vae(z_dim=48, patch_size=2, scale_factor_spatial=16)
    other = WanAutoregressivePipeline(None, None, pipe.transformer, vae, pipe.scheduler)
    with pytest.raises(ValueError, match="the VAE has 48 latent channels and the transformer 16"):
        other.rollout(prompt_embeds=noise(1, 8, 32), height=32, width=32, num_frames=5)


def test_the_command_takes_a_folder_or_a_file(tiny_checkpoint, tmp_path, capfd):
    vae = small_vae()
    vae.save_pretrained(tmp_path / "tiny")
    torch.save(vae.state_dict(), tmp_path / "taew.pth")
    words = ["generate", "--model", str(tiny_checkpoint), "--prompt", "rain", "--seed", "0", "--num-frames", "9"]
    words += ["--height", "32", "--width", "32", "--steps", "1"]
    for name, tiny in (("a.mp4", "tiny"), ("b.mp4", "taew.pth")):
        assert main([*words, "--output", str(tmp_path / name), "--tiny-vae", str(tmp_path / tiny)]) == 0
    first, second = (load_video(tmp_path / name, 32, 32, max_frames=9, fps=16) for name in ("a.mp4", "b.mp4"))
    assert np.array_equal(first, second)
    assert main([*words, "--output", str(tmp_path / "c.mp4"), "--tiny-vae", str(tmp_path / "none")]) == 2
    assert "none" in capfd.readouterr().err.splitlines()[-1]
