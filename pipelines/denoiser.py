"""What one forward over these frames at these noise levels gives.

A denoiser holds what the transformers keep of one video: keys and values, conditions, the prompt. It knows neither the
order of chunks nor what a prompt was before, and no VAE.

Of two transformers (Wan2.2-A14B's experts for high and for low noise) each step runs one. Both cache every finished
chunk, each in keys and values of its own, and each computes the text by itself, which FastVideo's code does not.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from wan_autoregressive.cache import AdaptiveSink, WanKVCache
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.components import WanComponents
from wan_autoregressive.pipelines.expert import Expert, Window
from wan_autoregressive.pipelines.image_condition import ImageCondition
from wan_autoregressive.pipelines.offload import make_room
from wan_autoregressive.pipelines.prompts import PromptState

__all__ = ["Denoiser", "Window"]


class Denoiser:
    """The transformer of one video, or its two experts, under its prompt.

    Args:
        total_frames: Latent frames of the video, if it has an end.
        prompt, negative_prompt_embeds: The negative one `(batch, text_tokens, text_dim)` is used with guidance.
        attention_kwargs: Passed to the transformer; `scale` is the LoRA scale.
        image: What the transformers are conditioned on beside the prompt.
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

    def predict(self, latents: torch.Tensor, window: Window) -> torch.Tensor:
        """The guided flow, shaped as `latents` `(batch, channels, frames, height, width)`.

        Of two experts the frame with the most noise decides.
        """
        is_low = self.boundary is not None and max(window.timesteps) < self.boundary
        expert, flows = self._in_use(1 if is_low else 0), []
        for branch, embeds in enumerate(self._embeds):
            flow = expert.forward(latents, window, branch, embeds)
            assert flow is not None
            flows.append(flow)
        return self._guided(flows)

    def predict_lanes(
        self, latents: Sequence[torch.Tensor], windows: Sequence[Window], first_lane: int
    ) -> list[torch.Tensor]:
        """The guided flows of chunks in lanes from `first_lane` on, shaped as `latents`, see `split_lanes`.

        Lanes that hold equally much run as one forward: all of them once the window is full.
        """
        caches = self.experts[0].lanes[0]
        flows: list[torch.Tensor] = []
        lanes = range(first_lane, first_lane + len(latents))

        def size(index: int) -> tuple[int, ...]:
            frames = windows[index].frames
            tokens = len(frames) * self._tokens_per_frame
            return tokens, *caches.plan(lanes[index], frames.start, tokens)

        for _, run in itertools.groupby(range(len(latents)), size):
            first, *_, last = [*run] * 2
            own = slice(first, last + 1)
            flows += self._predict_together(latents[own], windows[own], lanes[own])
        return flows

    def _predict_together(
        self, latents: Sequence[torch.Tensor], windows: Sequence[Window], lanes: range
    ) -> tuple[torch.Tensor, ...]:
        stacked = torch.cat(list(latents))
        expert = self._in_use(0)
        flows = [
            expert.forward_lanes(stacked, windows, lanes, branch, embeds) for branch, embeds in enumerate(self._embeds)
        ]
        return self._guided(flows).chunk(len(lanes))

    def _guided(self, flows: list[torch.Tensor]) -> torch.Tensor:
        """Of the flow under the prompt and, with guidance, the one under the negative prompt."""
        if len(flows) == 1:
            return flows[0]
        flow, negative_flow = flows
        return negative_flow + self.guidance_scale * (flow - negative_flow)

    def cache_context(self, latents: torch.Tensor, window: Window, skip_prompt: bool = False) -> None:
        """Write keys and values of finished latents to the caches of all experts.

        Args:
            skip_prompt: Leave out the prompt's cache, which is about to be rewritten.
        """
        for expert in self._all_in_turn():
            for branch, embeds in enumerate(self._embeds):
                if branch > 0 or not skip_prompt:
                    expert.forward(latents, window, branch, embeds, context_only=True)

    def rewrite_context(self, latents: torch.Tensor, window: Window, keep_sink: bool) -> None:
        """Replace what the caches of the prompt hold, or all but the sink, in one pass over finished latents."""
        for expert in self._all_in_turn():
            expert.rewrite(latents, window, 0, self.prompt.embeds, keep_sink)

    def split_lanes(self, count: int, sink_threshold: float | None = None) -> None:
        """Copy the caches, so that there are `count` lanes with the same past. Afterwards they share only the prompt.

        For a single expert. From then on only `predict_lanes` runs forwards.

        Args:
            sink_threshold: See [`AdaptiveSink`]; needs a window.
        """
        sink, size = None, self._tokens_per_frame
        if sink_threshold is not None:
            cache = self.experts[0].caches[0]
            sink = AdaptiveSink(sink_threshold, cache.sink_size // size, cache.window_size // size, size)
        self.experts[0].split_lanes(count, sink)

    @property
    def num_lanes(self) -> int:
        """Lanes of each cache; 1 before they are split."""
        lanes = self.experts[0].lanes
        return len(lanes[0].lanes) if lanes else 1

    def set_prompt(self, prompt: PromptState) -> None:
        """Use another prompt from the next forward on, without touching the caches."""
        self.prompt = prompt

    def keep_newest(self, num_frames: int) -> None:
        """Forget all but the sink and the newest frames, under every prompt. A newest chunk that stays whole can still
        be overwritten."""
        for expert in self.experts:
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
        for expert in self.experts:
            expert.conditions.notice_adapters(expert.transformer)

    def reset(self) -> None:
        """Forget the video, but not the prompt."""
        for expert in self.experts:
            expert.reset()

    def state_dict(self) -> dict[str, Any]:
        """Prompts, and the caches of every expert and lane."""
        return {
            "prompt": self.prompt,
            "negative_prompt_embeds": self.negative_prompt_embeds,
            "image": None if self.image is None else vars(self.image),
            "experts": [expert.state_dict() for expert in self.experts],
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` gave, on `device`."""
        self.prompt = state["prompt"]
        self.negative_prompt_embeds = state["negative_prompt_embeds"]
        for expert, saved in zip(self.experts, state["experts"], strict=True):
            expert.load_state_dict(saved, device)

    def fork(self) -> "Denoiser":
        """A copy with caches of its own; prompts and models are shared."""
        twin = copy.copy(self)
        twin.experts = [expert.fork() for expert in self.experts]
        return twin

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(expert.nbytes for expert in self.experts)

    @property
    def heads_are_split(self) -> bool:
        """Whether the caches hold some heads of several ranks'."""
        return any(expert.transformer.parallel is not None for expert in self.experts)

    @property
    def input_bytes(self) -> int:
        """Bytes of what forwards read beside weights, keys and values: latents, image, time, rotary tables, slots."""
        image = 0 if self.image is None else self.image.nbytes
        return image + sum(expert.input_bytes for expert in self.experts)

    @property
    def text_kv_bytes(self) -> int:
        """Bytes of the prompts' keys and values."""
        return sum(expert.conditions.text_kv_bytes for expert in self.experts)

    def _in_use(self, index: int) -> Expert:
        """An expert that is about to run; model offload has no other one on the device meanwhile."""
        for other in self.experts[:index] + self.experts[index + 1 :]:
            make_room(other.transformer)
        return self.experts[index]

    def _all_in_turn(self) -> Iterator[Expert]:
        """Every expert, the last one first: it made the last step, and the first one makes the next."""
        for index in reversed(range(len(self.experts))):
            yield self._in_use(index)

    @property
    def _embeds(self) -> list[torch.Tensor]:
        """Of the prompt and, with guidance, of the negative one."""
        embeds = [self.prompt.embeds]
        if len(self.experts[0].caches) == 2 and self.negative_prompt_embeds is not None:
            embeds.append(self.negative_prompt_embeds)
        return embeds

    @property
    def _caches(self) -> list[WanKVCache]:
        return [cache for expert in self.experts for cache in expert.caches]
