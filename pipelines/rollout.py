"""One video in the making: everything that lives as long as it does, and the steps that lengthen it."""

import copy
import dataclasses
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from diffusers.utils import logging

from wan_autoregressive.cache import WanKVCache
from wan_autoregressive.configs.registry import SAMPLERS
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.models.codec import ChunkDecoder
from wan_autoregressive.models.conditions import ConditionMemory
from wan_autoregressive.pipelines.chunk_in_flight import ChunkInFlight
from wan_autoregressive.pipelines.chunk_pixels import ChunkPixels
from wan_autoregressive.pipelines.components import Schedulers, WanComponents
from wan_autoregressive.pipelines.decode_alongside import check_decode_alongside, chunks_decoded_alongside
from wan_autoregressive.pipelines.denoiser import Denoiser
from wan_autoregressive.pipelines.frame_grid import Chunk
from wan_autoregressive.pipelines.image_condition import ImageCondition
from wan_autoregressive.pipelines.input_checks import check_experts, check_extensions
from wan_autoregressive.pipelines.latent_history import LatentHistory
from wan_autoregressive.pipelines.noise import NoiseSource
from wan_autoregressive.pipelines.outputs import WanVideoChunk
from wan_autoregressive.pipelines.prompts import Prompt, PromptState
from wan_autoregressive.pipelines.rollout_guard import RolloutGuard
from wan_autoregressive.pipelines.rollout_state import read_rollout_state, write_rollout_state
from wan_autoregressive.pipelines.samplers import Sampler, SamplingContext
from wan_autoregressive.pipelines.source_video import SourceEndedError, SourceVideo
from wan_autoregressive.pipelines.switching import SWITCH_SETTINGS, Past, PromptSwitching
from wan_autoregressive.pipelines.timings import StageTimings
from wan_autoregressive.schedulers.self_forcing_scheduler import Generators

logger = logging.get_logger(__name__)

TRAINED_FRAMES = 21

StepCallback = Callable[["WanRollout", Chunk, int, float, torch.Tensor], torch.Tensor]


class WanRollout:
    """A video that grows by one chunk per `step()`. Made by [`WanAutoregressivePipeline.rollout`].

    It owns the parts of one video: the denoiser with the KV caches, the sampler, prompts to come, noise, the last
    clean latents and the state of the VAE decoder; the models are only used. Rollouts on the same models therefore
    never disturb each other, however they are interleaved.

    Args:
        given_latents: `(batch, channels, frames, height, width)` that come first in the video.
        latents: Initial noise of the chunks to generate, instead of drawing it.
        schedulers: Of the first generated chunk and of later ones, instead of those that component and settings give.
        seconds_before: What was spent on this video before, by stage.
        image: What the transformer is conditioned on beside the prompt.
    """

    def __init__(
        self,
        components: WanComponents,
        config: RolloutConfig,
        prompt: PromptState,
        negative_prompt_embeds: torch.Tensor | None = None,
        prompt_schedule: dict[int, PromptState] | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        given_latents: torch.Tensor | None = None,
        source: SourceVideo | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        on_step_end: StepCallback | None = None,
        seconds_before: dict[str, float] | None = None,
        schedulers: Schedulers | None = None,
        image: ImageCondition | None = None,
    ) -> None:
        self.components = components
        self.given_latents = given_latents
        self.source = source
        self.batch_size = prompt.embeds.shape[0]
        self.device = components.device
        self.grid = components.frame_grid(config, 0 if given_latents is None else given_latents.shape[2])
        self.on_progress: Callable[[], Any] | None = None
        """Called after every denoising step."""
        self.on_preview: Callable[[WanVideoChunk], Any] | None = None
        """Called with a chunk whose `preview` is there and whose `frames` are still to be decoded."""
        self._on_step_end = on_step_end
        self._seconds_before = dict(seconds_before or {})
        self._guard = RolloutGuard()
        self._seconds_lock = threading.Lock()

        geometry = components.geometry
        size = geometry.latent_size(config.height, config.width)
        shape = (self.batch_size, geometry.latent_channels, *size)
        self.denoiser = Denoiser(
            components, config, self.grid.total_frames, prompt, negative_prompt_embeds, attention_kwargs, image
        )
        self.history = LatentHistory(config.window_frames)
        self.noise = NoiseSource(shape, self.device, generator, latents)
        self.switching = PromptSwitching(config, prompt_schedule or {})
        self._context = SamplingContext(
            config=config,
            grid=self.grid,
            denoiser=self.denoiser,
            schedulers=schedulers or components.schedulers(config),
            noise=self.noise,
            history=self.history,
            observer=weakref.proxy(self),  # a circle would keep a GPU's memory until Python collects garbage
            encode=components.encode_pixels,
            given_latents=given_latents,
            source=source,
        )
        self.sampler: Sampler = SAMPLERS.load(config.sampler)(self._context, **config.sampler_options)
        needs_decoder = config.output_type != "latent" or self.sampler.needs_pixels(config)
        self.pixels = ChunkPixels(components, config, needs_decoder)
        self.chunks_done = 0
        self.frames_done = 0
        """Latent frames that the video has."""
        self.steps_done = 0
        """Denoising steps over all chunks."""
        self.interrupted = False
        self._steps_finite: list[torch.Tensor] = []

    # What a caller does with it.

    def step(self, prompt: Prompt | None = None) -> WanVideoChunk:
        """Make the next chunk.

        Args:
            prompt: A new prompt (or embeddings) from this chunk on.

        Raises:
            RuntimeError: the video is complete, a step failed before, another thread uses the rollout, or an iterator
                that decodes alongside is open.
        """
        with self.stepping(prompt):
            in_flight = self.begin_chunk()
            self.make_latents(in_flight)
            return self.decode_chunk(in_flight)

    def __iter__(self) -> Iterator[WanVideoChunk]:
        return self.chunks()

    def chunks(
        self, decode_alongside: bool = False, stop: Callable[[], bool] | None = None
    ) -> Iterator[WanVideoChunk]:
        """The chunks to come, each handed out as soon as it is decoded.

        Args:
            decode_alongside: Denoise the next chunk in a second thread while the caller's thread decodes this one and
                while the caller has it: the same bits, with the memory of both at once. The rollout is then up to one
                chunk ahead of what was handed out: a prompt set after chunk k shows from chunk k + 2 on, `interrupt`
                lets one more chunk come, and `on_step_end`, `on_progress` and a source are called in the other thread.
                `step`, `save`, `fork` and `reset` are refused until the iterator has ended or was closed. One that is
                closed before its end stops after the denoising step under way and leaves the video half-written;
                `stop` ends it whole. Without pixels to decode (`output_type="latent"`) there is no second thread.
            stop: Asked before every chunk but the first is begun. Once it is true, what is under way is still handed
                out, and the rollout is as after as many `step()`: it can go on and be saved.

        Raises:
            ValueError: `decode_alongside` with models that are offloaded, which cannot run at the same time, or with a
                sampler that needs the pixels.
            RuntimeError: when the first chunk is asked for, as `step`.
        """
        stop = stop or (lambda: False)
        if decode_alongside and self.vae_decoder is not None:
            check_decode_alongside(self.components)
            if self.sampler.needs_pixels(self.config):
                raise ValueError(
                    f"sampler {self.config.sampler!r} begins a chunk from the pixels of the one before, which cannot "
                    "be decoded alongside; leave out decode_alongside"
                )
            return chunks_decoded_alongside(self, stop)
        return self._chunks_one_by_one(stop)

    def _chunks_one_by_one(self, stop: Callable[[], bool]) -> Iterator[WanVideoChunk]:
        while not self.done:
            try:
                chunk = self.step()
            except SourceEndedError:
                return
            yield chunk
            if stop():
                return

    def set_prompt(self, prompt: Prompt) -> None:
        """Use another prompt (or embeddings) from the next chunk on that is not begun yet. Safe from any thread."""
        started = time.perf_counter()
        self.switching.set_next(
            self.components.encode_prompt(prompt, self.batch_size, self.config.max_sequence_length)
        )
        with self._seconds_lock:
            spent = self._seconds_before.get("text", 0.0) + time.perf_counter() - started
            self._seconds_before["text"] = spent

    def change(self, **settings: Any) -> None:
        """Use other settings from the next chunk on, see `configs.rollout_config.CHANGEABLE`.

        Raises:
            ValueError: a setting that a video cannot change, or a value that cannot work.
            RuntimeError: during a step.
        """
        with self._guard.held("change"):
            config = self.config.changed(**settings)
            check_extensions(config)
            check_experts(self.components, config)
            self._context.schedulers = self.components.schedulers(config, dict(self.schedulers[1].config))
            self._context.config = config
            self.denoiser.guidance_scale = config.guidance_scale
            if not settings.keys().isdisjoint(SWITCH_SETTINGS):
                self.switching.use_policy_of(config)

    def replace_embeds(self, embeds: torch.Tensor, negative_embeds: torch.Tensor | None) -> None:
        """Use other embeddings of the same prompt from the next forward on, without touching the cache."""
        if embeds is not self.prompt.embeds:
            self.denoiser.set_prompt(PromptState(embeds, self.prompt.text))
        self.denoiser.negative_prompt_embeds = negative_embeds

    def reset(self) -> None:
        """Forget the video and start a new one with the current prompt; generators go on where they are.

        Raises:
            RuntimeError: during a step, or the video is made from a source, which cannot be read again.
        """
        if self.source is not None:
            raise RuntimeError("this rollout reads a source video and cannot start again; make a new rollout")
        with self._guard.held("reset"):
            self.denoiser.reset()
            self.history.clear()
            self.sampler.reset()
            self.switching.reset()
            self.pixels.reset()
            self.chunks_done = self.frames_done = self.steps_done = 0
            self.interrupted = False
            self._guard.mend()

    def interrupt(self) -> None:
        """Stop after the current denoising step. The chunk in the making is handed out as it is then."""
        self.interrupted = True

    def save(self, folder: str | os.PathLike[str], notes: dict[str, Any] | None = None) -> None:
        """Save everything the video needs to go on, so that [`WanAutoregressivePipeline.resume`] gives the same bits.

        Holds no weights: a state fits only the models it was made with. What was in `folder` before is replaced in one
        step once the new state is whole. `on_step_end` and `on_progress` are not saved.

        Args:
            notes: JSON values of the caller's, kept with the state as one unit.

        Raises:
            RuntimeError: during a step, or after one that failed.
            ValueError: `attention_kwargs` holds something that cannot be saved.
            OSError: it could not be written; an older state in `folder` is still whole.
        """
        with self._between_steps("save"):
            write_rollout_state(folder, self.components, self.vae_decoder is not None, self.state_dict(), notes)

    @classmethod
    def load(
        cls,
        components: WanComponents,
        folder: str | os.PathLike[str],
        generator_device: torch.device | str | None = None,
        on_step_end: StepCallback | None = None,
    ) -> "WanRollout":
        """Go on with a video that `save` wrote; see [`WanAutoregressivePipeline.resume`]."""
        config, state = read_rollout_state(folder, components)
        try:
            return cls.from_state(components, config, state, generator_device, on_step_end=on_step_end)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the state in '{folder}' is not a whole rollout of this version: {type(error).__name__} {error}"
            ) from error

    @classmethod
    def from_state(
        cls,
        components: WanComponents,
        config: RolloutConfig,
        state: dict[str, Any],
        generator_device: torch.device | str | None = None,
        **parts: Any,
    ) -> Self:
        """Go on from what `state_dict` gave, its tensors where the transformer runs; `parts` are not in it."""
        rollout = cls(
            components,
            config,
            prompt=state["denoiser"]["prompt"],
            negative_prompt_embeds=state["denoiser"]["negative_prompt_embeds"],
            given_latents=state["given_latents"],
            # Its own, not the pipeline's present one: step lists and shift belong to the video.
            schedulers=components.schedulers(config, state["scheduler"]),
            image=None if (image := state["denoiser"].get("image")) is None else ImageCondition(**image),
            **parts,
        )
        rollout.load_state_dict(state, generator_device)
        return rollout

    def fork(self) -> Self:
        """A copy that goes on from here on its own: both make the chunks that one alone would have made.

        Keys and values are copied, prompts and models shared; `on_step_end` is called by both. Without generators
        both draw from torch's global state. Raises `RuntimeError` during a step, or after one that failed.
        """
        with self._between_steps("fork"):
            twin = copy.copy(self)
            twin.denoiser, twin.history = self.denoiser.fork(), self.history.fork()
            twin.noise, twin.switching = self.noise.fork(), self.switching.fork()
            twin._context = dataclasses.replace(
                self._context,
                denoiser=twin.denoiser,
                history=twin.history,
                noise=twin.noise,
                observer=weakref.proxy(twin),
            )
            twin.sampler = self.sampler.fork(twin._context)
            twin.pixels = self.pixels.fork()
            twin._seconds_before = dict(self._seconds_before)
            twin._guard, twin._seconds_lock, twin.on_progress = RolloutGuard(), threading.Lock(), None
            twin.on_preview = None
            return twin

    # What a caller looks at.

    @property
    def config(self) -> RolloutConfig:
        """The settings as they are now."""
        return self._context.config

    @property
    def schedulers(self) -> Schedulers:
        """Of the first generated chunk, and of all later ones."""
        return self._context.schedulers

    @property
    def done(self) -> bool:
        """Whether the video has all its frames, or was interrupted."""
        return self.interrupted or self.frames_done == self.grid.total_frames

    @property
    def prompt(self) -> PromptState:
        """The one that forwards see now."""
        return self.denoiser.prompt

    @property
    def negative_prompt_embeds(self) -> torch.Tensor | None:
        """`(batch, text_tokens, text_dim)` of the negative prompt, with guidance."""
        return self.denoiser.negative_prompt_embeds

    @property
    def cache(self) -> WanKVCache:
        """The prompt's keys and values, of two transformers the first one's."""
        return self.denoiser.experts[0].caches[0]

    @property
    def vae_decoder(self) -> ChunkDecoder | None:
        """Of the VAE, with its state; None where nobody wants its pixels."""
        return self.pixels.vae_decoder

    @property
    def conditions(self) -> ConditionMemory:
        """What the transformer has computed of prompts and timesteps; `forget()` it after a change of weights."""
        return self.denoiser.experts[0].conditions

    @property
    def num_generated_chunks(self) -> int:
        """Chunks to generate, given ones not counted. Only for a video with an end."""
        return self.grid.num_generated_chunks

    @property
    def num_steps(self) -> int:
        """Denoising steps over all chunks. Only for a video with an end."""
        first, later = (self.sampler.num_steps(self.config, len(own.timesteps)) for own in self.schedulers)
        return first + (self.num_generated_chunks - 1) * later

    @property
    def nbytes(self) -> int:
        """Bytes held between steps: keys and values, prompts', inputs of forwards, latents, the VAE's state."""
        parts = self.denoiser.kv_cache_bytes, self.denoiser.text_kv_bytes, self.denoiser.input_bytes
        return sum(parts) + self.history.nbytes + self.sampler.nbytes + self.pixels.nbytes

    # One chunk.

    @contextmanager
    def stepping(self, prompt: Prompt | None = None) -> Iterator[None]:
        """Hold the rollout while chunks are made; an exception leaves it failed. Raises `RuntimeError` as `step`."""
        with self._guard.held("step"):
            self._guard.check_whole("step")
            if self.done:
                raise RuntimeError(f"the video is complete with {self.frames_done} latent frames; reset() starts anew")
            if prompt is not None:
                self.set_prompt(prompt)
            with self._guard.writing(harmless=SourceEndedError):
                try:
                    yield
                except SourceEndedError:
                    self.interrupted = True
                    raise

    @contextmanager
    def _between_steps(self, verb: str) -> Iterator[None]:
        """Hold the rollout. Raises `RuntimeError` where there is nothing whole to take."""
        if self.source is not None:
            raise RuntimeError(f"cannot {verb} this rollout: its source video is a stream and cannot be read twice")
        with self._guard.held(verb):
            self._guard.check_whole(verb)
            yield

    def begin_chunk(self) -> ChunkInFlight:
        """Take over what the caller has set for the next chunk. No model runs."""
        timings = StageTimings(self.device)
        with self._seconds_lock:
            while self._seconds_before:
                timings.add_seconds(*self._seconds_before.popitem())
        return ChunkInFlight(timings, self.switching.take_next())

    @torch.no_grad()
    def make_latents(self, in_flight: ChunkInFlight) -> None:
        """Denoise the next chunk (or write a given one). Leaves alone what `decode_chunk` uses."""
        timings = in_flight.timings
        self._steps_finite = in_flight.steps_finite
        self.denoiser.notice_adapters()
        chunk = self.grid.chunk(self.chunks_done, self.frames_done)
        if self.source is not None:
            with timings.stage("encode"):
                chunk = self.sampler.prepare(chunk)
        self._warn_of_length(chunk)

        # 1. Bring the past up to date: the last chunk's clean keys and values, or all of them for a new prompt
        with timings.stage("clean_pass"):
            past = Past(self.config, self.denoiser, self.history, self.sampler.recache_window, self.frames_done)
            self.switching.enter(chunk, in_flight.next_prompt, self.sampler, past)

        # 2. Latents of this chunk
        if chunk.given:
            with timings.stage("encode"):
                assert self.given_latents is not None
                latents = self.given_latents[:, :, chunk.start : chunk.stop]
                self.sampler.cache_given(chunk, latents)
        else:
            with timings.stage("denoise"):
                latents = self.sampler.next_chunk(chunk)
        self.history.append(latents)
        self.chunks_done, self.frames_done = chunk.index + 1, chunk.stop
        in_flight.chunk, in_flight.latents, in_flight.prompt_text = chunk, latents, self.prompt.text

    def decode_chunk(self, in_flight: ChunkInFlight) -> WanVideoChunk:
        """Make the pixels of a chunk whose latents are made. Leaves alone what `make_latents` uses."""
        return self.pixels.decode(in_flight, self.config, self.sampler, self.on_preview)

    def step_done(self, chunk: Chunk, timestep: float, latents: torch.Tensor) -> torch.Tensor:
        """The sampler has made a denoising step on the latents of a chunk; returns those to go on with."""
        if self._on_step_end is not None:
            latents = self._on_step_end(self, chunk, self.steps_done, timestep, latents)
        self.steps_done += 1
        self._steps_finite.append(latents.isfinite().all())
        if self.on_progress is not None:
            self.on_progress()
        return latents

    def _warn_of_length(self, chunk: Chunk) -> None:
        if self.config.window_frames is None and chunk.start <= TRAINED_FRAMES < chunk.stop:
            logger.warning(
                f"the video passes {TRAINED_FRAMES} latent frames, the length that Self-Forcing models are trained "
                "on, with all of it in view; set window_frames (and sink_frames) for longer videos"
            )

    # State.

    def state_dict(self) -> dict[str, Any]:
        """All that is saved: settings, counters and the state of every part, as plain values and tensors."""
        scheduler = self.schedulers[1].config
        return {
            "config": dataclasses.asdict(self.config),
            "scheduler": {name: value for name, value in scheduler.items() if not name.startswith("_")},
            "counters": {name: getattr(self, name) for name in _COUNTERS},
            "seconds_before": dict(self._seconds_before),
            "given_latents": self.given_latents,
            "denoiser": self.denoiser.state_dict(),
            "sampler": self.sampler.state_dict(),
            "switching": self.switching.state_dict(),
            "noise": self.noise.state_dict(),
            "history": self.history.state_dict(),
            **self.pixels.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], generator_device: torch.device | str | None = None) -> None:
        """Take over what `state_dict` of a rollout with the same settings and models gave."""
        counters, self._seconds_before = state["counters"], dict(state["seconds_before"])
        self.chunks_done, self.frames_done = counters["chunks_done"], counters["frames_done"]
        self.steps_done, self.interrupted = counters["steps_done"], counters["interrupted"]
        self.denoiser.load_state_dict(state["denoiser"], self.device)
        self.sampler.load_state_dict(state["sampler"])
        self.switching.load_state_dict(state["switching"])
        self.noise.load_state_dict(state["noise"], generator_device)
        self.history.load_state_dict(state["history"])
        self.pixels.load_state_dict(state)


_COUNTERS = ("chunks_done", "frames_done", "steps_done", "interrupted")
