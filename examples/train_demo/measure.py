"""What can be read off the frames of a toy-world video: colours, the shape's mask, where it is, what it looks like."""

import dataclasses

import torch

from examples.train_demo.world import BACKGROUNDS, COLORS, SHAPES, SIZE, coverage

VISIBLE_DISTANCE = 40.0  # RGB distance from the background below which nothing counts as a shape
NAME_DISTANCE = 60.0  # RGB distance up to which a colour still deserves its nearest name


@dataclasses.dataclass(frozen=True)
class FrameMeasures:
    """Measures of F frames.

    `background`, `color`: (F, 3), RGB 0..255. `mask`: (F, SIZE, SIZE), how much of each pixel is shape, 0..1.
    `area`: (F,), pixels; 0 where nothing is visible. `centroid`: (F, 2), (x, y) in pixels, wrap-around aware.
    """

    background: torch.Tensor
    color: torch.Tensor
    mask: torch.Tensor
    area: torch.Tensor
    centroid: torch.Tensor


def measure_frames(frames: torch.Tensor) -> FrameMeasures:
    """Measure frames (F, SIZE, SIZE, 3), RGB 0..255."""
    pixels = frames.flatten(1, 2)
    background = pixels.median(dim=1).values
    offset = pixels - background[:, None]
    distance = offset.norm(dim=-1)  # (F, pixels)
    # Every shape covers more than 5 % of the picture, so this quantile lies inside it.
    strongest = distance.quantile(0.97, dim=1, keepdim=True)
    inside = (distance > 0.7 * strongest) & (strongest > VISIBLE_DISTANCE)
    color = (pixels * inside[..., None]).sum(1) / inside.sum(1, keepdim=True).clamp(min=1)
    contrast = color - background
    mask = (offset * contrast[:, None]).sum(-1) / contrast.square().sum(-1, keepdim=True).clamp(min=1)
    mask = torch.where(strongest > VISIBLE_DISTANCE, mask.clamp(0, 1), 0).view(-1, SIZE, SIZE)
    return FrameMeasures(background, color, mask, mask.sum((1, 2)), circular_centroid(mask))


def circular_centroid(mask: torch.Tensor) -> torch.Tensor:
    """Centre of mass (..., 2) as (x, y) of masks (..., SIZE, SIZE) on a torus, in pixels."""
    solid = mask * (mask > 0.3)  # faint noise all over the picture would pull the centre about
    angle = 2 * torch.pi * torch.arange(SIZE) / SIZE
    sums = torch.stack([solid.sum(-2), solid.sum(-1)], dim=-2)  # over rows: x, over columns: y
    phase = torch.atan2((sums * angle.sin()).sum(-1), (sums * angle.cos()).sum(-1))
    return (phase * SIZE / (2 * torch.pi)) % SIZE


def wrapped(distance: torch.Tensor) -> torch.Tensor:
    """The shortest way on the torus: any difference of positions -> -SIZE / 2 .. SIZE / 2."""
    return (distance + SIZE / 2) % SIZE - SIZE / 2


def shape_center(measures: FrameMeasures, shape: str) -> torch.Tensor:
    """Centres (F, 2) as `world.render` counts them, if what is seen is `shape`: a triangle's centroid lies lower."""
    middle = torch.tensor([SIZE / 2, SIZE / 2])
    return (measures.centroid - circular_centroid(coverage(shape, middle)) + middle) % SIZE


def shape_overlap(measures: FrameMeasures, shape: str, reach: float = 1.0, step: float = 0.5) -> torch.Tensor:
    """Soft intersection over union (F,) of the masks with the template of `shape`, at its best place.

    The place is searched within `reach` pixels around the measured one.
    """
    center = shape_center(measures, shape)
    shifts = torch.arange(-reach, reach + step / 2, step)
    places = center[:, None] + torch.cartesian_prod(shifts, shifts)  # (F, K, 2)
    template = coverage(shape, places)  # (F, K, SIZE, SIZE)
    mask = measures.mask[:, None]
    both = torch.minimum(template, mask).sum((2, 3))
    either = torch.maximum(template, mask).sum((2, 3))
    return (both / either).amax(1)


def shape_overlaps(measures: FrameMeasures) -> dict[str, torch.Tensor]:
    """`shape_overlap` for every shape of the world."""
    return {shape: shape_overlap(measures, shape) for shape in SHAPES}


def name_color(rgb: torch.Tensor) -> str | None:
    """The shape colour nearest to RGB (3,), or None if none is near."""
    return _nearest(rgb, COLORS)


def name_background(rgb: torch.Tensor) -> str | None:
    """The background nearest to RGB (3,), or None if none is near."""
    return _nearest(rgb, BACKGROUNDS)


def _nearest(rgb: torch.Tensor, palette: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {name: (rgb - torch.tensor(value)).norm().item() for name, value in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= NAME_DISTANCE else None
