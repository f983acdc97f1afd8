"""One chunk after the other: Self-Forcing, LongLive 1 and 2, CausVid.

A chunk is denoised in a few steps that see the clean past in the cache; then a context pass writes the chunk's own
clean keys and values.
"""

import torch

from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.denoiser import Window
from wan_autoregressive.pipelines.frame_grid import Chunk, FrameGrid
from wan_autoregressive.pipelines.samplers.context_pass import ContextPassSampler


class ChunkwiseSampler(ContextPassSampler):
    """Finishes one chunk before it begins the next."""

    denoises_by_chunk = True

    @classmethod
    def check(cls, config: RolloutConfig) -> None:
        super().check(config)
        if config.strength is not None and config.solver != "renoise":
            raise ValueError(
                f"strength starts inside of the steps, which solver {config.solver!r} cannot; use 'renoise' for video "
                "to video"
            )

    def next_chunk(self, chunk: Chunk) -> torch.Tensor:
        context, solver = self.context, self.context.new_solver(chunk)
        latents = context.noise.initial(chunk.start - context.grid.first_generated_frame, chunk.num_frames)
        timesteps = solver.timesteps
        if self.source_latents is not None:
            timesteps = timesteps[len(timesteps) - context.config.num_source_steps(len(timesteps)) :]
            latents = context.scheduler_of(chunk).add_noise(self.source_latents, latents, timesteps[0])
        latents = self.take_steps(
            chunk, latents, solver, timesteps, lambda timestep: self._step_window(chunk, timestep)
        )
        self.due = chunk.frames if context.config.clean_pass else None
        return latents

    def _step_window(self, chunk: Chunk, timestep: float) -> Window:
        """What a denoising step sees and leaves in the cache."""
        return Window(chunk.frames, self._timesteps(chunk, timestep))

    @staticmethod
    def _timesteps(chunk: Chunk, timestep: float) -> tuple[float, ...]:
        """Given frames are clean."""
        if not chunk.fixed_frames:
            return (timestep,)
        return (0.0,) * chunk.fixed_frames + (timestep,) * (chunk.num_frames - chunk.fixed_frames)

    @classmethod
    def num_forwards(
        cls, config: RolloutConfig, grid: FrameGrid, steps: tuple[int, int], experts: int = 1
    ) -> int | None:
        generated, context_passes = grid.num_generated_chunks, grid.num_given_chunks
        if config.clean_pass:
            context_passes += generated - 1
        return config.num_branches * (steps[0] + (generated - 1) * steps[1] + experts * context_passes)
