"""What comes out of a rollout, and that nothing about the process changes it."""

import numpy as np
import pytest
import torch
from saved_rollouts import assert_same, generator, start

from wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.models.wan_vae import WanVaeDecoder

OPTIONS = {"num_frames": 25, "num_inference_steps": 1}


def test_uint8_frames_are_what_the_writer_would_make_of_floats(pipe):
    floats = list(start(pipe, **OPTIONS))
    for chunk, expected in zip(start(pipe, **OPTIONS, output_type="uint8"), floats, strict=True):
        assert chunk.frames.dtype == np.uint8
        assert chunk.frames.flags.c_contiguous
        assert np.array_equal(chunk.frames, np.rint(expected.frames * 255))
    whole = pipe("a red circle", height=32, width=32, **OPTIONS, generator=generator(), output_type="uint8").frames
    assert whole.shape == (1, 25, 32, 32, 3)
    assert np.array_equal(whole, np.rint(np.concatenate([chunk.frames for chunk in floats], axis=1) * 255))


def test_uint8_is_made_before_frames_leave_the_device(pipe, monkeypatch):
    """A quarter of the bytes cross."""
    crossed = []
    to_cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: crossed.append((self.dtype, self.nbytes)) or to_cpu(self))
    chunk = start(pipe, **OPTIONS, output_type="uint8").step()
    assert crossed == [(torch.uint8, chunk.frames.nbytes)]


def test_pixels_that_are_no_numbers(pipe, monkeypatch):
    decode = WanVaeDecoder.decode
    spoiled = lambda self, latents: decode(self, latents) * float("nan")  # noqa: E731
    rollout = start(pipe, **OPTIONS)
    rollout.step()
    monkeypatch.setattr(WanVaeDecoder, "decode", spoiled)
    with pytest.raises(RuntimeError, match=r"the pixels of chunk 1 \(latent frames 3 to 5\) hold NaN from the VAE"):
        rollout.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(pipe, tiny_checkpoint, dtype):
    expected = list(start(pipe, **OPTIONS, position_mode="sink_relative", window_frames=4))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        loaded = WanAutoregressivePipeline.from_pretrained(tiny_checkpoint, dtype=torch.float32)
        loaded.set_progress_bar_config(disable=True)
        chunks = list(start(loaded, **OPTIONS, position_mode="sink_relative", window_frames=4))
    finally:
        torch.set_default_dtype(before)
    assert_same(chunks, expected)


def test_settings_change_at_a_chunk_boundary(pipe):
    rollout = start(pipe, **OPTIONS, output_type="latent")
    steps = []
    rollout.on_progress = lambda: steps.append(rollout.chunks_done)
    rollout.step()
    rollout.change(num_inference_steps=3, switch_policy="blend", blend_chunks=2)
    rollout.step(prompt="rain")
    assert steps == [0, 1, 1, 1]
    assert rollout.switching.policy.chunks == 2
    for settings, words in (
        ({"window_frames": 6}, "window_frames cannot change while a video is made"),
        ({"guidance_scale": 3.0}, "guidance_scale cannot change from 1.0 to 3.0"),
        ({"context_noise": -1}, "context_noise is -1"),
        ({"denoising_steps": (1, 2)}, "descend"),
    ):
        config = rollout.config
        with pytest.raises(ValueError, match=words):
            rollout.change(**settings)
        assert rollout.config is config
    rollout.step()
