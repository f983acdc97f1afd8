"""What one forward over these frames at these noise levels gives.

A denoiser holds what the transformers keep of one video: keys and values, conditions, the prompt. It knows neither the
order of chunks nor what a prompt was before, and no VAE.

Of two transformers (Wan2.2-A14B's experts for high and for low noise) each step runs one. Both cache every finished
chunk, each in keys and values of its own, and each computes the text by itself, which FastVideo's code does not.
"""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from wan_autoregressive.cache import WanKVCache
from wan_autoregressive.cache.static_buffers import StaticBuffers
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.models.causal_wan_transformer import CausalWanTransformer3DModel
from wan_autoregressive.models.conditions import ConditionMemory
from wan_autoregressive.models.forward_plan import PastFrames
from wan_autoregressive.pipelines.components import WanComponents
from wan_autoregressive.pipelines.image_condition import ImageCondition
from wan_autoregressive.pipelines.offload import make_room
from wan_autoregressive.pipelines.prompts import PromptState


@dataclass(frozen=True)
class Window:
    """The frames of one forward.

    The cache is appended to by the first forward that keeps frames of a chunk, and overwritten by the later ones: a
    chunk is new if it starts at another frame than the newest one in the cache.
    """

    frames: range
    """Numbers of the latent frames; positions count by them."""
    timesteps: tuple[float, ...]
    """One for all frames, or one for each."""
    keep_frames: int | None = None
    """Frames, from the first on, whose keys and values the cache holds afterwards; all by default. With 0 the cache is
    left as it is."""
    past: PastFrames | None = None
    """What the frames see of the past; all that is held by default."""


class Expert:
    """One transformer with all that it keeps of one video.

    Args:
        caches: For the prompt and, with guidance, for the negative one.
        attention_kwargs: Passed to the transformer; `scale` is the LoRA scale.
        image: What the transformer is conditioned on beside the prompt.
    """

    def __init__(
        self,
        transformer: CausalWanTransformer3DModel,
        caches: list[WanKVCache],
        attention_kwargs: dict[str, Any],
        image: ImageCondition | None = None,
    ) -> None:
        self.transformer = transformer
        self.caches = caches
        self.image = image
        self._attention_kwargs = attention_kwargs
        self.conditions = ConditionMemory(num_prompts=len(caches))
        self._inputs = StaticBuffers()
        self._newest: list[int | None] = [None] * len(caches)
        """First frame of the newest chunk in each cache."""

    def forward(
        self, latents: torch.Tensor, window: Window, branch: int, embeds: torch.Tensor, context_only: bool = False
    ) -> torch.Tensor | None:
        """One forward through the cache of a branch, which is appended to or overwritten.

        Args:
            latents (`torch.Tensor` of shape `(batch, channels, frames, height, width)`): Of the window's frames.
            embeds (`torch.Tensor` of shape `(batch, text_tokens, text_dim)`): Of the branch's prompt.
            context_only (`bool`): Only leave keys and values in the cache: no last attention, feed-forward and head.

        Returns:
            The flow, shaped as `latents`; `None` with `context_only`.
        """
        cache, start = self.caches[branch], window.frames.start
        if self._newest[branch] == start:
            cache.enable_overwrite_mode()
        else:
            cache.enable_append_mode()
        flow = self._run(latents, window, branch, embeds, context_only)
        if window.keep_frames != 0:
            self._newest[branch] = start
        return flow

    def rewrite(
        self, latents: torch.Tensor, window: Window, branch: int, embeds: torch.Tensor, keep_sink: bool
    ) -> None:
        """Replace all that the cache of a branch holds, or all but the sink, by a pass over finished latents."""
        self.caches[branch].enable_rewrite_mode(keep_sink=keep_sink)
        self._run(latents, window, branch, embeds, context_only=True)
        self._newest[branch] = None

    def _run(
        self, latents: torch.Tensor, window: Window, branch: int, embeds: torch.Tensor, context_only: bool
    ) -> torch.Tensor | None:
        transformer, cache, timesteps = self.transformer, self.caches[branch], window.timesteps
        latents = self._with_image(latents, window.frames)
        plan = transformer.plan_forward(
            latents,
            cache,
            window.frames.start,
            keys_values_only=context_only,
            memory=self.conditions,
            timestep=timesteps[0] if len(timesteps) == 1 else timesteps,
            encoder_hidden_states=embeds,
            encoder_hidden_states_image=self._image_embeds,
            keep_frames=window.keep_frames,
            view=window.past,
        )
        flow = transformer(
            hidden_states=latents,
            timestep=self._timesteps(timesteps, latents),
            encoder_hidden_states=embeds,
            encoder_hidden_states_image=self._image_embeds,
            frame_offset=window.frames.start,
            attention_kwargs={**self._attention_kwargs, "kv_cache": cache, "plan": plan},
            return_dict=False,
        )[0]
        cache.end_forward()
        return flow

    def _with_image(self, latents: torch.Tensor, frames: range) -> torch.Tensor:
        """`(batch, in_channels, frames, height, width)` in the transformer's dtype: the latents of these frames, and
        behind them the channels of the image."""
        name, dtype = ("latents", latents.shape[2]), self.transformer.dtype
        if self.image is None:
            return self._inputs.copy_in(name, latents, dtype)
        batch_size, channels, *size = latents.shape
        condition = self.image.of(frames)
        joined = self._inputs.empty(name, (batch_size, channels + condition.shape[1], *size), dtype, latents.device)
        joined[:, :channels], joined[:, channels:] = latents, condition
        return joined

    @property
    def _image_embeds(self) -> torch.Tensor | None:
        return None if self.image is None else self.image.embeds

    def _timesteps(self, timesteps: tuple[float, ...], latents: torch.Tensor) -> torch.Tensor:
        """`(batch, 1)` or `(batch, frames)`, filled on the device, since a copy to it would wait."""
        shape = latents.shape[0], len(timesteps)
        tensor = self._inputs.empty(("timesteps", len(timesteps)), shape, torch.float32, latents.device)
        start = 0
        for timestep, run in itertools.groupby(timesteps):
            stop = start + len(list(run))
            tensor[:, start:stop].fill_(timestep)
            start = stop
        return tensor

    def add_to_bank(self, length: int, branch: int, embeds: torch.Tensor) -> None:
        """Let the proposed frame into the memory bank of a branch; its prompt decides who stays in a full one."""
        cache = self.caches[branch]
        is_full = length > cache.block_caches[0].bank.num_frames
        cache.add_to_bank(length, self._text_keys(embeds) if is_full else None)

    def _text_keys(self, embeds: torch.Tensor) -> list[torch.Tensor]:
        """Of each block's cross-attention, `(batch, text_tokens, heads, head_dim)`.

        A prompt that no forward has read to the end yet is read by one over a single token without a past: weights are
        touched inside of forwards only.
        """
        transformer = self.transformer
        config = transformer.config
        latents = embeds.new_zeros(embeds.shape[0], config.in_channels, *config.patch_size, dtype=transformer.dtype)
        like = latents.new_empty(len(latents), 0, config.num_attention_heads, config.attention_head_dim)
        text = self.conditions.text(embeds, len(transformer.blocks), like, self._image_embeds)
        if not text.is_complete:
            plan = transformer.plan_forward(latents)
            plan.text = text
            transformer(
                hidden_states=latents,
                timestep=latents.new_zeros(len(latents), dtype=torch.float32),
                encoder_hidden_states=embeds,
                encoder_hidden_states_image=self._image_embeds,
                attention_kwargs={**self._attention_kwargs, "plan": plan},
                return_dict=False,
            )
        return [block.key for block in text.blocks]

    def keep_newest(self, num_tokens: int) -> None:
        """Forget all but the sink and the newest tokens. A newest chunk that stays whole can still be overwritten."""
        for branch, cache in enumerate(self.caches):
            cache.keep_newest(num_tokens)
            if not cache.newest_tokens:
                self._newest[branch] = None

    def reset(self) -> None:
        for cache in self.caches:
            cache.reset()
        self.conditions.forget()
        self._newest = [None] * len(self.caches)

    def state_dict(self) -> dict[str, Any]:
        return {
            "caches": [cache.state_dict() for cache in self.caches],
            "newest": list(self._newest),
            "attention_kwargs": self._attention_kwargs,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        for cache, saved in zip(self.caches, state["caches"], strict=True):
            cache.load_state_dict(saved, device)
        self._newest = list(state["newest"])
        self._attention_kwargs = state["attention_kwargs"]

    def fork(self) -> "Expert":
        caches = [cache.fork() for cache in self.caches]
        twin = Expert(self.transformer, caches, dict(self._attention_kwargs), self.image)
        twin._newest = list(self._newest)
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(cache.allocated_bytes for cache in self.caches)

    @property
    def input_bytes(self) -> int:
        """Bytes of what forwards read beside weights, keys and values."""
        return self._inputs.nbytes + self.conditions.nbytes + sum(cache.slots.nbytes for cache in self.caches)


class Denoiser:
    """The transformer of one video, or its two experts, under its prompt.

    Args:
        total_frames (`int`, *optional*): Latent frames of the video, if it has an end.
        prompt, negative_prompt_embeds: The negative one `(batch, text_tokens, text_dim)` is used with guidance.
        attention_kwargs (`dict`, *optional*): Passed to the transformer; `scale` is the LoRA scale.
        image ([`ImageCondition`], *optional*): What the transformers are conditioned on beside the prompt.
    """

    def __init__(
        self,
        components: WanComponents,
        config: RolloutConfig,
        total_frames: int | None,
        prompt: PromptState,
        negative_prompt_embeds: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        image: ImageCondition | None = None,
    ) -> None:
        self.prompt = prompt
        self.image = image
        self.negative_prompt_embeds = negative_prompt_embeds
        self.guidance_scale = config.guidance_scale
        self._tokens_per_frame = components.tokens_per_frame(config)
        self.boundary = components.boundary
        """Timestep from which the first of two experts denoises; `None` with one."""
        self.experts = [
            Expert(
                transformer,
                [components.new_kv_cache(config, total_frames) for _ in range(config.num_branches)],
                attention_kwargs or {},
                image,
            )
            for transformer in components.transformers
        ]
        self._later_lanes: list[Expert] = []
        """Copies of the only expert, which is lane 0, with caches that go their own ways."""

    def predict(self, latents: torch.Tensor, window: Window, lane: int = 0) -> torch.Tensor:
        """The guided flow, shaped as `latents` `(batch, channels, frames, height, width)`.

        Of two experts the frame with the most noise decides.

        Args:
            lane (`int`): Whose caches are used, see `split_lanes`.
        """
        is_low = self.boundary is not None and max(window.timesteps) < self.boundary
        expert, flows = self._later_lanes[lane - 1] if lane else self._in_use(1 if is_low else 0), []
        for branch, embeds in enumerate(self._embeds):
            flow = expert.forward(latents, window, branch, embeds)
            assert flow is not None
            flows.append(flow)
        if len(flows) == 1:
            return flows[0]
        flow, negative_flow = flows
        return negative_flow + self.guidance_scale * (flow - negative_flow)

    def cache_context(self, latents: torch.Tensor, window: Window, skip_prompt: bool = False) -> None:
        """Write keys and values of finished latents to the caches of all experts.

        Args:
            skip_prompt (`bool`): Leave out the prompt's cache, which is about to be rewritten.
        """
        for expert in self._all_in_turn():
            for branch, embeds in enumerate(self._embeds):
                if branch > 0 or not skip_prompt:
                    expert.forward(latents, window, branch, embeds, context_only=True)

    def rewrite_context(self, latents: torch.Tensor, window: Window, keep_sink: bool) -> None:
        """Replace what the caches of the prompt hold, or all but the sink, in one pass over finished latents."""
        for expert in self._all_in_turn():
            expert.rewrite(latents, window, 0, self.prompt.embeds, keep_sink)

    def split_lanes(self, count: int) -> None:
        """Copy the caches, so that there are `count` lanes with the same past. Afterwards they share only the prompt.

        For a single expert. What writes a context, or changes one, does so in every lane.
        """
        self._later_lanes = [self.experts[0].fork() for _ in range(count - 1)]

    @property
    def lanes(self) -> list[Expert]:
        """Lane 0 is the expert itself."""
        return [self.experts[0], *self._later_lanes]

    def set_prompt(self, prompt: PromptState) -> None:
        """Use another prompt from the next forward on, without touching the caches."""
        self.prompt = prompt

    def keep_newest(self, num_frames: int) -> None:
        """Forget all but the sink and the newest frames, under every prompt. A newest chunk that stays whole can still
        be overwritten."""
        for expert in self._all:
            expert.keep_newest(num_frames * self._tokens_per_frame)

    def pin_newest(self, name: str, num_frames: int) -> None:
        """Protect the first frames of the newest chunk from eviction, in the place of what was pinned under `name`."""
        for cache in self._caches:
            cache.pin_newest(name, num_frames * self._tokens_per_frame)

    def propose_to_bank(self) -> None:
        """Let the first frame of the newest chunk be the next to enter the memory bank."""
        for cache in self._caches:
            cache.propose_to_bank()

    def add_to_bank(self, length: int) -> None:
        """Let the proposed frame into the memory bank, which then holds `length` frames if it can. In a full one those
        stay that have most to do with the prompt, or with guidance the negative one in its own cache."""
        for expert in self.experts:
            for branch, embeds in enumerate(self._embeds):
                expert.add_to_bank(length, branch, embeds)

    def jump(self, num_frames: float) -> None:
        """Move the next chunk away from the past in time; by a float there is no end to positions any more."""
        for cache in self._caches:
            cache.positions.jump(num_frames)

    def notice_adapters(self) -> None:
        """Drop what was computed under other LoRA adapters than the present ones, but for keys and values."""
        for expert in self._all:
            expert.conditions.notice_adapters(expert.transformer)

    def reset(self) -> None:
        """Forget the video, but not the prompt."""
        self._later_lanes = []
        for expert in self._all:
            expert.reset()

    def state_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "negative_prompt_embeds": self.negative_prompt_embeds,
            "image": None if self.image is None else vars(self.image),
            "experts": [expert.state_dict() for expert in self._all],
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.prompt = state["prompt"]
        self.negative_prompt_embeds = state["negative_prompt_embeds"]
        self.split_lanes(len(state["experts"]) - len(self.experts) + 1)
        for expert, saved in zip(self._all, state["experts"], strict=True):
            expert.load_state_dict(saved, device)

    def fork(self) -> "Denoiser":
        """A copy with caches of its own; prompts and models are shared."""
        twin = copy.copy(self)
        twin.experts = [expert.fork() for expert in self.experts]
        twin._later_lanes = [expert.fork() for expert in self._later_lanes]
        return twin

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(expert.nbytes for expert in self._all)

    @property
    def input_bytes(self) -> int:
        """Bytes of what forwards read beside weights, keys and values: latents, image, time, rotary tables, slots."""
        image = 0 if self.image is None else self.image.nbytes
        return image + sum(expert.input_bytes for expert in self._all)

    @property
    def text_kv_bytes(self) -> int:
        """Bytes of the prompts' keys and values."""
        return sum(expert.conditions.text_kv_bytes for expert in self._all)

    def _in_use(self, index: int) -> Expert:
        """An expert that is about to run; model offload has no other one on the device meanwhile."""
        for other in self.experts[:index] + self.experts[index + 1 :]:
            make_room(other.transformer)
        return self.experts[index]

    def _all_in_turn(self) -> Iterator[Expert]:
        """Every expert, the last one first: it made the last step, and the first one makes the next. Then lanes."""
        for index in reversed(range(len(self.experts))):
            yield self._in_use(index)
        yield from self._later_lanes

    @property
    def _all(self) -> list[Expert]:
        """Experts and lanes, each with caches of its own."""
        return [*self.experts, *self._later_lanes]

    @property
    def _embeds(self) -> list[torch.Tensor]:
        """Of the prompt and, with guidance, of the negative one."""
        embeds = [self.prompt.embeds]
        if len(self.experts[0].caches) == 2 and self.negative_prompt_embeds is not None:
            embeds.append(self.negative_prompt_embeds)
        return embeds

    @property
    def _caches(self) -> list[WanKVCache]:
        return [cache for expert in self._all for cache in expert.caches]
