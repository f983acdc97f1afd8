"""Renders one video of `wan-ar generate` after the other on a pipeline that is loaded: mp4, report, contact sheet."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from wan_autoregressive.configs import GenerateConfig
from wan_autoregressive.media.contact_sheet import write_contact_sheet
from wan_autoregressive.media.video_writer import VideoWriter
from wan_autoregressive.scripts.earlier_runs import finished_seed
from wan_autoregressive.scripts.errors import VideoIsWholeError, describe_error
from wan_autoregressive.scripts.generate_inputs import Job, Pixels, check_prompts
from wan_autoregressive.scripts.interrupts import SoftStop
from wan_autoregressive.scripts.load_pipeline import with_model_defaults
from wan_autoregressive.scripts.output_files import OutputFiles
from wan_autoregressive.scripts.output_lock import (
    OutputHeldError,
    OutputLostError,
    StillHeld,
    hold_output,
    never_lost,
)
from wan_autoregressive.scripts.resumable_render import (
    Checkpointing,
    Progress,
    discard,
    find_progress,
    pixels_sha256,
    render_resumable,
)
from wan_autoregressive.scripts.run_report import RunTimes, describe_device, write_chunk, write_report


@dataclass(frozen=True)
class Outcome:
    """What became of a job, in words and numbers that any process can be sent."""

    job: Job
    state: Literal["made", "already there", "held", "failed"]
    """`held`: another run is making it."""
    summary: str = ""
    """For a reader, one line; empty for what is not there, of which `reason` says why."""
    reason: str = ""
    seed: int | None = None
    frames: int | None = None
    """Pixel frames, of a video that was made."""
    seconds: float | None = None
    """That making it took, in all runs, without loading."""
    worker: str = ""
    """Machine and process, where there are several."""


@dataclass
class RenderWorker:
    """Renders jobs that differ in prompt and output only. Holds nothing of a video between two of them.

    Args:
        pipe: The loaded pipeline.
        asked: The settings as they were given; what they leave to the model is filled in here.
        seed: Of every job that does not go on with an earlier run.
        given: Frames that each video starts from, or with a strength is made from.
        chunks: How many a video will have, for the bar.
        load_s: Seconds that loading the pipeline took, for the reports.
        checkpointing: Whether and how often to save, and whether to go on.
        decode_alongside: Decode a chunk while the next one is denoised.
        stop: Looked at after each chunk if there is checkpointing.
        tell: Called with lines that the user should read before a video is begun.
        hold: Keeps other runs from making a video while this one does.
    """

    pipe: Any
    asked: GenerateConfig
    seed: int
    given: Pixels | None = None
    chunks: int | None = None
    load_s: float = 0.0
    checkpointing: Checkpointing | None = None
    decode_alongside: bool = False
    stop: SoftStop = dataclasses.field(default_factory=SoftStop)
    tell: Callable[[str], None] = print
    hold: Callable[[Path], AbstractContextManager[StillHeld]] = hold_output

    def __post_init__(self) -> None:
        self.config = with_model_defaults(self.asked, self.pipe)

    def render(self, job: Job) -> Outcome:
        """Render a video unless it is there, made with the same settings. Never raises but for a stop."""
        try:
            if (there := self._find(job)) is not None:
                return there
            with self.hold(job.output) as still_held:
                if (there := self._find(job)) is not None:  # another run was quicker
                    return there
                asked = config_of(self.asked, job)
                return self.make(job, find_progress(job.output, asked, self.given, self.checkpointing), still_held)
        except (OutputHeldError, OutputLostError) as error:
            return Outcome(job, "held", reason=describe_error(error))
        except Exception as error:
            from wan_autoregressive.pipelines.ranks import RankFailedError

            if isinstance(error, RankFailedError):  # no fault of the video: other ranks can make it
                raise
            return Outcome(job, "failed", reason=describe_error(error))

    def _find(self, job: Job) -> Outcome | None:
        """The video as an earlier run made it."""
        seed = finished_seed(job.output, config_of(self.config, job))
        if seed is None:
            return None
        return Outcome(job, "already there", f"{job.output}: already there, made with the same settings", seed=seed)

    def make(self, job: Job, progress: Progress | None = None, still_held: StillHeld = never_lost) -> Outcome:
        """Render a video, or the rest of it, whose output is held.

        Args:
            progress: What an earlier run saved of it.
            still_held: Asked before anything is put under its final name.

        Raises:
            OutputLostError: as `still_held` says.
            ValueError, OSError: wrong input; nothing was written.
            RuntimeError: something failed on the way (`VideoWriteError`, `VideoIsWholeError`, out of memory).
        """
        config = config_of(self.config, job)
        warning = check_prompts(self.pipe, config, job.prompt)
        if warning is not None:
            self.tell(warning)
        if self.checkpointing is None:
            seed, times = self.seed, self._render(config, job, still_held)
        else:
            if progress is None:
                if self.checkpointing.resume and self.asked.prompts is None:
                    self.tell(f"{job.output}: nothing is saved of it; starting from the beginning")
                asked = config_of(self.asked, job).model_dump(mode="json")
                progress = Progress(asked, pixels_sha256(self.given), self.seed)
            seed = progress.seed
            times = self._render_resumable(config, job, progress, self.checkpointing, still_held)
        times.stages["load"] = self.load_s
        still_held()
        try:
            self._write_report(config, job, seed, times)
            if self.checkpointing is not None:
                discard(job.output)
        except (OSError, RuntimeError) as error:
            raise VideoIsWholeError(f"'{job.output}' is whole, but what comes with it failed: {error}") from error
        size = f"{config.rollout.width * config.scale}x{config.rollout.height * config.scale}"
        rate = f"{times.frames_per_second:.2f} frames/s, first after {times.first_chunk_s or 0:.2f} s"
        summary = f"{job.output}: {times.frames} frames of {size} in {times.total_s:.1f} s ({rate}), seed {seed}"
        return Outcome(job, "made", summary, seed=seed, frames=times.frames, seconds=times.total_s)

    def _render(self, config: GenerateConfig, job: Job, still_held: StillHeld) -> RunTimes:
        """Render one video to its mp4, chunk by chunk, with a progress bar on a terminal."""
        times = RunTimes()
        start = time.perf_counter()
        video = self.pipe.stream(
            job.prompt, decode_alongside=self.decode_alongside, **rollout_arguments(config, self.seed, self.given)
        )
        with (
            tqdm(total=self.chunks, desc=job.output.name, unit="chunk", disable=None) as bar,
            VideoWriter(job.output, fps=config.fps, scale=config.scale) as writer,
            closing(video),
        ):
            for chunk in video:
                write_chunk(chunk, writer, times, start, bar)
            still_held()
            with times.measure("encode"):
                writer.close()
        times.total_s = time.perf_counter() - start
        return times

    def _render_resumable(
        self,
        config: GenerateConfig,
        job: Job,
        progress: Progress,
        checkpointing: Checkpointing,
        still_held: StillHeld,
    ) -> RunTimes:
        arguments = {"prompt": job.prompt} | rollout_arguments(config, progress.seed, self.given)
        return render_resumable(
            *(self.pipe, config, job.output, arguments, progress, checkpointing.every_chunks, self.chunks, self.stop),
            decode_alongside=self.decode_alongside,
            still_held=still_held,
        )

    def _write_report(self, config: GenerateConfig, job: Job, seed: int, times: RunTimes) -> None:
        files = OutputFiles(job.output)
        dtype = str(self.pipe.transformer.dtype).removeprefix("torch.")
        done = config.model_copy(update={"seed": seed})
        device = describe_device(self.pipe.device)
        write_report(files.report, done, device, dtype, times, self.decode_alongside)
        if config.contact_sheet:
            write_contact_sheet(job.output, files.contact_sheet)


def config_of(config: GenerateConfig, job: Job) -> GenerateConfig:
    """The config of one video of a run."""
    return config.model_copy(update={"prompt": job.prompt, "prompts": None, "output": job.output})


def rollout_arguments(config: GenerateConfig, seed: int, given: Pixels | None) -> dict[str, Any]:
    """What the pipeline is given for one video, beside its prompt."""
    import torch

    pixels: dict[str, Any] = {"video": given}
    if given is not None and config.rollout.strength is None:
        pixels = {"video": given[None]} if config.image is None else {"image": given[0]}
    return config.rollout_settings() | {
        "prompt_schedule": config.prompt_schedule(),
        "negative_prompt": config.negative_prompt,
        "generator": torch.Generator("cpu").manual_seed(seed),  # the same noise whatever the device
        **pixels,
    }
