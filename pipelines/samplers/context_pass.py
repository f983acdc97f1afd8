"""The context pass that runs late: what samplers have in common that write a finished chunk's clean keys and values.

It runs before the next chunk, so that a chunk is handed out without waiting for it and the last one never pays for it.
"""

from typing import Any

from wan_autoregressive.pipelines.denoiser import Window
from wan_autoregressive.pipelines.samplers.base import Sampler, SamplingContext


class ContextPassSampler(Sampler):
    """A subclass sets `due` to the frames of a chunk that it has finished."""

    def __init__(self, context: SamplingContext) -> None:
        super().__init__(context)
        self.due: range | None = None
        """Frames whose clean keys and values are still to be written."""

    def cache_past(self, skip_prompt: bool = False) -> None:
        if self.due is None:
            return
        latents = self.context.history.last(len(self.due))
        window = self.context_window(self.due, self.context.config.context_noise)
        self.context.denoiser.cache_context(latents, window, skip_prompt)
        self.due = None

    def context_window(self, frames: range, timestep: float) -> Window:
        """What the pass over finished frames sees and leaves in the cache."""
        return Window(frames, (timestep,))

    def reset(self) -> None:
        self.due = None

    def state_dict(self) -> dict[str, Any]:
        return {"due": None if self.due is None else (self.due.start, self.due.stop)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.due = None if state["due"] is None else range(*state["due"])
