"""A worker as an actor of Ray: one process, or one for each GPU of a video on one machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Protocol

from wan_autoregressive.scripts.generate_inputs import Job
from wan_autoregressive.scripts.render_job import Outcome


class Maker(Protocol):
    """What makes videos, such as a `RenderWorker`."""

    def render(self, job: Job) -> Outcome:
        """Make a video and say what became of it. What it raises is no fault of the video, which is tried again."""


MakeMaker = Callable[[Callable[[str], None]], AbstractContextManager[Maker]]
"""Is given what to call with lines that the user should read; its block lasts as long as the process.

Of several ranks all call it, and those but rank 0 do their part of what that does within the call.
"""


class _Rank:
    """A process of a worker. Becomes an actor."""

    def address(self) -> tuple[str, int]:
        """Where the ranks may meet, on this machine."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, probe.getsockname()[1]

    def start(self, make_maker: MakeMaker, folder: Path, rank: int, size: int, address: tuple[str, int] | None) -> str:
        """Load what makes videos; returns a name for this process."""
        os.chdir(folder)
        if address is not None:  # as torchrun says it; each process sees its own GPU alone
            numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": size}
            os.environ.update({name: str(number) for name, number in numbers.items()})
            os.environ.update({"MASTER_ADDR": address[0], "MASTER_PORT": str(address[1])})
        self._lines: list[str] = []
        self._stack = ExitStack()
        self._maker = self._stack.enter_context(make_maker(self._lines.append))
        return f"{socket.gethostname()}:{os.getpid()}"

    def render(self, job: Job) -> tuple[Outcome, list[str]]:
        """What became of a job, and the lines that the user should read."""
        self._lines.clear()
        return self._maker.render(job), list(self._lines)


class Crew:
    """A worker as who hands out jobs sees it. It is asked for one thing at a time: to start, then for a video.

    Args:
        make_maker: Called once in each of its processes, in the folder that this process is in.
        gpus: Of the worker. With two and more there are as many processes, each with the environment that torchrun
            gives the ranks of a group, and all make each video together. Rank 0 is asked; that another one answers
            at all means that it has ended.
    """

    def __init__(self, make_maker: MakeMaker, gpus: int) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.name = ""
        """Machine and process, once it is up."""
        self.job: Job | None = None
        self.answer: Any = None
        """To what was asked last."""
        size = max(gpus, 1)
        self._group: Any = None
        place: dict[str, Any] = {"num_cpus": 1, "num_gpus": min(gpus, 1)}
        places = [place]
        if size > 1:
            self._group = placement_group([{"CPU": 1, "GPU": 1}] * size, strategy="STRICT_PACK")
            bundles = [PlacementGroupSchedulingStrategy(self._group, number) for number in range(size)]
            places = [place | {"scheduling_strategy": bundle} for bundle in bundles]
        # Neither restarts nor retries of Ray's own: those know nothing of what is bounded here.
        self._ranks = [ray.remote(_Rank).options(**place).remote() for place in places]
        address = self._ranks[0].address.remote() if size > 1 else None
        self.asked, *self.followers = (
            rank.start.remote(make_maker, Path.cwd(), number, size, address) for number, rank in enumerate(self._ranks)
        )
        """What Ray will answer."""

    def begin(self, job: Job) -> None:
        """Ask for a video."""
        self.job = job
        self.asked = self._ranks[0].render.remote(job)

    def take(self, answered: Any) -> None:
        """Take an answer that is there, of rank 0 or another one.

        Raises:
            RayError: a process died, or what it was asked raised an error.
            ChildProcessError: one that follows rank 0 has ended.
        """
        import ray

        self.answer = ray.get(answered)
        if answered != self.asked:
            raise ChildProcessError("one of its processes ended before the others")

    def end(self) -> None:
        """End its processes at once, as if they had died."""
        import ray

        for rank in self._ranks:
            ray.kill(rank)
        if self._group is not None:
            ray.util.remove_placement_group(self._group)
