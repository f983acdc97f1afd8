"""What a forward is conditioned on, kept so that no forward computes it again.

A forward fills what is missing and later ones read it. The weights are touched inside of the forward only, where
offload hooks have them in place.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wan_autoregressive.cache.rotary import RotaryEmbedding
from wan_autoregressive.cache.static_buffers import StaticBuffers

_MAX_TIMESTEPS = 64


@dataclass
class TimeConditions:
    """Embedding and modulation of one timestep, `None` until a forward has filled them."""

    temb: torch.Tensor | None = None
    """`(batch, groups, dim)`"""
    modulation: torch.Tensor | None = None
    """`(batch, groups, 6, dim)`, before a block adds its own table."""


class BlockTextConditions:
    """Keys and values of one prompt in one block's cross-attention, once a forward has filled them.

    It has no `.to`: accelerate's hooks would call it and work on a copy.

    Args:
        key, value: `(batch, text_tokens, heads, head_dim)`. Memory for them.
        image: Those of an image that is attended to beside the text; the same under every prompt.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor, image: "BlockTextConditions | None" = None) -> None:
        self.key = key
        """Normalised."""
        self.value = value
        self.image = image
        self.is_filled = False

    def fill(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take over keys and values, in place unless autocast or a model on several devices makes them others."""
        if (key.dtype, key.device) == (self.key.dtype, self.key.device):
            self.key.copy_(key)
            self.value.copy_(value)
        else:
            self.key, self.value = key, value
        self.is_filled = True


@dataclass
class TextConditions:
    """One prompt's keys and values in all blocks."""

    embeds: torch.Tensor
    """What they are of; held, so that its id stays taken."""
    place: int
    """Which prompt's memory they are in."""
    blocks: list[BlockTextConditions]
    projected: torch.Tensor | None = None
    """`(batch, tokens, dim)`, those of an image first, as long as a block may need it."""

    @property
    def is_complete(self) -> bool:
        """Whether no block needs the prompt any more. A forward that ends early leaves the last block without."""
        return self.blocks[-1].is_filled


class ConditionMemory:
    """Conditions of one video that forwards have computed, by what they were computed from.

    What a forward reads is in the same memory from one forward to the next, whatever was computed anew in between.

    Args:
        num_prompts: Prompts in use at the same time: 2 with guidance. Older ones are dropped.
    """

    def __init__(self, num_prompts: int = 1) -> None:
        self._num_prompts = num_prompts
        self._adapters: tuple[Any, ...] = ()
        self._static, self._text_kv = StaticBuffers(), StaticBuffers()
        self.forget()

    def forget(self) -> None:
        """Drop everything. Needed after a change of weights in place; a change of LoRA adapters is noticed."""
        self._times: OrderedDict[Hashable, TimeConditions] = OrderedDict()
        self._texts: OrderedDict[Hashable, TextConditions] = OrderedDict()
        self._image: tuple[torch.Tensor, list[BlockTextConditions]] | None = None
        self._rotary: dict[Hashable, tuple[Hashable, RotaryEmbedding]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all but the prompts' keys and values: time conditions and rotary tables."""
        known = [tensor for time in self._times.values() for tensor in (time.temb, time.modulation)]
        return self._static.nbytes + sum(tensor.nbytes for tensor in known if tensor is not None)

    @property
    def text_kv_bytes(self) -> int:
        """Bytes of the memory for the keys and values of prompts and of an image."""
        return self._text_kv.nbytes

    def notice_adapters(self, model: nn.Module) -> None:
        """Drop everything if other LoRA adapters are active than the last time, or the same with other weights."""
        adapters = _active_adapters(model)
        if adapters != self._adapters:
            self._adapters = adapters
            self.forget()

    def time(self, timestep: Hashable) -> TimeConditions:
        """Of a timestep that holds for a whole chunk, or of a tuple with one per frame."""
        known = self._times.setdefault(timestep, TimeConditions())
        self._times.move_to_end(timestep)
        if len(self._times) > _MAX_TIMESTEPS:  # timesteps that follow a source video never come again
            self._times.popitem(last=False)
        if known.temb is None or known.modulation is None:
            return known
        groups = known.temb.shape[1]
        held = (self._static.copy_in((of, groups), getattr(known, of)) for of in ("temb", "modulation"))
        return TimeConditions(*held)

    def text(
        self, embeds: torch.Tensor, num_blocks: int, like: torch.Tensor, image_embeds: torch.Tensor | None = None
    ) -> TextConditions:
        """Of the embeddings `(batch, text_tokens, text_dim)` in this very tensor, as long as nothing is written to it.

        Args:
            like: Of any length, `(batch, tokens, heads, head_dim)`, as keys will be.
            image_embeds: `(batch, image_tokens, image_dim)` of an image that is attended to as well.
        """
        images: Sequence[BlockTextConditions | None] = [None] * num_blocks
        if image_embeds is not None:
            if self._image is None or self._image[0] is not image_embeds:
                self._texts.clear()  # they point to the keys and values of another image
                self._image = image_embeds, self._blocks("image", image_embeds, like, images)
            images = self._image[1]
        key = id(embeds), 0 if embeds.is_inference() else embeds._version
        if key not in self._texts:
            place = len(self._texts)
            if place == self._num_prompts:
                place = self._texts.popitem(last=False)[1].place  # the least recently used one makes room
            self._texts[key] = TextConditions(embeds, place, self._blocks(place, embeds, like, images))
        self._texts.move_to_end(key)
        return self._texts[key]

    def _blocks(
        self, name: Hashable, embeds: torch.Tensor, like: torch.Tensor, images: Sequence[BlockTextConditions | None]
    ) -> list[BlockTextConditions]:
        """Memory for the keys and values of these embeddings in all blocks, one for each of `images`."""
        shape, blocks = (*embeds.shape[:2], *like.shape[2:]), []
        for index, image in enumerate(images):
            key, value = (self._text_kv.empty((name, index, of), shape, like.dtype, like.device) for of in ("k", "v"))
            blocks.append(BlockTextConditions(key, value, image))
        return blocks

    def rotary(self, name: Hashable, geometry: Hashable, make: Callable[[], RotaryEmbedding]) -> RotaryEmbedding:
        """Tables by name, made anew where they are not those of `geometry`."""
        if name not in self._rotary or self._rotary[name][0] != geometry:
            cos, sin = make()
            tables = self._static.copy_in((name, "cos"), cos), self._static.copy_in((name, "sin"), sin)
            self._rotary[name] = geometry, tables
        return self._rotary[name][1]


def _active_adapters(model: nn.Module) -> tuple[Any, ...]:
    """What peft adds to the weights at the moment."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        return ()
    from peft.tuners.tuners_utils import BaseTunerLayer

    return tuple(
        (tuple(module.active_adapters), module.disable_adapters, tuple(module.merged_adapters), repr(module.scaling))
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
    )
