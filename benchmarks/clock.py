"""Wall time, and repetitions that take turns so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's queue drained before and after."""
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def interleaved(
    works: Mapping[str, Callable[[], float]], repeats: int, on_round: Callable[[int], None] | None = None
) -> dict[str, list[float]]:
    """Seconds of every work in every round; the order turns from round to round.

    Args:
        works: Each does its work once and returns the seconds that count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for index in range(repeats):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(works[name]())
        if on_round is not None:
            on_round(index)
    return seconds


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median of the ratios of each round, which is steadier than the ratio of medians when the machine is busy."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
