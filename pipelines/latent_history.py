"""The last clean latents of a video, for rebuilding the cache under another prompt."""

from typing import Any

import torch


class LatentHistory:
    """The newest `max_frames` latent frames, `(batch, channels, frames, height, width)`; all if `max_frames` is None.

    Chunks are kept as they come and only joined when asked for.
    """

    def __init__(self, max_frames: int | None) -> None:
        self.max_frames = max_frames
        self._chunks: list[torch.Tensor] = []

    def append(self, latents: torch.Tensor) -> None:
        self._chunks.append(latents)
        if self.max_frames is None:
            return
        while self.num_frames - self._chunks[0].shape[2] >= self.max_frames:
            self._chunks.pop(0)

    def last(self, num_frames: int) -> torch.Tensor:
        """The newest `num_frames` frames."""
        return torch.cat(self._chunks, dim=2)[:, :, -num_frames:]

    def clear(self) -> None:
        self._chunks.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"chunks": list(self._chunks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._chunks = list(state["chunks"])

    def fork(self) -> "LatentHistory":
        """A copy that goes on on its own. Tensors in here are replaced, never written to, so both share them."""
        twin = LatentHistory(self.max_frames)
        twin._chunks = list(self._chunks)
        return twin

    @property
    def num_frames(self) -> int:
        """Frames held: up to a chunk more than `max_frames`."""
        return sum(chunk.shape[2] for chunk in self._chunks)

    @property
    def nbytes(self) -> int:
        return sum(chunk.numel() * chunk.element_size() for chunk in self._chunks)
