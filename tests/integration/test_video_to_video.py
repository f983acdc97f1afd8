"""Video to video: every chunk starts from the noised encoding of its source chunk."""

import itertools

import numpy as np
import pytest
import torch

SIZE = {"height": 32, "width": 32}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def clip() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (25, 32, 32, 3), dtype=np.uint8)


def test_an_array_and_a_stream_of_its_frames_give_the_same_video(pipe, clip):
    from_array = pipe("x", **SIZE, video=clip, strength=0.5, generator=generator()).frames
    stream = pipe.stream("x", **SIZE, video=iter(clip), strength=0.5, generator=generator())
    from_stream = np.concatenate([chunk.frames for chunk in stream], axis=1)
    assert from_array.shape == (1, 25, 32, 32, 3)
    assert np.array_equal(from_array, from_stream)


def test_no_more_of_a_stream_is_taken_than_the_chunk_needs(pipe, clip):
    taken = itertools.count()
    frames = (frame for frame, _ in zip(itertools.cycle(clip), taken, strict=False))
    chunks = pipe.stream("x", **SIZE, video=frames, strength=0.5, chunk_frames=2, window_frames=4)
    next(chunks)
    assert next(taken) <= 6
    next(chunks)
    assert next(taken) <= 15


@pytest.mark.parametrize(("length", "frames"), [(25, 25), (24, 21), (22, 21), (2, 1)])
def test_the_video_ends_with_the_source(pipe, clip, length, frames):
    for source in (clip[:length], iter(clip[:length])):
        chunks = list(pipe.stream("x", **SIZE, video=source, strength=0.25, generator=generator()))
        assert sum(chunk.frames.shape[1] for chunk in chunks) == frames


def test_starts_at_the_strengths_noise_level(pipe, clip, monkeypatch):
    seen = []
    rollout = pipe.rollout("x", **SIZE, video=clip, strength=0.5, generator=generator(), output_type="latent")
    (expert,) = rollout.denoiser.experts
    forward = expert.forward

    def watch(latents, window, *args, **kwargs):
        seen.append((latents.clone(), window.timesteps[0], window.frames.start))
        return forward(latents, window, *args, **kwargs)

    monkeypatch.setattr(expert, "forward", watch)
    list(rollout)
    source = pipe.encode_video(clip, 32, 32)
    draws = generator()
    noise = torch.randn(1, 16, 3, 4, 4, generator=draws)
    third = pipe.scheduler.timesteps[2].item()
    first_input, first_timestep, _ = seen[0]
    assert first_timestep == third
    torch.testing.assert_close(
        first_input, pipe.scheduler.add_noise(source[:, :, :3], noise, third), rtol=0, atol=1e-6
    )
    assert [timestep for _, timestep, start in seen if start == 0] == [third, pipe.scheduler.timesteps[3].item(), 0.0]


def test_strength_draws_away_from_the_source(pipe, clip):
    source = pipe.encode_video(clip, 32, 32)

    def distance(strength):
        latents = pipe("x", **SIZE, video=clip, strength=strength, generator=generator(), output_type="latent").frames
        return float((latents - source).abs().mean())

    assert distance(0.25) < distance(1.0)


def test_refusals(pipe, clip, tmp_path):
    with pytest.raises(ValueError, match="pass the source as video"):
        pipe("x", **SIZE, strength=0.5)
    with pytest.raises(ValueError, match="strength is 0"):
        pipe("x", **SIZE, strength=0.0, video=clip)
    rollout = pipe.rollout("x", **SIZE, strength=0.5, video=clip)
    rollout.step()
    with pytest.raises(RuntimeError, match="reads a source video"):
        rollout.reset()
    with pytest.raises(RuntimeError, match="source video"):
        rollout.save(tmp_path / "state")
    with pytest.raises(RuntimeError, match="source video"):
        rollout.fork()
