"""Given frames that stay inside of a chunk, against the loop written out by hand."""

import pytest
import torch
from saved_rollouts import assert_same, generator, noise, start

from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.samplers import Sampler
from wan_autoregressive.schedulers.step_solver import RenoiseSolver, UniPCSolver

SOLVERS = {"renoise": RenoiseSolver, "unipc": UniPCSolver}


def first_chunk_by_hand(pipe, solver, embeds, given, latents, random) -> torch.Tensor:
    """No cache: the first chunk sees nothing but itself."""
    given_frames, frames = given.shape[2], latents.shape[2]
    for timestep in solver.timesteps:
        latents = torch.cat([given, latents[:, :, given_frames:]], dim=2)
        times = torch.full((latents.shape[0], frames), timestep)
        times[:, :given_frames] = 0
        with torch.no_grad():
            flow = pipe.transformer(latents, times, embeds, return_dict=False)[0]
        latents = solver.step(flow, timestep, latents, random)
    return torch.cat([given, latents[:, :, given_frames:]], dim=2)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("given_frames", [1, 2])
def test_the_first_chunk_is_made_around_given_frames(pipe, solver, given_frames):
    given, initial, embeds = noise(2, 16, given_frames, 4, 4), noise(2, 16, 7, 4, 4, seed=6), noise(2, 9, 32, seed=7)
    rollout = pipe.rollout(
        prompt_embeds=embeds,
        video_latents=given,
        latents=initial,
        given_in_chunk=True,
        solver=solver,
        num_inference_steps=3,
        generator=generator(4),
        output_type="latent",
    )
    chunks = list(rollout)
    assert [(chunk.start_frame, chunk.given) for chunk in chunks] == [(0, False), (3, False), (6, False)]
    assert torch.equal(chunks[0].latents[:, :, :given_frames], given)
    scheduler = rollout.schedulers[0]
    expected = first_chunk_by_hand(pipe, SOLVERS[solver](scheduler), embeds, given, initial[:, :, :3], generator(4))
    torch.testing.assert_close(chunks[0].latents, expected, rtol=0, atol=2e-5)


def test_noise_of_given_frames_is_drawn_and_unused(pipe):
    given = noise(1, 16, 1, 4, 4)
    drawn = start(pipe, video_latents=given, given_in_chunk=True, solver="unipc", output_type="latent", num_frames=25)
    random = generator()
    initial = torch.cat([torch.randn(1, 16, n, 4, 4, generator=random) for n in (3, 3, 1)], dim=2)
    initial[:, :, 0] = 1e6
    options = {"video_latents": given, "given_in_chunk": True, "solver": "unipc", "output_type": "latent"}
    assert_same(list(start(pipe, latents=initial, **{**options, "num_frames": 25})), list(drawn))


def test_an_extension_by_whole_chunks_is_as_without(pipe):
    options = {"video_latents": noise(1, 16, 6, 4, 4), "output_type": "latent"}
    assert_same(list(start(pipe, given_in_chunk=True, **options)), list(start(pipe, **options)))


def test_an_extension_that_ends_inside_of_a_chunk(pipe):
    given = noise(1, 16, 4, 4, 4)
    rollout = start(pipe, given_in_chunk=True, video_latents=given)
    chunks = list(rollout)
    assert [(chunk.start_frame, chunk.given) for chunk in chunks] == [
        *((0, True), (3, False), (6, False), (9, False), (12, False))
    ]
    assert torch.equal(torch.cat([chunk.latents for chunk in chunks], dim=2)[:, :, :4], given)


def test_the_length_of_the_noise_tells_the_length_of_the_video(pipe):
    arguments = {"prompt": "rain", "video_latents": noise(1, 16, 1, 4, 4), "latents": noise(1, 16, 6, 4, 4)}
    rollout = pipe.rollout(**arguments, given_in_chunk=True, output_type="latent")
    assert rollout.grid.total_frames == 6
    with pytest.raises(ValueError, match=r"latents has shape .*this video needs \(1, 16, 7, 4, 4\)"):
        pipe.rollout(**arguments, given_in_chunk=True, output_type="latent", num_frames=25)


def test_a_sampler_that_mixes_chunks_refuses():
    config = RolloutConfig(32, 32, given_in_chunk=True)
    with pytest.raises(ValueError, match="given_in_chunk does not work with sampler 'chunkwise'"):
        Sampler.check(config)
    with pytest.raises(ValueError, match="it works with solver 'renoise', got 'unipc'"):
        Sampler.check(RolloutConfig(32, 32, solver="unipc"))


def test_what_a_solver_cannot_do_is_refused(pipe):
    clip = torch.zeros(9, 3, 32, 32)
    with pytest.raises(ValueError, match="strength starts inside of the steps, which solver 'unipc' cannot"):
        pipe.rollout("rain", video=clip, strength=0.5, solver="unipc")
    with pytest.raises(ValueError, match="solver is 'unipcc'; allowed are renoise, unipc"):
        start(pipe, solver="unipcc")
    with pytest.raises(ValueError, match="solver 'unipc' takes evenly spaced steps"):
        start(pipe, solver="unipc", num_inference_steps=None, denoising_steps=(1000, 400))
