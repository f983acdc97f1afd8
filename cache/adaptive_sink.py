"""A sink that gives up frames which no longer look like the video: StreamDiffusionV2.

Before a frame is written, the means of its keys and of its values are compared with those of every sink frame. If the
sink frame that is least like it is less like it than a threshold, its slots are the next to be written, and what is
written there then belongs to the sink. After chenfengxu714/StreamDiffusionV2 (`models/wan/causal_model.py`), where too
a sink frame that is not there yet is like nothing.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from wan_autoregressive.cache.dynamic_dims import mark_dynamic
from wan_autoregressive.cache.token_buffer import TokenBuffer


@dataclass(frozen=True)
class AdaptiveSink:
    """For caches that are written frame by frame.

    Args:
        threshold: Mean of both cosines, -1 to 1, below which a sink frame is given up.
        sink_frames, window_frames: Of the cache.
        frame_size: Tokens of a frame.
    """

    threshold: float
    sink_frames: int
    window_frames: int
    frame_size: int

    def similarity(
        self,
        sink: tuple[TokenBuffer, TokenBuffer],
        frame: tuple[torch.Tensor, torch.Tensor],
        held_frames: torch.Tensor,
    ) -> torch.Tensor:
        """How much each sink frame is like the new one, `(batch, sink_frames)`: mean cosine of keys and values.

        Args:
            sink: Slots of keys and of values for the whole sink.
            frame: Those of the new frame, `(batch, frame_size, heads, head_dim)`.
            held_frames: How many sink frames are there; the others are like nothing, 0.
        """
        cosines = []
        for buffer, new in zip(sink, frame, strict=True):
            frames = buffer.tokens().unflatten(1, (self.sink_frames, self.frame_size)).mean(2)
            cosines.append(F.cosine_similarity(frames.flatten(2), new.mean(1, keepdim=True).flatten(2), dim=-1))
        is_held = torch.arange(self.sink_frames, device=held_frames.device) < held_frames
        return torch.where(is_held, (cosines[0] + cosines[1]) / 2, 0)


class SinkQueue:
    """Which frame's slots are written next, for each row of a batch, on the device: nothing waits for it.

    Given-up sink frames come first, the newest of them before the others; then the other frames in turn. A forward
    works on a copy, which `commit` takes over: one that failed changes nothing.

    Args:
        rows: Of the batch.
        most: Forwards at most before the window is full; each may give up a frame.
    """

    def __init__(self, sink: AdaptiveSink, rows: int, most: int, device: torch.device) -> None:
        self.sink = sink
        with torch.inference_mode(False):  # to be written outside of that mode as well
            self._state = torch.empty(2, rows, 2 + most + 1, dtype=torch.int64, device=device)
            self.held_frames = torch.empty((), dtype=torch.int64, device=device)
            """Sink frames that are there when a forward begins."""
            self.is_full = torch.empty((), dtype=torch.bool, device=device)
            """Whether a frame has to go for the one that is new."""
        self.reset()

    def begin(self, start: int, stop: int, held_frames: int, is_full: bool) -> torch.Tensor:
        """A forward is about to write rows from `start` to `stop`; returns what `next_slots` works on.

        The rest is in tensors, so that a compiled block is the same for an empty sink and a full window.
        """
        self.held_frames.fill_(held_frames)
        self.is_full.fill_(is_full)
        self._state[1].copy_(self._state[0])
        rows = self._state[1, start:stop]
        mark_dynamic(rows, dim=0)
        return rows

    def commit(self) -> None:
        """It has succeeded."""
        self._state[0].copy_(self._state[1])

    def next_slots(self, state: torch.Tensor, similarity: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        """The slots of a new frame, `(rows, frame_size)`.

        Args:
            state: Of these rows, see `begin`.
            similarity: `(rows, sink_frames)`. Of the sink frames and the new one.
            free: `(rows, frame_size)`. Its slots while the window fills.
        """
        given_up, count, following = state[:, 2:], state[:, :1], state[:, 1:2]
        lowest, frame = similarity.min(dim=1, keepdim=True)
        given_up.scatter_(1, count, frame)
        count += lowest < self.sink.threshold
        is_given_up = self.is_full & (count > 0)
        chosen = torch.where(is_given_up, given_up.gather(1, (count - 1).clamp(min=0)), following)
        count -= is_given_up.to(count.dtype)
        first, others = self.sink.sink_frames, self.sink.window_frames - self.sink.sink_frames
        is_next = self.is_full & ~is_given_up
        following.copy_(torch.where(is_next, first + (following + 1 - first) % others, following))
        size = self.sink.frame_size
        return torch.where(self.is_full, chosen * size + torch.arange(size, device=chosen.device), free)

    def reset(self) -> None:
        self._state.zero_()
        self._state[:, :, 1] = self.sink.sink_frames

    def state_dict(self) -> torch.Tensor:
        """Between two forwards: for each row how many frames are given up, who is next in turn, and which they are."""
        return self._state[0]

    def load_state_dict(self, state: torch.Tensor) -> None:
        self._state[0].copy_(state)

    @property
    def nbytes(self) -> int:
        return self._state.nbytes
