"""Prompts that change, and what then happens to the past: a class for each policy.

A policy runs at a chunk boundary: it has the newest chunk's clean keys and values written, except where it rewrites
them anyway, and then takes over a new prompt.
"""

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch

from wan_autoregressive.configs.choices import RecacheSink
from wan_autoregressive.configs.registry import SWITCH_POLICIES
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.denoiser import Denoiser, Window
from wan_autoregressive.pipelines.frame_grid import Chunk
from wan_autoregressive.pipelines.latent_history import LatentHistory
from wan_autoregressive.pipelines.prompts import PromptState
from wan_autoregressive.pipelines.samplers.base import Sampler

SWITCH_SETTINGS = frozenset(
    {"switch_policy", "recache_sink", "flush_frames", "cut_jump_frames", "blend_chunks", "switch_options"}
)
"""What of the settings makes a policy."""


@dataclass
class Past:
    """The video so far, as a policy sees it."""

    config: RolloutConfig
    denoiser: Denoiser
    history: LatentHistory
    recache_window: Callable[[range], Window]
    """What a pass over finished frames that replaces their keys and values sees."""
    frames_done: int = 0
    """Latent frames."""


class SwitchPolicy:
    """What happens to the past when the prompt changes. The fields of a policy are its parameters.

    It is found by its name in `configs.registry.SWITCH_POLICIES`.
    """

    rewrites_prompt_cache: ClassVar[bool] = False
    """Whether `switch` replaces the newest chunk's keys and values under the prompt, so that they need not be written
    before."""
    has_endless_positions: ClassVar[bool] = False
    """Whether absolute positions go on behind the end of the rotary table."""

    @classmethod
    def from_config(cls, config: RolloutConfig) -> Self:
        """With the parameters that the settings name. Raises `ValueError` for one that there is not."""
        try:
            return cls(**config.switch_options)
        except TypeError as error:
            raise ValueError(f"switch_options do not fit {config.switch_policy!r}: {error}") from error

    def cache_past(self, past: Past, write: Callable[[], None]) -> None:
        """The newest chunk is finished: have its clean keys and values written by `write`."""
        write()

    def switch(self, past: Past, old: PromptState) -> None:
        """The denoiser has just got another prompt than `old`, and there is a past."""

    def begin_chunk(self, past: Past) -> None:
        """A chunk is about to begin, under whatever prompt."""

    def reset(self) -> None:
        """Forget changes under way."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers from chunk to chunk, beside its parameters."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""


@dataclass
class Recache(SwitchPolicy):
    """Rebuild the window's keys and values from clean latents under the new prompt, in one pass.

    As LongLive does (`pipeline/interactive_causal_inference.py`). A kept sink keeps the old prompt's, unless the video
    is still within the window; frames that it hides from attention are not computed. With `refresh` the oldest frames
    of the window become the new sink.
    """

    rewrites_prompt_cache = True
    sink: RecacheSink = "keep"

    @classmethod
    def from_config(cls, config: RolloutConfig) -> Self:
        return cls(config.recache_sink)

    def switch(self, past: Past, old: PromptState) -> None:
        config, frames_done = past.config, past.frames_done
        window = config.window_frames or frames_done
        keep_sink = self.sink == "keep" and frames_done > window
        num_frames = min(window, frames_done) - (config.sink_frames if keep_sink else 0)
        frames = range(frames_done - num_frames, frames_done)
        latents = past.history.last(num_frames)
        past.denoiser.rewrite_context(latents, past.recache_window(frames), keep_sink)


@dataclass
class CrossAttentionOnly(SwitchPolicy):
    """Only change the text; the past goes on to speak of the old one."""


@dataclass
class Flush(SwitchPolicy):
    """Keep the sink and the newest `frames` latent frames (Infinity-RoPE's KV flush)."""

    frames: int = 2

    @classmethod
    def from_config(cls, config: RolloutConfig) -> Self:
        return cls(config.flush_frames)

    def switch(self, past: Past, old: PromptState) -> None:
        past.denoiser.keep_newest(self.frames)


@dataclass
class Cut(Flush):
    """A flush and a jump of `jump_frames` latent frames ahead in time (Infinity-RoPE's scene cut)."""

    jump_frames: int = 42

    @classmethod
    def from_config(cls, config: RolloutConfig) -> Self:
        return cls(config.flush_frames, config.cut_jump_frames)

    def switch(self, past: Past, old: PromptState) -> None:
        super().switch(past, old)
        past.denoiser.jump(self.jump_frames)


@dataclass
class Blend(SwitchPolicy):
    """Interpolate the embeddings from the old prompt to the new one over some chunks."""

    chunks: int = 4

    def __post_init__(self) -> None:
        self._old: PromptState | None = None
        self._new: PromptState | None = None
        self._chunks_done = 0

    @classmethod
    def from_config(cls, config: RolloutConfig) -> Self:
        return cls(config.blend_chunks)

    def switch(self, past: Past, old: PromptState) -> None:
        self._old, self._new, self._chunks_done = old, past.denoiser.prompt, 0

    def begin_chunk(self, past: Past) -> None:
        if self._old is None or self._new is None:
            return
        self._chunks_done += 1
        weight = self._chunks_done / self.chunks
        if weight >= 1:
            past.denoiser.set_prompt(self._new)
            self.reset()
        else:
            embeds = torch.lerp(self._old.embeds, self._new.embeds, weight)
            past.denoiser.set_prompt(PromptState(embeds, self._new.text))

    def reset(self) -> None:
        self._old, self._new, self._chunks_done = None, None, 0

    def state_dict(self) -> dict[str, Any]:
        return {"old": self._old, "new": self._new, "chunks_done": self._chunks_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._old, self._new, self._chunks_done = state["old"], state["new"], state["chunks_done"]


class PromptSwitching:
    """The prompts to come, and the policy that takes them over.

    Args:
        schedule: Prompts by the latent frame from which they hold.
    """

    def __init__(self, config: RolloutConfig, schedule: dict[int, PromptState]) -> None:
        self.use_policy_of(config)
        self._schedule = dict(sorted(schedule.items()))
        self._next: PromptState | None = None
        self._lock = threading.Lock()

    def use_policy_of(self, config: RolloutConfig) -> None:
        """Take the policy that the settings name; a change under way under the old one stays as it is."""
        self.policy: SwitchPolicy = SWITCH_POLICIES.load(config.switch_policy).from_config(config)

    def set_next(self, prompt: PromptState) -> None:
        """Take a prompt over at the next chunk that begins; of several the last. Safe from any thread."""
        with self._lock:
            self._next = prompt

    def take_next(self) -> PromptState | None:
        """The prompt that was set, once."""
        with self._lock:
            prompt, self._next = self._next, None
        return prompt

    def enter(self, chunk: Chunk, prompt: PromptState | None, sampler: Sampler, past: Past) -> None:
        """Bring the past up to date for a chunk, and take over `prompt` or the one that the schedule has for it."""
        scheduled = None
        for frame in [frame for frame in self._schedule if frame <= chunk.start]:
            scheduled = self._schedule.pop(frame)
        prompt = prompt or scheduled
        rewritten = prompt is not None and past.frames_done > 0 and self.policy.rewrites_prompt_cache
        self.policy.cache_past(past, partial(sampler.cache_past, skip_prompt=rewritten))
        if prompt is not None:
            old = past.denoiser.prompt
            past.denoiser.set_prompt(prompt)
            self.policy.reset()
            if past.frames_done:
                self.policy.switch(past, old)
        self.policy.begin_chunk(past)

    def reset(self) -> None:
        """Forget the prompts to come."""
        self._schedule.clear()
        self.policy.reset()

    def state_dict(self) -> dict[str, Any]:
        return {"schedule": dict(self._schedule), "next": self._next, "policy": self.policy.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._schedule, self._next = dict(state["schedule"]), state["next"]
        self.policy.load_state_dict(state["policy"])

    def fork(self) -> "PromptSwitching":
        """A copy that goes on from here on its own."""
        twin = copy.copy(self)
        twin.policy, twin._schedule, twin._lock = copy.copy(self.policy), dict(self._schedule), threading.Lock()
        return twin
