"""The few-step sampler of Self-Forcing: predict x0, re-noise it to the next step, the last x0 is the sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from wan_autoregressive.configs.rollout_config import check_steps

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class SelfForcingSchedulerOutput(BaseOutput):
    """What one step gives.

    Args:
        prev_sample: Input of the next step; after the last step the finished sample.
        pred_original_sample: The x0 that this step predicts.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class SelfForcingScheduler(SchedulerMixin, ConfigMixin):
    """Denoising step list of a distilled causal Wan model, after `utils/scheduler.py` of Self-Forcing.

    The table has `num_train_timesteps` entries `sigma = shift * s / (1 + (shift - 1) * s)`, `t = 1000 * sigma` for
    evenly spaced `s`. A warped step list indexes it: with shift 5, steps 1000, 750, 500, 250 run at t = 1000, 937.5,
    833.333, 625. Timesteps are floats; truncating them changes the video.

    A step keeps nothing, so one scheduler serves all chunks, and `FlowMatchLCMScheduler` of diffusers gives the same
    numbers; it is not the base because it draws a noise tensor too many per chunk and counts steps itself.

    Args:
        denoising_steps: Strictly descending, in [0, `num_train_timesteps`]. A step at 0 runs at t = 0 with the
            smallest sigma of the table above 0, for models that are made for it (Krea Realtime).
        shift: Flow shift of the table.
        warp: Whether steps are indices into the table (whole numbers) or timesteps that are used as they are, with the
            sigma of the nearest entry.
        num_train_timesteps: Entries of the table.

    Raises:
        ValueError: a list that is empty, does not descend or leaves the table; a shift of 0 or less.
    """

    _compatibles: list[str] = []  # noqa: RUF012 - read by diffusers under this name
    order = 1

    @register_to_config
    def __init__(
        self,
        denoising_steps: Sequence[float] = (1000, 750, 500, 250),
        shift: float = 5.0,
        warp: bool = True,
        num_train_timesteps: int = 1000,
    ) -> None:
        if shift <= 0:
            raise ValueError(f"shift is {shift}; it must be above 0")
        s = torch.linspace(1.0, 0.0, num_train_timesteps + 1, dtype=torch.float32)
        self._table_sigmas = shift * s / (1 + (shift - 1) * s)  # (num_train_timesteps + 1,), the last one is 0
        self._table_timesteps = self._table_sigmas * num_train_timesteps
        self.set_timesteps()

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Reads configs of Wan's other schedulers: UniPC's `flow_shift` is our `shift`; its orders do nothing here."""
        if "flow_shift" in config_dict and "shift" not in config_dict:
            config_dict = dict(config_dict)
            config_dict["shift"] = config_dict.pop("flow_shift")
        if config_dict.get("_class_name", cls.__name__) != cls.__name__:
            own = cls._get_init_keys(cls)
            config_dict = {name: value for name, value in config_dict.items() if name in own or name.startswith("_")}
        return super().extract_init_dict(config_dict, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        denoising_steps: Sequence[float] | None = None,
    ) -> None:
        """Choose the steps of a chunk.

        Args:
            num_inference_steps: Evenly spaced steps, 4 gives 1000, 750, 500, 250. The list of the config is used if it
                has as many.
            device: Where `timesteps` shall be. `sigmas` stay on the CPU.
            denoising_steps: An own list instead.
        """
        if num_inference_steps is not None and denoising_steps is not None:
            raise ValueError(
                f"got num_inference_steps={num_inference_steps} and denoising_steps={list(denoising_steps)}; pass one"
            )
        steps = list(self.config.denoising_steps if denoising_steps is None else denoising_steps)
        if num_inference_steps is not None and num_inference_steps != len(steps):
            steps = self._evenly_spaced(num_inference_steps)
        self._check_steps(steps)

        if self.config.warp:
            indices = torch.tensor([self.config.num_train_timesteps - int(step) for step in steps])
            timesteps = self._table_timesteps[indices]
        else:
            timesteps = torch.tensor(steps, dtype=torch.float32)
        self.steps = steps
        """As they were asked for, before warping."""
        self.timesteps = timesteps.to(device)  # (steps,) float32
        last = torch.zeros(1, dtype=torch.float32)
        self.sigmas = torch.cat([self._nearest_sigmas(timesteps), last])  # (steps + 1,) float32
        self.num_inference_steps = len(steps)
        self._timestep_floats: list[float] = timesteps.tolist()
        self._sigma_floats: list[float] = self.sigmas.tolist()

    @property
    def evenly_spaced(self) -> bool:
        """Whether the steps are those of a count of steps, warped."""
        return bool(self.config.warp) and self.steps == self._evenly_spaced(len(self.steps))

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SelfForcingSchedulerOutput | Any:
        """One denoising step: `x0 = sample - sigma * flow`, then noise for the next step unless it is the last.

        Args:
            model_output: Predicted flow, shaped as `sample`.
            timestep: One of `timesteps`. A tensor on a GPU costs a sync; a float does not.
            sample: `(batch, channels, frames, height, width)`. Current noisy latents.
            generator: Source of the noise.

        Returns:
            [`SelfForcingSchedulerOutput`], or `(prev_sample, pred_original_sample)` if not `return_dict`.
        """
        index = self._index_of(float(timestep))
        x0 = self.predict_original_sample(model_output, self._sigma_floats[index], sample)
        prev_sample = x0
        if index + 1 < len(self._timestep_floats):
            noise = draw_noise(x0.shape, generator, x0.device, x0.dtype)
            prev_sample = self._mix(x0, noise, self._sigma_floats[index + 1])
        if not return_dict:
            return prev_sample, x0
        return SelfForcingSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def predict_original_sample(self, model_output: torch.Tensor, sigma: float, sample: torch.Tensor) -> torch.Tensor:
        """x0 from flow, computed in float64 as the original does (float32 where the device has no float64)."""
        precise = torch.float32 if sample.device.type == "mps" else torch.float64
        return (sample.to(precise) - sigma * model_output.to(precise)).to(sample.dtype)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timestep: float | torch.Tensor
    ) -> torch.Tensor:
        """Clean latents noised to a timestep: `(1 - sigma) * x0 + sigma * noise`, sigma of the nearest table entry."""
        return self._mix(original_samples, noise, self.sigma_at(float(timestep)))

    def sigma_at(self, timestep: float) -> float:
        """Sigma of the table entry nearest to any timestep."""
        return float(self._nearest_sigmas(torch.tensor(timestep)))

    def _nearest_sigmas(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Of the nearest entries above 0. At t = 0 it is the smallest, as in the original, whose table has no 0."""
        distances = self._table_timesteps[:-1] - timesteps[..., None]
        return self._table_sigmas[distances.abs().argmin(dim=-1)]

    @staticmethod
    def _mix(x0: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        return (1 - sigma) * x0 + sigma * noise

    def _index_of(self, timestep: float) -> int:
        try:
            return self._timestep_floats.index(timestep)
        except ValueError:
            raise ValueError(
                f"timestep {timestep} is not one of this schedule's timesteps {self._timestep_floats}"
            ) from None

    def _evenly_spaced(self, num_inference_steps: int) -> list[float]:
        if not 1 <= num_inference_steps <= self.config.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}; it must be 1 to {self.config.num_train_timesteps}"
            )
        last = self.config.num_train_timesteps
        return [round(last * (num_inference_steps - i) / num_inference_steps) for i in range(num_inference_steps)]

    def _check_steps(self, steps: list[float]) -> None:
        check_steps("denoising_steps", steps, self.config.num_train_timesteps)
        if self.config.warp and any(step != int(step) for step in steps):
            raise ValueError(
                f"denoising_steps is {steps}; with warp=True steps are indices and must be whole numbers. "
                "Use warp=False for timesteps"
            )


def draw_noise(
    shape: tuple[int, ...], generator: Generators, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Diffusers' `randn_tensor` to the bit; that one waits for the GPU whenever the generator is on the CPU.

    Args:
        generator: On `device` or on the CPU; `None` draws from the global state of `device`.

    Raises:
        ValueError: a generator on a GPU for noise on another device.
    """
    first = generator[0] if isinstance(generator, list) else generator
    drawn_on = device if first is None or first.device.type != "cpu" else first.device
    noise = randn_tensor(shape, generator=generator, device=drawn_on, dtype=dtype)
    if noise.device.type == "cpu" and device.type == "cuda":
        noise = noise.pin_memory()  # from other memory the copy may wait for its turn
    return noise.to(device, non_blocking=True)
