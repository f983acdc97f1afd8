"""A tiny VAE for the live view beside the full one."""

import numpy as np
import pytest
import torch
from saved_rollouts import SIZE, assert_same, start, state_of
from test_tiny_codec import small_vae

from wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.pipelines.session import RolloutSession

OPTIONS = {"num_frames": 35, "window_frames": 6, "num_inference_steps": 1, "output_type": "uint8"}  # cut by 2 frames


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    return small_vae()


@pytest.fixture(scope="module")
def previewed(pipe, tiny) -> list:
    """What the tiny VAE makes alone."""
    alone = WanAutoregressivePipeline(pipe.tokenizer, pipe.text_encoder, pipe.transformer, tiny, pipe.scheduler)
    alone.set_progress_bar_config(disable=True)
    return list(start(alone, **OPTIONS))


def assert_previews(chunks, previewed) -> None:
    for chunk, expected in zip(chunks, previewed, strict=True):
        assert np.array_equal(chunk.preview, expected.frames)


@pytest.mark.parametrize("alongside", [False, True])
def test_both_decode_the_same_latents(pipe, tiny, previewed, alongside):
    chunks = list(start(pipe, **OPTIONS, preview_vae=tiny).chunks(decode_alongside=alongside))
    assert_same(chunks, list(start(pipe, **OPTIONS)))
    assert_previews(chunks, previewed)
    assert all(chunk.timings.preview_s > 0 for chunk in chunks)
    assert [len(chunk.preview[0]) for chunk in chunks] == [9, 12, 12, 2]


@pytest.mark.slow
def test_the_preview_comes_before_the_frames(pipe, tiny, previewed, monkeypatch):
    rollout, seen = start(pipe, **OPTIONS, preview_vae=tiny), []
    decode = rollout.vae_decoder.decode
    monkeypatch.setattr(rollout.vae_decoder, "decode", lambda latents: seen.append("full") or decode(latents))
    rollout.on_preview = seen.append
    rollout.step()
    rollout.step()
    assert seen[1::2] == ["full", "full"]
    assert [chunk.frames for chunk in seen[::2]] == [None, None]
    assert_previews(seen[::2], previewed[:2])


@pytest.mark.slow
def test_alone_beside_latents(pipe, tiny, previewed):
    chunks = list(start(pipe, **{**OPTIONS, "output_type": "latent"}, preview_vae=tiny))
    assert all(chunk.frames is None for chunk in chunks)
    whole = np.concatenate([chunk.preview for chunk in chunks], axis=1)
    expected = np.concatenate([chunk.frames for chunk in previewed], axis=1)
    assert np.array_equal((whole * 255).round().astype(np.uint8), expected)


@pytest.mark.slow
def test_saved_forked_and_begun_again(pipe, tiny, previewed, tmp_path):
    rollout = start(pipe, **OPTIONS, preview_vae=tiny)
    rollout.step()
    rollout.save(tmp_path)
    assert rollout.nbytes - start(pipe, **OPTIONS).nbytes > rollout.pixels.preview_decoder.state_bytes > 0
    resumed, twin = pipe.resume(tmp_path, preview_vae=tiny), rollout.fork()
    assert state_of(resumed) == state_of(rollout)
    for other in (resumed, twin):
        assert_previews(list(other), previewed[1:])
    without = list(pipe.resume(tmp_path))
    assert_same(without, list(rollout))
    assert all(chunk.preview is None for chunk in without)
    rollout.reset()
    rollout.noise.generator.manual_seed(0)
    assert_previews(list(rollout), previewed)


@pytest.mark.slow
def test_in_a_session(pipe, tiny, previewed):
    session = RolloutSession(start(pipe, **OPTIONS, preview_vae=tiny), snapshots=2)
    made = [session.get().chunk for _ in range(2) if session.advance()]
    session.seek(1)
    made[1:] = [session.get().chunk for _ in range(3) if session.advance()]
    assert_previews(made, previewed)


def test_one_of_other_latents_is_refused(pipe, tiny, tmp_path):
    of_wan22 = small_vae(z_dim=48, patch_size=2, scale_factor_spatial=16)
    with pytest.raises(ValueError, match="the preview VAE has latent_channels 48 and the video 16"):
        start(pipe, **OPTIONS, preview_vae=of_wan22)
    with pytest.raises(ValueError, match="the VAE is a Linear"):
        pipe.rollout("x", **SIZE, preview_vae=torch.nn.Linear(1, 1))
    start(pipe, **OPTIONS).save(tmp_path)
    with pytest.raises(ValueError, match="made without a preview VAE until now"):
        pipe.resume(tmp_path, preview_vae=tiny)
