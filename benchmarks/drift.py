"""How a video changes over its length, measured without any weights: light, colour, sharpness, flicker, repetition.

    python -m benchmarks.drift video.mp4 --csv drift.csv --plot drift.png

Prints each measure at the start and at the end of a video, and what shows at the boundaries of chunks. Takes any video
file; `docs/EVALUATION.md` says what the measures are and what they do not see.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.drift_measures import Array, DriftMeasures, boundary_ratio, measure_drift
from benchmarks.experiment import table_of
from wan_autoregressive.media.reading import load_video
from wan_autoregressive.pipelines.frame_grid import pixel_frames_of

_TEMPORAL_FACTOR = 4  # pixel frames per latent frame after the first
_AT_BOUNDARIES = ("motion", "brightness_step")
_MOST_LINES = 60


def main(argv: Sequence[str] | None = None) -> None:
    """Measure with the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("video", type=Path)
    add("--height", type=int, default=240, metavar="PX", help="frames are scaled and cropped to it (default: 240)")
    add("--width", type=int, default=416, metavar="PX", help="default: 416")
    add("--chunk-frames", type=int, default=3, metavar="N", help="latent frames per chunk (default: 3)")
    add("--first-chunk-frames", type=int, metavar="N", help="of the first chunk (default: as the others)")
    add("--csv", type=Path, metavar="FILE", help="write the measures of every frame")
    add("--plot", type=Path, metavar="FILE", help="draw them, as png or svg; needs matplotlib")
    args = parser.parse_args(argv)
    try:
        frames = load_video(args.video, args.height, args.width)
        starts = chunk_starts(len(frames), args.chunk_frames, args.first_chunk_frames)
        measures = measure_drift(frames, _TEMPORAL_FACTOR * args.chunk_frames)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    if args.csv is not None:
        write_csv(args.csv, measures, starts)
    if args.plot is not None:
        _plot(args.plot, measures, starts)
    Console().print(_table(measures, starts))


def chunk_starts(num_frames: int, chunk_frames: int, first_chunk_frames: int | None = None) -> list[int]:
    """Pixel frames of a video at which a chunk begins, the first one left out.

    Args:
        num_frames: Pixel frames of the video.
        chunk_frames, first_chunk_frames: Latent frames.

    Raises:
        ValueError: a chunk without frames.
    """
    first = chunk_frames if first_chunk_frames is None else first_chunk_frames
    if min(chunk_frames, first) < 1:
        raise ValueError(f"chunks of {first} and then {chunk_frames} latent frames; each must have at least 1")
    latents = range(first, num_frames, chunk_frames)
    starts = (pixel_frames_of(latent, _TEMPORAL_FACTOR) for latent in latents)
    return [start for start in starts if start < num_frames]


def write_csv(path: Path, measures: DriftMeasures, starts: Sequence[int]) -> None:
    """A row for each frame: its number, whether a chunk begins with it, its measures, empty where there is none."""
    columns = [getattr(measures, name) for name in measures.names()]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["frame", "chunk_starts", *measures.names()])
        for index, values in enumerate(zip(*columns, strict=True)):
            cells = ("" if np.isnan(value) else f"{value:.6g}" for value in values)
            writer.writerow([index, int(index in starts), *cells])


def ends_of(values: Array) -> tuple[float, float]:
    """Means of the first and of the last eighth of the frames; NaN where no frame of it has the measure."""
    count = max(1, len(values) // 8)
    known = [part[~np.isnan(part)] for part in (values[:count], values[-count:])]
    first, last = (float(part.mean()) if len(part) else float("nan") for part in known)
    return first, last


def _table(measures: DriftMeasures, starts: Sequence[int]) -> Table:
    rows = []
    for name in measures.names():
        values = getattr(measures, name)
        first, last = ends_of(values)
        ratio = f"{boundary_ratio(values, starts):.2f}" if name in _AT_BOUNDARIES else ""
        rows.append((name.replace("_", " "), f"{first:.4f}", f"{last:.4f}", f"{last - first:+.4f}", ratio))
    titles = ("measure", "first eighth", "last eighth", "change", "at boundaries")
    caption = f"{len(measures.motion)} frames, {len(starts)} boundaries: there by elsewhere, 1 is no difference"
    return table_of(titles, rows, caption)


def _plot(path: Path, measures: DriftMeasures, starts: Sequence[int]) -> None:
    from matplotlib.figure import Figure

    names = measures.names()
    figure = Figure(figsize=(9, 1.6 * len(names)), layout="constrained")
    for name, axes in zip(names, figure.subplots(len(names), sharex=True), strict=True):
        axes.plot(getattr(measures, name), linewidth=1)
        axes.set_title(name.replace("_", " "), loc="left", fontsize=9)
        for start in starts if len(starts) <= _MOST_LINES else ():
            axes.axvline(start, color="0.85", linewidth=0.6, zorder=0)
    axes.set_xlabel("frame")
    figure.savefig(path)


if __name__ == "__main__":
    main()
