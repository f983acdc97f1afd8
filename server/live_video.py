"""One live video: a rollout that can be taken back to any of its chunks.

Why no `RolloutSession`: that has one line of chunks, of which a seek forgets the later part. Here branches stay, and
there is no boundary that cannot be reached. The newest ones are held as forks. What is a few chunks behind one that is
held is made again, to the bit, since the timeline knows every decision. For the rest keys and values are made anew
from the latents of the last chunks before the place: near to what they were, not the same, and the timeline says so.
Only in a video that is made from a camera there is no way back: its frames are gone once they are used.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from wan_autoregressive.configs.prompt_times import latent_frame_of
from wan_autoregressive.pipelines.outputs import WanVideoChunk
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.pipelines.snapshots import Snapshots
from wan_autoregressive.server.live_model import LiveModel
from wan_autoregressive.server.live_settings import check_settings
from wan_autoregressive.server.live_source import LiveSource
from wan_autoregressive.server.timeline import Decisions, Timeline, TimelineChunk
from wan_autoregressive.server.video_folder import VideoFolder

MOST_REPEATED = 8
"""Chunks that are made again, unseen, for the sake of exactness."""


@dataclass(frozen=True)
class MadeChunk:
    """A new chunk of the timeline with its pixels, `(frames, height, width, 3)` in uint8."""

    entry: TimelineChunk
    frames: npt.NDArray[np.uint8]
    chunk: WanVideoChunk


class LiveVideo:
    """Only the model's thread calls its verbs; `lock` is held for every change of the timeline, for other readers.

    Args:
        folder: Its own; holds chunks, and after `save` all that is needed to go on.
        snapshots: Places of the video, beside its start, that are kept in memory to go back to at once.
        settings: Of its rollout, instead of the model's.
        schedule: Later prompts by latent frame; forgotten once one is set by hand.
        source: Frames that it is made from.
        stop_frame: Pixel frames that the video is to have; the last chunk is cut there. None does not end.
    """

    def __init__(
        self,
        model: LiveModel,
        folder: Path,
        prompt: str,
        seed: int,
        image: Image.Image | None = None,
        snapshots: int = 8,
        settings: dict[str, Any] | None = None,
        schedule: dict[int, str] | None = None,
        source: LiveSource | None = None,
        stop_frame: int | None = None,
    ) -> None:
        self.folder, self.first_prompt, self.seed = VideoFolder(folder), prompt, seed
        self.source, self.stop_frame = source, stop_frame
        self.timeline = Timeline()
        self.lock = threading.Lock()
        self._model, self._image = model, image
        self._first_settings, self._schedule = dict(settings or {}), dict(schedule or {})
        self._snapshots: Snapshots[int | None] = Snapshots(None, snapshots)
        self._rollout: WanRollout | None = None
        self._to_repeat: list[TimelineChunk] = []
        self._next = Decisions()
        self._next_is_near = False
        self._run_up_frames = 0
        """Latent frames of the rollout that are given, to see a past; they are chunks of the timeline already."""
        self.folder.make()

    @property
    def prompt(self) -> str:
        """Of the next chunk."""
        return self._decide().prompt or self._prompt_at(self.timeline.tip)

    @property
    def settings(self) -> dict[str, Any]:
        """What the next chunk is made with that is not the model's own."""
        return _joined(self._settings_after(self.timeline.branch_path()), self._next.settings)

    @property
    def has_frames(self) -> bool:
        """Whether a chunk can be made: the camera, if there is one, has sent enough."""
        return self.source is None or self.source.ready

    @property
    def is_complete(self) -> bool:
        """Whether the present branch has all frames that the video is to have."""
        return self.stop_frame is not None and self._next_frame >= self.stop_frame

    @property
    def is_near(self) -> bool:
        """Whether the next chunk sees a past that was made anew from latents."""
        return self._next_is_near

    @property
    def num_to_repeat(self) -> int:
        """Chunks that `advance` will make again before the next new one, given ones of a run-up included."""
        done = 0 if self._rollout is None else self._rollout.frames_done
        return len(self._to_repeat) + self._model.num_chunks(max(0, self._run_up_frames - done))

    def advance(self) -> MadeChunk | None:
        """Make the next chunk; or, on the way to a place that no snapshot holds, one before it and give nothing."""
        rollout = self._open()
        try:
            return self._step(rollout)
        except BaseException:  # half-written: whoever tries again begins at a snapshot
            self._rollout, self._to_repeat = None, []
            raise

    def _step(self, rollout: WanRollout) -> MadeChunk | None:
        if rollout.frames_done < self._run_up_frames:
            rollout.step()
            return None
        repeated = self._to_repeat[0] if self._to_repeat else None
        decided = repeated.decisions if repeated else self._decide()
        if decided.seed is not None:
            rollout.noise.generator.manual_seed(decided.seed)  # type: ignore[union-attr]
        if decided.settings:
            rollout.change(**decided.settings)
        made = rollout.step(prompt=decided.prompt)
        if repeated:
            self._to_repeat.pop(0)
            self._keep(repeated.id, rollout)
            return None
        frames = made.frames[0]
        if self.stop_frame is not None:
            frames = frames[: self.stop_frame - self._next_frame]
        noise = rollout.noise.generator.get_state()  # type: ignore[union-attr]
        self.folder.write_latents(self.timeline.next_id, made.latents, noise)
        with self.lock:
            entry = self.timeline.append(
                *(self._next_frame, len(frames), self.prompt),
                *(decided.prompt, decided.seed, decided.settings or None, self._next_is_near),
            )
        self._next, self._next_is_near = Decisions(), False
        self._keep(entry.id, rollout)
        return MadeChunk(entry, frames, made)

    def change_prompt(self, prompt: str, after: int | None) -> list[int]:
        """Go on with another prompt after a chunk of the present branch; what comes later is dropped, ids returned."""
        with self.lock:
            before = self.timeline.branch_path()
            dropped = self.timeline.cut_after(after)
        settings = [chunk.decisions.settings for chunk in before if chunk.id in dropped]
        self._next.settings = _joined(*settings, self._next.settings)  # what was set there still holds
        self._snapshots.drop(dropped)
        for part in dropped:
            self.folder.remove_chunk(part)
        if dropped:
            self._go_to(after)
        self._set_next(prompt)
        return dropped

    def fork(self, after: int | None, prompt: str | None = None, seed: int | None = None) -> None:
        """Go on after any chunk, on the branch that ends there or on a new one. `KeyError` if it is not kept."""
        with self.lock:
            before = self.timeline.tip
            self.timeline.go_on_after(after)
        if after != before:
            self._next = Decisions()
            self._go_to(after)
        if prompt is not None:
            self._set_next(prompt)
        if seed is not None:
            self._next.seed = seed

    def change_settings(self, settings: dict[str, Any]) -> None:
        """Make the next chunk and later ones with other settings. Raises `ValueError` for what cannot change so."""
        present = check_settings(self._model, self.settings)
        new = {name: value for name, value in settings.items() if getattr(present, name) != value}
        present.changed(**new)
        check_settings(self._model, {**self.settings, **new})
        self._next.settings.update(new)

    def save(self) -> None:
        """Write what is needed to go on from the end of the present branch, to the bit where that is exact.

        Raises:
            OSError: it could not be written; what was saved before is still whole.
        """
        tip = self.timeline.tip
        if self._rollout is not None and not (self._to_repeat or self._next_is_near or self.source):
            self.folder.save_rollout(tip, self._rollout)
        self.folder.write_description(self.describe())
        if self.folder.has_rollout(tip):  # else an older one is what to begin from
            self.folder.remove_rollouts(but=tip)

    def describe(self) -> dict[str, Any]:
        """The whole video in plain values."""
        with self.lock:
            return {
                "prompt": self.first_prompt,
                "seed": self.seed,
                "next_prompt": self._next.prompt,
                "next_seed": self._next.seed,
                "next_settings": self._next.settings,
                "settings": self._first_settings,
                "schedule": {str(frame): prompt for frame, prompt in self._schedule.items()},
                "from_image": self._image is not None,
                "from_camera": self.source is not None,
                "fps": self._model.fps,
                **self.timeline.as_dict(),
            }

    @classmethod
    def load(cls, model: LiveModel, path: Path, snapshots: int = 8, stop_frame: int | None = None) -> LiveVideo:
        """Take up what `save` wrote.

        Raises:
            ValueError, OSError: it is damaged, or made from a camera. That it was made with another model, `advance`
                says.
        """
        folder = VideoFolder(path)
        values = folder.read_description()
        if values.get("from_camera"):
            raise ValueError("it was made from a camera, whose frames are gone; it can be watched, and not go on")
        image = folder.read_image() if values["from_image"] else None
        schedule = {int(frame): prompt for frame, prompt in values.get("schedule", {}).items()}
        video = cls(
            *(model, path, values["prompt"], values["seed"], image, snapshots, values.get("settings"), schedule),
            stop_frame=stop_frame,
        )
        video.timeline = Timeline.from_dict(values)
        video._next = Decisions(values["next_prompt"], values["next_seed"], values.get("next_settings", {}))
        video._mend()
        return video

    def _mend(self) -> None:
        """After a crash: what came behind the last save is lost, and what cannot be shown any more is left out."""
        on_disk, timeline = self.folder.chunks, self.timeline
        later = on_disk - timeline.chunks.keys()
        timeline.remove(timeline.chunks.keys() - on_disk)
        if later:
            timeline.next_id = max(timeline.next_id, max(later) + 1)  # a viewer may hold chunks of these numbers
            self.folder.write_description(self.describe())
            for chunk in later:
                self.folder.remove_chunk(chunk)

    @property
    def _next_frame(self) -> int:
        """First pixel frame of the next chunk."""
        tip = self.timeline.tip
        return 0 if tip is None else self.timeline.chunks[tip].stop_frame

    def _open(self) -> WanRollout:
        if self._rollout is None:
            self._go_to(self.timeline.tip)
        assert self._rollout is not None
        return self._rollout

    def _go_to(self, chunk: int | None) -> None:
        """Stand behind a chunk; or at a place before it, with what is to be repeated or run up from there."""
        path = self.timeline.path(chunk)
        base = len(path)  # chunks before the place to begin from
        while base and not self._can_begin_after(path, base):
            base -= 1
        self._run_up_frames, self._next_is_near = 0, False
        self._to_repeat = path[base:]
        if len(self._to_repeat) > MOST_REPEATED and self._can_run_up_to(path):
            self._to_repeat, self._next_is_near = [], True
            self._rollout = self._run_up_to(path)
        elif self._to_repeat and self._to_repeat[0].near:
            self._rollout = self._run_up_to(path[:base])
        else:
            self._rollout = self._begin_after(path[base - 1].id if base else None)

    def _can_begin_after(self, path: list[TimelineChunk], base: int) -> bool:
        place, next_is_near = path[base - 1].id, base < len(path) and path[base].near
        return place in self._snapshots or self.folder.has_rollout(place) or next_is_near

    def _begin_after(self, place: int | None) -> WanRollout:
        if place in self._snapshots:
            return self._snapshots.fork(place)
        if place is None:
            if self._image is not None:
                self.folder.write_image(self._image)
            rollout = self._model.start(self.first_prompt, self.seed, self._image, self._first_settings, self.source)
        else:
            rollout = self._model.resume(self.folder.rollout_path(place))
        self._keep(place, rollout)
        return rollout

    def _can_run_up_to(self, path: list[TimelineChunk]) -> bool:
        frames = self._model.run_up_frames(self._settings_after(path))
        return bool(frames) and all(
            self.folder.has_latents(part.id) for part in path[-self._model.num_chunks(frames) :]
        )

    def _run_up_to(self, path: list[TimelineChunk]) -> WanRollout:
        """A rollout that is given the latents of the last chunks of `path`, whose `step` hands them out first."""
        settings = self._settings_after(path)
        self._run_up_frames = self._model.run_up_frames(settings)
        last = path[-self._model.num_chunks(self._run_up_frames) :]
        latents, noise = self.folder.read_latents([part.id for part in last])
        return self._model.start_behind(latents[:, :, -self._run_up_frames :], noise, path[-1].prompt, settings)

    def _keep(self, place: int | None, rollout: WanRollout) -> None:
        if self.source is None:
            self._snapshots.keep(place, rollout)

    def _decide(self) -> Decisions:
        """What is decided before the next new chunk: what was asked for, and the prompt that is due."""
        prompt = self._scheduled() if self._next.prompt is None else self._next.prompt
        return replace(self._next, prompt=prompt)

    def _scheduled(self) -> str | None:
        """The prompt that the schedule has for the next chunk."""
        tip = self.timeline.tip
        before = -1 if tip is None else latent_frame_of(self.timeline.chunks[tip].start_frame)
        due = [at for at in sorted(self._schedule) if before < at <= latent_frame_of(self._next_frame)]
        return self._schedule[due[-1]] if due else None

    def _settings_after(self, path: list[TimelineChunk]) -> dict[str, Any]:
        """What a chunk behind this path is made with, if nothing is decided before it."""
        return _joined(self._first_settings, *(chunk.decisions.settings for chunk in path))

    def _set_next(self, prompt: str) -> None:
        self._schedule.clear()
        self._next.prompt = None if prompt == self._prompt_at(self.timeline.tip) else prompt

    def _prompt_at(self, chunk: int | None) -> str:
        return self.first_prompt if chunk is None else self.timeline.chunks[chunk].prompt


def _joined(*settings: dict[str, Any]) -> dict[str, Any]:
    """Of two values the later one."""
    return {name: value for part in settings for name, value in part.items()}
