"""What a forward needs beside its inputs."""

from collections.abc import Sequence
from dataclasses import dataclass

from wan_autoregressive.cache import WanKVBlockCache
from wan_autoregressive.cache.rotary import RotaryEmbedding
from wan_autoregressive.models.conditions import TextConditions, TimeConditions


@dataclass
class ForwardPlan:
    """Made by [`CausalWanTransformer3DModel.plan_forward`]."""

    block_caches: Sequence[WanKVBlockCache | None]
    rotary_emb: RotaryEmbedding
    key_rotary_emb: RotaryEmbedding | None = None
    """Of all cached keys, where they are rotated when they are used."""
    time: TimeConditions | None = None
    text: TextConditions | None = None
    keys_values_only: bool = False
    """The forward ends with the last block's keys and values in the cache."""
