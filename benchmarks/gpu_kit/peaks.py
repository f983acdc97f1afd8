"""The two rates that bound everything: matrix products, and memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.clock import timed


@dataclass(frozen=True)
class Peaks:
    """What the device reaches when it does one thing."""

    flops_per_s: float
    """Of one large matrix product; a multiply-add counts as 2."""
    bytes_per_s: float
    """Of a copy, read and write together."""

    def least_s(self, flops: float, moved_bytes: float) -> float:
        """Seconds that no program on this device goes below, if it does either at these rates."""
        return max(flops / self.flops_per_s, moved_bytes / self.bytes_per_s)


@torch.no_grad()
def measure_peaks(device: torch.device, dtype: torch.dtype, tiny: bool = False) -> Peaks:
    """Products of 8192 x 8192 matrices, and copies of 1 GiB."""
    side, size = (256, 2**20) if tiny else (8192, 2**30)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product_s = steady_seconds(lambda: left @ right, device)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy_s = steady_seconds(lambda: target.copy_(source), device)
    return Peaks(2 * side**3 / product_s, 2 * size / copy_s)


def steady_seconds(work: Callable[[], Any], device: torch.device, least_s: float = 0.3) -> float:
    """Seconds of one call, over as many as take about `least_s`, after two that do not count."""
    work()
    calls = max(1, math.ceil(least_s / timed(work, device)))

    def often() -> None:
        for _ in range(calls):
            work()

    return timed(often, device) / calls
