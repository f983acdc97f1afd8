"""How the latents of a chunk go from one denoising step to the next."""

from typing import Protocol

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler

from wan_autoregressive.schedulers.self_forcing_scheduler import Generators, SelfForcingScheduler


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
