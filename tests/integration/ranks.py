"""Several processes that make one thing together over gloo on the loopback, as ranks on several devices would.

They are forked from a server that has imported the library once: a launch costs a second, not ten for each process.
"""

import contextlib
import datetime
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PEER_TIMEOUT = 120
"""Seconds that a rank waits for another one before it gives up."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["wan_autoregressive.pipelines", "ranks"])


class RankError(RuntimeError):
    """What a rank raised, with its traceback."""

    raised_at = 0.0


def run_ranks(target: Callable[..., Any], count: int, folder: Path, *args: Any, limit_s: float = 300) -> list[Any]:
    """What `target(*args)` returned on each of `count` ranks, in the order of ranks.

    Args:
        target: A function of a module that tests can import.
        folder: An empty one, for the meeting of the ranks.

    Raises:
        RankError: what the first rank to fail raised.
        TimeoutError: not all of them ended within `limit_s`.
    """
    results = start_ranks(target, count, folder, *args, limit_s=limit_s)
    failed = [result for result in results if isinstance(result, RankError)]
    if failed:
        raise min(failed, key=lambda error: error.raised_at)
    return results


def start_ranks(
    target: Callable[..., Any], count: int, folder: Path, *args: Any, limit_s: float = 300, lost: int | None = None
) -> list[Any]:
    """As `run_ranks`, with a `RankError` or, of a rank that was killed, `None` in the place of its result.

    Args:
        lost: A rank that is not waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pipes = [_context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        _context.Process(target=_rank, args=(rank, count, folder, pipe[1], target, args), daemon=True)
        for rank, pipe in enumerate(pipes)
    ]
    results: list[Any] = [None] * count
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        open_ends = {receiver: rank for rank, (receiver, _) in enumerate(pipes) if rank != lost}
        end = datetime.datetime.now() + datetime.timedelta(seconds=limit_s)
        while open_ends:
            ready = wait(open_ends, max(0.0, (end - datetime.datetime.now()).total_seconds()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(open_ends.values())} of {count} are not done after {limit_s} s")
            for receiver in ready:
                rank = open_ends.pop(receiver)
                try:
                    results[rank] = pickle.loads(receiver.recv_bytes())
                except EOFError:  # killed
                    results[rank] = None
    finally:
        for process in processes:
            process.kill()
            process.join()
    return results


def _rank(rank: int, count: int, folder: Path, sender: Any, target: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group(
        *("gloo", f"file://{folder / 'store'}", datetime.timedelta(seconds=PEER_TIMEOUT)), rank=rank, world_size=count
    )
    try:
        result = target(*args)
        with contextlib.suppress(RuntimeError):  # one that is gone does not come
            dist.barrier()  # others may still be reading
    except BaseException as error:
        result = RankError(f"rank {rank}: {type(error).__name__}: {error}\n{traceback.format_exc()}")
        result.raised_at = time.monotonic()
    # By value: `send` would share the memory of a tensor, which ends with this rank.
    sender.send_bytes(pickle.dumps(result))
    sender.close()
    os._exit(0)  # without the farewell of a group whose other ranks may be gone
