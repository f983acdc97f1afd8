"""A stream whose every denoising step has a cache of its own, a lane: StreamDiffusionV2.

The first chunk goes through its N steps in one cache, and what the last step leaves there is copied to N lanes. From
then on lane j always makes step j: each tick a new chunk enters lane 0, all chunks in flight take the step of their
lane in one forward and move one lane on, and the one that has left the last lane is finished. Only latents move
between lanes. A lane's forwards append to its cache and never overwrite, so that a chunk sees the past at the noise
level that it has itself, never clean; there is no context pass. After chenfengxu714/StreamDiffusionV2
(`models/wan/causal_stream_inference.py`, `streamv2v/inference.py`).

Video to video starts a chunk from a mix of noise and source, see [`NoisedSource`].
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.denoiser import Window
from wan_autoregressive.pipelines.frame_grid import Chunk, FrameGrid
from wan_autoregressive.pipelines.samplers.base import Sampler, SamplingContext
from wan_autoregressive.pipelines.samplers.lane_settings import check_adaptive_sink, check_restart, forwards_in_lanes
from wan_autoregressive.pipelines.samplers.noised_source import NoisedSource
from wan_autoregressive.pipelines.source_video import SourceEndedError
from wan_autoregressive.schedulers import SelfForcingScheduler

POLICIES_WITHOUT_A_PAST = ("cross_attention", "blend")


@dataclass(frozen=True)
class ChunkInLane:
    """A chunk before the step of a lane."""

    chunk: Chunk
    latents: torch.Tensor
    """Noisy, `(batch, channels, frames, height, width)`."""
    timestep: float
    lane: int = 0
    is_real: bool = True
    """Whether it is a chunk of the video."""


class StreamBatchSampler(Sampler):
    """Denoises chunks in as many lanes as there are denoising steps.

    With a source, `strength` is the rate of noise in a still picture, and all steps of the list are made.

    Args:
        normalized_source: Whether source latents are on the transformer's scale. The original mixes in latents as the
            VAE gives them and decodes normalised ones all the same; its checkpoint is used with `False`.
        restart_positions: Rotary position from which on the next chunk starts again at `window_frames - 1`, while
            cached keys keep theirs. The original's live sessions use 50.
        adaptive_sink: Similarity, -1 to 1, below which a frame in the sink is given up for the frame that is new, see
            [`AdaptiveSink`]. The original's default is 0.2.
        sequential: Finish one chunk before the next begins, all steps in a single cache, as the original does without
            batches: a chunk does not wait in lanes, and its past is at the noise of the last step.
    """

    def __init__(
        self,
        context: SamplingContext,
        normalized_source: bool = True,
        restart_positions: int | None = None,
        adaptive_sink: float | None = None,
        sequential: bool = False,
    ) -> None:
        super().__init__(context)
        if adaptive_sink is not None and context.denoiser.heads_are_split:
            raise ValueError(
                "adaptive_sink compares frames by all heads, and each of several ranks holds some; leave it out, or "
                "make the video on one rank"
            )
        self._restart_positions = restart_positions
        self._adaptive_sink = adaptive_sink
        self._sequential = sequential
        self._in_flight: tuple[ChunkInLane, ...] = ()
        """Oldest first, each in a lane of its own, one lane after the other. Replaced and never changed, so that a
        fork may share it."""
        self._source: NoisedSource | None = None
        if context.source is not None:
            assert context.config.strength is not None
            self._source = NoisedSource(context.source, context.config.strength, normalized_source)

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
        check_restart(config)
        check_adaptive_sink(config)

    @classmethod
    def counts_video_frames(cls, config: RolloutConfig) -> bool:
        return cls.options(config)["restart_positions"] is None

    # Of the source.

    def prepare(self, chunk: Chunk) -> Chunk:
        """Reads as far ahead as chunks enter before this one is finished."""
        source = self._source
        if source is None:
            return chunk
        ahead = 0 if self._sequential or self._is_first(chunk) else self._num_steps - 1
        while not source.ended:
            newest = self._newest_chunk
            following = chunk if newest is None else self._after(newest)
            if following is None or following.index > chunk.index + ahead:
                break
            source.read(following)
        known = (*(entry.chunk for entry in self._real_ones), *(read.chunk for read in source.waiting))
        if not known:
            raise SourceEndedError("the source video has no frames left")
        return known[0]

    # A chunk.

    def next_chunk(self, chunk: Chunk) -> torch.Tensor:
        if self._sequential:
            return self._denoise_alone(chunk)
        if self._is_first(chunk):
            latents = self._denoise_alone(chunk)
            self.context.denoiser.split_lanes(self._num_steps, self._adaptive_sink)
            self._in_flight = self._stand_ins(chunk, latents)
            return latents
        lanes = self.context.denoiser.num_lanes
        if lanes != self._num_steps:
            raise ValueError(
                f"sampler 'stream_batch' has {lanes} lanes, one for each denoising step; "
                f"their number cannot change to {self._num_steps} while a video is made"
            )
        while True:
            self._let_in(chunk)
            oldest = self._tick()
            if oldest.lane == self._num_steps or self.context.observer.interrupted:
                self._in_flight = self._in_flight[1:]
                if oldest.is_real:
                    return oldest.latents

    def _denoise_alone(self, chunk: Chunk) -> torch.Tensor:
        """Step by step in one cache."""
        entry = self._entering(chunk)
        while entry.lane < self._num_steps and not self.context.observer.interrupted:
            entry = self._stepped(entry, self.context.denoiser.predict(entry.latents, self._window(entry)))
        return entry.latents

    def _let_in(self, first: Chunk) -> None:
        """Let the next chunk enter, unless the video has no more; the first one in flight is `first`."""
        following = self._after(self._real_ones[-1].chunk) if self._real_ones else first
        if following is not None and (self._source is None or self._source.waiting):
            self._in_flight = (*self._in_flight, self._entering(following))

    def _stand_ins(self, first: Chunk, latents: torch.Tensor) -> tuple[ChunkInLane, ...]:
        """What lanes run on that no chunk has reached yet: zeros, in the place of the chunk after the first one.

        That chunk overwrites them. Only an adaptive sink looks at them before, so there are none without it.
        """
        following = self._after(first)
        if self._adaptive_sink is None or following is None:
            return ()
        timesteps, zeros = self._timesteps, torch.zeros_like(latents[:, :, : following.num_frames])
        return tuple(
            ChunkInLane(following, zeros, timesteps[lane], lane, is_real=False)
            for lane in reversed(range(1, self._num_steps))
        )

    def _tick(self) -> ChunkInLane:
        """One step for every chunk in flight; returns the oldest."""
        by_lane = self._in_flight[::-1]
        flows = self.context.denoiser.predict_lanes(
            [entry.latents for entry in by_lane], [self._window(entry) for entry in by_lane], by_lane[0].lane
        )
        oldest_first = zip(self._in_flight, reversed(flows), strict=True)
        self._in_flight = tuple(self._stepped(entry, flow) for entry, flow in oldest_first)
        return self._in_flight[0]

    def _entering(self, chunk: Chunk) -> ChunkInLane:
        """A chunk before the first step: noise, or noise and source."""
        context = self.context
        read, timestep = None, self._timesteps[0]
        if self._source is not None:
            read = self._source.take()
            chunk = read.chunk
        latents = context.noise.initial(chunk.start - context.grid.first_generated_frame, chunk.num_frames)
        if read is not None:
            latents = read.noise_rate * latents + (1 - read.noise_rate) * read.latents
            if not self._is_first(chunk):
                timestep = float(int(1000 * read.noise_rate) - 100)  # the original tells less noise than there is
        return ChunkInLane(chunk, latents, timestep)

    def _window(self, entry: ChunkInLane) -> Window:
        return Window(self._positions(entry.chunk), (entry.timestep,))

    def _stepped(self, entry: ChunkInLane, flow: torch.Tensor) -> ChunkInLane:
        """A chunk after its step: noised to that of the next lane, or finished."""
        scheduler = self._scheduler
        latents = scheduler.predict_original_sample(flow, scheduler.sigma_at(entry.timestep), entry.latents)
        following, timestep = entry.lane + 1, 0.0
        if following < self._num_steps:
            timestep = self._timesteps[following]
            latents = scheduler.add_noise(latents, self.context.noise.draw(entry.chunk.num_frames), timestep)
        if entry.is_real:
            latents = self.context.observer.step_done(entry.chunk, entry.timestep, latents)
        return replace(entry, latents=latents, timestep=timestep, lane=following)

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
    def _real_ones(self) -> tuple[ChunkInLane, ...]:
        return tuple(entry for entry in self._in_flight if entry.is_real)

    @property
    def _newest_chunk(self) -> Chunk | None:
        """That was read and is not finished."""
        if self._source is not None and self._source.waiting:
            return self._source.waiting[-1].chunk
        return self._real_ones[-1].chunk if self._real_ones else None

    @property
    def _scheduler(self) -> SelfForcingScheduler:
        return self.context.schedulers[1]

    @property
    def _timesteps(self) -> list[float]:
        return self._scheduler.timesteps.tolist()

    @property
    def _num_steps(self) -> int:
        return len(self._scheduler.timesteps)

    @classmethod
    def num_steps(cls, config: RolloutConfig, listed: int) -> int:
        return listed

    @classmethod
    def num_caches(cls, config: RolloutConfig, steps: int) -> int:
        return 1 if cls.options(config)["sequential"] else steps

    @classmethod
    def chunks_to_settle(cls, config: RolloutConfig, steps: int) -> int:
        return steps

    @classmethod
    def num_forwards(
        cls, config: RolloutConfig, grid: FrameGrid, steps: tuple[int, int], experts: int = 1
    ) -> int | None:
        sizes = [chunk.num_frames for chunk in grid if not chunk.given]
        options = cls.options(config)
        forwards = grid.num_given_chunks + (len(sizes) if options["sequential"] else 1) * steps[1]
        if not options["sequential"]:
            has_stand_ins = options["adaptive_sink"] is not None
            held = sizes.pop(0) + grid.given_frames
            forwards += forwards_in_lanes(sizes, held, steps[1], config.window_frames or math.inf, has_stand_ins)
        return config.num_branches * forwards

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
        source = 0 if self._source is None else self._source.nbytes
        latents = {id(entry.latents): entry.latents for entry in self._in_flight}  # stand-ins may share theirs
        return source + sum(tensor.nbytes for tensor in latents.values())
