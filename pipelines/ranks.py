"""Several ranks that do together what the first of them says, and that say whose fault it is when one drops out.

Orders go over a gloo group of their own, on the CPU, so that no device waits for them. This module knows nothing of
videos.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store  # there is no public way to it

_ROLL_CALL_S = 5.0
"""How long those that noticed a failure wait for the others to notice it too, before they call them gone."""

_NONE, _END = ("none",), ("end",)
"""Orders: rank 0 is still there, and that it ends."""


class RankFailedError(RuntimeError):
    """Another rank failed or is gone. The message names it, in one line."""


class Ranks:
    """The ranks of a group, of which the first one leads.

    On it `turn` gives an order and does its own part; the others take orders from `orders` and do theirs within
    `together`. While rank 0 has none to give it is heard from all the same.

    Args:
        talk: Of theirs, with the backend gloo and for nothing else. Every member makes this at the same time.
        timeout_s: The timeout of `talk`, after which a rank that is waited for counts as gone.
    """

    def __init__(self, talk: dist.ProcessGroup, timeout_s: float) -> None:
        self._talk = talk
        self.rank, self.count = dist.get_rank(talk), dist.get_world_size(talk)
        self._store = _get_default_store()
        self._store.set(self._key("who", self.rank), f"process {os.getpid()} on {socket.gethostname()}")
        self._timeout_s = timeout_s
        self._failure: str | None = None
        self._turn = threading.Lock()
        self._ended = threading.Event()
        dist.barrier(self._talk)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    # Orders.

    def __enter__(self) -> Self:
        """On rank 0: be heard from until the end of the block, which the others are told."""
        self._thread = threading.Thread(target=self._stay_heard, name="wan-ranks", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if self._failure is None:
            with contextlib.suppress(RuntimeError):  # who is gone needs no word
                self.share(_END)

    @contextmanager
    def turn(self, *order: Any, harmless: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """On rank 0: give an order and do the own part of it within the block, one at a time. Elsewhere nothing.

        Args:
            order: Anything that can be pickled.
            harmless: Errors that every rank has at the same place, after which all go on.

        Raises:
            RankFailedError: another rank is the reason that the block failed.
        """
        if not self.leads:
            yield
            return
        with self._turn, self.together(harmless):
            self.share(order)
            yield

    def orders(self) -> Iterator[tuple[Any, ...]]:
        """On the other ranks: what rank 0 orders, until it ends. Raises `RankFailedError` when it is gone."""
        while True:
            with self.together():
                order = self.share(None)
            if order == _END:
                return
            if order != _NONE:
                yield order

    # At the same time on all ranks.

    def agree(self, wish: bool) -> bool:
        """Whether rank 0 wishes it: one int to every other one."""
        flag = torch.tensor([int(wish)])
        dist.broadcast(flag, group=self._talk, group_src=0)
        return bool(flag)

    def share(self, value: Any, source: int = 0) -> Any:
        """What one rank, the first by default, calls this with, on all of them."""
        told = [value]
        dist.broadcast_object_list(told, group=self._talk, group_src=source)
        return told[0]

    def check_same(self, digests: dict[str, str]) -> None:
        """Raise `ValueError` on all ranks, with the first difference, unless all have the same digests."""
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, digests, group=self._talk)
        for rank, theirs in enumerate(found):
            for name in found[0].keys() | theirs.keys():
                if theirs.get(name) != found[0].get(name):
                    raise ValueError(
                        f"rank {rank} ({self._who(rank)}) has another {name} than rank 0: all ranks of a video need "
                        "the same models, settings, prompts and noise"
                    )

    @contextmanager
    def together(self, harmless: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """What all ranks do at the same time. Raises `RankFailedError` where another one is the cause of an error."""
        if self._failure is not None:
            raise RankFailedError(f"{self._failure}; these ranks cannot go on, start them again")
        try:
            yield
        except harmless:
            raise
        except BaseException as error:
            culprit = self._call_the_roll(error)
            self._failure = culprit or f"rank {self.rank} failed: {error}"
            if culprit is None:
                raise
            raise RankFailedError(culprit) from error

    # Whose fault it is.

    def _call_the_roll(self, error: BaseException) -> str | None:
        """Name another rank as the reason for an error here; `None` if it is this one's own."""
        words = " ".join(f"{type(error).__name__}: {error}".split())
        kind = "noticed" if _is_of_a_connection(error) else "failed"
        kind = "stopped" if isinstance(error, KeyboardInterrupt) else kind
        others = [rank for rank in range(self.count) if rank != self.rank]
        try:
            self._store.set(self._key("end", self.rank), f"{kind} {words}")
            if kind == "failed":
                return None
            if kind == "noticed":
                keys = [self._key("end", rank) for rank in others]
                with contextlib.suppress(dist.DistError, RuntimeError, KeyboardInterrupt):
                    self._store.wait(keys, timedelta(seconds=_ROLL_CALL_S))
            said = {rank: self._said(rank) for rank in others}
        except (dist.DistError, RuntimeError):
            # It was kept by rank 0, or by what started all of them.
            return f"rank 0 has ended or does not answer, and with it where ranks meet ({words})"
        for rank, (kind_there, words_there) in said.items():
            if kind_there == "failed":
                return f"rank {rank} ({self._who(rank)}) failed: {words_there}"
        if kind == "stopped":
            return None
        silent = [f"rank {rank} ({self._who(rank)})" for rank, (kind_there, _) in said.items() if not kind_there]
        if silent:
            return f"{' and '.join(silent)} has ended, was stopped or does not answer for {self._timeout_s:g} s"
        stopped = [rank for rank, (kind_there, _) in said.items() if kind_there == "stopped"]
        if stopped:
            return f"rank {stopped[0]} ({self._who(stopped[0])}) was stopped: {said[stopped[0]][1]}"
        return f"the connection between ranks broke: {words}"

    def _said(self, rank: int) -> tuple[str, str]:
        """How a rank ended and what it said, both empty if it said nothing."""
        key = self._key("end", rank)
        if not self._store.check([key]):
            return "", ""
        kind, _, words = self._store.get(key).decode().partition(" ")
        return kind, words

    def _who(self, rank: int) -> str:
        return str(self._store.get(self._key("who", rank)).decode())

    def _key(self, of: str, rank: int) -> str:
        return f"{self._talk.group_name}/{of}/{rank}"

    def _stay_heard(self) -> None:
        while not self._ended.wait(self._timeout_s / 3):
            if self._turn.acquire(blocking=False):
                try:
                    self.share(_NONE)
                except RuntimeError:  # the next order fails as well, and says why
                    return
                finally:
                    self._turn.release()


class RankGroup:
    """Some ranks with a group for tensors. All ranks of `torch.distributed` make it at the same time."""

    def __init__(self, members: list[int], timeout_s: float) -> None:
        timeout = timedelta(seconds=timeout_s)
        self.group = dist.new_group(members, timeout)
        talk = dist.new_group(members, timeout, backend="gloo")
        self.is_member = dist.get_rank() in members
        if self.is_member:
            self.ranks = Ranks(talk, timeout_s)


def _is_of_a_connection(error: BaseException) -> bool:
    """Whether an error comes from talking to others. gloo and NCCL raise plain `RuntimeError`."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error).lower() for name in ("gloo", "nccl"))
    )
