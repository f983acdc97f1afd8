"""Stand-ins for a pipeline in workers of Ray, which import them by name. A prompt says what is to happen."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from wan_autoregressive.scripts.generate_inputs import Job
from wan_autoregressive.scripts.render_job import Outcome


class WritingMaker:
    """Writes the prompt as the video, unless the prompt says something else."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def render(self, job: Job) -> Outcome:
        begun = job.output.with_suffix(".begun")
        times = len(begun.read_text()) + 1 if begun.exists() else 1
        begun.write_text("x" * times)
        word = job.prompt.split()[0]
        if word == "die" or (word == "die-once" and times == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "raise":
            raise KeyError("lost")
        if word == "held" and times == 1:
            return Outcome(job, "held", reason="another run is writing it")
        if word == "refuse":
            return Outcome(job, "failed", reason="no such thing")
        if word == "warn":
            self._tell("warning: a strange word")
        job.output.write_text(job.prompt)
        return Outcome(job, "made", f"{job.output}: made", seed=1, frames=2, seconds=0.5)


@contextmanager
def make_by_writing(tell: Callable[[str], None]) -> Iterator[WritingMaker]:
    yield WritingMaker(tell)


def no_maker(tell: Callable[[str], None]) -> AbstractContextManager[WritingMaker]:
    raise ValueError("the model folder is gone")


class GroupMaker:
    """Of several ranks, the one that is asked. All add up their numbers for every video."""

    def render(self, job: Job) -> Outcome:
        import torch
        import torch.distributed as dist

        died = job.output.with_suffix(".died")
        deadly = job.prompt == "die-once" and not died.exists()
        if deadly:
            died.touch()
        dist.broadcast(torch.tensor([int(deadly)]), src=0)
        numbers = torch.tensor([1, dist.get_world_size()])
        dist.all_reduce(numbers)  # raises where another rank has died
        job.output.write_text(f"{numbers.tolist()}")
        return Outcome(job, "made")


@contextmanager
def make_in_group(folder: Path, tell: Callable[[str], None]) -> Iterator[GroupMaker]:
    """Every rank is where torchrun's environment says; those but rank 0 follow it, and die when it says so."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    # At the port that is named torch itself would listen on every interface.
    place = f"file://{folder / os.environ['MASTER_PORT']}.store"
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", place, timedelta(seconds=60), size, rank)
    while rank:
        deadly = torch.tensor([0])
        dist.broadcast(deadly, src=0)
        if deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.tensor([rank + 1, size]))
    yield GroupMaker()
