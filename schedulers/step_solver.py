"""How the latents of a chunk go from one denoising step to the next."""

import math
from typing import Protocol

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler

from wan_autoregressive.configs.registry import SOLVERS
from wan_autoregressive.schedulers.self_forcing_scheduler import Generators, SelfForcingScheduler, draw_noise


class StepSolver(Protocol):
    """The steps of one chunk: a chunk gets a solver of its own, so nothing of one is ever saved.

    It is found by its name in `configs.registry.SOLVERS`, and made from the scheduler with the chunk's steps.
    """

    timesteps: list[float]
    """What the model is given, one for each step, descending."""

    def step(
        self, flow: torch.Tensor, timestep: float, sample: torch.Tensor, generator: Generators = None
    ) -> torch.Tensor:
        """Input of the next step, and after the last one the finished latents.

        Args:
            flow: Predicted for `sample`, both `(batch, channels, frames, height, width)`.
            timestep: The next one of `timesteps`.
            generator: Source of noise, for a solver that draws any.
        """


class RenoiseSolver:
    """Predict x0 and noise it anew for the next step: how few-step models are distilled (Self-Forcing).

    As all solvers it is made from a [`SelfForcingScheduler`]; here that does the step, and any of its steps may be the
    first.
    """

    def __init__(self, scheduler: SelfForcingScheduler) -> None:
        self._scheduler = scheduler
        self.timesteps: list[float] = scheduler.timesteps.tolist()

    def step(
        self, flow: torch.Tensor, timestep: float, sample: torch.Tensor, generator: Generators = None
    ) -> torch.Tensor:
        return self._scheduler.step(flow, timestep, sample, generator=generator).prev_sample


class BoundaryRenoiseSolver:
    """Renoise for two transformers: steps above the boundary predict the state at the boundary instead of x0.

    With sigmas s of the steps and b of the boundary, the nearest in the table: a step above goes to
    `x_b = x - (s - b) * flow`. To the next step above, at s', it is noised as the forward process has it,
    `a * x_b + sqrt(s'^2 - (a * b)^2) * noise` with `a = (1 - s') / (1 - b)`. The first step below takes x_b as it is,
    without noise, at its own timestep and sigma (with the published steps 866 for a state at 875). From there on x0 is
    predicted and noised anew, as by [`RenoiseSolver`].

    Read in FastVideo: `CausalDMDDenosingStage` (`pipelines/stages/causal_denoising.py`), `pred_noise_to_x_bound`
    (`models/utils.py`), `add_noise_high`, and `SelfForcingWan2_2_T2V480PConfig` with shift 12 and warped steps: which
    step is above is asked of warped timesteps, at least `boundary_ratio * num_train_timesteps`. There noise is drawn
    for the hand-over too and not used; here it is not drawn, so that one seed gives other videos. Not checked: numbers
    against that code or any checkpoint made for it; none was run.

    Args:
        boundary: Timestep from which the first transformer denoises.
    """

    def __init__(self, scheduler: SelfForcingScheduler, boundary: float) -> None:
        self._scheduler, self._boundary = scheduler, boundary
        self._boundary_sigma = scheduler.sigma_at(boundary)
        self.timesteps: list[float] = scheduler.timesteps.tolist()
        self._sigmas: list[float] = scheduler.sigmas.tolist()

    def step(
        self, flow: torch.Tensor, timestep: float, sample: torch.Tensor, generator: Generators = None
    ) -> torch.Tensor:
        if timestep < self._boundary:
            return self._scheduler.step(flow, timestep, sample, generator=generator).prev_sample
        index, at_boundary = self.timesteps.index(timestep), self._boundary_sigma
        latents = self._scheduler.predict_original_sample(flow, self._sigmas[index] - at_boundary, sample)
        if self.timesteps[index + 1] < self._boundary:
            return latents
        following = self._sigmas[index + 1]
        kept = (1 - following) / (1 - at_boundary)
        noise = draw_noise(latents.shape, generator, latents.device, latents.dtype)
        return kept * latents + math.sqrt(following**2 - (kept * at_boundary) ** 2) * noise


class UniPCSolver:
    """UniPC of order 2 in all steps of a chunk, without noise between them (LongLive 2.0).

    As the original's `FlowUniPCMultistepScheduler` (`wan_5b/utils/fm_solvers_unipc.py`): evenly spaced sigmas from
    0.999 down, shifted, and timesteps cut down to whole numbers. With shift 5, four steps run at t = 999, 937, 833,
    624. UniPC's defaults in diffusers would start at 1, with other sigmas and 625.

    Raises:
        ValueError: steps that are not evenly spaced.
    """

    def __init__(self, scheduler: SelfForcingScheduler) -> None:
        config, count = scheduler.config, scheduler.num_inference_steps
        if not scheduler.evenly_spaced:
            raise ValueError(
                f"solver 'unipc' takes evenly spaced steps, but the steps are {scheduler.steps} (warp "
                f"{config.warp}); pass num_inference_steps={count}"
            )
        self._scheduler = UniPCMultistepScheduler(
            num_train_timesteps=config.num_train_timesteps,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=config.shift,
        )
        self._scheduler.set_timesteps(sigmas=np.linspace(0.999, 0, count + 1)[:-1])
        self._scheduler.set_begin_index(0)
        self.timesteps: list[float] = [float(timestep) for timestep in self._scheduler.timesteps]

    def step(
        self, flow: torch.Tensor, timestep: float, sample: torch.Tensor, generator: Generators = None
    ) -> torch.Tensor:
        return self._scheduler.step(flow, timestep, sample, return_dict=False)[0]


def new_solver(name: str, scheduler: SelfForcingScheduler, boundary: float | None = None) -> StepSolver:
    """The solver of that name for the steps of one chunk.

    Args:
        boundary: Timestep from which the first of two transformers denoises; `None` with one.

    Raises:
        ValueError: steps that the solver cannot take, or that leave one of two transformers without any.
    """
    if boundary is not None and name == "renoise":
        solver: StepSolver = BoundaryRenoiseSolver(scheduler, boundary)
    else:
        solver = SOLVERS.load(name)(scheduler)
    timesteps = solver.timesteps
    if boundary is not None and not timesteps[-1] < boundary <= timesteps[0]:
        shown = ", ".join(f"{timestep:g}" for timestep in timesteps)
        raise ValueError(
            f"the steps run at t = {shown}; two transformers share them at {boundary:g} and each needs at least one"
        )
    return solver
