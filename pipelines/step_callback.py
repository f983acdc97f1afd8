"""diffusers' `callback_on_step_end` for a video that is denoised chunk by chunk."""

from collections.abc import Callable
from typing import Any

import torch

from wan_autoregressive.pipelines.frame_grid import Chunk
from wan_autoregressive.pipelines.rollout import WanRollout

StepEndFunction = Callable[[Any, int, float, dict[str, Any]], dict[str, Any]]


class VideoStepCallback:
    """Shows a step-end function the latents of the whole video and takes its changes over.

    Frames that are still to come are zero. The step index runs over all chunks.
    """

    def __init__(self, pipe: Any, function: StepEndFunction, tensor_inputs: list[str]) -> None:
        self._pipe = pipe
        self._function = function
        self._tensor_inputs = tensor_inputs
        self.latents: torch.Tensor | None = None
        """`(batch, channels, latent_frames, height, width)` of the whole video, once a step has ended."""

    def __call__(
        self, rollout: WanRollout, chunk: Chunk, step: int, timestep: float, chunk_latents: torch.Tensor
    ) -> torch.Tensor:
        if self.latents is None:
            self.latents = self._video_buffer(rollout, chunk_latents)
        self.latents[:, :, chunk.start : chunk.stop] = chunk_latents
        available = {
            "latents": self.latents,
            "prompt_embeds": rollout.prompt.embeds,
            "negative_prompt_embeds": rollout.negative_prompt_embeds,
        }
        callback_kwargs = {}
        for name in self._tensor_inputs:
            callback_kwargs[name] = available[name]
        outputs = self._function(self._pipe, step, timestep, callback_kwargs)

        self.latents = outputs.pop("latents", self.latents)
        rollout.replace_embeds(
            outputs.pop("prompt_embeds", rollout.prompt.embeds),
            outputs.pop("negative_prompt_embeds", rollout.negative_prompt_embeds),
        )
        if self._pipe.interrupt:
            rollout.interrupt()
        return self.latents[:, :, chunk.start : chunk.stop].clone()

    @staticmethod
    def _video_buffer(rollout: WanRollout, chunk_latents: torch.Tensor) -> torch.Tensor:
        batch, channels, _, height, width = chunk_latents.shape
        assert rollout.grid.total_frames is not None, "a callback sees the whole video, so it must have an end"
        latents = chunk_latents.new_zeros(batch, channels, rollout.grid.total_frames, height, width)
        if rollout.given_latents is not None:
            latents[:, :, : rollout.grid.given_frames] = rollout.given_latents
        return latents
