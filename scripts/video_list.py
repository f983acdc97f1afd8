"""The videos of a list: made by this run in order, or by any number of runs between them, and what became of each.

Whoever makes them gives an `Outcome` for each job as it comes; `report_all` is what all of them are read by.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from wan_autoregressive.scripts.deaths import note_deaths
from wan_autoregressive.scripts.earlier_runs import finished_seed
from wan_autoregressive.scripts.errors import VideoIsWholeError, print_error, print_note
from wan_autoregressive.scripts.generate_inputs import Job
from wan_autoregressive.scripts.interrupts import SoftStop
from wan_autoregressive.scripts.output_lease import OutputLeases
from wan_autoregressive.scripts.output_lock import StillHeld
from wan_autoregressive.scripts.render_job import Outcome, RenderWorker, config_of

POLL_S = 2.0
"""Seconds between two looks at what other runs hold."""


class VideosFailedError(RuntimeError):
    """Some of the videos of a list could not be made."""


def render_in_order(worker: RenderWorker, jobs: Sequence[Job]) -> Iterator[Outcome]:
    """Render the videos that are not there yet, going on after one that fails."""
    jobs[0].output.parent.mkdir(exist_ok=True)
    # One seed for all: a prompt gives the same video alone and in a list.
    seeds = (finished_seed(job.output, config_of(worker.config, job)) for job in jobs)
    worker = dataclasses.replace(worker, seed=next((seed for seed in seeds if seed is not None), worker.seed))
    for job in jobs:
        yield worker.render(job)
        worker.stop.check()


def render_shared(worker: RenderWorker, jobs: Sequence[Job]) -> Iterator[Outcome]:
    """Render what no other run of the list is at, until every video is there or failed; what runs that died have
    begun is taken over.

    Each run gives an outcome for each job: `already there` for what others made.
    """
    jobs[0].output.parent.mkdir(exist_ok=True)
    leases = OutputLeases()

    @contextmanager
    def hold(output: Path) -> Iterator[StillHeld]:
        with leases.hold(output) as still_held, note_deaths(output, still_held):
            yield still_held

    worker = dataclasses.replace(worker, hold=hold)
    left, told = list(jobs), False
    while left:
        held = []
        for job in left:
            outcome = worker.render(job)
            if outcome.state == "held":
                held.append(job)
            else:
                yield outcome
            worker.stop.check()
        if len(held) == len(left):
            if not told:
                print_note(f"waiting for {len(held)} videos that other runs make")
            told = True
            _sleep(POLL_S, worker.stop)
        left = held


def report_all(outcomes: Iterable[Outcome], num_jobs: int) -> None:
    """Print what became of each video.

    Raises:
        VideosFailedError: some are not there, once all were tried.
        VideoIsWholeError: standard output cannot be written.
    """
    failed = []
    for outcome in outcomes:
        if outcome.state in ("made", "already there"):
            print_outcome(outcome)
        else:
            print_error(f"{outcome.job.output.name}: {outcome.reason}")
            failed.append(outcome.job.output.name)
    if failed:
        raise VideosFailedError(f"{len(failed)} of {num_jobs} videos failed: {', '.join(failed)}")


def print_outcome(outcome: Outcome) -> None:
    """Print the line of a video that is there."""
    try:
        print(outcome.summary, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise VideoIsWholeError(
            f"'{outcome.job.output}' is whole, but standard output cannot be written: {error.strerror}"
        ) from error


def with_manifest(outcomes: Iterable[Outcome], path: Path) -> Iterator[Outcome]:
    """Pass outcomes on, adding a line of JSON for each to `path`: of several for one video the last one counts."""
    for outcome in outcomes:
        record = {"output": str(outcome.job.output), "prompt": outcome.job.prompt}
        record |= {
            name: value for name, value in dataclasses.asdict(outcome).items() if name not in ("job", "summary")
        }
        record["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        yield outcome


def _sleep(seconds: float, stop: SoftStop) -> None:
    """Wait, but no longer than until a stop is requested."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))
        stop.check()
