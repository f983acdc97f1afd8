"""The forwards of the rolling sampler as one packed forward, for training.

A tick of `sampler="rolling"` denoises several chunks together, each at its own noise level. They see the sink, moved
to directly before the newest finished frames, and some of those; the finished frames' keys and values come from
context passes, which see a longer past and no sink. Side by side in one packed forward (`packed`) all of this is a
matter of positions and of who sees whom.
"""

import dataclasses
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from examples.train_demo.latent_pool import CHUNK_FRAMES
from examples.train_demo.packed import PackedLayout, make_layout, packed_flow
from examples.train_demo.sampling import DENOISING_STEPS

STEPS = len(DENOISING_STEPS)


@dataclasses.dataclass(frozen=True)
class Sight:
    """What forwards of the rolling sampler see, in latent frames; as published, scaled to the demo's four steps.

    Rolling Forcing has five steps, chunks of 3 frames, a sink of a chunk and room for one finished chunk beside it:
    `attended_frames` is 5 x 3 + 3 + 3 there, 4 x 3 + 3 + 3 here.
    """

    attended_frames: int = (STEPS + 2) * CHUNK_FRAMES
    sink_frames: int = CHUNK_FRAMES

    @property
    def sampler_settings(self) -> dict[str, Any]:
        """The pipeline's arguments for it."""
        return {
            "sampler": "rolling",
            "position_mode": "sink_relative",
            "window_frames": self.attended_frames + self.sink_frames,
            "sink_frames": self.sink_frames,
            "sampler_options": {"attended_frames": self.attended_frames},
        }


@dataclasses.dataclass(frozen=True)
class Tick:
    """Which chunks of a video one joint forward denoises."""

    chunks: range
    """Oldest first."""
    first_step: int
    """The step that the oldest takes; each newer one is a step behind the one before."""

    @property
    def start(self) -> int:
        """First latent frame in flight; that many are finished."""
        return CHUNK_FRAMES * self.chunks.start

    @property
    def frames(self) -> slice:
        """Latent frames in flight."""
        return slice(self.start, CHUNK_FRAMES * self.chunks.stop)

    @property
    def steps(self) -> range:
        """The step of each chunk."""
        return range(self.first_step, self.first_step - len(self.chunks), -1)

    @property
    def sigmas(self) -> torch.Tensor:
        """Noise level of each chunk, `(chunks,)`."""
        return torch.tensor([DENOISING_STEPS[step] / 1000 for step in self.steps])


def video_ticks(chunks: int) -> list[Tick]:
    """All ticks of a video of `chunks` chunks, which enter one by one and leave after `STEPS` ticks."""
    ticks = []
    for tick in range(chunks + STEPS - 1):
        oldest, newest = max(0, tick - STEPS + 1), min(chunks - 1, tick)
        ticks.append(Tick(range(oldest, newest + 1), tick - oldest))
    return ticks


class JointForward:
    """The joint forward of a tick, with the context passes that made its past.

    Args:
        model: whose weights are used, as they are at the time of a call.
        past_chunks: how many of the newest finished chunks are there, beside the sink. With all of them, the default,
            the forward is the sampler's; with a few, context passes see a shorter past, and it costs less.
    """

    def __init__(self, model: WanTransformer3DModel, sight: Sight, past_chunks: int | None = None) -> None:
        self.model, self.sight, self.past_chunks = model, sight, past_chunks
        self._layouts: dict[Tick, PackedLayout] = {}

    def flow(self, tick: Tick, past: torch.Tensor, noisy: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Flow of the chunks in flight, shaped as `noisy`.

        Args:
            past: finished latents (B, 16, F, 8, 8) from frame 0 on, all that there are.
            noisy: latents in flight (B, 16, frames of the tick, 8, 8).
            text: embeddings (B, tokens, dim).
        """
        first = 0 if self.past_chunks is None else max(0, tick.start - CHUNK_FRAMES * self.past_chunks)
        if tick not in self._layouts:
            frames, visible = tick_visibility(tick, self.sight, first)
            self._layouts[tick] = make_layout(self.model, frames, visible, *noisy.shape[3:])
        layout, sink, past = self._layouts[tick], past[:, :, : self.sight.sink_frames], past[:, :, first:]
        own = tick.sigmas.repeat_interleave(CHUNK_FRAMES)
        timesteps = 1000 * torch.cat([torch.zeros(sink.shape[2] + past.shape[2]), own])
        packed = torch.cat([sink, past, noisy], dim=2)
        timesteps = timesteps.expand(len(packed), -1)
        flow = packed_flow(self.model, packed, timesteps, text, layout.cos, layout.sin, layout.bias)
        return flow[:, :, -noisy.shape[2] :]


def tick_visibility(tick: Tick, sight: Sight, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (N,) and visibility (N, N) of the moved sink, the finished frames from `first` on and those in flight.

    The sink is there twice: as finished frames that context passes see, and once more where the joint forward sees it.
    That one has the keys and values of the first, as it sees nothing else and only distances matter to it.
    """
    start, own = tick.start, CHUNK_FRAMES * len(tick.chunks)
    sink = min(sight.sink_frames, start)
    newest = max(0, min(sight.attended_frames - sight.sink_frames - own, start - sink))
    finished, in_flight = torch.arange(first, start), torch.arange(start, start + own)
    frames = torch.cat([torch.arange(sink) + start - newest - sink, finished, in_flight])
    is_sink = torch.arange(len(frames)) < sink
    is_own = torch.arange(len(frames)) >= len(frames) - own
    chunk = torch.cat([torch.arange(sink), finished, in_flight]) // CHUNK_FRAMES
    distance = chunk[:, None] - chunk[None]
    same_kind = (is_sink[:, None] == is_sink[None]) & (is_own[:, None] == is_own[None])
    in_context = same_kind & (distance >= 0) & (distance < sight.attended_frames // CHUNK_FRAMES)
    in_joint = is_sink | is_own | (frames >= start - newest)
    visible = torch.where(is_own[:, None], in_joint[None], in_context)
    return frames, visible
