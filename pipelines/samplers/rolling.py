"""A window of chunks at rising noise, denoised together: Rolling Forcing.

A tick is one forward over all chunks in flight, the oldest the cleanest: each takes one denoising step, the oldest is
finished and leaves, and a new one of pure noise enters at the next tick. A chunk sees newer, noisier ones beside it
and the finished past in the cache. After TencentARC/RollingForcing (`pipeline/rolling_forcing_inference.py`,
`wan/modules/causal_model.py`).

The two kinds of forward see different pasts. A joint forward attends to `attended_frames` latent frames at most, its
own included: the sink, moved to directly before the newest finished frames, and as many of those as there is room
for. The context pass of a finished chunk, which writes its clean keys and values, attends to the newest
`attended_frames` and knows no sink.

A prompt changes between two ticks. What happens to finished frames is the switch policy's business; chunks in flight
keep the latents that they have and take their remaining steps under the new prompt, so that it comes in over as many
chunks as there are steps.
"""

from dataclasses import dataclass
from typing import Any

import torch

from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.models.forward_plan import PastFrames
from wan_autoregressive.pipelines.denoiser import Window
from wan_autoregressive.pipelines.frame_grid import Chunk, FrameGrid
from wan_autoregressive.pipelines.samplers.base import SamplingContext
from wan_autoregressive.pipelines.samplers.context_pass import ContextPassSampler


@dataclass(frozen=True)
class ChunkInWindow:
    """A chunk that has taken some of its steps."""

    chunk: Chunk
    latents: torch.Tensor
    """What the next step starts from, `(batch, channels, frames, height, width)`."""
    steps_done: int = 0


class RollingSampler(ContextPassSampler):
    """Denoises as many chunks together as there are denoising steps.

    Args:
        attended_frames: Latent frames that any forward attends to at most, own ones included. Its own and the sink it
            sees in any case.
        reference_draws: Draw noise as the original does, which gives the same video for the same seed: all initial
            noise at once, before anything, and for every re-noise as much as the window has frames, of which one
            chunk's are used.
    """

    def __init__(self, context: SamplingContext, attended_frames: int = 21, reference_draws: bool = False) -> None:
        super().__init__(context)
        self._attended_frames = attended_frames
        self._reference_draws = reference_draws
        self._in_flight: tuple[ChunkInWindow, ...] = ()
        """Oldest first. Replaced and never changed, so that a fork may share it."""
        self._all_noise: torch.Tensor | None = None
        """Initial noise of the whole video, where it is drawn as the original does."""

    @classmethod
    def check(cls, config: RolloutConfig) -> None:
        super().check(config)
        options = cls.options(config)
        attended = options["attended_frames"]
        if not isinstance(attended, int) or attended < config.largest_chunk_frames:
            raise ValueError(
                f"attended_frames is {attended!r}; it must be a whole number of latent frames that holds at least a "
                f"chunk of {config.largest_chunk_frames}"
            )
        if config.strength is not None or config.first_chunk_steps is not None or not config.clean_pass:
            raise ValueError(
                "sampler 'rolling' makes every chunk in the same steps from pure noise and caches it in a pass of its "
                "own; leave out strength, first_chunk_steps and clean_pass"
            )
        if config.sink_frames and config.position_mode == "absolute":
            raise ValueError(
                "sampler 'rolling' moves the sink along with the window; set position_mode='sink_relative' (or leave "
                "out sink_frames)"
            )
        if config.num_frames is None and options["reference_draws"]:
            raise ValueError("reference_draws draws all noise at once; a video without num_frames has no end of it")
        needed = attended + config.sink_frames
        if config.num_frames is None and config.sink_frames and (config.window_frames or 0) < needed:
            raise ValueError(
                f"window_frames is {config.window_frames}, with {attended} attended_frames and {config.sink_frames} "
                "sink_frames: context passes would see the sink at an ever growing distance, up to the end of the "
                f"rotary table. A video without end needs window_frames of at least {needed}"
            )

    def next_chunk(self, chunk: Chunk) -> torch.Tensor:
        while True:
            self._let_in(chunk)
            oldest = self._tick()
            is_finished = oldest.steps_done == self._num_steps
            if is_finished or self.context.observer.interrupted:
                break
        self._in_flight = self._in_flight[1:]
        self.due = chunk.frames
        return oldest.latents

    def cache_given(self, chunk: Chunk, latents: torch.Tensor) -> None:
        self.context.denoiser.cache_context(latents, self.context_window(chunk.frames, 0.0))

    @classmethod
    def chunks_to_settle(cls, config: RolloutConfig, steps: int) -> int:
        return int(cls.options(config)["attended_frames"]) // config.chunk_frames

    @classmethod
    def num_forwards(
        cls, config: RolloutConfig, grid: FrameGrid, steps: tuple[int, int], experts: int = 1
    ) -> int | None:
        generated = grid.num_generated_chunks
        ticks = generated + steps[1] - 1
        return config.num_branches * (grid.num_given_chunks + ticks + generated - 1)

    # A tick.

    def _let_in(self, first: Chunk) -> None:
        """Start the next chunk from noise, unless the video has no more; the first one is `first`."""
        grid = self.context.grid
        chunk = first
        if self._in_flight:
            newest = self._in_flight[-1].chunk
            if newest.stop == grid.total_frames:
                return
            chunk = grid.chunk(newest.index + 1, newest.stop)
        noise = self._initial_noise(chunk)
        self._in_flight = (*self._in_flight, ChunkInWindow(chunk, noise))

    def _tick(self) -> ChunkInWindow:
        """One step for every chunk in flight; returns the oldest."""
        timesteps = self._timesteps
        flow = self.context.denoiser.predict(
            torch.cat([entry.latents for entry in self._in_flight], dim=2), self._joint_window()
        )
        flows = flow.split([entry.chunk.num_frames for entry in self._in_flight], dim=2)
        stepped = []
        for entry, own_flow in zip(self._in_flight, flows, strict=True):
            latents = self._stepped(entry, own_flow)
            timestep = timesteps[entry.steps_done]
            latents = self.context.observer.step_done(entry.chunk, timestep, latents)
            stepped.append(ChunkInWindow(entry.chunk, latents, entry.steps_done + 1))
        self._in_flight = tuple(stepped)
        return stepped[0]

    def _joint_window(self) -> Window:
        config, oldest, steps = self.context.config, self._in_flight[0], self._timesteps
        frames = range(oldest.chunk.start, self._in_flight[-1].chunk.stop)
        timesteps = [steps[entry.steps_done] for entry in self._in_flight for _ in entry.chunk.frames]
        newest = self._attended_frames - config.sink_frames - len(frames)
        if config.window_frames is not None:  # the place of the oldest chunk counts, as if it were in the cache
            newest = min(newest, config.window_frames - config.sink_frames - oldest.chunk.num_frames)
        # Before anything is cached the oldest chunk may be, as its context pass overwrites it.
        kept = oldest.chunk.num_frames if frames.start == 0 else 0
        return Window(frames, tuple(timesteps), kept, PastFrames(max(0, newest)))

    # A timestep for each frame, as joint forwards have it, and a past by its slots: no compiled graphs of their own.

    def context_window(self, frames: range, timestep: float) -> Window:
        past = PastFrames(max(0, self._attended_frames - len(frames)), sink=False)
        return Window(frames, (timestep,) * len(frames), past=past)

    def recache_window(self, frames: range) -> Window:
        return Window(frames, (self.context.config.context_noise,) * len(frames), past=PastFrames())

    def _stepped(self, entry: ChunkInWindow, flow: torch.Tensor) -> torch.Tensor:
        """Latents of a chunk after its step: noised to the next one, or finished."""
        scheduler, step = self.context.schedulers[1], entry.steps_done
        x0 = scheduler.predict_original_sample(flow, float(scheduler.sigmas[step]), entry.latents)
        if step + 1 == self._num_steps:
            return x0
        return scheduler.add_noise(x0, self._renoise(entry.chunk), self._timesteps[step + 1])

    @property
    def _timesteps(self) -> list[float]:
        return self.context.schedulers[1].timesteps.tolist()

    @property
    def _num_steps(self) -> int:
        return len(self.context.schedulers[1].timesteps)

    # Noise.

    def _initial_noise(self, chunk: Chunk) -> torch.Tensor:
        noise, grid = self.context.noise, self.context.grid
        start = chunk.start - grid.given_frames
        if noise.is_given or not self._reference_draws:
            return noise.initial(start, chunk.num_frames)
        if self._all_noise is None:
            assert grid.total_frames is not None
            self._all_noise = noise.draw(grid.total_frames - grid.given_frames, frames_first=True)
        return self._all_noise[:, :, start : start + chunk.num_frames]

    def _renoise(self, chunk: Chunk) -> torch.Tensor:
        noise = self.context.noise
        if not self._reference_draws:
            return noise.draw(chunk.num_frames)
        first, last = self._in_flight[0].chunk, self._in_flight[-1].chunk
        whole = noise.draw(last.stop - first.start, frames_first=True)
        return whole[:, :, chunk.start - first.start : chunk.stop - first.start]

    # State.

    def reset(self) -> None:
        super().reset()
        self._in_flight, self._all_noise = (), None

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "in_flight": [{**vars(entry), "chunk": vars(entry.chunk)} for entry in self._in_flight],
            "all_noise": self._all_noise,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._in_flight = tuple(
            ChunkInWindow(**{**entry, "chunk": Chunk(**entry["chunk"])}) for entry in state["in_flight"]
        )
        self._all_noise = state["all_noise"]

    @property
    def nbytes(self) -> int:
        held = [entry.latents for entry in self._in_flight]
        return sum(tensor.nbytes for tensor in (*held, self._all_noise) if tensor is not None)
