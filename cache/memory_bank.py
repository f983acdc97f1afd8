"""Single frames out of the whole video beside the window, chosen by how much they have to do with the prompt.

MemFlow (KlingTeam/MemFlow). Such a frame keeps the keys and values that it was written with. It may be in the window
as well and then counts twice.
"""

from collections.abc import Callable
from typing import Any

import torch

from wan_autoregressive.cache.dynamic_dims import mark_dynamic


class MemoryBank:
    """Keys and values of up to `num_frames` frames of one block, and of one more that may enter.

    They are kept in the dtype of the model, `(batch, num_frames + 1, frame_size, heads, head_dim)`, in memory that
    never moves.

    Args:
        num_frames: 0 is no bank at all.
        frame_size: Tokens of a frame.
    """

    def __init__(self, num_frames: int = 0, frame_size: int = 0) -> None:
        if num_frames < 0 or (num_frames and frame_size < 1):
            raise ValueError(
                f"a memory bank of {num_frames} frames with {frame_size} tokens each; it must be at least 0 frames, "
                "and at least 1 token in each"
            )
        self.num_frames = num_frames
        self.frame_size = frame_size
        self._num_held = 0
        self._key: torch.Tensor | None = None
        self._value: torch.Tensor | None = None

    def make_room(self, like: torch.Tensor) -> None:
        """Allocate for tokens like these, `(batch, tokens, heads, head_dim)`, and forget all frames."""
        self._num_held = 0
        if not self.num_frames:
            return
        shape = like.shape[0], self.num_frames + 1, self.frame_size, *like.shape[2:]
        with torch.inference_mode(False):  # to be written outside of that mode as well
            self._key, self._value = like.new_zeros(shape), like.new_zeros(shape)

    def propose(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """The frame that `add` will let in from now on, `(batch, frame_size, heads, head_dim)`: a copy."""
        for frames, frame in zip(self._needed_frames(), (key, value), strict=True):
            frames[:, -1] = frame

    def add(
        self,
        length: int,
        text_key: torch.Tensor | None,
        total: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Let the proposed frame in.

        Args:
            length: Frames that the bank is to hold then, if it can: the proposed one in the last place, and what is
                there already before it. If it cannot, only the `num_frames - 1` that have most to do with the prompt
                stay, best first, and the proposed one comes behind them.
            text_key: `(batch, text_tokens, heads, head_dim)`. The prompt's keys in this block's cross-attention, for a
                bank that is full.
            total: Of scores `(batch, frames)` over all heads, where others have some of them.
        """
        key, value = self._needed_frames()
        if length > self.num_frames:
            if text_key is None:
                raise RuntimeError(f"a bank of {self.num_frames} frames is full: pass the keys of the prompt")
            scores = relevance(text_key, key[:, :-1])
            scores = scores if total is None else total(scores)
            best = scores.topk(self.num_frames - 1, dim=1).indices  # (batch, frames)
            batch = torch.arange(len(best), device=best.device)[:, None]
            for frames in (key, value):
                frames[:, :-2] = frames[batch, best]
        self._num_held = min(length, self.num_frames)
        for frames in (key, value):
            frames[:, self._num_held - 1] = frames[:, -1]

    @property
    def held(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values of the frames in the bank, `(batch, tokens, heads, head_dim)`: views. `None` if it is
        empty."""
        if not self._num_held:
            return None
        key, value = (frames[:, : self._num_held].flatten(1, 2) for frames in self._needed_frames())
        mark_dynamic(key, value)
        return key, value

    def reset(self) -> None:
        """Forget all frames; memory stays allocated."""
        self._num_held = 0

    def release(self) -> None:
        """Forget all frames and free the memory."""
        self._num_held, self._key, self._value = 0, None, None

    def state_dict(self) -> dict[str, Any]:
        """Plain values, and the tensors themselves."""
        return {"num_held": self._num_held, "key": self._key, "value": self._value}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over what `state_dict` of a bank of the same size gave, copied to `device`."""
        self._num_held = state["num_held"]
        self._key, self._value = (
            None if frames is None else frames.to(device, copy=True) for frames in (state["key"], state["value"])
        )

    def expected_bytes(self, batch_size: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of both buffers, before anything is allocated."""
        if not self.num_frames:
            return 0
        return 2 * batch_size * (self.num_frames + 1) * self.frame_size * num_heads * head_dim * dtype.itemsize

    @property
    def nbytes(self) -> int:
        return sum(frames.nbytes for frames in (self._key, self._value) if frames is not None)

    def _needed_frames(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._key is None or self._value is None:
            raise RuntimeError("the memory bank has no memory yet: nothing was written to the cache")
        return self._key, self._value


def relevance(text_key: torch.Tensor, frame_keys: torch.Tensor) -> torch.Tensor:
    """Product of the mean key of a prompt, padding included, and that of each frame, summed over heads: `(batch,
    frames)`, float32.

    Args:
        text_key: `(batch, text_tokens, heads, head_dim)`
        frame_keys: `(batch, frames, frame_size, heads, head_dim)`
    """
    text, frames = text_key.float().mean(dim=1), frame_keys.float().mean(dim=2)
    return torch.einsum("bhd,bfhd->bf", text, frames)
