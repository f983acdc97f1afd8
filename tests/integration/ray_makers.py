"""Stand-ins for a pipeline in workers of Ray, which import them by name. A prompt says what is to happen."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from wan_autoregressive.scripts.generate_inputs import Job
from wan_autoregressive.scripts.render_job import Outcome


class WritingMaker:
    """Writes the prompt as the video, unless the prompt says something else."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell

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
            self.tell("warning: a strange word")
        job.output.write_text(job.prompt)
        return Outcome(job, "made", f"{job.output}: made", seed=1, frames=2, seconds=0.5)


def no_maker(tell: Callable[[str], None]) -> WritingMaker:
    raise ValueError("the model folder is gone")


class GroupMaker:
    """Adds up the numbers of the ranks, as torchrun's environment names them; rank 1 can be told to die, once."""

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        from datetime import timedelta

        import torch.distributed as dist

        # At the port where torch itself would listen, it does so on every interface.
        place = f"file://{folder / os.environ['MASTER_PORT']}.store"
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", place, timedelta(seconds=60), size, rank)

    def render(self, job: Job) -> Outcome:
        import torch
        import torch.distributed as dist

        rank, died = dist.get_rank(), job.output.with_suffix(".died")
        if job.prompt == "die-once" and rank == 1 and not died.exists():
            died.touch()
            time.sleep(0.2)  # rank 0 waits for it by then
            os.kill(os.getpid(), signal.SIGKILL)
        numbers = torch.tensor([rank + 1, dist.get_world_size()])
        dist.all_reduce(numbers)
        if rank == 0:
            job.output.write_text(f"{numbers.tolist()}")
        return Outcome(job, "made", seed=rank)
