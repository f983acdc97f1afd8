"""Judges a toy-world video against its prompt, chunk by chunk."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from examples.train_demo import measure
from examples.train_demo.world import DIRECTIONS, SHAPES, SIZE, SPEED, Scene, coverage

LEAST_OVERLAP = 0.7  # of the mask with the prompted shape's template, for the shape to count as right
INTACT_OVERLAP = 0.6
INTACT_AREA = (0.6, 1.5)  # of the template's area
SHAPE_FRAME_STEP = 3  # the overlap is measured on every third frame: it costs the most and changes slowly
ENDS = 3  # chunks at either end that drift is measured on


@dataclasses.dataclass(frozen=True)
class ChunkScore:
    """One chunk against the prompt. `speed`: pixels per frame along the prompted direction.

    `overlap`: mean intersection over union with the template of the PROMPTED shape. `intact`: one shape of the right
    colour and about the right size and form on the right background.
    """

    background: bool
    color: bool
    shape: bool
    direction: bool
    speed: float
    overlap: float
    intact: bool


@dataclasses.dataclass(frozen=True)
class VideoScore:
    """One video against its prompt. `flicker`: frame difference at chunk boundaries over that inside chunks."""

    prompt: str
    chunks: tuple[ChunkScore, ...]
    flicker: float | None


def chunk_ranges(num_frames: int, chunk_frames: int = 3, first_chunk_frames: int | None = None) -> list[range]:
    """Pixel frames of each chunk; sizes in latent frames, of which the first is one pixel frame and others four."""
    end = 4 * (chunk_frames if first_chunk_frames is None else first_chunk_frames) - 3
    bounds = [0, min(end, num_frames)]
    while bounds[-1] < num_frames:
        bounds.append(min(bounds[-1] + 4 * chunk_frames, num_frames))
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


def as_pixels(video: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Video (F, SIZE, SIZE, 3), uint8 or float in 0..1 -> float32 in 0..255. Raises ValueError for another shape."""
    frames = torch.as_tensor(video)
    if frames.ndim != 4 or tuple(frames.shape[1:]) != (SIZE, SIZE, 3):
        raise ValueError(f"got a video of shape {tuple(frames.shape)}; the demo world is (frames, {SIZE}, {SIZE}, 3)")
    return frames.float() * (255.0 if frames.is_floating_point() else 1.0)


def score_video(
    video: np.ndarray | torch.Tensor, scene: Scene, chunk_frames: int = 3, first_chunk_frames: int | None = None
) -> VideoScore:
    """Judge a video (F, SIZE, SIZE, 3), uint8 or float in 0..1, against the words of `scene`.

    Raises:
        ValueError: a video of another size, or one of fewer than 2 frames, in which nothing can move.
    """
    frames = as_pixels(video)
    if len(frames) < 2:
        raise ValueError(f"got {len(frames)} frames; a direction needs at least 2")
    ranges = chunk_ranges(len(frames), chunk_frames, first_chunk_frames)
    measures = measure.measure_frames(frames)
    moves = measure.wrapped(measures.centroid[1:] - measures.centroid[:-1])
    chunks = tuple(_score_chunk(measures, moves, chunk, scene) for chunk in ranges)
    return VideoScore(scene.prompt, chunks, boundary_flicker(frames, ranges))


def boundary_flicker(frames: torch.Tensor, ranges: Sequence[range]) -> float | None:
    """Mean frame difference at chunk boundaries over that inside chunks; None where a video has only one chunk."""
    change = (frames[1:] - frames[:-1]).abs().mean((1, 2, 3))
    at_boundary = torch.zeros(len(change), dtype=torch.bool)
    at_boundary[[chunk.start - 1 for chunk in ranges[1:]]] = True
    if not at_boundary.any() or at_boundary.all():
        return None
    return (change[at_boundary].mean() / change[~at_boundary].mean().clamp(min=1e-6)).item()


def summarize(scores: Sequence[VideoScore]) -> dict[str, float | int | None]:
    """Figures over all videos: shares of right chunks, speed, the worst chunk, drift, flicker, intact at the end.

    `worst_chunk`: the lowest mean overlap of a chunk index over that of the first chunk. `drift`: mean overlap of the
    last three chunks less that of the first three.
    """
    chunks = [chunk for score in scores for chunk in score.chunks]
    length = min(len(score.chunks) for score in scores)
    overlap = [statistics.fmean(score.chunks[index].overlap for score in scores) for index in range(length)]
    flickers = [score.flicker for score in scores if score.flicker is not None]
    return {
        "videos": len(scores),
        "background": _share(chunks, lambda chunk: chunk.background),
        "color": _share(chunks, lambda chunk: chunk.color),
        "direction": _share(chunks, lambda chunk: chunk.direction),
        "shape": _share(chunks, lambda chunk: chunk.shape),
        "overlap": statistics.fmean(chunk.overlap for chunk in chunks),
        "speed": statistics.fmean(chunk.speed for chunk in chunks),
        "worst_chunk": min(overlap) / max(overlap[0], 1e-6),
        "drift": statistics.fmean(overlap[-ENDS:]) - statistics.fmean(overlap[:ENDS]),
        "flicker": statistics.fmean(flickers) if flickers else None,
        "intact_at_end": _share((score.chunks[-1] for score in scores), lambda chunk: chunk.intact),
    }


def _score_chunk(measures: measure.FrameMeasures, moves: torch.Tensor, chunk: range, scene: Scene) -> ChunkScore:
    rows = slice(chunk.start, chunk.stop)
    background = measure.name_background(measures.background[rows].median(0).values) == scene.background
    color = measure.name_color(measures.color[rows].median(0).values) == scene.color
    some = slice(chunk.start, chunk.stop, SHAPE_FRAME_STEP)
    fields = dataclasses.asdict(measures)
    seen = measure.FrameMeasures(**{name: values[some] for name, values in fields.items()})
    overlaps = {shape: measure.shape_overlap(seen, shape).mean().item() for shape in SHAPES}
    overlap = overlaps[scene.shape]
    velocity = moves[max(0, chunk.start - 1) : max(1, chunk.stop - 1)].mean(0)  # with the step into the chunk
    speeds = {name: float(velocity @ torch.tensor(step).float()) for name, step in DIRECTIONS.items()}
    speed = speeds[scene.direction]
    straight = abs(velocity.abs().min().item()) < SPEED / 2
    size = (seen.area / coverage(scene.shape, torch.tensor([SIZE / 2, SIZE / 2])).sum()).mean().item()
    return ChunkScore(
        background=background,
        color=color,
        shape=overlap == max(overlaps.values()) and overlap >= LEAST_OVERLAP,
        direction=speed == max(speeds.values()) and speed > SPEED / 3 and straight,
        speed=speed,
        overlap=overlap,
        intact=background and color and overlap >= INTACT_OVERLAP and INTACT_AREA[0] <= size <= INTACT_AREA[1],
    )


def _share(chunks: Iterable[ChunkScore], right: Callable[[ChunkScore], bool]) -> float:
    return statistics.fmean(float(right(chunk)) for chunk in chunks)
