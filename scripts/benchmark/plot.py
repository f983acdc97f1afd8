"""Seconds per chunk over a rollout as a PNG, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from wan_autoregressive.scripts.benchmark.fit import LineFit

_WIDTH, _HEIGHT = 960, 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 100, 24, 48, 48
_INK, _GRID, _POINTS, _LINE = (40, 40, 40), (225, 225, 225), (31, 119, 180), (214, 39, 40)


def draw_chunk_times(
    path: Path, seconds: Sequence[float], title: str, fit: LineFit | None = None, unit: str = "seconds"
) -> None:
    """Write a PNG with a point per chunk and the fitted line, which covers the last chunks.

    Raises:
        ValueError: no chunks.
        OSError: `path` cannot be written.
    """
    if not seconds:
        raise ValueError("there are no chunks to draw")
    image = Image.new("RGB", (_WIDTH, _HEIGHT), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    step = nice_step(max(seconds) / 5)
    highest = step * math.ceil(max(seconds) / step * 1.02)
    last = max(len(seconds) - 1, 1)

    def place(index: float, second: float) -> tuple[float, float]:
        across = _LEFT + (_WIDTH - _LEFT - _RIGHT) * index / last
        return across, _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * second / highest

    for tick in range(round(highest / step) + 1):
        (left, level), (right, _) = place(0, tick * step), place(last, tick * step)
        draw.line([left, level, right, level], fill=_GRID)
        draw.text((left - 8, level), f"{tick * step:.4g}", fill=_INK, anchor="rm")
    chunk_step = max(1, round(nice_step(last / 8)))
    for index in range(0, last + 1, chunk_step):
        across, floor = place(index, 0)
        draw.line([across, floor, across, floor + 5], fill=_INK)
        draw.text((across, floor + 8), str(index), fill=_INK, anchor="mt")
    for index, second in enumerate(seconds):
        x, y = place(index, second)
        draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=_POINTS)
    if fit is not None:
        first = len(seconds) - fit.chunks
        ends = [place(i, fit.intercept_s + fit.slope_s_per_chunk * i) for i in (first, len(seconds) - 1)]
        draw.line([*ends[0], *ends[1]], fill=_LINE, width=2)
        title += f"; slope {fit.percent_per_100_chunks:+.2f} % per 100 chunks"
    draw.text((_LEFT, 16), title, fill=_INK)
    draw.text((_WIDTH // 2, _HEIGHT - 6), "chunk", fill=_INK, anchor="mb")
    draw.text((8, 16), unit, fill=_INK)
    image.save(path, format="PNG")


def nice_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... (or tenths, hundredths, ...) that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * 0.999999)
