"""One live video: a rollout that can be taken back to any of its chunks, and its place on the disk.

Why no `RolloutSession`: that has one line of chunks, of which a seek forgets the later part. Here branches stay, and
there is no boundary that cannot be reached: what no snapshot holds is made again from the nearest one, to the bit,
since the timeline knows every decision.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from wan_autoregressive.atomic_file import write_text
from wan_autoregressive.pipelines.outputs import WanVideoChunk
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.server.live_model import LiveModel
from wan_autoregressive.server.timeline import Timeline, TimelineChunk
from wan_autoregressive.server.video_plan import VideoPlan

FORMAT = 1
IMAGE_NAME = "image.png"
"""In its folder, where it starts from one."""


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
        plan: Settings, prompts to come, a camera.
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
    ) -> None:
        self.plan = VideoPlan() if plan is None else plan
        self.folder, self.first_prompt, self.seed = folder, prompt, seed
        self.timeline = Timeline()
        self.lock = threading.Lock()
        self._model, self._image, self._max_snapshots = model, image, snapshots
        self._snapshots: dict[int | None, WanRollout] = {}
        self._rollout: WanRollout | None = None
        self._to_repeat: list[TimelineChunk] = []
        self._next_prompt: str | None = None
        self._next_seed: int | None = None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.chunk_folder.mkdir(mode=0o700, exist_ok=True)
        if image is not None and not (folder / IMAGE_NAME).exists():
            image.save(folder / IMAGE_NAME)

    @property
    def chunk_folder(self) -> Path:
        return self.folder / "chunks"

    @property
    def prompt(self) -> str:
        """Of the next chunk."""
        return self._prompt_now() if self._next_prompt is None else self._next_prompt

    @property
    def settings(self) -> dict[str, Any]:
        """What the next chunk is made with that is not the model's own."""
        return self.plan.settings_after(self.timeline.branch_path())

    @property
    def num_to_repeat(self) -> int:
        """Chunks that `advance` will make again before the next new one."""
        return len(self._to_repeat)

    def advance(self) -> MadeChunk | None:
        """Make the next chunk; or, on the way to a place that no snapshot holds, repeat one and give nothing."""
        rollout = self._open()
        repeated = self._to_repeat[0] if self._to_repeat else None
        new_prompt = repeated.new_prompt if repeated else self._next_prompt
        new_seed = repeated.new_seed if repeated else self._next_seed
        new_settings = repeated.new_settings if repeated else self.plan.next_settings or None
        if repeated is None and new_prompt is None:
            tip = self.timeline.tip
            new_prompt = self.plan.planned_prompt(None if tip is None else self.timeline.chunks[tip])
        if new_seed is not None:
            rollout.noise.generator.manual_seed(new_seed)  # type: ignore[union-attr]
        try:
            if new_settings is not None:
                rollout.change(**new_settings)
            made = rollout.step(prompt=new_prompt)
        except BaseException:  # half-written: whoever tries again begins at a snapshot
            self._rollout, self._to_repeat = None, []
            raise
        if repeated:
            self._to_repeat.pop(0)
            self._keep_snapshot(repeated.id)
            return None
        frames = made.frames[0]
        with self.lock:
            entry = self.timeline.append(
                *(made.start_pixel_frame, len(frames), new_prompt or self._prompt_now()),
                *(new_prompt, new_seed, new_settings),
            )
        self._forget_next()
        self._keep_snapshot(entry.id)
        return MadeChunk(entry, frames, made)

    def change_prompt(self, prompt: str, after: int | None) -> list[int]:
        """Go on with another prompt after a chunk of the present branch; what comes later is dropped, ids returned."""
        with self.lock:
            before = self.timeline.branch_path()
            dropped = self.timeline.cut_after(after)
        self.plan.keep_changes_of(chunk for chunk in before if chunk.id in dropped)
        for part in dropped:
            self._snapshots.pop(part, None)
            remove_chunk(self.chunk_folder, part)
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
            self._forget_next()
            self._go_to(after)
        if prompt is not None:
            self._set_next(prompt)
        if seed is not None:
            self._next_seed = seed

    def change_settings(self, settings: dict[str, Any]) -> None:
        """Make the next chunk and later ones with other settings. Raises `ValueError` for what cannot change so."""
        self.plan.change(self._model, self.timeline.branch_path(), settings)

    def save(self) -> None:
        """Write what is needed to go on from the end of the present branch to the bit."""
        if self._rollout is not None and not self._to_repeat and self.plan.source is None:
            self._rollout.save(self._state_folder())
        write_text(self.folder / "session.json", json.dumps(self.describe()))
        for old in set(self.folder.glob("rollout-*")) - {self._state_folder()}:
            shutil.rmtree(old, ignore_errors=True)

    def describe(self) -> dict[str, Any]:
        """The whole video in plain values."""
        with self.lock:
            return {
                "format": FORMAT,
                "prompt": self.first_prompt,
                "seed": self.seed,
                "next_prompt": self._next_prompt,
                "next_seed": self._next_seed,
                **self.plan.as_dict(),
                "from_image": self._image is not None,
                "fps": self._model.fps,
                **self.timeline.as_dict(),
            }

    @classmethod
    def load(cls, model: LiveModel, folder: Path, snapshots: int = 8) -> LiveVideo:
        """Take up what `save` wrote.

        Raises:
            ValueError: it is damaged. That it was made with another model, `advance` says.
        """
        values = read_description(folder)
        image = None
        if values["from_image"]:
            with Image.open(folder / IMAGE_NAME, formats=("PNG",)) as file:
                image = file.convert("RGB")
        plan = VideoPlan.from_dict(values)
        video = cls(model, folder, values["prompt"], values["seed"], image, snapshots, plan)
        video.timeline = Timeline.from_dict(values)
        video._next_prompt, video._next_seed = values["next_prompt"], values["next_seed"]
        return video

    def _state_folder(self) -> Path:
        """Named after the chunk that it stands behind, so that it never fits to another timeline."""
        return self.folder / f"rollout-{self.timeline.tip}"

    def _open(self) -> WanRollout:
        if self._rollout is None and self._state_folder().is_dir():
            self._rollout = self._model.resume(self._state_folder())
            self._keep_snapshot(self.timeline.tip)
        elif self._rollout is None:
            self._go_to(self.timeline.tip)
        assert self._rollout is not None
        return self._rollout

    def _start(self) -> WanRollout:
        plan = self.plan
        rollout = self._model.start(self.first_prompt, self.seed, self._image, plan.settings, plan.source)
        if plan.source is None:
            self._snapshots[None] = rollout.fork()
        return rollout

    def _go_to(self, chunk: int | None) -> None:
        """Stand after a chunk, or at a snapshot before it with the steps to it still to be repeated."""
        path = self.timeline.path(chunk)
        held = next((part.id for part in reversed(path) if part.id in self._snapshots), None)
        self._to_repeat = [part for part in path if held is None or part.index > self.timeline.chunks[held].index]
        self._rollout = self._snapshots[held].fork() if held in self._snapshots else self._start()

    def _forget_next(self) -> None:
        self._next_prompt = self._next_seed = None
        self.plan.next_settings = {}

    def _set_next(self, prompt: str) -> None:
        self.plan.schedule.clear()
        self._next_prompt = None if prompt == self._prompt_now() else prompt

    def _prompt_now(self) -> str:
        tip = self.timeline.tip
        return self.first_prompt if tip is None else self.timeline.chunks[tip].prompt

    def _keep_snapshot(self, chunk: int | None) -> None:
        assert self._rollout is not None
        if self.plan.source is not None:
            return
        self._snapshots[chunk] = self._rollout.fork()
        while len(self._snapshots) - (None in self._snapshots) > self._max_snapshots:
            self._drop_snapshot()
        release_free_memory()

    def _drop_snapshot(self) -> None:
        """The newer half stays; of the others, the one goes from which the snapshot before it is nearest."""
        held = sorted(key for key in self._snapshots if key is not None)
        older = held[: len(held) - self._max_snapshots // 2]
        del self._snapshots[min(older, key=self._steps_to_repeat)]

    def _steps_to_repeat(self, chunk: int) -> int:
        """Chunks that would have to be made again to stand there without its snapshot."""
        steps, at = 1, self.timeline.chunks[chunk].parent
        while at is not None and at not in self._snapshots:
            steps, at = steps + 1, self.timeline.chunks[at].parent
        return steps


def read_description(folder: Path) -> dict[str, Any]:
    """What `describe` gave when the video in `folder` was saved; `ValueError` if that cannot be read."""
    try:
        values: dict[str, Any] = json.loads((folder / "session.json").read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"it has format {values['format']}, this version reads {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the session in '{folder}' cannot be read: {error}") from error
    return values


def remove_chunk(folder: Path, chunk: int) -> None:
    """Remove the files of a chunk, as far as there are any."""
    for kind in ("mp4", "webp", "images"):
        (folder / f"{chunk}.{kind}").unlink(missing_ok=True)


def release_free_memory() -> None:
    """Give what glibc holds free between snapshots back to the system: it grows by ten times their size otherwise."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)
