"""Render a video so that a crash costs at most the chunks since the last checkpoint.

Beside `x.mp4` a folder `x.resume` holds finished segments and the state of the rollout after them. `state.json` in it
is the one thing that counts: it names the segments that belong to the state, and it is replaced in one step. What a
crash left beyond it is rendered again.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from wan_autoregressive.configs import GenerateConfig
from wan_autoregressive.media.segments import join_segments
from wan_autoregressive.media.video_writer import VideoWriteError, VideoWriter
from wan_autoregressive.scripts.earlier_runs import first_difference
from wan_autoregressive.scripts.interrupts import SoftStop
from wan_autoregressive.scripts.output_files import OutputFiles
from wan_autoregressive.scripts.output_lock import StillHeld, never_lost
from wan_autoregressive.scripts.run_report import STAGES, RunTimes, write_chunk

_SEGMENTS = re.compile(r"segment-\d+(\.part)?\.mp4")


@dataclass(frozen=True)
class Checkpointing:
    """Save every so many chunks; and whether to go on with what an earlier run saved."""

    every_chunks: int
    resume: bool


@dataclass(frozen=True)
class Segment:
    """A part of the video that is finished."""

    name: str
    frames: int
    bytes: int
    sha256: str


@dataclass
class Progress:
    """What is done of a video, as it is saved with the state of its rollout."""

    arguments: dict[str, Any]
    """`GenerateConfig` as JSON, as it was given: the model's own settings are not filled in."""
    given_sha256: str | None
    """Of the pixels that the video starts from."""
    seed: int
    segments: list[Segment] = dataclasses.field(default_factory=list)
    times: RunTimes = dataclasses.field(default_factory=RunTimes)

    @property
    def frames(self) -> int:
        """Pixel frames in the segments."""
        return sum(segment.frames for segment in self.segments)

    @classmethod
    def of_folder(cls, folder: Path) -> Progress:
        """As it was saved. Raises `ValueError` if there is none, or it is damaged or another program's."""
        from wan_autoregressive.pipelines.state_folder import read_content

        try:
            progress = TypeAdapter(cls).validate_python(read_content(folder)["notes"])
            if progress.times.stages.keys() != set(STAGES):
                raise KeyError(f"stages {', '.join(STAGES)}")
            return progress
        except (ValidationError, KeyError, TypeError) as error:
            raise ValueError(f"'{folder}' holds a state that another version or another program saved") from error


def find_progress(
    output: Path, config: GenerateConfig, given: Any, checkpointing: Checkpointing | None
) -> Progress | None:
    """What an earlier run saved of the video `output`, checked without loading a model; None when there is nothing.

    Args:
        config: of this one video, as it was given.
        given: pixels that the video starts from, a NumPy array, or None.

    Raises:
        ValueError: it was made with other arguments (the first is named), is damaged, or would be lost because the
            run shall not resume.
    """
    if checkpointing is None:
        return None
    from wan_autoregressive.pipelines.state_folder import has_state

    folder = OutputFiles(output).resume_folder
    if not has_state(folder):
        return None
    if not checkpointing.resume:
        raise ValueError(
            f"'{folder}' holds an unfinished '{output.name}'; add --resume to go on with it, or delete that folder to "
            "start anew"
        )
    progress = Progress.of_folder(folder)
    # A seed that was drawn may be given now: it is the same.
    ignore = frozenset({"seed"}) if config.seed == progress.seed else frozenset()
    difference = first_difference(progress.arguments, config, ignore)
    if difference is None and progress.given_sha256 != pixels_sha256(given):
        difference = "the given image or clip has other pixels now"
    if difference is not None:
        raise ValueError(
            f"cannot resume '{output.name}' with other arguments: {difference}; give the old ones, or delete "
            f"'{folder}' to start anew"
        )
    for segment in progress.segments:
        _check_segment(folder / segment.name, segment)
    return progress


def pixels_sha256(pixels: Any) -> str | None:
    """SHA-256 of a NumPy array's bytes, in hex."""
    return None if pixels is None else hashlib.sha256(pixels.tobytes()).hexdigest()


def render_resumable(
    pipe: Any,
    config: GenerateConfig,
    output: Path,
    arguments: dict[str, Any],
    progress: Progress,
    every_chunks: int,
    chunks: int | None,
    stop: SoftStop,
    decode_alongside: bool = False,
    still_held: StillHeld = never_lost,
) -> RunTimes:
    """Render the rest of a video, saving it every `every_chunks` chunks, and join all of it to `output`.

    Times add up over the runs, leaving out what a crash lost. The caller calls `discard` once it needs no more of it.

    Args:
        config: of this one video.
        arguments: of `pipe.rollout`, for a video that starts now.
        progress: new, or what `find_progress` found.
        chunks: how many there will be, for the bar.
        stop: looked at after every chunk.
        decode_alongside: decode a chunk while the next one is denoised, but for the last one before a checkpoint.
        still_held: asked before a state is saved and before the video is joined.

    Raises:
        OutputLostError: as `still_held` says; nothing is touched that another run may have written.
        Stopped: a stop was requested. What is done is saved and playable, as after any failure.
        ValueError: the saved state is damaged or of other weights.
        VideoWriteError, OSError: something could not be written.
    """
    folder = OutputFiles(output).resume_folder
    rollout = pipe.resume(folder) if progress.segments else pipe.rollout(**arguments)
    folder.mkdir(exist_ok=True)
    _remove_segments(folder, keep={segment.name for segment in progress.segments})
    with (
        _kept_on_failure(output, progress, still_held),
        tqdm(total=chunks, initial=rollout.chunks_done, desc=output.name, unit="chunk", disable=None) as bar,
    ):
        while not rollout.done:
            stop.check()
            _render_segment(rollout, config, folder, progress, every_chunks, stop, bar, decode_alongside, still_held)
        still_held()
        start = time.perf_counter()
        found = join_segments([folder / segment.name for segment in progress.segments], output)
        if found != progress.frames:
            raise VideoWriteError(f"'{output}' has {found} frames instead of {progress.frames}")
    times = progress.times
    times.stages["encode"] += time.perf_counter() - start
    times.total_s += time.perf_counter() - start
    return times


def discard(output: Path, keep_part: bool = False) -> None:
    """Remove what was kept for resuming, once the video is whole; with `keep_part` not what was made for watching."""
    from wan_autoregressive.pipelines.state_folder import remove_state

    files = OutputFiles(output)
    folder = files.resume_folder
    if folder.is_dir():
        remove_state(folder)
        _remove_segments(folder, keep=set())
        with contextlib.suppress(OSError):  # there are other files in it, which are not ours
            folder.rmdir()
    if not keep_part:
        files.part.unlink(missing_ok=True)


def count_segments(output: Path) -> int:
    """Segments that are kept of an unfinished video: one that gets on has more."""
    folder = OutputFiles(output).resume_folder
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sum(bool(_SEGMENTS.fullmatch(name)) and ".part" not in name for name in names)


def _render_segment(
    rollout: Any,
    config: GenerateConfig,
    folder: Path,
    progress: Progress,
    every_chunks: int,
    stop: SoftStop,
    bar: Any,
    decode_alongside: bool,
    still_held: StillHeld,
) -> None:
    """Render up to `every_chunks` chunks to a new segment and save the state that goes with it."""
    from wan_autoregressive.pipelines.state_folder import file_sha256

    times = copy.deepcopy(progress.times)
    start = time.perf_counter() - times.total_s
    path = folder / f"segment-{len(progress.segments):06d}.mp4"
    end = rollout.chunks_done + every_chunks
    chunks = rollout.chunks(decode_alongside, stop=lambda: rollout.chunks_done >= end or stop.requested)
    with VideoWriter(path, fps=config.fps, scale=config.scale) as writer, contextlib.closing(chunks):
        for chunk in chunks:
            write_chunk(chunk, writer, times, start, bar)
        with times.measure("encode"):
            writer.close()
    segment = Segment(
        name=path.name, frames=writer.frames_written, bytes=path.stat().st_size, sha256=file_sha256(path)
    )
    times.total_s = time.perf_counter() - start
    still_held()
    after = dataclasses.replace(progress, segments=[*progress.segments, segment], times=times)
    rollout.save(folder, notes=dataclasses.asdict(after))
    progress.segments, progress.times = after.segments, after.times


@contextlib.contextmanager
def _kept_on_failure(output: Path, progress: Progress, still_held: StillHeld) -> Iterator[None]:
    """Put what is done into a playable `x.part.mp4` when the block fails, and say so with the error."""
    try:
        yield
    except BaseException as error:
        still_held()  # or else what is there is another run's
        folder, part = OutputFiles(output).resume_folder, OutputFiles(output).part
        covered = [folder / segment.name for segment in progress.segments]
        # Beyond the last checkpoint there may be a segment that was not finished, or not yet saved with a state.
        beyond = folder / f"segment-{len(covered):06d}.mp4"
        rest = [path for path in (beyond, beyond.with_suffix(".part.mp4")) if path.is_file()]
        notes = []
        with contextlib.suppress(OSError, ValueError, VideoWriteError):
            frames = _join_playable(covered, rest[:1], part)
            notes.append(f"{frames} frames are in '{part}'")
        # Asked of the folder: the error may have come right after a state was saved.
        saved_frames = _saved_frames(folder)
        if saved_frames:
            notes.append(f"{saved_frames} frames are saved; run the same command with --resume to go on from there")
        elif notes or not rest:
            discard(output, keep_part=True)
        error.__notes__ = notes or getattr(error, "__notes__", [])  # instead of the segment writer's
        raise


def _join_playable(covered: list[Path], rest: list[Path], output: Path) -> int:
    """Join segments with what plays of an unfinished one."""
    try:
        return join_segments([*covered, *rest], output)
    except (ValueError, VideoWriteError):
        return join_segments(covered, output)


def _saved_frames(folder: Path) -> int:
    """Pixel frames in the segments that the saved state covers; 0 where there is none."""
    try:
        return Progress.of_folder(folder).frames
    except ValueError:
        return 0


def _check_segment(path: Path, expected: Segment) -> None:
    from wan_autoregressive.pipelines.state_folder import file_sha256

    if not path.is_file():
        raise ValueError(f"the segment '{path}' of the unfinished video is missing")
    if path.stat().st_size != expected.bytes or file_sha256(path) != expected.sha256:
        raise ValueError(f"the segment '{path}' of the unfinished video is cut off or damaged")


def _remove_segments(folder: Path, keep: set[str]) -> None:
    """Remove segments that runs of this command wrote."""
    for path in folder.iterdir():
        if _SEGMENTS.fullmatch(path.name) and path.name not in keep:
            path.unlink(missing_ok=True)
