"""One video in the making: everything that lives as long as it does, and the steps that lengthen it."""

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging
from diffusers.utils.torch_utils import get_module_execution_device

from wan_autoregressive.cache import WanKVCache
from wan_autoregressive.cache.fixed_memory import FixedMemory
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.models.conditions import ConditionMemory
from wan_autoregressive.models.streaming_vae import StreamingVaeDecoder, denormalize_latents
from wan_autoregressive.pipelines.decode_alongside import check_decode_alongside, chunks_decoded_alongside
from wan_autoregressive.pipelines.finite_check import check_finite
from wan_autoregressive.pipelines.frame_grid import FrameBlock, pixel_frames_of
from wan_autoregressive.pipelines.latent_history import LatentHistory
from wan_autoregressive.pipelines.outputs import WanVideoChunk
from wan_autoregressive.pipelines.prompt_switch import advance_blend, switch_prompt
from wan_autoregressive.pipelines.prompts import Prompt, PromptState
from wan_autoregressive.pipelines.rollout_state import fork_rollout, save_rollout
from wan_autoregressive.pipelines.source_video import SourceEndedError, SourceVideo
from wan_autoregressive.pipelines.timings import StageTimings
from wan_autoregressive.schedulers import SelfForcingScheduler
from wan_autoregressive.schedulers.self_forcing_scheduler import Generators, draw_noise

if TYPE_CHECKING:
    from wan_autoregressive.pipelines.pipeline_wan_autoregressive import WanAutoregressivePipeline

logger = logging.get_logger(__name__)

TRAINED_FRAMES = 21

StepCallback = Callable[["WanRollout", FrameBlock, int, float, torch.Tensor], torch.Tensor]


@dataclasses.dataclass
class ChunkDraft:
    """A chunk on its way: what the caller has set for it, then its latents, which pixels are still to be made of."""

    timings: StageTimings
    next_prompt: PromptState | None
    block: FrameBlock = dataclasses.field(init=False)
    latents: torch.Tensor = dataclasses.field(init=False)
    prompt_text: list[str] | None = dataclasses.field(init=False)
    steps_finite: list[torch.Tensor] = dataclasses.field(default_factory=list)
    """For each denoising step whether its latents are finite, as the device says once it gets there."""


class WanRollout:
    """A video that grows by one chunk per `step()`. Made by [`WanAutoregressivePipeline.rollout`].

    It owns the KV caches, the state of the VAE decoder, the generators, the prompt and the last clean latents; the
    pipeline's components are only used. Rollouts on one pipeline therefore never disturb each other, however they are
    interleaved.

    The pass that writes a chunk's clean keys and values runs at the start of the next step: a chunk is handed out
    without waiting for it, and the last chunk never pays for it.
    """

    chunks_done: int
    frames_done: int
    """Latent frames that the video has."""
    steps_done: int
    """Denoising steps over all chunks."""
    interrupted: bool
    blend: dict[str, Any] | None
    """A prompt change under way: `old` and `new` prompt and `chunks_done`."""
    _position_shift: int
    _newest_block_frames: int
    _clean_pass_due: bool
    _failed: bool

    def __init__(
        self,
        pipe: "WanAutoregressivePipeline",
        config: RolloutConfig,
        schedulers: tuple[SelfForcingScheduler, SelfForcingScheduler],
        prompt: PromptState,
        negative_prompt_embeds: torch.Tensor | None = None,
        prompt_schedule: dict[int, PromptState] | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        video_latents: torch.Tensor | None = None,
        source: SourceVideo | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        on_step_end: StepCallback | None = None,
        seconds_before: dict[str, float] | None = None,
    ) -> None:
        self.pipe = pipe
        self.config = config
        self.prompt = prompt
        self.negative_prompt_embeds = negative_prompt_embeds
        self.generator = generator
        self._prompt_schedule = dict(sorted((prompt_schedule or {}).items()))
        self._next_prompt: PromptState | None = None
        self._initial_noise = latents
        self.given_latents = video_latents
        self.source = source
        self._attention_kwargs = attention_kwargs or {}
        self._on_step_end = on_step_end
        self._seconds_before = dict(seconds_before or {})
        self.on_progress: Callable[[], Any] | None = None
        """Called after every denoising step."""

        self.batch_size = prompt.embeds.shape[0]
        self.device = pipe._execution_device
        self.grid = pipe.frame_grid(config, 0 if video_latents is None else video_latents.shape[2])
        self.latent_height, self.latent_width = pipe.latent_size(config.height, config.width)
        self.first_scheduler, self.scheduler = schedulers
        self.tokens_per_frame = pipe.tokens_per_frame(config)

        self.cache = self._new_cache()
        self.negative_cache = self._new_cache() if config.do_classifier_free_guidance else None
        self.conditions = ConditionMemory(num_prompts=len(self.branches()))
        self._inputs = FixedMemory()
        self.history = LatentHistory(config.window_frames)
        self.vae_decoder = None if config.output_type == "latent" else self._new_vae_decoder()
        self._lock = threading.Lock()
        self._restart()

    # What a caller does with it.

    def step(self, prompt: Prompt | None = None) -> WanVideoChunk:
        """Make the next chunk.

        Args:
            prompt (`str`, `list[str]` or `torch.Tensor`, *optional*): A new prompt (or embeddings) from this chunk on.

        Raises:
            RuntimeError: the video is complete, a step failed before, another thread is in a step, or an iterator
                that decodes alongside is open.
        """
        with self.stepping(prompt):
            draft = self.begin_chunk()
            self.make_latents(draft)
            return self.decode_chunk(draft)

    def __iter__(self) -> Iterator[WanVideoChunk]:
        return self.chunks()

    def chunks(
        self, decode_alongside: bool = False, stop: Callable[[], bool] | None = None
    ) -> Iterator[WanVideoChunk]:
        """The chunks to come, each handed out as soon as it is decoded.

        Args:
            decode_alongside (`bool`, defaults to `False`): Denoise the next chunk in a second thread while the
                caller's thread decodes this one and while the caller has it: the same bits, with the memory of both at
                once. The rollout is then up to one chunk ahead of what was handed out: a prompt set after chunk k
                shows from chunk k + 2 on, `interrupt` lets one more chunk come, and `on_step_end`, `on_progress` and a
                source are called in the other thread. `step`, `save`, `fork` and `reset` are refused until the
                iterator has ended or was closed. One that is closed before its end stops after the denoising step
                under way and leaves the video half-written; `stop` ends it whole. Without pixels to decode
                (`output_type="latent"`) there is no second thread.
            stop (`Callable`, *optional*): Asked before every chunk but the first is begun. Once it is true, what is
                under way is still handed out, and the rollout is as after as many `step()`: it can go on and be saved.

        Raises:
            ValueError: `decode_alongside` with models that are offloaded, which cannot run at the same time.
            RuntimeError: when the first chunk is asked for, as `step`.
        """
        stop = stop or (lambda: False)
        if decode_alongside and self.vae_decoder is not None:
            check_decode_alongside(self.pipe)
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
        """Use another prompt (or embeddings) from the next chunk on that is not begun yet."""
        started = time.perf_counter()
        self._next_prompt = self.pipe.encode_for_rollout(prompt, self.batch_size, self.config.max_sequence_length)
        self._seconds_before["text"] = self._seconds_before.get("text", 0.0) + time.perf_counter() - started

    def replace_embeds(self, embeds: torch.Tensor, negative_embeds: torch.Tensor | None) -> None:
        """Use other embeddings of the same prompt from the next forward on, without touching the cache."""
        if embeds is not self.prompt.embeds:
            self.prompt = PromptState(embeds, self.prompt.text)
        self.negative_prompt_embeds = negative_embeds

    def reset(self) -> None:
        """Forget the video and start a new one with the current prompt; generators go on where they are.

        Raises:
            RuntimeError: during a step, or the video is made from a source, which cannot be read again.
        """
        if self.source is not None:
            raise RuntimeError("this rollout reads a source video and cannot start again; make a new rollout")
        with self.held_still("reset"):
            self.cache.reset()
            if self.negative_cache is not None:
                self.negative_cache.reset()
            self.history.clear()
            self.conditions.forget()
            if self.vae_decoder is not None:
                self.vae_decoder.reset()
            self._prompt_schedule.clear()
            self._restart()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save everything the video needs to go on, so that [`WanAutoregressivePipeline.resume`] gives the same bits.

        Holds no weights: a state fits only the models it was made with. What was in `folder` before is replaced in one
        step once the new state is whole. `on_step_end` and `on_progress` are not saved.

        Raises:
            RuntimeError: during a step, or after one that failed.
            ValueError: `attention_kwargs` holds something that cannot be saved.
            OSError: it could not be written; an older state in `folder` is still whole.
        """
        save_rollout(self, folder)

    def fork(self) -> "WanRollout":
        """A copy that goes on from here on its own: both make the chunks that one alone would have made.

        Keys and values are copied, prompts and models shared; `on_step_end` is called by both. Without generators
        both draw from torch's global state. Raises `RuntimeError` during a step, or after one that failed.
        """
        return fork_rollout(self)

    def interrupt(self) -> None:
        """Stop after the current denoising step. The chunk in the making is handed out as it is then."""
        self.interrupted = True

    @property
    def done(self) -> bool:
        """Whether the video has all its frames, or was interrupted."""
        return self.interrupted or self.frames_done == self.grid.total_frames

    @property
    def num_generated_chunks(self) -> int:
        """Chunks to generate, given ones not counted. Only for a video with an end."""
        return sum(not block.given for block in self.grid)

    @property
    def num_steps(self) -> int:
        """Denoising steps over all chunks. Only for a video with an end."""
        first, later = (
            self.config.num_source_steps(len(scheduler.timesteps))
            for scheduler in (self.first_scheduler, self.scheduler)
        )
        return first + (self.num_generated_chunks - 1) * later

    @property
    def input_bytes(self) -> int:
        """Bytes of what forwards read beside weights, keys and values: latents, time, rotary tables, slot numbers."""
        slots = sum(cache.slots.nbytes for cache, _ in self.branches())
        return self._inputs.nbytes + self.conditions.nbytes + slots

    # One chunk.

    @contextmanager
    def held_still(self, verb: str) -> Iterator[None]:
        """Keep others from changing the rollout. Raises `RuntimeError` while something else does."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                f"cannot {verb} this rollout during a step; do it between two steps (another thread may be in step(), "
                "or an iterator that decodes alongside may still be open)"
            )
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def stepping(self, prompt: Prompt | None = None) -> Iterator[None]:
        """Hold the rollout while chunks are made; an exception leaves it failed. Raises `RuntimeError` as `step`."""
        with self.held_still("step"):
            if self._failed:
                raise RuntimeError(
                    "a step of this rollout failed, or an iterator that ran ahead was closed, and left it "
                    "half-written; reset() starts anew"
                )
            if self.done:
                raise RuntimeError(f"the video is complete with {self.frames_done} latent frames; reset() starts anew")
            if prompt is not None:
                self.set_prompt(prompt)
            self._failed = True
            try:
                yield
            except SourceEndedError:
                self.interrupted, self._failed = True, False
                raise
            self._failed = False

    def begin_chunk(self) -> ChunkDraft:
        """Take over what the caller has set for the next chunk. No model runs."""
        timings = StageTimings(self.device)
        while self._seconds_before:
            timings.add_seconds(*self._seconds_before.popitem())
        draft = ChunkDraft(timings, self._next_prompt)
        self._next_prompt = None
        return draft

    @torch.no_grad()
    def make_latents(self, draft: ChunkDraft) -> None:
        """Denoise the next chunk (or write a given one). Leaves alone what `decode_chunk` uses."""
        block, timings = self.grid.block(self.chunks_done, self.frames_done), draft.timings
        self.conditions.notice_adapters(self.pipe.transformer)
        source_latents = None
        if self.source is not None:
            with timings.stage("encode"):
                source_latents = self.source.next_latents(block.num_frames)
            block = dataclasses.replace(block, stop=block.start + source_latents.shape[2])

        # 1. Bring the past up to date: the last chunk's clean keys and values, or all of them for a new prompt
        with timings.stage("clean_pass"):
            self._enter_block(block, draft.next_prompt)

        # 2. Latents of this chunk
        if block.given:
            with timings.stage("encode"):
                latents = self._write_given(block)
        else:
            with timings.stage("denoise"):
                latents = self._denoise(block, draft.steps_finite, source_latents)
        self._clean_pass_due = self.config.clean_pass and not block.given
        self.history.append(latents)
        self.chunks_done, self.frames_done = block.index + 1, block.stop
        draft.block, draft.latents, draft.prompt_text = block, latents, self.prompt.text

    @torch.no_grad()
    def decode_chunk(self, draft: ChunkDraft) -> WanVideoChunk:
        """Make the pixels of a chunk whose latents are made. Leaves alone what `make_latents` uses."""
        block, frames = draft.block, None
        if self.vae_decoder is not None:
            device = get_module_execution_device(self.pipe.vae)
            with draft.timings.stage("decode", device):
                frames = self._decode(draft.latents.to(device), block)
        check_finite(draft.steps_finite, block)  # last: it waits for the device, as pixels on their way to the CPU do
        return WanVideoChunk(
            frames=frames,
            latents=draft.latents,
            index=block.index,
            start_frame=block.start,
            start_pixel_frame=self._pixel_frames(block.start),
            given=block.given,
            prompt=draft.prompt_text,
            timings=draft.timings,
        )

    def _enter_block(self, block: FrameBlock, next_prompt: PromptState | None) -> None:
        """Take over a prompt that is due and bring the caches up to date."""
        if self.config.window_frames is None and block.start <= TRAINED_FRAMES < block.stop:
            logger.warning(
                f"the video passes {TRAINED_FRAMES} latent frames, the length that Self-Forcing models are trained "
                "on, with all of it in view; set window_frames (and sink_frames) for longer videos"
            )
        scheduled = None
        for frame in [frame for frame in self._prompt_schedule if frame <= block.start]:
            scheduled = self._prompt_schedule.pop(frame)
        next_prompt = next_prompt or scheduled

        if self._clean_pass_due:
            recached = next_prompt is not None and self.config.switch_policy == "recache"
            self._clean_pass(skip_prompt_branch=recached)
        for cache, _ in self.branches():
            cache.jump_frames = 0
        if next_prompt is not None:
            switch_prompt(self, next_prompt)
        advance_blend(self)

    def _clean_pass(self, skip_prompt_branch: bool) -> None:
        """Overwrite the newest chunk's keys and values with those of its clean latents."""
        block_frames = self._newest_block_frames
        latents = self.history.last(block_frames)
        start = self.frames_done - block_frames
        if not skip_prompt_branch:
            self.cache.enable_overwrite_mode()
            self.write_past(latents, self.config.context_noise, start, self.cache, self.prompt.embeds)
        if self.negative_cache is not None:
            self.negative_cache.enable_overwrite_mode()
            self.write_past(latents, self.config.context_noise, start, *self.branches()[1])
        self._clean_pass_due = False

    def _write_given(self, block: FrameBlock) -> torch.Tensor:
        """Write given latents to the caches at t = 0 and return them."""
        assert self.given_latents is not None
        latents = self.given_latents[:, :, block.start : block.stop]
        for cache, embeds in self.branches():
            cache.enable_append_mode()
            self.write_past(latents, 0.0, block.start, cache, embeds)
        self._newest_block_frames = block.num_frames
        return latents

    def _denoise(
        self, block: FrameBlock, steps_finite: list[torch.Tensor], source_latents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The few-step denoise of a chunk: `(batch, channels, frames, height, width)` clean latents."""
        latents = self._noise(block)
        scheduler = self.first_scheduler if block.start == self.grid.given_frames else self.scheduler
        timesteps = scheduler.timesteps.tolist()
        if source_latents is not None:
            timesteps = timesteps[len(timesteps) - self.config.num_source_steps(len(timesteps)) :]
            latents = scheduler.add_noise(source_latents, latents, timesteps[0])
        for i, timestep in enumerate(timesteps):
            flow = self._guided_flow(latents, timestep, block.start, first_step=i == 0)
            latents = scheduler.step(flow, timestep, latents, generator=self.generator).prev_sample
            if self._on_step_end is not None:
                latents = self._on_step_end(self, block, self.steps_done, timestep, latents)
            self.steps_done += 1
            steps_finite.append(latents.isfinite().all())
            if self.on_progress is not None:
                self.on_progress()
            if self.interrupted:
                break
        self._newest_block_frames = block.num_frames
        return latents

    def _guided_flow(self, latents: torch.Tensor, timestep: float, start: int, first_step: bool) -> torch.Tensor:
        flows = []
        for cache, embeds in self.branches():
            if first_step:
                cache.enable_append_mode()
            else:
                cache.enable_overwrite_mode()
            flows.append(self.flow(latents, timestep, start, cache, embeds))
        if len(flows) == 1:
            return flows[0]
        flow, negative_flow = flows
        return negative_flow + self.config.guidance_scale * (flow - negative_flow)

    def jump(self, num_frames: int) -> None:
        """Move the next chunk away from the past in time: for good, or with relative positions while it is newest."""
        if self.config.position_mode != "relative":
            self._position_shift += num_frames
        for cache, _ in self.branches():
            cache.jump_frames = num_frames

    def flow(
        self, latents: torch.Tensor, timestep: float, start: int, cache: WanKVCache, embeds: torch.Tensor
    ) -> torch.Tensor:
        """One forward through a cache: the flow of `latents`, whose first frame is latent frame `start`."""
        flow = self._forward(latents, timestep, start, cache, embeds)
        assert flow is not None
        return flow

    def write_past(
        self, latents: torch.Tensor, timestep: float, start: int, cache: WanKVCache, embeds: torch.Tensor
    ) -> None:
        """The part of a forward that leaves keys and values in a cache: no last attention, feed-forward and head."""
        self._forward(latents, timestep, start, cache, embeds, keys_values_only=True)

    def _forward(
        self,
        latents: torch.Tensor,
        timestep: float,
        start: int,
        cache: WanKVCache,
        embeds: torch.Tensor,
        keys_values_only: bool = False,
    ) -> torch.Tensor | None:
        transformer = self.pipe.transformer
        latents = self._inputs.hold(("latents", latents.shape[2]), latents, transformer.dtype)
        timesteps = self._inputs.empty("timesteps", (self.batch_size, 1), torch.float32, latents.device)
        timesteps.fill_(timestep)
        frame_offset = start + self._position_shift
        plan = transformer.plan_forward(
            latents, cache, frame_offset, keys_values_only, self.conditions, timestep, embeds
        )
        flow = transformer(
            hidden_states=latents,
            timestep=timesteps,
            encoder_hidden_states=embeds,
            frame_offset=frame_offset,
            attention_kwargs={**self._attention_kwargs, "kv_cache": cache, "plan": plan},
            return_dict=False,
        )[0]
        cache.end_forward()
        return flow

    def branches(self) -> list[tuple[WanKVCache, torch.Tensor]]:
        """The cache and the embeddings of the prompt and, with guidance, of the negative prompt."""
        branches = [(self.cache, self.prompt.embeds)]
        if self.negative_cache is not None and self.negative_prompt_embeds is not None:
            branches.append((self.negative_cache, self.negative_prompt_embeds))
        return branches

    def _noise(self, block: FrameBlock) -> torch.Tensor:
        if self._initial_noise is not None:
            start = block.start - self.grid.given_frames
            return self._initial_noise[:, :, start : start + block.num_frames]
        channels = self.pipe.transformer.config.in_channels
        shape = (self.batch_size, channels, block.num_frames, self.latent_height, self.latent_width)
        return draw_noise(shape, self.generator, self.device, torch.float32)

    def _decode(self, latents: torch.Tensor, block: FrameBlock) -> Any:
        assert self.vae_decoder is not None
        vae = self.pipe.vae
        video = self.vae_decoder.decode(denormalize_latents(vae, latents.to(vae.dtype)))
        if self.config.num_frames is not None:
            video = video[:, :, : self.config.num_frames - self._pixel_frames(block.start)]
        return self.pipe.video_processor.postprocess_video(video, output_type=self.config.output_type)

    def _pixel_frames(self, latent_frames: int) -> int:
        return pixel_frames_of(latent_frames, self.pipe.vae_scale_factor_temporal) if latent_frames else 0

    # State.

    def _restart(self) -> None:
        self.chunks_done = 0
        self.frames_done = 0
        self.steps_done = 0
        self.interrupted = False
        self.blend = None
        self._position_shift = 0
        self._newest_block_frames = 0
        self._clean_pass_due = False
        self._failed = False

    def _new_vae_decoder(self) -> StreamingVaeDecoder:
        # On a CPU the state is where it would be parked.
        parked = self.config.park_vae_state and get_module_execution_device(self.pipe.vae).type != "cpu"
        return StreamingVaeDecoder(self.pipe.vae, parking_device="cpu" if parked else None)

    def _new_cache(self) -> WanKVCache:
        return self.pipe.new_kv_cache(self.config, self.grid.total_frames)
