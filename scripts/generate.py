"""`wan-ar generate`: a prompt becomes an mp4, with a JSON beside it that says how.

Everything that can be checked without the model is checked before it is loaded: flags, files, folders.
"""

from __future__ import annotations

import argparse
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from wan_autoregressive.configs import GenerateConfig
from wan_autoregressive.media import load_image, load_video
from wan_autoregressive.scripts.generate_flags import add_config_flags, config_from_args
from wan_autoregressive.scripts.load_pipeline import check_model_folder, load_pipeline, with_model_defaults
from wan_autoregressive.scripts.run_report import RunTimes, describe_device, dry_run_text, write_report
from wan_autoregressive.video_writer import VideoWriter, check_video_target, check_writable_folder

Pixels = npt.NDArray[np.uint8]


class VideosFailedError(RuntimeError):
    """Some of the videos of a prompts file could not be made."""


@dataclass(frozen=True)
class Job:
    """One video to make."""

    prompt: str
    output: Path


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
    jobs = plan_jobs(config)
    check_model_folder(config.model)
    given = load_given(config)

    # 2. The model
    start = time.perf_counter()
    pipe = load_pipeline(config)
    load_s = time.perf_counter() - start
    config = with_model_defaults(config, pipe)
    # Pixel frames to latent frames: the first is one of its own.
    given_latents = 0 if given is None else (len(given) - 1) // pipe.vae_scale_factor_temporal + 1
    plan = pipe.plan(**config.rollout_settings(), given_frames=given_latents)
    if args.dry_run:
        for job in jobs:
            check_prompts(pipe, config, job.prompt)
        print(dry_run_text(config, plan, videos=len(jobs)))
        return 0

    # 3. The videos. One seed for all: a prompt gives the same video alone and in a list.
    seed = secrets.randbelow(2**32) if config.seed is None else config.seed
    if config.prompts is None:
        _render_to_file(pipe, config, jobs[0], seed, given, plan.chunks, load_s)
        return 0
    config.output.mkdir(exist_ok=True)
    failed = []
    for job in jobs:
        try:
            _render_to_file(pipe, config, job, seed, given, plan.chunks, load_s)
        except Exception as error:
            from wan_autoregressive.scripts.cli import describe_error, print_error

            print_error(f"{job.output.name}: {describe_error(error)}")
            failed.append(job.output.name)
    if failed:
        raise VideosFailedError(f"{len(failed)} of {len(jobs)} videos failed: {', '.join(failed)}")
    return 0


def plan_jobs(config: GenerateConfig) -> list[Job]:
    """List the videos to make, having checked that their files can be written.

    Raises:
        ValueError: the prompts file cannot be read or is empty.
        OSError: the output cannot be written.
    """
    if config.prompts is None:
        assert config.prompt is not None  # one of the two, as GenerateConfig checks
        return [Job(config.prompt, check_video_target(config.output))]
    try:
        lines = config.prompts.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ValueError(f"cannot read the prompts file '{config.prompts}': {reason}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"the prompts file '{config.prompts}' holds no prompt; write one per line")
    # The folder itself is made when the first video is; here it is enough that this will work.
    check_writable_folder(config.output if config.output.exists() else config.output.parent)
    digits = max(4, len(str(len(prompts))))
    return [Job(prompt, config.output / f"{number:0{digits}}.mp4") for number, prompt in enumerate(prompts, start=1)]


def load_given(config: GenerateConfig) -> Pixels | None:
    """Read the frames that the video starts from, (frames, height, width, 3); None when there are none.

    A clip is resampled to the rate of the video, so that its motion keeps its speed.

    Raises:
        ValueError: unreadable, or so long that nothing is left to generate.
    """
    if config.image is not None:
        given = load_image(config.image, config.height, config.width)
    elif config.video is not None:
        given = load_video(config.video, config.height, config.width, max_frames=config.num_frames, fps=config.fps)
    else:
        return None
    if len(given) >= config.num_frames:
        raise ValueError(
            f"num_frames is {config.num_frames}, given frames included, and '{config.image or config.video}' has at "
            f"least as many at {config.fps:g} frames per second; raise num_frames or give less"
        )
    return given


def check_prompts(pipe: Any, config: GenerateConfig, prompt: str) -> None:
    """Raise ValueError when a prompt has more tokens than are kept, since the rest would be dropped in silence."""
    changes = [(f"prompt at latent frame {frame}", text) for frame, text in config.prompt_schedule().items()]
    for name, text in (("prompt", prompt), ("negative_prompt", config.negative_prompt), *changes):
        if text is None:
            continue
        count = len(pipe.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])
        if count > config.max_sequence_length:
            raise ValueError(
                f"{name} is too long: {count} tokens, and max_sequence_length is {config.max_sequence_length}; "
                "shorten it"
            )


def render(
    pipe: Any,
    config: GenerateConfig,
    job: Job,
    seed: int,
    given: Pixels | None = None,
    chunks: int | None = None,
) -> RunTimes:
    """Render one video to its mp4, chunk by chunk, with a progress bar on a terminal.

    Args:
        given: frames that come first, (frames, height, width, 3).
        chunks: how many to expect, for the bar.

    Raises:
        ValueError: the prompt is too long, or what the pipeline refuses; nothing was written.
        VideoWriteError: the mp4 could not be written.
    """
    import torch

    check_prompts(pipe, config, job.prompt)
    times = RunTimes()
    arguments = config.rollout_settings() | {
        "prompt_schedule": config.prompt_schedule(),
        "negative_prompt": config.negative_prompt,
        "generator": torch.Generator("cpu").manual_seed(seed),  # the same noise whatever the device
        "video": None if given is None else given[None],
        "output_type": "np",
    }
    start = time.perf_counter()
    with (
        tqdm(total=chunks, desc=job.output.name, unit="chunk", disable=None) as bar,
        VideoWriter(job.output, fps=config.fps, scale=config.scale) as writer,
    ):
        for chunk in pipe.stream(job.prompt, **arguments):
            frames = chunk.frames[0]
            times.add_chunk(chunk.timings, len(frames), time.perf_counter() - start)
            with times.measure("encode"):
                writer.write(frames)
            bar.set_postfix_str(f"{times.frames / (time.perf_counter() - start):.2f} frames/s", refresh=False)
            bar.update()
        with times.measure("encode"):
            writer.close()
    times.total_s = time.perf_counter() - start
    return times


def _render_to_file(
    pipe: Any,
    config: GenerateConfig,
    job: Job,
    seed: int,
    given: Pixels | None,
    chunks: int | None,
    load_s: float,
) -> None:
    """Render one video, write its report beside it and say so."""
    times = render(pipe, config, job, seed, given, chunks)
    times.stages["load"] = load_s
    done = config.model_copy(update={"prompt": job.prompt, "prompts": None, "output": job.output, "seed": seed})
    dtype = str(pipe.transformer.dtype).removeprefix("torch.")
    write_report(job.output.with_suffix(".json"), done, describe_device(pipe.device), dtype, times)
    size = f"{config.width * config.scale}x{config.height * config.scale}"
    rate = f"{times.frames_per_second:.2f} frames/s, first after {times.first_chunk_s or 0:.2f} s"
    print(f"{job.output}: {times.frames} frames of {size} in {times.total_s:.1f} s ({rate}), seed {seed}", flush=True)
