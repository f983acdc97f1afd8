"""Workers of `wan-ar generate --workers N`, on one machine or many that see one folder.

Ray finds machines and GPUs, starts processes and says when one is gone. What is here: a video is handed to a worker
that is up, one at a time; a worker that dies is replaced, and its video goes on from its last checkpoint wherever a
worker is free. Videos, states and reports are files in the output folder.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from wan_autoregressive.scripts.deaths import Deaths
from wan_autoregressive.scripts.errors import describe_error, print_note
from wan_autoregressive.scripts.generate_inputs import Job
from wan_autoregressive.scripts.interrupts import Stopped, handle_stops
from wan_autoregressive.scripts.ray_crew import Crew, MakeMaker
from wan_autoregressive.scripts.render_job import Outcome
from wan_autoregressive.scripts.spread_flags import Spread
from wan_autoregressive.scripts.video_list import with_manifest

MOST_FAILED_STARTS = 3
"""In a row; then no worker is started any more."""
MANIFEST = "manifest.jsonl"
_PATIENCE_S = 60.0


def render_on_ray(make_maker: MakeMaker, jobs: Sequence[Job], spread: Spread) -> Iterator[Outcome]:
    """Render jobs on `spread.workers` workers, with a bar on a terminal and a line for each in `manifest.jsonl` beside
    the videos. Outcomes come as they are ready.

    Args:
        make_maker: Called once in every worker, in the folder that this process is in; it is sent there by pickle.

    Raises:
        ValueError: Ray is not installed, or this machine does not have the GPUs.
        ConnectionError: there is no cluster at the address.
        RuntimeError: no worker can be started; the message says why.
    """
    folder = jobs[0].output.parent
    with _connected(spread) as gpus, tqdm(total=len(jobs), unit="video", disable=None) as bar:
        folder.mkdir(exist_ok=True)
        crews = Crews(make_maker, jobs, spread.workers or 1, gpus)
        states: Counter[str] = Counter()
        with contextlib.closing(crews):
            for outcome in with_manifest(crews.outcomes(), folder / MANIFEST):
                states[outcome.state] += 1
                bar.set_postfix(states, refresh=False)
                bar.update()
                with tqdm.external_write_mode():
                    yield outcome


@contextlib.contextmanager
def _connected(spread: Spread) -> Iterator[int]:
    """Ray, for the block; gives the GPUs of a worker."""
    local = spread.ray_address is None
    if local:
        # Or else Ray takes the address of an interface for its own, and listens there.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # What Ray has to say would be between our lines on standard output; workers that die are told of in our words.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError("--workers needs Ray, which is not here: pip install 'wan-autoregressive[ray]'") from error

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if local:
        slots = (spread.workers or 1) * max(1, spread.gpus_per_video or 1)
        ray.init(address="local", num_cpus=slots, include_dashboard=False, **quiet)
    else:
        ray.init(address=spread.ray_address, **quiet)
    try:
        there = int(ray.cluster_resources().get("GPU", 0))
        gpus = min(there, 1) if spread.gpus_per_video is None else spread.gpus_per_video
        if local and gpus > there:
            raise ValueError(f"--gpus-per-video is {gpus}, and this machine has {there} GPUs; see also --ray-address")
        with _stopped_by_signals():
            yield gpus
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Ray puts a handler in the place of ours, and makes a plain KeyboardInterrupt of what a handler raises."""
    numbers: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        numbers.append(number)
        raise Stopped(number)

    with handle_stops(stop):
        try:
            yield
        except KeyboardInterrupt as error:
            stopped = Stopped(numbers[0] if numbers else signal.SIGINT)
            stopped.add_note("all workers were ended; the same command goes on")
            raise stopped from error


class Crews:
    """Hands jobs to workers that are up, and replaces those that die.

    Args:
        workers: How many there are at most.
        gpus: Of each.
    """

    def __init__(self, make_maker: MakeMaker, jobs: Sequence[Job], workers: int, gpus: int) -> None:
        self._make_maker, self._gpus = make_maker, gpus
        self._todo, self._num_jobs = deque(jobs), len(jobs)
        self._deaths: dict[Path, Deaths] = {}
        self._failed_starts, self._start_error = 0, ""
        self._busy: dict[Any, Crew] = {}
        """By what they may answer."""
        self._idle: list[Crew] = []
        for _ in range(min(workers, len(jobs))):
            self._start()

    def outcomes(self) -> Iterator[Outcome]:
        """What became of each job, as it is known.

        Raises:
            RuntimeError: no worker can be started.
        """
        import ray

        left, told = self._num_jobs, False
        while left:
            if not self._busy:
                raise RuntimeError(f"no worker can be started: {self._start_error}")
            answered, _ = ray.wait(list(self._busy), timeout=_PATIENCE_S)
            if not answered and not told and not any(crew.name for crew in self._busy.values()):
                print_note(f"waiting for a worker; each needs a CPU and {self._gpus} GPUs: {ray.cluster_resources()}")
                told = True
            for answer in answered:
                outcome = self._take(self._busy.pop(answer), answer)
                if outcome is not None:
                    left -= 1
                    yield outcome

    def close(self) -> None:
        """End all workers at once. What they were at is as after a crash: it can be gone on with."""
        for crew in {id(crew): crew for crew in [*self._busy.values(), *self._idle]}.values():
            crew.end()

    def _start(self) -> None:
        self._wait_for(Crew(self._make_maker, self._gpus))

    def _wait_for(self, crew: Crew) -> None:
        self._busy |= dict.fromkeys([crew.asked, *crew.followers], crew)

    def _take(self, crew: Crew, answer: Any) -> Outcome | None:
        """Take an answer of a crew, and hand out what is next."""
        from ray.exceptions import RayError

        try:
            crew.take(answer)
        except (RayError, ChildProcessError) as error:
            outcome = self._lose(crew, error)
        else:
            outcome = self._hear(crew)
            self._idle.append(crew)
        while self._idle and self._todo:
            crew = self._idle.pop()
            crew.begin(self._todo.popleft())
            self._wait_for(crew)
        return outcome

    def _hear(self, crew: Crew) -> Outcome | None:
        if not crew.name:  # it is up
            crew.name, self._failed_starts = crew.answer, 0
            return None
        outcome, lines = crew.answer
        crew.job = None
        for line in lines:
            print_note(line)
        if outcome.state == "held":  # by the process of a worker that Ray took for dead, or another run
            return self._try_again(outcome.job, outcome.reason)
        return replace(outcome, worker=crew.name)

    def _lose(self, crew: Crew, error: Exception) -> Outcome | None:
        """End what is left of a crew, and start another one in its place."""
        self._busy = {asked: other for asked, other in self._busy.items() if other is not crew}
        self._idle = [other for other in self._idle if other is not crew]
        crew.end()
        outcome = None
        if not crew.name:
            self._failed_starts += 1
            self._start_error = _reason(error)
        elif crew.job is not None:
            outcome = self._try_again(crew.job, f"worker {crew.name} ended: {_reason(error)}")
        if self._failed_starts < MOST_FAILED_STARTS and len(self._todo) > len(self._idle):
            self._start()
        return outcome

    def _try_again(self, job: Job, reason: str) -> Outcome | None:
        """Put a job back on the list, or give it up."""
        deaths = self._deaths.get(job.output, Deaths()).one_more(job.output)
        self._deaths[job.output] = deaths
        if deaths.too_many:
            return Outcome(job, "failed", reason=f"{reason} ({deaths.count} times in a row)")
        print_note(f"{job.output}: {reason}; it is tried again")
        self._todo.append(job)
        return None


def _reason(error: Exception) -> str:
    """What happened to a worker, in one line."""
    from ray.exceptions import RayActorError, RayError, RayTaskError

    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RayActorError):
        return "its process died"
    return str(cause).splitlines()[0] if isinstance(cause, RayError) else describe_error(cause)
