"""Where the gaussians of a video come from."""

import copy
from typing import Any

import torch

from wan_autoregressive.schedulers.self_forcing_scheduler import Generators, draw_noise


class NoiseSource:
    """Noise chunk by chunk, as `(batch, channels, frames, height, width)` in float32.

    Args:
        shape: Batch, channels, height and width of the video's latents.
        generator: `None` draws from torch's global state.
        initial: Initial noise of all generated frames, instead of drawing it.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        device: torch.device,
        generator: Generators = None,
        initial: torch.Tensor | None = None,
    ) -> None:
        self._shape = shape
        self._device = device
        self.generator = generator
        self._initial = initial

    def initial(self, first_frame: int, num_frames: int) -> torch.Tensor:
        """What generated frames start from.

        Args:
            first_frame: Frames of generated chunks before it; chunks of given ones do not count.
        """
        if self._initial is not None:
            return self._initial[:, :, first_frame : first_frame + num_frames]
        return self.draw(num_frames)

    def draw(self, num_frames: int, frames_first: bool = False) -> torch.Tensor:
        """Fresh noise.

        Args:
            frames_first: Draw it as `(batch, frames, channels, height, width)`, as original implementations do: other
                noise from the same seed.
        """
        batch, channels, height, width = self._shape
        if frames_first:
            shape = batch, num_frames, channels, height, width
            return draw_noise(shape, self.generator, self._device, torch.float32).transpose(1, 2)
        return draw_noise((batch, channels, num_frames, height, width), self.generator, self._device, torch.float32)

    @property
    def is_given(self) -> bool:
        """Whether initial noise is not drawn."""
        return self._initial is not None

    def state_dict(self) -> dict[str, Any]:
        # The initial noise whole, also where it is used up: a reset starts from it again.
        return {"generator": _generator_states(self.generator), "initial": self._initial}

    def load_state_dict(self, state: dict[str, Any], generator_device: torch.device | str | None = None) -> None:
        """Raises `ValueError` for a `generator_device` of another kind than the saved generators were on."""
        self.generator = _load_generators(state["generator"], generator_device)
        self._initial = state["initial"]

    def fork(self) -> "NoiseSource":
        """A copy that draws what this one would have drawn. Without generators both draw from torch's global state."""
        twin = copy.copy(self)
        twin.generator = _load_generators(_generator_states(self.generator), None)
        return twin


def _generator_states(generators: Generators) -> dict[str, Any] | None:
    """States by distinct generator: one that stands in a list twice goes on as one."""
    if generators is None:
        return None
    listed = generators if isinstance(generators, list) else [generators]
    distinct = {id(generator): generator for generator in listed}
    order = list(distinct)
    return {
        "states": [generator.get_state() for generator in distinct.values()],
        "devices": [str(generator.device) for generator in distinct.values()],
        "order": [order.index(id(generator)) for generator in listed],
        "is_list": isinstance(generators, list),
    }


def _load_generators(saved: dict[str, Any] | None, device: torch.device | str | None) -> Generators:
    if saved is None:
        return None
    made = []
    for state, was in zip(saved["states"], saved["devices"], strict=True):
        wanted = torch.device(was if device is None else device)
        if wanted.type != torch.device(was).type:
            raise ValueError(
                f"generator_device is {str(device)!r}, but the saved generator is of a {torch.device(was).type} "
                "device: kinds of devices draw different numbers"
            )
        generator = torch.Generator(wanted)
        generator.set_state(state.cpu())
        made.append(generator)
    generators = [made[index] for index in saved["order"]]
    return generators if saved["is_list"] else generators[0]
