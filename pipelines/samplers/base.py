"""What all ways to sample have in common."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self

import torch

from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.components import Schedulers
from wan_autoregressive.pipelines.denoiser import Denoiser, Window
from wan_autoregressive.pipelines.frame_grid import Chunk, FrameGrid
from wan_autoregressive.pipelines.latent_history import LatentHistory
from wan_autoregressive.pipelines.noise import NoiseSource
from wan_autoregressive.pipelines.source_video import SourceVideo
from wan_autoregressive.schedulers import SelfForcingScheduler, StepSolver
from wan_autoregressive.schedulers.step_solver import new_solver


class StepObserver(Protocol):
    """Who is told of every denoising step: the rollout."""

    interrupted: bool
    """Whether the sampler shall stop after the step under way."""

    def step_done(self, chunk: Chunk, timestep: float, latents: torch.Tensor) -> torch.Tensor:
        """The latents to go on with, after a step on those of a chunk."""


@dataclass
class SamplingContext:
    """What a sampler works with. The rollout owns it all."""

    config: RolloutConfig
    """The settings as they are now."""
    grid: FrameGrid
    """How the video is divided into chunks."""
    denoiser: Denoiser
    """What predicts the flow of frames, and writes the cache."""
    schedulers: Schedulers
    """Of the first generated chunk, and of all later ones."""
    noise: NoiseSource
    """Draws the noise of the video in the documented order."""
    history: LatentHistory
    """Clean latents of the chunks that are done."""
    observer: StepObserver
    """Is told of every denoising step; gives back the latents to go on with."""
    encode: Callable[[torch.Tensor], torch.Tensor]
    """Latents of pixels `(batch, 3, frames, height, width)` in [-1, 1], as a video of their own."""
    given_latents: torch.Tensor | None = None
    """`(batch, channels, frames, height, width)` that come first in the video."""
    source: SourceVideo | None = None
    """Of video to video."""

    def scheduler_of(self, chunk: Chunk) -> SelfForcingScheduler:
        """The first generated chunk may have a step list of its own."""
        first, later = self.schedulers
        return first if chunk.start == self.grid.first_generated_frame else later

    def new_solver(self, chunk: Chunk) -> StepSolver:
        """For the steps of one chunk."""
        return new_solver(self.config.solver, self.scheduler_of(chunk), self.denoiser.boundary)


class Sampler:
    """Makes the latents of a video, chunk by chunk.

    A subclass gives `next_chunk` and, where its past needs writing, `cache_past`. What it remembers from chunk to
    chunk goes through `state_dict`, `load_state_dict`, `fork` and `reset`. It is found by its name in
    `configs.registry.SAMPLERS`; the keywords of its constructor are its `sampler_options`.
    """

    denoises_by_chunk: ClassVar[bool] = False
    """Whether a chunk goes through the steps of `context.new_solver` by itself: then any solver will do, given frames
    may be in it, and two transformers may share the steps."""

    fills_memory_bank: ClassVar[bool] = False
    """Whether `memory_bank_frames` means something to it."""

    def __init__(self, context: SamplingContext) -> None:
        self.context = context
        self.source_latents: torch.Tensor | None = None
        """Of the chunk that was prepared last, `(batch, channels, frames, height, width)`, in video to video."""

    @classmethod
    def check(cls, config: RolloutConfig) -> None:
        """Raise `ValueError` for settings that this sampler cannot work with; no model has run yet."""
        try:
            inspect.signature(cls).bind(None, **config.sampler_options)
        except TypeError as error:
            raise ValueError(f"sampler_options do not fit sampler {config.sampler!r}: {error}") from error
        if config.solver != "renoise" and not cls.denoises_by_chunk:
            raise ValueError(
                f"sampler {config.sampler!r} noises frames anew between steps; it works with solver 'renoise', got "
                f"{config.solver!r}"
            )
        if config.memory_bank_frames and not cls.fills_memory_bank:
            raise ValueError(
                f"memory_bank_frames is {config.memory_bank_frames}, which sampler {config.sampler!r} does not fill; "
                "use sampler 'memory_bank' or leave it out"
            )
        if config.given_in_chunk and not cls.denoises_by_chunk:
            raise ValueError(f"given_in_chunk does not work with sampler {config.sampler!r}; leave it out")

    @classmethod
    def options(cls, config: RolloutConfig) -> dict[str, Any]:
        """All of `sampler_options`, those that are not set as the constructor has them."""
        parameters = inspect.signature(cls).parameters
        defaults = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
        return {**defaults, **config.sampler_options}

    @classmethod
    def chunks_to_settle(cls, config: RolloutConfig, steps: int) -> int:
        """Chunks after the one that has filled the window until each costs the same."""
        return 0

    @classmethod
    def counts_video_frames(cls, config: RolloutConfig) -> bool:
        """Whether the frames of its windows are numbered as in the video, as a transformer that is conditioned on an
        image needs it."""
        return True

    @classmethod
    def needs_pixels(cls, config: RolloutConfig) -> bool:
        """Whether a chunk can only be begun once the one before it is decoded."""
        return False

    def take_pixels(self, chunk: Chunk, pixels: torch.Tensor) -> None:
        """A chunk has been decoded, to `(batch, 3, frames, height, width)` in [-1, 1]."""

    def prepare(self, chunk: Chunk) -> Chunk:
        """Take what a chunk needs of the source, before anything runs; it comes out shorter where the source ends.

        Raises:
            SourceEndedError: the source video has nothing left for it.
        """
        if self.context.source is None:
            return chunk
        self.source_latents = self.context.source.next_latents(chunk.num_frames)
        return shortened(chunk, self.source_latents.shape[2])

    def cache_past(self, skip_prompt: bool = False) -> None:
        """Bring the caches up to date with the chunks that are done, before a prompt changes or a chunk begins.

        Args:
            skip_prompt: Leave out the prompt's cache, which is about to be rewritten.
        """

    def next_chunk(self, chunk: Chunk) -> torch.Tensor:
        """Finished latents `(batch, channels, frames, height, width)` of a chunk to generate."""
        raise NotImplementedError

    def take_steps(
        self,
        chunk: Chunk,
        latents: torch.Tensor,
        solver: StepSolver,
        timesteps: list[float],
        window: Callable[[float], Window],
    ) -> torch.Tensor:
        """The latents of a chunk after denoising steps on it alone, or after the one at which a stop was asked for.

        Args:
            timesteps: Of the solver's, the ones to make.
            window: Of the step at a timestep.
        """
        context = self.context
        for timestep in timesteps:
            latents = self._with_given(chunk, latents)
            flow = context.denoiser.predict(latents, window(timestep))
            latents = self._with_given(chunk, solver.step(flow, timestep, latents, context.noise.generator))
            latents = context.observer.step_done(chunk, timestep, latents)
            if context.observer.interrupted:
                break
        return latents

    def _with_given(self, chunk: Chunk, latents: torch.Tensor) -> torch.Tensor:
        """The latents of a chunk with the frames that were given in their places."""
        given = self.context.given_latents
        if given is None or not chunk.fixed_frames:
            return latents
        return torch.cat([given[:, :, chunk.start :], latents[:, :, chunk.fixed_frames :]], dim=2)

    def cache_given(self, chunk: Chunk, latents: torch.Tensor) -> None:
        """Write given latents `(batch, channels, frames, height, width)` to the caches."""
        self.context.denoiser.cache_context(latents, Window(chunk.frames, (0.0,)))

    def recache_window(self, frames: range) -> Window:
        """Of a pass over finished frames that replaces their keys and values, as a switch policy may ask for."""
        return Window(frames, (self.context.config.context_noise,))

    @classmethod
    def num_steps(cls, config: RolloutConfig, listed: int) -> int:
        """Denoising steps of a chunk, of a list with `listed` steps."""
        return config.num_source_steps(listed)

    @classmethod
    def num_caches(cls, config: RolloutConfig, steps: int) -> int:
        """Caches that are held for each prompt.

        Args:
            steps: Denoising steps of a chunk.
        """
        return 1

    @classmethod
    def num_forwards(
        cls, config: RolloutConfig, grid: FrameGrid, steps: tuple[int, int], experts: int = 1
    ) -> int | None:
        """Forwards of a whole video with an end under one prompt, or `None` if that is not known.

        Args:
            steps: Denoising steps of the first generated chunk and of the later ones.
            experts: Transformers, 1 or 2: they share the steps, and each caches every finished chunk.
        """
        return None

    def reset(self) -> None:
        """Forget the video."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers from chunk to chunk: plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that it remembers."""
        return 0

    def fork(self, context: SamplingContext) -> Self:
        """A copy that goes on from here on its own, with another context."""
        twin = copy.copy(self)
        twin.context = context
        return twin


def shortened(chunk: Chunk, num_frames: int) -> Chunk:
    """The first frames of a chunk."""
    return replace(chunk, stop=chunk.start + num_frames)
