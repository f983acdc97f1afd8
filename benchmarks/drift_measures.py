"""What of a video may drift, measured frame by frame without any weights. numpy only.

Frames are `(height, width, 3)` uint8, luma and colours in 0 to 1. Videos compare only at the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # ITU-R BT.709
_THUMBNAIL = 16
_ROWS_AT_ONCE = 512
_SAME = 1e-3
"""Largest root mean square, of luma in 0 to 1, of what counts as no difference between two thumbnails."""


@dataclass(frozen=True)
class DriftMeasures:
    """One number for each frame, `(frames,)` float32; NaN where there is none."""

    brightness: Array
    """Mean luma."""
    contrast: Array
    """Standard deviation of luma."""
    colourfulness: Array
    """Hasler and Suesstrunk, Measuring colourfulness in natural images (2003): `std + 0.3 mean` of the opponent
    colours red - green and yellow - blue."""
    colour_shift: Array
    """How far the mean colour, luma taken off, is from that of the first chunk."""
    sharpness: Array
    """Variance of luma's Laplacian by the variance of luma: what is fine, whatever the contrast; 0 for one colour."""
    motion: Array
    """Mean absolute difference of luma to the frame before. The first has none."""
    brightness_step: Array
    """Absolute difference of brightness to the frame before. The first has none."""
    repetition: Array
    """How much the frame is like the one most like it of those a chunk and more before it: 1 is the same, 0 is as far
    from it as frames of this video are from their mean. Frames without such a past have none."""

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in fields(cls)]


def measure_drift(frames: npt.NDArray[np.uint8], chunk_frames: int = 12) -> DriftMeasures:
    """Measure a whole video.

    Args:
        frames: `(frames, height, width, 3)`, both sides at least 16 pixels.
        chunk_frames: Pixel frames of a chunk: the first ones are what colours are compared with, and repetition looks
            no nearer.

    Raises:
        ValueError: frames of another shape, or a chunk without frames.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or min(frames.shape[1:3]) < _THUMBNAIL or not len(frames):
        raise ValueError(
            f"the frames are {frames.shape}; they must be (frames, height, width, 3), sides of at least {_THUMBNAIL}"
        )
    if chunk_frames < 1:
        raise ValueError(f"chunk_frames is {chunk_frames}; it must be at least 1")
    of_frames: dict[str, list[float]] = {name: [] for name in DriftMeasures.names()}
    chroma, thumbnails, before = [], [], None
    for frame in frames:
        pixels = frame.astype(np.float32) / 255
        luma = pixels @ _LUMA  # (height, width)
        mean = pixels.mean(axis=(0, 1))
        of_frames["brightness"].append(float(luma.mean()))
        of_frames["contrast"].append(float(luma.std()))
        of_frames["colourfulness"].append(_colourfulness(pixels))
        of_frames["sharpness"].append(_sharpness(luma))
        of_frames["motion"].append(np.nan if before is None else float(np.abs(luma - before).mean()))
        chroma.append(mean - mean @ _LUMA)
        thumbnails.append(_thumbnail(luma))
        before = luma
    colours = np.stack(chroma)  # (frames, 3)
    shift = np.linalg.norm(colours - colours[:chunk_frames].mean(axis=0), axis=1)
    arrays = {name: np.array(values, np.float32) for name, values in of_frames.items()}
    steps = np.abs(np.diff(arrays["brightness"], prepend=np.float32(np.nan)))
    repetition = _repetition(np.stack(thumbnails), chunk_frames)
    return DriftMeasures(**{**arrays, "colour_shift": shift, "brightness_step": steps, "repetition": repetition})


def boundary_ratio(values: Array, starts: Sequence[int]) -> float:
    """Mean of a measure at the first frames of chunks by its mean at all others: about 1 where nothing shows between
    chunks; NaN without a boundary, or where neither has a value above 0.

    Args:
        starts: Numbers of frames; those past the end do not count.
    """
    is_start = np.zeros(len(values), bool)
    is_start[[start for start in starts if start < len(values)]] = True
    known = ~np.isnan(values)
    at, between = values[known & is_start], values[known & ~is_start]
    if not len(at) or not len(between):
        return float("nan")
    inside = float(between.mean())
    if inside == 0:
        return float("inf") if at.any() else float("nan")
    return float(at.mean()) / inside


def _colourfulness(pixels: Array) -> float:
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    opponents = red - green, (red + green) / 2 - blue
    return float(
        np.hypot(*(opponent.std() for opponent in opponents))
        + 0.3 * np.hypot(*(opponent.mean() for opponent in opponents))
    )


def _sharpness(luma: Array) -> float:
    inner = luma[1:-1, 1:-1]
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * inner
    variance = float(luma.var())
    return float(laplacian.var()) / variance if variance > 1e-8 else 0.0


def _thumbnail(luma: Array) -> Array:
    """Means of a 16 x 16 grid, `(256,)`: what is moved by a pixel, or noisy, is the same picture."""
    rows, columns = (np.linspace(0, side, _THUMBNAIL, endpoint=False).astype(int) for side in luma.shape)
    sums = np.add.reduceat(np.add.reduceat(luma, rows, axis=0), columns, axis=1)
    sizes = np.outer(np.diff(rows, append=luma.shape[0]), np.diff(columns, append=luma.shape[1]))
    return (sums / sizes).ravel().astype(np.float32)


def _repetition(thumbnails: Array, gap: int) -> Array:
    """For each frame `1 - nearest / typical`, the root mean square distances to the nearest thumbnail of those `gap`
    and more before it, and of thumbnails to their mean; at least 0. `(frames,)`."""
    count, size = thumbnails.shape
    centred = thumbnails - thumbnails.mean(axis=0)  # what never changes is no repetition
    squares = (centred**2).sum(axis=1)
    typical = np.sqrt(squares.mean() / size)
    found = np.full(count, np.nan, np.float32)
    for start in range(0, count, _ROWS_AT_ONCE):
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, count))
        distances = squares[rows, None] + squares[None] - 2 * centred[rows] @ centred.T  # (rows, frames)
        distances[np.arange(count)[None] > rows[:, None] - gap] = np.inf
        nearest = np.sqrt(np.maximum(distances.min(axis=1), 0) / size)
        has_past = rows >= gap
        likeness = np.where(nearest <= _SAME, 1.0, 1 - nearest / max(typical, _SAME))
        found[rows[has_past]] = np.clip(likeness, 0, 1)[has_past]
    return found
