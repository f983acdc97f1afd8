"""What a forward is conditioned on, kept so that no forward computes it again.

A forward fills what is missing and later ones read it. The weights are touched inside of the forward only, where
offload hooks have them in place.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

from wan_autoregressive.cache.rotary import RotaryEmbedding


class TimeConditions:
    """Embedding and modulation of one timestep, `None` until a forward has filled them."""

    def __init__(self) -> None:
        self.temb: torch.Tensor | None = None
        """`(batch, groups, dim)`"""
        self.modulation: torch.Tensor | None = None
        """`(batch, groups, 6, dim)`, before a block adds its own table."""


class BlockTextConditions:
    """Keys and values of one prompt in one block's cross-attention, `None` until a forward has filled them.

    It has no `.to`: accelerate's hooks would call it and work on a copy.
    """

    def __init__(self) -> None:
        self.key: torch.Tensor | None = None
        """`(batch, text_tokens, heads, head_dim)`, normalised."""
        self.value: torch.Tensor | None = None


class TextConditions:
    """One prompt's keys and values in all blocks."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [BlockTextConditions() for _ in range(num_blocks)]
        self.projected: torch.Tensor | None = None
        """`(batch, text_tokens, dim)`, as long as a block may need it."""

    @property
    def is_complete(self) -> bool:
        """Whether no block needs the prompt any more. A forward that ends early leaves the last block without."""
        return self.blocks[-1].value is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are filled."""
        tensors = (tensor for block in self.blocks for tensor in (block.key, block.value))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class ConditionMemory:
    """Conditions of one video that forwards have computed, by what they were computed from.

    Args:
        num_prompts (`int`, defaults to 1): Prompts in use at the same time: 2 with guidance. Older ones are dropped.
    """

    def __init__(self, num_prompts: int = 1) -> None:
        self._num_prompts = num_prompts
        self._adapters: tuple[Any, ...] = ()
        self.forget()

    def forget(self) -> None:
        """Drop everything. Needed after a change of weights in place; a change of LoRA adapters is noticed."""
        self._times: dict[float, TimeConditions] = {}
        self._texts: OrderedDict[Hashable, tuple[torch.Tensor, TextConditions]] = OrderedDict()
        self._rotary: OrderedDict[Hashable, RotaryEmbedding] = OrderedDict()

    @property
    def text_kv_bytes(self) -> int:
        """Bytes of the prompts' keys and values."""
        return sum(text.nbytes for _, text in self._texts.values())

    def notice_adapters(self, model: nn.Module) -> None:
        """Drop everything if other LoRA adapters are active than the last time, or the same with other weights."""
        adapters = _active_adapters(model)
        if adapters != self._adapters:
            self._adapters = adapters
            self.forget()

    def time(self, timestep: float) -> TimeConditions:
        """Of a timestep that holds for a whole chunk."""
        return self._times.setdefault(timestep, TimeConditions())

    def text(self, embeds: torch.Tensor, num_blocks: int) -> TextConditions:
        """Of the embeddings in this very tensor, as long as nothing is written to it."""
        version = 0 if embeds.is_inference() else embeds._version
        made = lambda: (embeds, TextConditions(num_blocks))  # noqa: E731 - held, so that its id stays taken
        return _recent(self._texts, (id(embeds), version), self._num_prompts, made)[1]

    def rotary(self, key: Hashable, make: Callable[[], RotaryEmbedding]) -> RotaryEmbedding:
        """Tables of one of the two newest geometries: that of the chunk and that of the cached keys."""
        return _recent(self._rotary, key, 2, make)


def _recent(entries: OrderedDict[Hashable, Any], key: Hashable, size: int, make: Callable[[], Any]) -> Any:
    """The entry of `key`, made if it is missing; the least recently used one makes room."""
    if key not in entries:
        entries[key] = make()
    entries.move_to_end(key)
    if len(entries) > size:
        entries.popitem(last=False)
    return entries[key]


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
