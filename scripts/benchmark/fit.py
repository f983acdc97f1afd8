"""Is the cost per chunk flat? A straight line through the seconds of many chunks. No torch in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LineFit:
    """Least squares `seconds = intercept + slope * chunk`."""

    slope_s_per_chunk: float
    intercept_s: float
    mean_s: float
    percent_per_100_chunks: float
    """Slope over 100 chunks in percent of the mean."""
    standard_error_percent: float
    """One standard error of it, from the scatter around the line."""
    chunks: int


def fit_line(chunk_indices: Sequence[int], seconds: Sequence[float]) -> LineFit:
    """Fit chunks that are alike; ValueError for fewer than 3 or for lengths that differ."""
    count = len(chunk_indices)
    if count < 3 or count != len(seconds):
        raise ValueError(f"a fit needs 3 chunks or more and as many times, got {count} and {len(seconds)}")
    mean_index, mean_s = sum(chunk_indices) / count, sum(seconds) / count
    spread = sum((index - mean_index) ** 2 for index in chunk_indices)
    pairs = list(zip(chunk_indices, seconds, strict=True))
    slope = sum((index - mean_index) * (second - mean_s) for index, second in pairs) / spread
    intercept = mean_s - slope * mean_index
    squares = sum((second - intercept - slope * index) ** 2 for index, second in pairs)
    error = (squares / (count - 2) / spread) ** 0.5
    return LineFit(slope, intercept, mean_s, 1e4 * slope / mean_s, 1e4 * error / mean_s, count)
