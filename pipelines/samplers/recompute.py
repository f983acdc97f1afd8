"""The past is made anew for every chunk, from a few latent frames at the start of time: Krea Realtime.

Before a chunk the cache is emptied and the last `context_frames` latents run through the model, at rotary positions 0
and up. The chunk comes right behind them, so that positions never grow, and its own keys and values are thrown away:
there is no pass that writes them. A video that is cut off at its start this way would begin with a latent that stands
for four pixel frames, which no VAE gives for a first frame; so the first context frame is the last pixel frame of its
latent, encoded as a video of its own. After krea-ai/realtime-video (`release_server.py`).
"""

from itertools import pairwise
from typing import Any, Literal, get_args

import torch

from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.denoiser import Window
from wan_autoregressive.pipelines.frame_grid import Chunk, FrameGrid
from wan_autoregressive.pipelines.samplers.base import Sampler, SamplingContext
from wan_autoregressive.schedulers import SelfForcingScheduler
from wan_autoregressive.schedulers.step_solver import RenoiseSolver

ContextPrompt = Literal["old", "new"]
POLICIES_WITH_A_PAST = ("recache", "flush", "cut")


class RecomputeSampler(Sampler):
    """Denoises a chunk behind a context that is made for it alone.

    With `strength` every step of the list is made, evenly spaced from `strength` of the way to 0, on the source noised
    to the first of them.

    Args:
        context_frames: Latent frames before the chunk that it sees, fewer at the start.
        keep_first_frame: The first context frame is the video's first latent for ever, instead of one that is encoded
            again; no pixels are needed then.
        context_prompt: Prompt of the context when the prompt changes: `old` makes it under the one before, as the
            original does, `new` under the chunk's own.
    """

    def __init__(
        self,
        context: SamplingContext,
        context_frames: int = 3,
        keep_first_frame: bool = False,
        context_prompt: ContextPrompt = "old",
    ) -> None:
        super().__init__(context)
        self._context_frames = context_frames
        self._keep_first_frame = keep_first_frame
        self._context_prompt = context_prompt
        self._frames_done = 0
        self._first_frame: torch.Tensor | None = None
        """The video's first latent frame, where it is kept."""
        self._pixels: tuple[torch.Tensor, ...] = ()
        """Last pixel frames `(batch, 3, 1, height, width)` of the newest latents, oldest first."""

    @classmethod
    def check(cls, config: RolloutConfig) -> None:
        super().check(config)
        options = cls.options(config)
        frames = options["context_frames"]
        if not isinstance(frames, int) or frames < 1:
            raise ValueError(f"context_frames is {frames!r}; it must be a whole number of at least 1 latent frame")
        if options["context_prompt"] not in get_args(ContextPrompt):
            raise ValueError(f"context_prompt is {options['context_prompt']!r}; allowed are old, new")
        window, needed = config.window_frames, frames + config.largest_chunk_frames
        if window is None or window < needed or config.sink_frames:
            raise ValueError(
                f"sampler 'recompute' keeps {frames} context frames and a chunk in the cache and no sink; set "
                f"window_frames={needed} and leave out sink_frames, got {window} and {config.sink_frames}"
            )
        if config.switch_policy in POLICIES_WITH_A_PAST:
            raise ValueError(
                f"sampler 'recompute' makes the past anew for every chunk, so that switch_policy "
                f"{config.switch_policy!r} has none to work on; use 'cross_attention' or 'blend' (context_prompt says "
                "under which prompt the past is made)"
            )
        if not config.clean_pass:
            raise ValueError("sampler 'recompute' has no clean pass; leave out clean_pass")

    @classmethod
    def counts_video_frames(cls, config: RolloutConfig) -> bool:
        return False

    @classmethod
    def needs_pixels(cls, config: RolloutConfig) -> bool:
        return not cls.options(config)["keep_first_frame"]

    def take_pixels(self, chunk: Chunk, pixels: torch.Tensor) -> None:
        if self.needs_pixels(self.context.config):
            newest = (*self._pixels, *_last_pixel_frames(chunk, pixels))
            self._pixels = newest[-self._context_frames :]

    def cache_past(self, skip_prompt: bool = False) -> None:
        if self._context_prompt == "old" and self._frames_done >= self.context.grid.given_frames:
            self._recompute()

    def cache_given(self, chunk: Chunk, latents: torch.Tensor) -> None:
        self._finish(chunk, latents)

    def next_chunk(self, chunk: Chunk) -> torch.Tensor:
        if self._context_prompt == "new":
            self._recompute()
        context, scheduler = self.context, self._scheduler_of(chunk)
        start = min(self._context_frames, chunk.start)
        frames, timesteps = range(start, start + chunk.num_frames), scheduler.timesteps.tolist()
        latents = context.noise.initial(chunk.start - context.grid.given_frames, chunk.num_frames)
        if self.source_latents is not None:
            latents = scheduler.add_noise(self.source_latents, latents, timesteps[0])
        solver = RenoiseSolver(scheduler)
        latents = self.take_steps(chunk, latents, solver, timesteps, lambda timestep: Window(frames, (timestep,)))
        self._finish(chunk, latents)
        return latents

    @classmethod
    def num_steps(cls, config: RolloutConfig, listed: int) -> int:
        return listed

    @classmethod
    def num_forwards(
        cls, config: RolloutConfig, grid: FrameGrid, steps: tuple[int, int], experts: int = 1
    ) -> int | None:
        context_frames, forwards = cls.options(config)["context_frames"], 0
        for chunk in grid:
            if not chunk.given:
                forwards += steps[0 if chunk.start == grid.given_frames else 1]
                forwards += len(_context_windows(min(context_frames, chunk.start), config.chunk_frames))
        return forwards * config.num_branches

    def _recompute(self) -> None:
        """Replace what the caches hold by the context of the chunk to come."""
        if not self._frames_done:
            return
        denoiser, config = self.context.denoiser, self.context.config
        denoiser.keep_newest(0)
        latents = self._context_latents()
        for frames in _context_windows(latents.shape[2], config.chunk_frames):
            window = Window(frames, (config.context_noise,))
            denoiser.cache_context(latents[:, :, frames.start : frames.stop], window)

    def _context_latents(self) -> torch.Tensor:
        """`(batch, channels, up to context_frames, height, width)`"""
        history, wanted = self.context.history, self._context_frames
        if self._frames_done <= wanted:
            return history.last(self._frames_done)
        first = self._first_frame if self._keep_first_frame else self.context.encode(self._pixels[0])
        assert first is not None
        newest = history.last(wanted)[:, :, 1:]
        return torch.cat([first.to(newest), newest], dim=2)

    def _finish(self, chunk: Chunk, latents: torch.Tensor) -> None:
        if self._keep_first_frame and self._first_frame is None:
            self._first_frame = latents[:, :, :1]
        self._frames_done = chunk.stop

    def _scheduler_of(self, chunk: Chunk) -> SelfForcingScheduler:
        scheduler, strength = self.context.scheduler_of(chunk), self.context.config.strength
        if strength is None:
            return scheduler
        first = scheduler.config.num_train_timesteps * strength
        spaced = SelfForcingScheduler.from_config(scheduler.config)
        spaced.set_timesteps(denoising_steps=torch.linspace(first, 0, len(scheduler.timesteps)).int().tolist())
        return spaced

    # State.

    def reset(self) -> None:
        self._frames_done, self._first_frame, self._pixels = 0, None, ()

    def state_dict(self) -> dict[str, Any]:
        return {"frames_done": self._frames_done, "first_frame": self._first_frame, "pixels": list(self._pixels)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._frames_done, self._first_frame = state["frames_done"], state["first_frame"]
        self._pixels = tuple(state["pixels"])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._pixels, self._first_frame) if tensor is not None)


def _context_windows(num_frames: int, chunk_frames: int) -> list[range]:
    """Frames of the forwards that make a context: causal between chunks, as the past of a video is."""
    starts = [*range(0, num_frames, chunk_frames), num_frames]
    return [range(start, stop) for start, stop in pairwise(starts)]


def _last_pixel_frames(chunk: Chunk, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Of each latent frame of a chunk, in memory of their own."""
    is_first = chunk.start == 0  # that latent is one pixel frame
    per_latent = (pixels.shape[2] - is_first) // max(1, chunk.num_frames - is_first)
    last = pixels.shape[2] - 1
    places = [last - per_latent * later for later in reversed(range(chunk.num_frames))]
    return [pixels[:, :, place : place + 1].clone() for place in places]
