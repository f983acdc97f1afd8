"""`wan-ar generate`: a prompt becomes an mp4, with a JSON beside it that says how.

Everything that can be checked without the model is checked before it is loaded: flags, files, folders.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from wan_autoregressive.configs import GenerateConfig
from wan_autoregressive.demo import DEMO
from wan_autoregressive.media.contact_sheet import write_contact_sheet
from wan_autoregressive.media.video_writer import VideoWriter
from wan_autoregressive.scripts.earlier_runs import finished_seed
from wan_autoregressive.scripts.generate_flags import (
    add_config_flags,
    add_decode_flag,
    add_resume_flags,
    config_from_args,
)
from wan_autoregressive.scripts.generate_inputs import Job, Pixels, check_prompts, load_given, plan_jobs
from wan_autoregressive.scripts.interrupts import SoftInterrupt
from wan_autoregressive.scripts.load_pipeline import (
    check_model_folder,
    load_pipeline,
    model_folder,
    with_model_defaults,
)
from wan_autoregressive.scripts.output_lock import hold_output
from wan_autoregressive.scripts.resumable_render import (
    Checkpointing,
    Progress,
    checkpointing_from_args,
    discard,
    find_progress,
    pixels_sha256,
    render_resumable,
)
from wan_autoregressive.scripts.run_report import RunTimes, describe_device, dry_run_text, write_chunk, write_report


class VideosFailedError(RuntimeError):
    """Some of the videos of a prompts file could not be made."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add `generate` to the command's subparsers."""
    parser = subparsers.add_parser(
        "generate",
        help="render a video from a prompt",
        description="Render a video from a prompt. Settings come from the defaults, then --config, then the flags.",
    )
    add_config_flags(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved config and what it will take, and render nothing"
    )
    add_resume_flags(parser)
    add_decode_flag(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Render what the flags ask for.

    Raises:
        ValueError, OSError: the input is wrong; nothing was written.
        RuntimeError: something failed on the way (`VideoWriteError`, `VideosFailedError`, out of memory).
    """
    # 1. Everything that needs no model
    config = config_from_args(args)
    checkpointing = checkpointing_from_args(args)
    jobs = plan_jobs(config)
    check_model_folder(model_folder(config))
    if "model" not in args and str(config.model) == DEMO:
        print("no --model given: using the small demo checkpoint that comes with the package", file=sys.stderr)
    given = load_given(config)

    # 2. The videos; those of a list are held one by one
    is_one_video = config.prompts is None and not args.dry_run
    with hold_output(config.output) if is_one_video else nullcontext():
        _make(args, config, checkpointing, jobs, given)
    return 0


def _make(
    args: argparse.Namespace,
    config: GenerateConfig,
    checkpointing: Checkpointing | None,
    jobs: list[Job],
    given: Pixels | None,
) -> None:
    """Load the model and render all videos, or say what they would take."""
    # 1. What an earlier run left
    progress = _progress_of(jobs[0], config, given, checkpointing) if config.prompts is None else None

    # 2. The model
    start = time.perf_counter()
    pipe = load_pipeline(config)
    load_s = time.perf_counter() - start
    asked, config = config, with_model_defaults(config, pipe)
    # Pixel frames to latent frames: the first is one of its own.
    given_latents = 0 if given is None else (len(given) - 1) // pipe.vae_scale_factor_temporal + 1
    plan = pipe.plan(**config.rollout_settings(), given_frames=given_latents)
    if args.dry_run:
        for job in jobs:
            check_prompts(pipe, config, job.prompt)
        print(dry_run_text(config, plan, videos=len(jobs)))
        return

    # 3. The videos
    stop = SoftInterrupt("stopping after this chunk; Ctrl-C again stops at once")
    with stop if checkpointing is not None else nullcontext():
        this_run = _Run(pipe, asked, config, given, plan.chunks, load_s, checkpointing, stop, args.decode_alongside)
        if config.prompts is None:
            _render_to_file(this_run, jobs[0], _seed(config), progress)
        else:
            _render_all(this_run, jobs)


def render(
    pipe: Any,
    config: GenerateConfig,
    job: Job,
    seed: int,
    given: Pixels | None = None,
    chunks: int | None = None,
    decode_alongside: bool = False,
) -> RunTimes:
    """Render one video to its mp4, chunk by chunk, with a progress bar on a terminal.

    Args:
        given: frames that come first, (frames, height, width, 3).
        chunks: how many to expect, for the bar.
        decode_alongside: decode a chunk while the next one is denoised.

    Raises:
        ValueError: the prompt is too long, or what the pipeline refuses; nothing was written.
        VideoWriteError: the mp4 could not be written.
    """
    check_prompts(pipe, config, job.prompt)
    times = RunTimes()
    arguments = _rollout_arguments(config, seed, given) | {"decode_alongside": decode_alongside}
    start = time.perf_counter()
    with (
        tqdm(total=chunks, desc=job.output.name, unit="chunk", disable=None) as bar,
        VideoWriter(job.output, fps=config.fps, scale=config.scale) as writer,
        closing(pipe.stream(job.prompt, **arguments)) as video,
    ):
        for chunk in video:
            write_chunk(chunk, writer, times, start, bar)
        with times.measure("encode"):
            writer.close()
    times.total_s = time.perf_counter() - start
    return times


@dataclass(frozen=True)
class _Run:
    """What all videos of a run share."""

    pipe: Any
    asked: GenerateConfig
    """As it was given; `config` has the model's own settings filled in."""
    config: GenerateConfig
    given: Pixels | None
    chunks: int | None
    load_s: float
    checkpointing: Checkpointing | None
    stop: SoftInterrupt
    decode_alongside: bool


def _render_all(run: _Run, jobs: list[Job]) -> None:
    """Render the videos that are not there yet, going on after one that fails."""
    run.config.output.mkdir(exist_ok=True)
    finished = {job: finished_seed(job.output, _config_of(run.config, job)) for job in jobs}
    # One seed for all: a prompt gives the same video alone and in a list.
    seed = next((found for found in finished.values() if found is not None), _seed(run.config))
    failed = []
    for job in jobs:
        if finished[job] is not None:
            print(f"{job.output}: already there, made with the same settings", flush=True)
            continue
        try:
            with hold_output(job.output):
                progress = _progress_of(job, run.asked, run.given, run.checkpointing)
                _render_to_file(run, job, seed, progress)
        except Exception as error:
            from wan_autoregressive.scripts.cli import describe_error, print_error

            print_error(f"{job.output.name}: {describe_error(error)}")
            failed.append(job.output.name)
        if run.stop.requested:
            raise KeyboardInterrupt
    if failed:
        raise VideosFailedError(f"{len(failed)} of {len(jobs)} videos failed: {', '.join(failed)}")


def _render_to_file(run: _Run, job: Job, seed: int, progress: Progress | None) -> None:
    """Render one video, or the rest of it, write its report beside it and say so."""
    config = _config_of(run.config, job)
    if run.checkpointing is None:
        times = render(run.pipe, config, job, seed, run.given, run.chunks, run.decode_alongside)
    else:
        check_prompts(run.pipe, config, job.prompt)
        if progress is None:
            if run.checkpointing.resume:
                print(f"{job.output}: nothing is saved of it; starting from the beginning", flush=True)
            asked = _config_of(run.asked, job).model_dump(mode="json")
            progress = Progress(asked, pixels_sha256(run.given), seed)
        seed = progress.seed
        arguments = {"prompt": job.prompt} | _rollout_arguments(config, seed, run.given)
        times = render_resumable(
            *(run.pipe, config, arguments, progress, run.checkpointing.every_chunks, run.chunks, run.stop),
            decode_alongside=run.decode_alongside,
        )
    times.stages["load"] = run.load_s
    dtype = str(run.pipe.transformer.dtype).removeprefix("torch.")
    done = config.model_copy(update={"seed": seed})
    device = describe_device(run.pipe.device)
    write_report(job.output.with_suffix(".json"), done, device, dtype, times, run.decode_alongside)
    if config.contact_sheet:
        write_contact_sheet(job.output, job.output.with_suffix(".png"))
    if run.checkpointing is not None:
        discard(job.output)
    size = f"{config.width * config.scale}x{config.height * config.scale}"
    rate = f"{times.frames_per_second:.2f} frames/s, first after {times.first_chunk_s or 0:.2f} s"
    print(f"{job.output}: {times.frames} frames of {size} in {times.total_s:.1f} s ({rate}), seed {seed}", flush=True)


def _progress_of(
    job: Job, asked: GenerateConfig, given: Pixels | None, checkpointing: Checkpointing | None
) -> Progress | None:
    """What an earlier run saved of a video; `find_progress` says what it raises."""
    if checkpointing is None:
        return None
    return find_progress(job.output, _config_of(asked, job), given, checkpointing)


def _config_of(config: GenerateConfig, job: Job) -> GenerateConfig:
    """The config of one video of the run."""
    return config.model_copy(update={"prompt": job.prompt, "prompts": None, "output": job.output})


def _seed(config: GenerateConfig) -> int:
    return secrets.randbelow(2**32) if config.seed is None else config.seed


def _rollout_arguments(config: GenerateConfig, seed: int, given: Pixels | None) -> dict[str, Any]:
    """What the pipeline is given for one video, beside its prompt."""
    import torch

    return config.rollout_settings() | {
        "prompt_schedule": config.prompt_schedule(),
        "negative_prompt": config.negative_prompt,
        "generator": torch.Generator("cpu").manual_seed(seed),  # the same noise whatever the device
        "video": None if given is None else given[None],
        "output_type": "np",
    }
