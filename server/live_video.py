"""One live video: a rollout that can be taken back to any of its chunks.

Why no `RolloutSession`: that has one line of chunks, of which a seek forgets the later part. Here branches stay, and
there is no boundary that cannot be reached. The newest ones are held as forks. What is a few chunks behind one that is
held is made again, to the bit, since the timeline knows every decision. For the rest keys and values are made anew
from the latents of the last chunks before the place: near to what they were, not the same, and the timeline says so.
Only in a video that is made from a camera there is no way back: its frames are gone once they are used.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from wan_autoregressive.pipelines.outputs import WanVideoChunk
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.pipelines.snapshots import Snapshots
from wan_autoregressive.server.live_model import LiveModel
from wan_autoregressive.server.made_by import check_made_by
from wan_autoregressive.server.made_chunk import MadeChunk
from wan_autoregressive.server.timeline import Decisions, Timeline, TimelineChunk
from wan_autoregressive.server.video_folder import VideoFolder
from wan_autoregressive.server.video_plan import VideoPlan

MOST_REPEATED = 8
"""Chunks that are made again, unseen, for the sake of exactness."""


class LiveVideo:
    """Only the model's thread calls its verbs; `lock` is held for every change of the timeline, for other readers.

    Args:
        folder: Its own; holds chunks, and after `save` all that is needed to go on.
        snapshots: Places of the video, beside its start, that are kept in memory to go back to at once.
        plan: Settings, prompts to come, a camera.
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
        plan: VideoPlan | None = None,
        stop_frame: int | None = None,
    ) -> None:
        self.folder, self.first_prompt, self.seed = VideoFolder(folder), prompt, seed
        self.plan, self.stop_frame = plan or VideoPlan(), stop_frame
        self.timeline = Timeline()
        self.lock = threading.Lock()
        self._model, self._image = model, image
        self._snapshots: Snapshots[int | None] = Snapshots(None, snapshots)
        self._rollout: WanRollout | None = None
        self._to_repeat: list[TimelineChunk] = []
        self._next_is_near = False
        self._run_up_frames = 0
        """Latent frames of the rollout that are given, to see a past; they are chunks of the timeline already."""
        self.folder.make()

    @property
    def prompt(self) -> str:
        """Of the next chunk."""
        return self.plan.decide(self._tip).prompt or self._present_prompt

    @property
    def settings(self) -> dict[str, Any]:
        """What the next chunk is made with that is not the model's own."""
        return self.plan.next_settings(self.timeline.branch_path())

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

    def advance(self, on_preview: Callable[[MadeChunk], None] | None = None) -> MadeChunk | None:
        """Make the next chunk; or, on the way to a place that no snapshot holds, one before it and give nothing.

        Args:
            on_preview: Called with a new chunk before its pixels are decoded in full, where there is a preview VAE.
        """
        rollout = self._open()
        try:
            return self._step(rollout, on_preview)
        except BaseException:  # half-written: whoever tries again begins at a snapshot
            self._rollout, self._to_repeat = None, []
            raise

    def _step(self, rollout: WanRollout, on_preview: Callable[[MadeChunk], None] | None) -> MadeChunk | None:
        if rollout.frames_done < self._run_up_frames:
            rollout.step()
            return None
        repeated = self._to_repeat[0] if self._to_repeat else None
        decided = repeated.decisions if repeated else self.plan.decide(self._tip)
        if decided.seed is not None:
            rollout.noise.generator.manual_seed(decided.seed)  # type: ignore[union-attr]
        if decided.settings:
            rollout.change(**decided.settings)
        shown: list[TimelineChunk] = []

        def show(chunk: WanVideoChunk) -> None:
            shown.append(self._enter(rollout, chunk, len(chunk.preview[0]), decided))
            if on_preview is not None:
                on_preview(MadeChunk(shown[0], chunk.preview[0], chunk, is_preview=True))

        rollout.on_preview = None if repeated else show
        made = rollout.step(prompt=decided.prompt)
        rollout.on_preview = None
        if repeated:
            self._to_repeat.pop(0)
            self._keep(repeated.id, rollout)
            return None
        frames = made.frames[0]
        if self.stop_frame is not None:
            frames = frames[: self.stop_frame - self._next_frame]
        entry = shown[0] if shown else self._enter(rollout, made, len(frames), decided)
        self._keep(entry.id, rollout)
        return MadeChunk(entry, frames, made, was_shown=bool(shown and on_preview))

    def _enter(self, rollout: WanRollout, made: WanVideoChunk, frames: int, decided: Decisions) -> TimelineChunk:
        """Put a new chunk on the timeline."""
        if self.plan.source is None:  # else there is no way back that would need them
            noise = rollout.noise.generator.get_state()  # type: ignore[union-attr]
            self.folder.write_latents(self.timeline.next_id, made.latents, noise)
        with self.lock:
            entry = self.timeline.append(self._next_frame, frames, self.prompt, decided, self._next_is_near)
        self.plan.next, self._next_is_near = Decisions(), False
        return entry

    def change_prompt(self, prompt: str, after: int | None) -> list[int]:
        """Go on with another prompt after a chunk of the present branch; what comes later is dropped, ids returned."""
        with self.lock:
            before = self.timeline.branch_path()
            dropped = self.timeline.cut_after(after)
        self.plan.keep_changes_of(chunk for chunk in before if chunk.id in dropped)
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
            self.plan.next = Decisions()
            self._go_to(after)
        if prompt is not None:
            self._set_next(prompt)
        if seed is not None:
            self.plan.next = replace(self.plan.next, seed=seed)

    def change_settings(self, settings: dict[str, Any]) -> None:
        """Make the next chunk and later ones with other settings. Raises `ValueError` for what cannot change so."""
        self.plan.change_settings(self._model, self.timeline.branch_path(), settings)

    def save(self) -> None:
        """Write what is needed to go on from the end of the present branch, to the bit where that is exact.

        Raises:
            OSError: it could not be written; what was saved before is still whole.
        """
        tip = self.timeline.tip
        if self._rollout is not None and not (self._to_repeat or self._next_is_near or self.plan.source):
            self.folder.save_rollout(tip, self._rollout)
        self._write_description()
        if self.folder.has_rollout(tip):  # else an older one is what to begin from
            self.folder.remove_rollouts(but=tip)

    def describe(self) -> dict[str, Any]:
        """The whole video in plain values."""
        with self.lock:
            return {
                "prompt": self.first_prompt,
                "seed": self.seed,
                **self.plan.as_dict(),
                "server_settings": self._model.own_settings,
                "from_image": self._image is not None,
                "fps": self._model.fps,
                **self.timeline.as_dict(),
            }

    @classmethod
    def load(cls, model: LiveModel, path: Path, snapshots: int = 8, stop_frame: int | None = None) -> LiveVideo:
        """Take up what `save` wrote. It goes on with the settings that its server had, whatever this one has.

        Raises:
            ValueError, OSError: it is damaged, made from a camera, or by another model.
        """
        folder = VideoFolder(path)
        values = folder.read_description()
        if "made_by" in values:  # else it was saved by an older version
            check_made_by(values["made_by"], model)
            model = model.with_settings(values["server_settings"])
        plan = VideoPlan.from_dict(values)
        image = folder.read_image() if values["from_image"] else None
        video = cls(model, path, values["prompt"], values["seed"], image, snapshots, plan, stop_frame)
        video.timeline = Timeline.from_dict(values)
        video._mend()
        return video

    def _write_description(self) -> None:
        self.folder.write_description({**self.describe(), "made_by": self._model.made_by})

    def _mend(self) -> None:
        """After a crash: what came behind the last save is lost, and what cannot be shown any more is left out."""
        numbers, timeline = self.folder.numbers, self.timeline
        timeline.remove(timeline.chunks.keys() - self.folder.chunks)
        lost = numbers - timeline.chunks.keys()
        if lost:
            timeline.next_id = max(timeline.next_id, max(lost) + 1)  # a viewer may hold chunks of these numbers
            self._write_description()
            for chunk in lost:
                self.folder.remove_chunk(chunk)

    @property
    def _tip(self) -> TimelineChunk | None:
        """The chunk before the next one."""
        return None if self.timeline.tip is None else self.timeline.chunks[self.timeline.tip]

    @property
    def _next_frame(self) -> int:
        """First pixel frame of the next chunk."""
        return 0 if self._tip is None else self._tip.stop_frame

    @property
    def _is_watched(self) -> bool:
        """Whether somebody sees it come: else it has no preview."""
        return self.stop_frame is None

    @property
    def _present_prompt(self) -> str:
        return self.first_prompt if self._tip is None else self._tip.prompt

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
            plan = self.plan
            rollout = self._model.start(
                *(self.first_prompt, self.seed, self._image, plan.settings, plan.source), preview=self._is_watched
            )
        else:
            rollout = self._model.resume(self.folder.rollout_path(place), preview=self._is_watched)
        self._keep(place, rollout)
        return rollout

    def _can_run_up_to(self, path: list[TimelineChunk]) -> bool:
        frames = self._model.run_up_frames(self.plan.settings_after(path))
        return bool(frames) and all(
            self.folder.has_latents(part.id) for part in path[-self._model.num_chunks(frames) :]
        )

    def _run_up_to(self, path: list[TimelineChunk]) -> WanRollout:
        """A rollout that is given the latents of the last chunks of `path`, whose `step` hands them out first."""
        settings = self.plan.settings_after(path)
        self._run_up_frames = self._model.run_up_frames(settings)
        last = path[-self._model.num_chunks(self._run_up_frames) :]
        latents, noise = self.folder.read_latents([part.id for part in last])
        latents = latents[:, :, -self._run_up_frames :]
        return self._model.start_behind(latents, noise, path[-1].prompt, settings, preview=self._is_watched)

    def _keep(self, place: int | None, rollout: WanRollout) -> None:
        if self.plan.source is None:
            self._snapshots.keep(place, rollout)

    def _set_next(self, prompt: str) -> None:
        self.plan.change_prompt(None if prompt == self._present_prompt else prompt)
