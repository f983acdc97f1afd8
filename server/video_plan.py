"""What a live video is made with beside its first prompt: settings, prompts that are planned, a camera."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from wan_autoregressive.configs.prompt_times import latent_frame_at, latent_frame_of
from wan_autoregressive.server.live_model import LiveModel
from wan_autoregressive.server.live_settings import check_settings
from wan_autoregressive.server.live_source import LiveSource
from wan_autoregressive.server.messages import Start
from wan_autoregressive.server.timeline import Decisions, TimelineChunk

_CAMERA_STRENGTH = 0.75


@dataclass
class VideoPlan:
    """Of one video. Chunks hold what was changed right before them, so a place of the video is known by its path."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Of the rollout from its start, instead of the model's own."""
    schedule: dict[int, str] = field(default_factory=dict)
    """Later prompts by latent frame; emptied once one is set by hand."""
    source: LiveSource | None = None
    """Frames that it is made from. They are gone once they are used, so there is no way back in such a video."""
    next: Decisions = field(default_factory=Decisions)
    """What was asked for before the next chunk."""

    @property
    def has_frames(self) -> bool:
        """Whether a chunk can be made: the camera, if there is one, has sent enough."""
        return self.source is None or self.source.ready

    @classmethod
    def from_start(cls, model: LiveModel, start: Start) -> VideoPlan:
        """What a viewer asks for. Raises `ValueError` if it cannot work."""
        settings, source = start.settings.given(), None
        if start.camera and (start.image is not None or start.prompt_changes):
            raise ValueError("a video from the camera has neither an image to start from nor a schedule")
        if start.camera:
            settings.setdefault("strength", model.settings.get("strength") or _CAMERA_STRENGTH)
        else:
            settings.pop("strength", None)
        config = check_settings(model, settings)
        if start.camera:
            source = LiveSource(config.height, config.width, config.largest_chunk_frames)
        changes = start.prompt_changes or {}
        return cls(settings, {latent_frame_at(time, model.fps): prompt for time, prompt in changes.items()}, source)

    def settings_after(self, path: Iterable[TimelineChunk]) -> dict[str, Any]:
        """What the chunk behind a path is made with that is not the model's own, if nothing is decided before it."""
        return _joined(self.settings, *(chunk.decisions.settings for chunk in path))

    def next_settings(self, path: Iterable[TimelineChunk]) -> dict[str, Any]:
        """What the next chunk, behind this path, is made with that is not the model's own."""
        return _joined(self.settings_after(path), self.next.settings)

    def decide(self, before: TimelineChunk | None) -> Decisions:
        """For the next chunk, behind this one; None for the start of the video. Of its prompt what is due, if any."""
        prompt = self._planned_prompt(before) if self.next.prompt is None else self.next.prompt
        return replace(self.next, prompt=prompt)

    def change_prompt(self, prompt: str | None) -> None:
        """Make the next chunk and later ones with another prompt, whatever was planned; None keeps the present one."""
        self.schedule, self.next = {}, replace(self.next, prompt=prompt)

    def change_settings(self, model: LiveModel, path: Iterable[TimelineChunk], settings: dict[str, Any]) -> None:
        """Make the chunk behind a path and later ones otherwise. Raises `ValueError` for what cannot change so."""
        present = self.next_settings(path)
        config = check_settings(model, present)
        new = {name: value for name, value in settings.items() if getattr(config, name) != value}
        config.changed(**new)
        check_settings(model, _joined(present, new))
        self.next = replace(self.next, settings=_joined(self.next.settings, new))

    def keep_changes_of(self, dropped: Iterable[TimelineChunk]) -> None:
        """Chunks are dropped for another prompt: what was changed with them still holds."""
        changes = (chunk.decisions.settings for chunk in dropped)
        self.next = replace(self.next, settings=_joined(*changes, self.next.settings))

    def _planned_prompt(self, before: TimelineChunk | None) -> str | None:
        last, frame = (
            (-1, 0) if before is None else (latent_frame_of(before.start_frame), latent_frame_of(before.stop_frame))
        )
        due = [at for at in sorted(self.schedule) if last < at <= frame]
        return self.schedule[due[-1]] if due else None

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it; a camera as the mere fact."""
        return {
            "settings": self.settings,
            "schedule": {str(frame): prompt for frame, prompt in self.schedule.items()},
            "from_camera": self.source is not None,
            "next_prompt": self.next.prompt,
            "next_seed": self.next.seed,
            "next_settings": self.next.settings,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VideoPlan:
        """What `as_dict` gave. Raises `ValueError` for a video from a camera."""
        if values.get("from_camera"):
            raise ValueError("it was made from a camera, whose frames are gone; it can be watched, and not go on")
        decisions = Decisions(values["next_prompt"], values["next_seed"], values.get("next_settings", {}))
        schedule = {int(frame): prompt for frame, prompt in values.get("schedule", {}).items()}
        return cls(values.get("settings", {}), schedule, next=decisions)


def _joined(*settings: dict[str, Any]) -> dict[str, Any]:
    """Of two values the later one."""
    return {name: value for part in settings for name, value in part.items()}
