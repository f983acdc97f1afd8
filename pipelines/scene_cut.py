"""Shots: what the past is to a video once its scene has changed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.prompts import PromptState
from wan_autoregressive.pipelines.switching import Past, SwitchPolicy


@dataclass
class SceneCut(SwitchPolicy):
    """A new shot, of all videos of a batch together (LongLive 2.0, `multi_shot_*` and `shot_clean_recache`).

    The past stays in view, further away in time. Under absolute positions every shot begins `position_offset` latent
    frames later than it would, and positions have no end; relative ones know no offset. The first frames of the shot,
    at most as many as the sink has, are pinned beside the sink until the next shot's take their place. So a full
    window is the sink, the first frames of the shot and the newest frames.

    Args:
        position_offset: Latent frames, also a fraction.
        pin: Whether the first frames of a shot are pinned.
        clean_recache: Forget all but the sink before the first chunk's clean keys and values are written, so that
            these and all later chunks know nothing of the shots before. That chunk itself was still made in view of
            them.
        words: Only a prompt whose text begins with these words cuts, and any other is only a new text; of a batch the
            first prompt tells. If they are empty, every change of the prompt cuts. The model was trained on prompts of
            new shots that begin with "The scene transitions. ".
    """

    has_endless_positions = True
    position_offset: float = 8.0
    pin: bool = True
    clean_recache: bool = False
    words: str = ""

    def __post_init__(self) -> None:
        if not (isinstance(self.position_offset, int | float) and 0 <= self.position_offset < math.inf):
            raise ValueError(f"position_offset is {self.position_offset!r}; it must be latent frames, 0 or more")
        self._shot_start: int | None = None
        """First frame of a shot whose first chunk is not cached yet."""

    @classmethod
    def from_config(cls, config: RolloutConfig) -> Self:
        policy = super().from_config(config)
        if not policy.pin or not config.sink_frames or config.window_frames is None:
            return policy
        if config.position_mode == "sink_relative":
            raise ValueError(
                "scene_cut pins frames beside the sink, which position_mode 'sink_relative' would leave behind; use "
                "'relative', which gives what it would, or switch_options {'pin': False}"
            )
        largest = config.largest_chunk_frames
        needed = config.sink_frames + min(config.sink_frames, largest) + largest
        if config.window_frames < needed:
            raise ValueError(
                f"window_frames is {config.window_frames}; scene_cut needs {needed} for a sink of "
                f"{config.sink_frames}, {min(config.sink_frames, largest)} pinned frames and a chunk of {largest}. "
                "Use a larger window, a smaller sink or switch_options {'pin': False}"
            )
        return policy

    def begin_chunk(self, past: Past) -> None:
        if not past.frames_done and past.config.position_mode == "absolute":
            past.denoiser.jump(0.0)  # by a float: without an end from the start

    def switch(self, past: Past, old: PromptState) -> None:
        text = past.denoiser.prompt.text
        if self.words and (text is None or not text[0].startswith(self.words)):
            return
        self._shot_start = past.frames_done
        if past.config.position_mode == "absolute":
            past.denoiser.jump(float(self.position_offset))

    def cache_past(self, past: Past, write: Callable[[], None]) -> None:
        if self._shot_start is None:
            write()
            return
        frames = past.frames_done - self._shot_start
        if self.clean_recache:
            past.denoiser.keep_newest(frames)
        write()
        if self.pin and past.config.sink_frames:
            past.denoiser.pin_newest("shot", min(past.config.sink_frames, frames))
        self._shot_start = None

    def reset(self) -> None:
        self._shot_start = None

    def state_dict(self) -> dict[str, Any]:
        return {"shot_start": self._shot_start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._shot_start = state["shot_start"]
