"""What happens to the sink when frames leave the window."""

from dataclasses import dataclass
from typing import Protocol

import torch

from wan_autoregressive.cache.token_window import Span


class SinkUpdate(Protocol):
    """Lets evicted tokens leave a trace in the sink. Without one the sink is static."""

    def absorb(self, buffer: torch.Tensor, sink_size: int, evicted: tuple[Span, ...]) -> None:
        """Change the sink, slots `[0, sink_size)` of a key or value buffer `(batch, capacity, heads, head_dim)`, in
        place. `evicted` are the slots of the tokens that go, oldest first; their content is still there."""


@dataclass(frozen=True)
class MovingAverageSink:
    """`sink = decay * sink + (1 - decay) * evicted`, on values and on keys without rotary embedding.

    Reward-Forcing (`wan/modules/causal_model.py`), where as many frames are evicted as the sink has. For other sizes
    the evicted frames are folded into the sink one after the other, starting at its first frame each time.

    Args:
        decay: Share of the old sink, 0 to 1.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay is {self.decay}; it is the share of the old sink, 0 to 1")

    def absorb(self, buffer: torch.Tensor, sink_size: int, evicted: tuple[Span, ...]) -> None:
        slot = 0
        for start, stop in evicted:
            while start < stop:
                count = min(stop - start, sink_size - slot)
                buffer[:, slot : slot + count].lerp_(buffer[:, start : start + count], 1 - self.decay)
                start, slot = start + count, (slot + count) % sink_size
