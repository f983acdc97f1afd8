"""`wan-ar generate` in several processes that torchrun has started: the first one leads, the others follow.

Rank 0 reads, writes and prints as a single process does. The others only load the model and do their part of what it
does; of what is wrong they say nothing that rank 0 says as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from wan_autoregressive.configs import GenerateConfig
from wan_autoregressive.scripts.generate_flags import GenerateArguments
from wan_autoregressive.scripts.interrupts import handle_stops
from wan_autoregressive.scripts.load_pipeline import load_pipeline


def own_rank() -> int | None:
    """Of this process, as torchrun says it; None where it is alone."""
    return int(os.environ["RANK"]) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def check(arguments: GenerateArguments) -> None:
    """Raise `ValueError` for flags that mean nothing to this process or its ranks."""
    if arguments.decode_rank and own_rank() is None:
        raise ValueError(
            "--decode-rank lets the last of several processes decode, and this one is alone; start them by torchrun "
            "--nproc-per-node N -m wan_autoregressive.scripts.cli generate"
        )
    if not arguments.rank_timeout > 0:
        raise ValueError(f"--rank-timeout must be more than 0 seconds, got {arguments.rank_timeout:g}")


def follow(arguments: GenerateArguments) -> None:
    """On a rank other than the first: do this rank's part until rank 0 ends.

    A signal to stop comes to all ranks, and what it means is for rank 0 to decide.

    Raises:
        RankFailedError: another rank failed or is gone.
    """
    if arguments.dry_run:
        return
    with handle_stops(lambda number, frame: None):
        pipe = load_pipeline(on_own_device(arguments.config))
        with on_all_ranks(pipe, arguments):
            pass


@contextmanager
def on_all_ranks(pipe: Any, arguments: GenerateArguments) -> Iterator[None]:
    """Have all ranks make the videos of a pipeline; alone, nothing changes.

    Raises:
        RankFailedError: another rank failed or is gone.
        ValueError: the ranks have other models, or the model has fewer heads than there are ranks.
    """
    if own_rank() is None:
        yield
        return
    import torch
    import torch.distributed as dist

    from wan_autoregressive.pipelines.parallel_pipeline import parallel_rollouts

    device = pipe.wan_components().device
    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)
    backend = None if device.type == "cpu" else f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    dist.init_process_group(backend or "gloo", timeout=timedelta(seconds=arguments.rank_timeout))
    with parallel_rollouts(pipe, arguments.decode_rank, arguments.rank_timeout):
        yield
    dist.destroy_process_group()


def on_own_device(config: GenerateConfig) -> GenerateConfig:
    """The settings with the device of this rank, which is one of its own.

    Raises:
        ValueError: one device is named for all of them.
    """
    if own_rank() is None or config.device == "cpu":
        return config
    if ":" in config.device:
        raise ValueError(f"each rank takes a device of its own; give --device {config.device.split(':')[0]} or none")
    import torch

    kind = "cuda" if config.device == "auto" else config.device
    if config.device == "auto" and not torch.cuda.is_available():
        return config
    return config.model_copy(update={"device": f"{kind}:{os.environ['LOCAL_RANK']}"})
