"""A chunk's steps by each solver, against loops written out by hand."""

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from wan_autoregressive import SelfForcingScheduler
from wan_autoregressive.schedulers.step_solver import BoundaryRenoiseSolver, RenoiseSolver, UniPCSolver, new_solver


def flow_of(sample: torch.Tensor, timestep: float) -> torch.Tensor:
    """Anything that is not linear."""
    return torch.sin(3 * sample) + sample * timestep / 1000


def scheduler_with(steps: int | None = None, **config) -> SelfForcingScheduler:
    scheduler = SelfForcingScheduler(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def solved(solver, latents: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    for timestep in solver.timesteps:
        latents = solver.step(flow_of(latents, timestep), timestep, latents, generator)
    return latents


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_unipc_is_the_loop_of_diffusers(steps, shift):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1])
    expected = noise()
    for timestep in scheduler.timesteps:
        expected = scheduler.step(flow_of(expected, float(timestep)), timestep, expected).prev_sample
    assert torch.equal(solved(UniPCSolver(scheduler_with(steps, shift=shift)), noise()), expected)


def test_unipc_has_the_timesteps_of_the_original():
    assert UniPCSolver(scheduler_with(4)).timesteps == [999, 937, 833, 624]
    assert UniPCSolver(scheduler_with(2)).timesteps == [999, 833]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 50, 1000])
def test_unipc_timesteps_are_shifted_sigmas_cut_down(steps):
    base = [0.999 * (1 - index / steps) for index in range(steps)]
    expected = [int(1000 * 5 * s / (1 + 4 * s)) for s in base]
    assert UniPCSolver(scheduler_with(steps)).timesteps == expected


def test_unipc_with_two_steps_is_euler():
    # Its first step has no past, and its last one lands on the x0 that it predicts: the second order has no say.
    solver, sigmas = UniPCSolver(scheduler_with(2)), [5 * s / (1 + 4 * s) for s in (0.999, 0.4995)]
    latents = noise()
    for timestep, sigma, following in zip(solver.timesteps, sigmas, [*sigmas[1:], 0.0], strict=True):
        latents = latents + (following - sigma) * flow_of(latents, timestep)
    torch.testing.assert_close(solved(solver, noise()), latents, rtol=0, atol=1e-5)


def test_unipc_draws_nothing():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    solved(UniPCSolver(scheduler_with(4)), noise(), generator)
    assert torch.equal(generator.get_state(), before)


def test_renoise_is_the_scheduler():
    scheduler, expected = scheduler_with(), noise()
    generator = torch.Generator().manual_seed(3)
    for timestep in scheduler.timesteps.tolist():
        expected = scheduler.step(flow_of(expected, timestep), timestep, expected, generator).prev_sample
    assert torch.equal(solved(RenoiseSolver(scheduler), noise(), torch.Generator().manual_seed(3)), expected)


@pytest.mark.parametrize(
    "config",
    [{"denoising_steps": (1000, 757, 522)}, {"denoising_steps": (1000, 500), "warp": False}],
)
def test_unipc_refuses_steps_that_are_not_evenly_spaced(config):
    with pytest.raises(ValueError, match=r"solver 'unipc' takes evenly spaced steps.*pass num_inference_steps"):
        UniPCSolver(SelfForcingScheduler(**config))


PUBLISHED = {"denoising_steps": (1000, 850, 700, 550, 350, 275, 200, 125), "shift": 12.0}


def test_a_pair_of_experts_in_the_published_steps():
    sigmas = [12 * s / (1000 + 11 * s) for s in PUBLISHED["denoising_steps"]]
    bound = 12 * 368 / (1000 + 11 * 368)  # of the table entry nearest to 0.875
    latents, source = noise(), torch.Generator().manual_seed(3)
    for place, sigma in enumerate(sigmas):
        flow = flow_of(latents, 1000 * sigma)
        latents = latents - (sigma - bound if place < 4 else sigma) * flow
        if place < 3:
            following = sigmas[place + 1]
            a = (1 - following) / (1 - bound)
            fresh = torch.randn(latents.shape, generator=source)
            latents = a * latents + (following**2 - (a * bound) ** 2) ** 0.5 * fresh
        elif 3 < place < 7:
            following = sigmas[place + 1]
            latents = (1 - following) * latents + following * torch.randn(latents.shape, generator=source)
    generator = torch.Generator().manual_seed(3)
    solver = new_solver("renoise", scheduler_with(**PUBLISHED), 875.0)
    torch.testing.assert_close(solved(solver, noise(), generator), latents, rtol=0, atol=1e-4)
    assert torch.equal(generator.get_state(), source.get_state())


def test_states_above_the_boundary_have_the_noise_of_their_step():
    # A flow that knows the clean latents: every state must then be that of the forward process at its sigma.
    clean = torch.zeros(1, 1, 1, 300, 300)
    latents = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    solver = new_solver("renoise", scheduler_with(**PUBLISHED), 875.0)
    sigmas = [12 * s / (1000 + 11 * s) for s in PUBLISHED["denoising_steps"]]
    levels = []
    for timestep, sigma in zip(solver.timesteps[:4], sigmas, strict=False):
        latents = solver.step(
            (latents - clean) / sigma, timestep, latents, torch.Generator().manual_seed(int(sigma * 1e6))
        )
        levels.append(latents.std().item())
    assert levels == pytest.approx([*sigmas[1:4], 0.875], abs=0.01)  # 0.0024 is the spread of 90 000 numbers


def test_a_step_at_the_boundary_is_the_state_that_was_predicted():
    solver = new_solver("renoise", scheduler_with(denoising_steps=(1000, 875, 500), warp=False), 875.0)
    flow = flow_of(noise(), 1000.0)
    made = solver.step(flow, 1000.0, noise(), torch.Generator().manual_seed(0))
    sigma = scheduler_with().sigma_at(875.0)
    torch.testing.assert_close(made, noise() - (1 - sigma) * flow, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["renoise", "unipc"])
@pytest.mark.parametrize(("steps", "boundary"), [(1, 875.0), (4, 600.0), (2, 1001.0)])
def test_steps_that_leave_an_expert_without_any_are_refused(name, steps, boundary):
    with pytest.raises(ValueError, match=r"two transformers share them at .* and each needs at least one"):
        new_solver(name, scheduler_with(steps), boundary)


def test_the_boundary_is_for_two_experts_alone():
    scheduler = scheduler_with()
    assert type(new_solver("renoise", scheduler)) is RenoiseSolver
    assert type(new_solver("renoise", scheduler, 875.0)) is BoundaryRenoiseSolver
    assert type(new_solver("unipc", scheduler, 875.0)) is UniPCSolver
