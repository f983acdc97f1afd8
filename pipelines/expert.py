"""One transformer with all that it keeps of one video."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wan_autoregressive.cache import AdaptiveSink, LaneCaches, WanKVCache
from wan_autoregressive.cache.dynamic_dims import mark_dynamic
from wan_autoregressive.cache.static_buffers import StaticBuffers
from wan_autoregressive.models.causal_wan_transformer import CausalWanTransformer3DModel
from wan_autoregressive.models.conditions import ConditionMemory
from wan_autoregressive.models.forward_plan import PastFrames
from wan_autoregressive.pipelines.image_condition import ImageCondition


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
        self.lanes: list[LaneCaches] = []
        """Of each cache once it is split; the cache itself is lane 0."""

    def forward(
        self, latents: torch.Tensor, window: Window, branch: int, embeds: torch.Tensor, context_only: bool = False
    ) -> torch.Tensor | None:
        """One forward through the cache of a branch, which is appended to or overwritten.

        Args:
            latents: `(batch, channels, frames, height, width)`. Of the window's frames.
            embeds: `(batch, text_tokens, text_dim)`. Of the branch's prompt.
            context_only: Only leave keys and values in the cache: no last attention, feed-forward and head.

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

    def forward_lanes(
        self, latents: torch.Tensor, windows: Sequence[Window], lanes: range, branch: int, embeds: torch.Tensor
    ) -> torch.Tensor:
        """One forward through some lanes of a branch, which must see equally much.

        Args:
            latents: `(lanes * batch, channels, frames, height, width)`. Lane after lane.
            windows: One for each lane, of as many frames and with one timestep.

        Returns:
            The flow, shaped as `latents`.
        """
        caches, starts = self.lanes[branch], [window.frames.start for window in windows]
        caches.use(lanes, starts)
        flow = self._forward(latents, windows, embeds, caches, frame_offset=starts)
        assert flow is not None
        return flow

    def split_lanes(self, count: int, sink: AdaptiveSink | None) -> None:
        """Make lanes of each cache, with the same past."""
        self.lanes = self.lanes or [LaneCaches(cache, sink) for cache in self.caches]
        for caches in self.lanes:
            caches.split(count)

    def _run(
        self, latents: torch.Tensor, window: Window, branch: int, embeds: torch.Tensor, context_only: bool
    ) -> torch.Tensor | None:
        return self._forward(
            latents,
            [window],
            embeds,
            self.caches[branch],
            frame_offset=window.frames.start,
            keys_values_only=context_only,
            keep_frames=window.keep_frames,
            view=window.past,
        )

    def _forward(
        self,
        latents: torch.Tensor,
        windows: Sequence[Window],
        embeds: torch.Tensor,
        cache: WanKVCache | LaneCaches,
        **plan_options: Any,
    ) -> torch.Tensor | None:
        """`latents` are those of all windows, which are one for each lane, behind each other in the batch."""
        transformer, timesteps = self.transformer, [window.timesteps for window in windows]
        latents = self._with_image(latents, windows)
        if len(windows) > 1:  # fewer of them at the end of a video
            mark_dynamic(latents, dim=0)
        plan = transformer.plan_forward(
            latents,
            cache,
            memory=self.conditions,
            timestep=tuple(timesteps),
            encoder_hidden_states=embeds,
            encoder_hidden_states_image=self._image_embeds,
            **plan_options,
        )
        flow = transformer(
            hidden_states=latents,
            timestep=self._timesteps(timesteps, latents),
            encoder_hidden_states=embeds,
            encoder_hidden_states_image=self._image_embeds,
            attention_kwargs={**self._attention_kwargs, "kv_cache": cache, "plan": plan},
            return_dict=False,
        )[0]
        cache.end_forward()
        return flow

    def _with_image(self, latents: torch.Tensor, windows: Sequence[Window]) -> torch.Tensor:
        """`(batch, in_channels, frames, height, width)` in the transformer's dtype: the latents of these frames, and
        behind them the channels of the image."""
        name, dtype = ("latents", latents.shape[2], len(windows)), self.transformer.dtype
        if self.image is None:
            return self._inputs.copy_in(name, latents, dtype)
        own, condition = latents.shape[1], self.image.channels.shape[1]
        shape = (len(latents), own + condition, *latents.shape[2:])
        joined = self._inputs.empty(name, shape, dtype, latents.device)
        joined[:, :own].copy_(latents)
        for rows, window in zip(joined.chunk(len(windows)), windows, strict=True):
            rows[:, own:].copy_(self.image.of(window.frames))
        return joined

    @property
    def _image_embeds(self) -> torch.Tensor | None:
        return None if self.image is None else self.image.embeds

    def _timesteps(self, timesteps: list[tuple[float, ...]], latents: torch.Tensor) -> torch.Tensor:
        """`(batch, 1)` or `(batch, frames)`, filled on the device, since a copy to it would wait."""
        lanes, groups = len(timesteps), len(timesteps[0])
        shape = latents.shape[0], groups
        tensor = self._inputs.empty(("timesteps", groups, lanes), shape, torch.float32, latents.device)
        for rows, of_lane in zip(tensor.chunk(lanes), timesteps, strict=True):
            start = 0
            for timestep, run in itertools.groupby(of_lane):
                stop = start + len(list(run))
                rows[:, start:stop].fill_(timestep)
                start = stop
        return tensor

    def add_to_bank(self, length: int, branch: int, embeds: torch.Tensor) -> None:
        """Let the proposed frame into the memory bank of a branch; its prompt decides who stays in a full one."""
        cache, parallel = self.caches[branch], self.transformer.parallel
        is_full = length > cache.block_caches[0].bank.num_frames
        total = None if parallel is None else parallel.total
        cache.add_to_bank(length, self._text_keys(embeds) if is_full else None, total)

    def _text_keys(self, embeds: torch.Tensor) -> list[torch.Tensor]:
        """Of each block's cross-attention, `(batch, text_tokens, heads, head_dim)`: the heads that the caches hold.

        A prompt that no forward has read to the end yet is read by one that does nothing else: weights are touched
        inside of forwards only.
        """
        transformer = self.transformer
        config = transformer.config
        latents = embeds.new_zeros(embeds.shape[0], config.in_channels, *config.patch_size, dtype=transformer.dtype)
        like = latents.new_empty(len(latents), 0, config.num_attention_heads, config.attention_head_dim)
        text = self.conditions.text(embeds, len(transformer.blocks), like, self._image_embeds)
        if not text.is_complete:
            plan = transformer.plan_forward(latents)
            plan.text, plan.reads_text_only = text, True
            transformer(
                hidden_states=latents,
                timestep=latents.new_zeros(len(latents), dtype=torch.float32),
                encoder_hidden_states=embeds,
                encoder_hidden_states_image=self._image_embeds,
                attention_kwargs={**self._attention_kwargs, "plan": plan},
                return_dict=False,
            )
        return [transformer.of_own_heads(block.key) for block in text.blocks]

    def keep_newest(self, num_tokens: int) -> None:
        """Forget all but the sink and the newest tokens. A newest chunk that stays whole can still be overwritten."""
        for branch, cache in enumerate(self.caches):
            cache.keep_newest(num_tokens)
            if not cache.newest_tokens:
                self._newest[branch] = None

    def reset(self) -> None:
        for cache in self.caches:
            cache.reset()
        for lanes in self.lanes:
            lanes.reset()
        self.conditions.forget()
        self._newest = [None] * len(self.caches)

    def state_dict(self) -> dict[str, Any]:
        return {
            "caches": [cache.state_dict() for cache in self.caches],
            "newest": list(self._newest),
            "attention_kwargs": self._attention_kwargs,
            "lanes": [lanes.state_dict() for lanes in self.lanes],
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        for cache, saved in zip(self.caches, state["caches"], strict=True):
            cache.load_state_dict(saved, device)
        self._newest = list(state["newest"])
        self._attention_kwargs = state["attention_kwargs"]
        states = zip(self.caches, state.get("lanes", ()), strict=False)
        self.lanes = [LaneCaches.from_state(cache, saved, device) for cache, saved in states]

    def fork(self) -> "Expert":
        lanes = [own.fork() for own in self.lanes]
        caches = [own.lanes[0] for own in lanes] or [cache.fork() for cache in self.caches]
        twin = Expert(self.transformer, caches, dict(self._attention_kwargs), self.image)
        twin._newest, twin.lanes = list(self._newest), lanes
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        lanes = sum(caches.nbytes for caches in self.lanes)
        return sum(cache.allocated_bytes for cache in self.caches) + lanes

    @property
    def input_bytes(self) -> int:
        """Bytes of what forwards read beside weights, keys and values."""
        slots = sum(cache.slots.nbytes for cache in self.caches) + sum(caches.slot_bytes for caches in self.lanes)
        return self._inputs.nbytes + self.conditions.nbytes + slots
