"""One chunk after the other: Self-Forcing, LongLive 1 and 2, CausVid.

A chunk is denoised in a few steps that see the clean past in the cache; then a context pass writes the chunk's own
clean keys and values. That pass runs before the next chunk, so that a chunk is handed out without waiting for it and
the last one never pays for it.
"""

from typing import Any

import torch

from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.denoiser import Window
from wan_autoregressive.pipelines.frame_grid import Chunk, FrameGrid
from wan_autoregressive.pipelines.samplers.base import Sampler, SamplingContext, shortened


class ChunkwiseSampler(Sampler):
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

    def __init__(self, context: SamplingContext) -> None:
        super().__init__(context)
        self._source_latents: torch.Tensor | None = None
        self._due: range | None = None
        """Frames whose clean keys and values are still to be written."""

    def prepare(self, chunk: Chunk) -> Chunk:
        source = self.context.source
        if source is None:
            return chunk
        self._source_latents = source.next_latents(chunk.num_frames)
        return shortened(chunk, self._source_latents.shape[2])

    def cache_past(self, skip_prompt: bool = False) -> None:
        if self._due is None:
            return
        latents = self.context.history.last(len(self._due))
        window = Window(self._due, (self.context.config.context_noise,))
        self.context.denoiser.cache_context(latents, window, skip_prompt)
        self._due = None

    def next_chunk(self, chunk: Chunk) -> torch.Tensor:
        context = self.context
        solver, noise = context.new_solver(chunk), context.noise
        latents = noise.initial(chunk.start - context.grid.first_generated_frame, chunk.num_frames)
        timesteps = solver.timesteps
        if self._source_latents is not None:
            timesteps = timesteps[len(timesteps) - context.config.num_source_steps(len(timesteps)) :]
            latents = context.scheduler_of(chunk).add_noise(self._source_latents, latents, timesteps[0])
        for timestep in timesteps:
            latents = self._with_given(chunk, latents)
            flow = context.denoiser.predict(latents, Window(chunk.frames, self._timesteps(chunk, timestep)))
            latents = self._with_given(chunk, solver.step(flow, timestep, latents, noise.generator))
            latents = context.observer.step_done(chunk, timestep, latents)
            if context.observer.interrupted:
                break
        self._due = chunk.frames if context.config.clean_pass else None
        return latents

    def _with_given(self, chunk: Chunk, latents: torch.Tensor) -> torch.Tensor:
        """The latents of a chunk with the frames that were given in their places."""
        given = self.context.given_latents
        if given is None or not chunk.fixed_frames:
            return latents
        return torch.cat([given[:, :, chunk.start :], latents[:, :, chunk.fixed_frames :]], dim=2)

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
        if grid.total_frames is None:
            return None
        chunks, generated = sum(1 for _ in grid), grid.num_generated_chunks
        context_passes = generated - 1 if config.clean_pass else 0
        branches = 2 if config.do_classifier_free_guidance else 1
        written = chunks - generated + context_passes
        return branches * (steps[0] + (generated - 1) * steps[1] + experts * written)

    def reset(self) -> None:
        self._source_latents = self._due = None

    def state_dict(self) -> dict[str, Any]:
        return {"due": None if self._due is None else (self._due.start, self._due.stop)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._due = None if state["due"] is None else range(*state["due"])
