"""`wan-ar generate`: a prompt becomes an mp4, with a JSON beside it that says how.

Everything that can be checked without the model is checked before it is loaded: flags, files, folders.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import yaml

from wan_autoregressive.configs import GenerateConfig
from wan_autoregressive.configs.prompt_times import LATENT_PIXEL_FRAMES
from wan_autoregressive.scripts import several_ranks
from wan_autoregressive.scripts.errors import print_note
from wan_autoregressive.scripts.generate_flags import GenerateArguments, parse_flags
from wan_autoregressive.scripts.generate_inputs import Pixels, check_prompts, load_given, plan_jobs, read_prompts
from wan_autoregressive.scripts.interrupts import import_or_leave
from wan_autoregressive.scripts.load_pipeline import (
    check_model_folder,
    load_pipeline,
    model_folder,
    with_model_defaults,
)
from wan_autoregressive.scripts.output_lock import hold_output
from wan_autoregressive.scripts.ray_workers import render_on_ray
from wan_autoregressive.scripts.render_job import RenderWorker, config_of
from wan_autoregressive.scripts.resumable_render import Checkpointing, find_progress
from wan_autoregressive.scripts.run_report import dry_run_text
from wan_autoregressive.scripts.video_list import print_outcome, render_in_order, render_shared, report_all


def main(words: Sequence[str]) -> int:
    """Do what the words after `wan-ar generate` ask for.

    Raises:
        ValueError, OSError: the input is wrong; nothing was written.
        RuntimeError: something failed on the way (`VideoWriteError`, `VideosFailedError`, out of memory).
    """
    # 1. Everything that needs no model
    arguments = parse_flags(words)
    if arguments is None:  # help
        return 0
    config = arguments.config
    if arguments.print_config:
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
        return 0
    several_ranks.check(arguments)
    if several_ranks.own_rank():  # not the first one, which does all that follows
        several_ranks.follow(arguments)
        return 0
    checkpointing = _checkpointing(arguments)
    prompts = read_prompts(config)
    jobs = [] if arguments.dry_run and config.output is None else plan_jobs(config, prompts, arguments.inputs)
    check_model_folder(model_folder(config))
    if not arguments.model_given:
        print_note("no --model given: using the small demo checkpoint that comes with the package")
    given = load_given(config)
    import_or_leave("wan_autoregressive.pipelines")

    # 2. The videos; those of a list are held one by one
    if arguments.dry_run:
        _print_dry_run(config, prompts, given)
    elif config.prompts is None:
        with hold_output(jobs[0].output):
            progress = find_progress(jobs[0].output, config_of(config, jobs[0]), given, checkpointing)
            with _worker(arguments, checkpointing, given) as worker:
                print_outcome(worker.make(jobs[0], progress))
    elif arguments.spread.workers is not None:
        report_all(render_on_ray(partial(_worker_elsewhere, arguments), jobs, arguments.spread), len(jobs))
    else:
        render = render_shared if arguments.spread.share else render_in_order
        with _worker(arguments, checkpointing, given) as worker:
            report_all(render(worker, jobs), len(jobs))
    return 0


def _checkpointing(arguments: GenerateArguments) -> Checkpointing | None:
    if arguments.checkpoint_every is None:
        return None
    if arguments.config.rollout.strength is not None:
        raise ValueError("a video made from another cannot be saved half way; leave out --checkpoint-every")
    return Checkpointing(arguments.checkpoint_every, arguments.resume or arguments.spread.is_used)


@contextmanager
def _worker(
    arguments: GenerateArguments, checkpointing: Checkpointing | None, given: Pixels | None
) -> Iterator[RenderWorker]:
    """Load the model; within the block a signal waits for the end of a chunk if that is then saved."""
    with (
        _loaded_worker(arguments, checkpointing, given, print_note) as worker,
        worker.stop.soften() if checkpointing is not None else nullcontext(),
    ):
        yield worker


def _worker_elsewhere(arguments: GenerateArguments, tell: Callable[[str], None]) -> AbstractContextManager[Any]:
    """Load the model in another process than the one that read the flags. None where this one has followed another."""
    if several_ranks.own_rank():
        several_ranks.follow(arguments)
        return nullcontext()
    return _loaded_worker(arguments, _checkpointing(arguments), load_given(arguments.config), tell)


@contextmanager
def _loaded_worker(
    arguments: GenerateArguments,
    checkpointing: Checkpointing | None,
    given: Pixels | None,
    tell: Callable[[str], None],
) -> Iterator[RenderWorker]:
    config = several_ranks.on_own_device(arguments.config)
    start = time.perf_counter()
    pipe = load_pipeline(config)
    worker = RenderWorker(
        pipe,
        config,
        seed=secrets.randbelow(2**32) if config.seed is None else config.seed,
        given=given,
        load_s=time.perf_counter() - start,
        chunks=estimate_of(pipe, config, given).chunks,
        checkpointing=checkpointing,
        decode_alongside=arguments.decode_alongside or arguments.decode_rank,
        tell=tell,
    )
    with several_ranks.on_all_ranks(pipe, arguments):
        yield worker


def estimate_of(pipe: Any, config: GenerateConfig, given: Pixels | None) -> Any:
    """What one video will take, from `pipe.estimate`, which raises `ValueError` for what the model cannot do."""
    settings = config.rollout_settings()
    if given is None or (config.image is not None and pipe.wan_components().condition_channels):
        return pipe.estimate(**settings)
    # Pixel frames to latent frames: the first is one of its own.
    latent_frames = (len(given) - 1) // LATENT_PIXEL_FRAMES + 1
    if config.rollout.strength is None:
        return pipe.estimate(**settings, given_frames=latent_frames)
    source_frames = (latent_frames - 1) * LATENT_PIXEL_FRAMES + 1
    return pipe.estimate(**settings | {"num_frames": min(settings["num_frames"], source_frames)})


def _print_dry_run(config: GenerateConfig, prompts: list[str], given: Pixels | None) -> None:
    pipe = load_pipeline(config)
    estimate = estimate_of(pipe, config, given)
    for prompt in prompts:
        warning = check_prompts(pipe, config, prompt)
        if warning is not None:
            print_note(warning)
    print(dry_run_text(with_model_defaults(config, pipe), estimate, videos=len(prompts)))
