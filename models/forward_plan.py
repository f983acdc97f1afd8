"""What a forward needs beside its inputs."""

from collections.abc import Sequence
from dataclasses import dataclass

from wan_autoregressive.cache import LaneBlock, PastView, WanKVBlockCache
from wan_autoregressive.cache.rotary import RotaryEmbedding
from wan_autoregressive.models.conditions import TextConditions, TimeConditions


@dataclass(frozen=True)
class PastFrames:
    """Which of the past a forward sees, in latent frames."""

    newest: int | None = None
    """The ones right before its own; `None` is all that is held."""
    sink: bool = True
    """Whether the sink is seen where `newest` does not reach it, and may be moved. If not, it is like other frames:
    seen as far as `newest` reaches, where it was written."""

    def in_tokens(self, tokens_per_frame: int) -> PastView:
        return PastView(None if self.newest is None else self.newest * tokens_per_frame, self.sink)


@dataclass
class ForwardPlan:
    """Made by [`CausalWanTransformer3DModel.plan_forward`]."""

    block_caches: Sequence[WanKVBlockCache | LaneBlock | None]
    rotary_emb: RotaryEmbedding
    key_rotary_emb: RotaryEmbedding | None = None
    """Of all cached keys, where they are rotated when they are used."""
    time: TimeConditions | None = None
    text: TextConditions | None = None
    keys_values_only: bool = False
    """The forward ends with the last block's keys and values in the cache."""
    reads_text_only: bool = False
    """The forward ends with the prompt's keys and values in `text`."""
