"""A stream whose every denoising step has a cache of its own, a lane: StreamDiffusionV2.

The first chunk goes through its N steps in one cache, and what the last step leaves there is copied to N lanes. From
then on lane j always makes step j: each tick a new chunk enters lane 0, every chunk in flight takes the step of its
lane and moves one lane on, and the one that has left the last lane is finished. Only latents move between lanes. A
lane's forwards append to its cache and never overwrite, so that a chunk sees the past at the noise level that it has
itself, never clean; there is no context pass. After chenfengxu714/StreamDiffusionV2
(`models/wan/causal_stream_inference.py`, `streamv2v/inference.py`).

The original runs the lanes of a tick as one batch. Here they run one after the other, with the same result.

Video to video starts a chunk from a mix of noise and source, by a rate that falls where the source moves much.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.denoiser import Window
from wan_autoregressive.pipelines.frame_grid import Chunk, FrameGrid
from wan_autoregressive.pipelines.samplers.base import Sampler, SamplingContext, shortened
from wan_autoregressive.pipelines.source_video import SourceEndedError
from wan_autoregressive.schedulers import SelfForcingScheduler

POLICIES_WITHOUT_A_PAST = ("cross_attention", "blend")
LARGEST_MOTION = 0.2
"""Root mean square of the change from frame to frame, of pixels in [-1, 1], from which on motion counts as 1."""


@dataclass(frozen=True)
class ChunkInLane:
    """A chunk before the step of a lane."""

    chunk: Chunk
    latents: torch.Tensor
    """Noisy, `(batch, channels, frames, height, width)`."""
    timestep: float
    lane: int = 0


@dataclass(frozen=True)
class SourceChunk:
    """A chunk of the source that has been read and not entered yet."""

    chunk: Chunk
    latents: torch.Tensor
    noise_rate: float


class StreamBatchSampler(Sampler):
    """Denoises chunks in as many lanes as there are denoising steps.

    With a source, `strength` is the rate of noise in a still picture, and all steps of the list are made.

    Args:
        normalized_source (`bool`, defaults to `True`): Whether source latents are on the transformer's scale. The
            original mixes in latents as the VAE gives them and decodes normalised ones all the same; its checkpoint
            is used with `False`.
        restart_positions (`int`, *optional*): Rotary position from which on the next chunk starts again at
            `window_frames - 1`, while cached keys keep theirs. The original's live sessions use 50.
    """

    counts_video_frames = False

    def __init__(
        self, context: SamplingContext, normalized_source: bool = True, restart_positions: int | None = None
    ) -> None:
        super().__init__(context)
        self._normalized_source = normalized_source
        self._restart_positions = restart_positions
        self._in_flight: tuple[ChunkInLane, ...] = ()
        """Oldest first, each in a lane of its own. Replaced and never changed, so that a fork may share it."""
        self._read: tuple[SourceChunk, ...] = ()
        self._source_ended = False
        self._noise_rate: float | None = None
        """Of the newest chunk that was read."""
        self._last_pixels: torch.Tensor | None = None
        """Newest frame that was read, `(videos, 3, 1, height, width)`."""

    @classmethod
    def check(cls, config: RolloutConfig) -> None:
        super().check(config)
        if config.first_chunk_steps is not None or not config.clean_pass or config.context_noise:
            raise ValueError(
                "sampler 'stream_batch' has a lane for each step and no context pass; leave out first_chunk_steps, "
                "clean_pass and context_noise"
            )
        if config.switch_policy not in POLICIES_WITHOUT_A_PAST:
            raise ValueError(
                f"sampler 'stream_batch' keeps a past of its own for each step, which switch_policy "
                f"{config.switch_policy!r} cannot change; use {' or '.join(map(repr, POLICIES_WITHOUT_A_PAST))}"
            )
        if config.strength is not None and config.strength <= 0.2:
            raise ValueError(
                f"strength is {config.strength}; sampler 'stream_batch' tells the model up to 200 timesteps less than "
                "1000 x strength, so it must be above 0.2"
            )
        restart = config.sampler_options.get("restart_positions")
        if restart is None:
            return
        if config.window_frames is None or config.position_mode != "absolute":
            raise ValueError("restart_positions needs window_frames and position_mode 'absolute'; leave it out")
        smallest = config.window_frames + 2 * config.chunk_frames
        if not isinstance(restart, int) or restart < smallest:
            raise ValueError(
                f"restart_positions is {restart!r}; positions start again at window_frames - 1, so it must be a whole "
                f"number of at least {smallest}"
            )

    # Of the source.

    def prepare(self, chunk: Chunk) -> Chunk:
        """Reads as far ahead as chunks enter before this one is finished."""
        if self.context.source is None:
            return chunk
        ahead = 0 if self._is_first(chunk) else self._num_lanes - 1
        while not self._source_ended:
            newest = self._newest_chunk
            following = chunk if newest is None else self._after(newest)
            if following is None or following.index > chunk.index + ahead:
                break
            self._read_source(following)
        known = (*(entry.chunk for entry in self._in_flight), *(read.chunk for read in self._read))
        if not known:
            raise SourceEndedError("the source video has no frames left")
        return known[0]

    def _read_source(self, chunk: Chunk) -> None:
        source, strength = self.context.source, self.context.config.strength
        assert source is not None
        assert strength is not None
        try:
            frames = source.next_frames(chunk.num_frames, self._normalized_source)
        except SourceEndedError:
            self._source_ended = True
            return
        if self._noise_rate is None or self._last_pixels is None:
            self._noise_rate = strength
        else:
            motion = _motion(torch.cat([self._last_pixels, frames.pixels], dim=2))
            self._noise_rate = 0.9 * (strength - 0.1 * motion) + 0.1 * self._noise_rate
        self._last_pixels = frames.pixels[:, :, -1:]
        chunk = shortened(chunk, frames.latents.shape[2])
        self._read = (*self._read, SourceChunk(chunk, frames.latents, self._noise_rate))

    # A chunk.

    def next_chunk(self, chunk: Chunk) -> torch.Tensor:
        if self._is_first(chunk):
            return self._denoise_first(chunk)
        lanes = len(self.context.denoiser.lanes)
        if lanes != self._num_lanes:
            raise ValueError(
                f"sampler 'stream_batch' has {lanes} lanes, one for each denoising step; "
                f"their number cannot change to {self._num_lanes} while a video is made"
            )
        while True:
            self._let_in(chunk)
            oldest = self._tick()
            if oldest.lane == self._num_lanes or self.context.observer.interrupted:
                break
        self._in_flight = self._in_flight[1:]
        return oldest.latents

    def _denoise_first(self, chunk: Chunk) -> torch.Tensor:
        """Step by step in one cache, which then becomes that of every lane."""
        entry = self._entering(chunk)
        while entry.lane < self._num_lanes and not self.context.observer.interrupted:
            entry = self._stepped(entry, lane=0)
        self.context.denoiser.split_lanes(self._num_lanes)
        return entry.latents

    def _let_in(self, first: Chunk) -> None:
        """Let the next chunk enter, unless the video has no more; the first one in flight is `first`."""
        following = self._after(self._in_flight[-1].chunk) if self._in_flight else first
        if following is not None and (self.context.source is None or self._read):
            self._in_flight = (*self._in_flight, self._entering(following))

    def _tick(self) -> ChunkInLane:
        """One step for every chunk in flight; returns the oldest."""
        self._in_flight = tuple(self._stepped(entry, entry.lane) for entry in self._in_flight)
        return self._in_flight[0]

    def _entering(self, chunk: Chunk) -> ChunkInLane:
        """A chunk before the first step: noise, or noise and source."""
        context = self.context
        read, timestep = None, self._timesteps[0]
        if context.source is not None:
            read, self._read = self._read[0], self._read[1:]
            chunk = read.chunk
        latents = context.noise.initial(chunk.start - context.grid.first_generated_frame, chunk.num_frames)
        if read is not None:
            latents = read.noise_rate * latents + (1 - read.noise_rate) * read.latents
            if not self._is_first(chunk):
                timestep = float(int(1000 * read.noise_rate) - 100)  # the original tells less noise than there is
        return ChunkInLane(chunk, latents, timestep)

    def _stepped(self, entry: ChunkInLane, lane: int) -> ChunkInLane:
        """A chunk after its step: noised to that of the next lane, or finished."""
        scheduler = self._scheduler
        window = Window(self._positions(entry.chunk), (entry.timestep,))
        flow = self.context.denoiser.predict(entry.latents, window, lane)
        latents = scheduler.predict_original_sample(flow, scheduler.sigma_at(entry.timestep), entry.latents)
        following, timestep = entry.lane + 1, 0.0
        if following < self._num_lanes:
            timestep = self._timesteps[following]
            latents = scheduler.add_noise(latents, self.context.noise.draw(entry.chunk.num_frames), timestep)
        latents = self.context.observer.step_done(entry.chunk, entry.timestep, latents)
        return ChunkInLane(entry.chunk, latents, timestep, following)

    def _positions(self, chunk: Chunk) -> range:
        """Rotary positions of a chunk's frames."""
        config, limit = self.context.config, self._restart_positions
        if limit is None or chunk.start < limit:
            return chunk.frames
        assert config.window_frames is not None
        start, size = config.window_frames - 1, config.chunk_frames
        chunks_since = (chunk.start - limit) // size % math.ceil((limit - start) / size)
        return range(start + chunks_since * size, start + chunks_since * size + chunk.num_frames)

    def _is_first(self, chunk: Chunk) -> bool:
        return chunk.start == self.context.grid.first_generated_frame

    def _after(self, chunk: Chunk) -> Chunk | None:
        """The next chunk of the video, if it has one."""
        grid = self.context.grid
        return None if chunk.stop == grid.total_frames else grid.chunk(chunk.index + 1, chunk.stop)

    @property
    def _newest_chunk(self) -> Chunk | None:
        """That was read and is not finished."""
        if self._read:
            return self._read[-1].chunk
        return self._in_flight[-1].chunk if self._in_flight else None

    @property
    def _scheduler(self) -> SelfForcingScheduler:
        return self.context.schedulers[1]

    @property
    def _timesteps(self) -> list[float]:
        return self._scheduler.timesteps.tolist()

    @property
    def _num_lanes(self) -> int:
        return len(self._scheduler.timesteps)

    @classmethod
    def num_steps(cls, config: RolloutConfig, listed: int) -> int:
        return listed

    @classmethod
    def num_forwards(
        cls, config: RolloutConfig, grid: FrameGrid, steps: tuple[int, int], experts: int = 1
    ) -> int | None:
        return config.num_branches * (grid.num_given_chunks + grid.num_generated_chunks * steps[1])

    # State. A rollout with a source is neither reset nor saved nor forked, so nothing of it is here.

    def reset(self) -> None:
        self._in_flight = ()

    def state_dict(self) -> dict[str, Any]:
        return {"in_flight": [{**vars(entry), "chunk": vars(entry.chunk)} for entry in self._in_flight]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._in_flight = tuple(
            ChunkInLane(**{**entry, "chunk": Chunk(**entry["chunk"])}) for entry in state["in_flight"]
        )

    @property
    def nbytes(self) -> int:
        waiting = [*(entry.latents for entry in self._in_flight), *(read.latents for read in self._read)]
        return sum(tensor.nbytes for tensor in (*waiting, self._last_pixels) if tensor is not None)


def _motion(pixels: torch.Tensor) -> float:
    """How much frames `(videos, 3, frames, height, width)` in [-1, 1] differ from the one before: 0 (still) to 1."""
    changes = (pixels[:, :, 1:] - pixels[:, :, :-1]).float().square().mean(dim=(0, 1, 3, 4)).sqrt()
    return min(float(changes.max()) / LARGEST_MOTION, 1.0)
