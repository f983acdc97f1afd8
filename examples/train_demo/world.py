"""The toy world of the demo checkpoint: one coloured shape that moves over a plain background.

Everything is rendered on demand, so there is no data set: a scene (four words) and a start position give a clip of
any length. The picture wraps around at its borders, so that a shape can move for ever and a rollout of any length has
one right answer.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import torch

SIZE = 64  # pixels, height and width
FPS = 16
RADIUS = 12.0  # pixels: half of the side of every shape's bounding box
SPEED = 1.5  # pixels per frame
START_SPREAD = 14.0  # pixels: the centre of frame 0 lies within SIZE / 2 +- START_SPREAD, x and y
CROSS_HALF_WIDTH = RADIUS / 3

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (40, 175, 60),
    "blue": (50, 90, 235),
    "yellow": (245, 215, 50),
    "purple": (165, 60, 205),
    "cyan": (60, 215, 225),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 12),
    "gray": (120, 120, 120),
    "white": (240, 240, 240),
    "navy": (20, 25, 80),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

_PROMPT = re.compile(r"a (\w+) (\w+) moving (\w+) on a (\w+) background")


@dataclasses.dataclass(frozen=True)
class Scene:
    """The four words of a prompt. Raises ValueError for a word that this world does not have."""

    color: str
    shape: str
    direction: str
    background: str

    def __post_init__(self) -> None:
        for word, known in (
            (self.color, COLORS),
            (self.shape, SHAPES),
            (self.direction, DIRECTIONS),
            (self.background, BACKGROUNDS),
        ):
            if word not in known:
                raise ValueError(f"the demo world has no {word!r}; it knows {', '.join(known)}")

    @property
    def prompt(self) -> str:
        return f"a {self.color} {self.shape} moving {self.direction} on a {self.background} background"


def parse_prompt(prompt: str) -> Scene:
    """Read a prompt of this world. Raises ValueError if it has another form or an unknown word."""
    match = _PROMPT.fullmatch(" ".join(prompt.lower().split()).rstrip("."))
    if match is None:
        form = "a {color} {shape} moving {direction} on a {background} background"
        raise ValueError(f"not a prompt of the demo world: {prompt!r}; its form is {form!r}")
    return Scene(*match.groups())


def all_scenes() -> list[Scene]:
    """All 384 scenes, in a fixed order."""
    return [Scene(*words) for words in itertools.product(COLORS, SHAPES, DIRECTIONS, BACKGROUNDS)]


def is_held_out(scene: Scene) -> bool:
    """Whether the transformer never sees this combination in training: 96 of the 384.

    The rule is a Latin one: each word, and each pair of words, is held out equally often, so every word (and pair)
    is still seen in training.
    """
    words = (
        list(COLORS).index(scene.color),
        SHAPES.index(scene.shape),
        list(DIRECTIONS).index(scene.direction),
        list(BACKGROUNDS).index(scene.background),
    )
    return sum(words) % 4 == 0


def training_scenes() -> list[Scene]:
    return [scene for scene in all_scenes() if not is_held_out(scene)]


def held_out_scenes() -> list[Scene]:
    return [scene for scene in all_scenes() if is_held_out(scene)]


def spread(scenes: Sequence[Scene], count: int) -> list[Scene]:
    """`count` of the scenes, always the same ones, with all words mixed; all of them if there are no more."""
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(0))[:count].sort().values
    return [scenes[index] for index in order.tolist()]


def positions(scenes: Sequence[Scene], starts: torch.Tensor, num_frames: int, first_frame: int = 0) -> torch.Tensor:
    """Centres of the shapes, not wrapped: `starts` (B, 2) as (x, y) in pixels at frame 0 -> (B, num_frames, 2)."""
    steps = torch.tensor([DIRECTIONS[scene.direction] for scene in scenes], dtype=starts.dtype)
    frames = torch.arange(first_frame, first_frame + num_frames, dtype=starts.dtype)
    return starts[:, None] + SPEED * frames[None, :, None] * steps[:, None]


def coverage(shape: str, centers: torch.Tensor) -> torch.Tensor:
    """Share of each pixel that the shape covers: centres (..., 2) in pixels -> (..., SIZE, SIZE) in 0..1."""
    grid = torch.arange(SIZE, dtype=centers.dtype)
    dx = (grid - centers[..., 0, None] + SIZE / 2) % SIZE - SIZE / 2  # (..., SIZE)
    dy = (grid - centers[..., 1, None] + SIZE / 2) % SIZE - SIZE / 2
    dx, dy = dx[..., None, :], dy[..., :, None]
    if shape == "circle":
        return (RADIUS + 0.5 - torch.sqrt(dx**2 + dy**2)).clamp(0, 1)
    if shape == "square":
        return _bar(dx, RADIUS) * _bar(dy, RADIUS)
    if shape == "triangle":  # apex at the top, base as wide as the bounding box
        side = (2 * dx.abs() - (dy + RADIUS)) / 5**0.5
        return (0.5 - side).clamp(0, 1) * (RADIUS + 0.5 - dy).clamp(0, 1)
    if shape == "cross":
        horizontal = _bar(dx, RADIUS) * _bar(dy, CROSS_HALF_WIDTH)
        return torch.maximum(horizontal, _bar(dx, CROSS_HALF_WIDTH) * _bar(dy, RADIUS))
    raise ValueError(f"no shape {shape!r} in the demo world; it knows {', '.join(SHAPES)}")


def render(scenes: Sequence[Scene], starts: torch.Tensor, num_frames: int, first_frame: int = 0) -> torch.Tensor:
    """Clips (B, 3, num_frames, SIZE, SIZE), float32 in -1..1, of scenes whose shapes stand at `starts` at frame 0.

    Args:
        scenes: B scenes.
        starts: (B, 2), centre (x, y) in pixels at frame 0.
        num_frames: frames to render, from `first_frame` on.
    """
    centers = positions(scenes, starts.float(), num_frames, first_frame)
    clips = []
    for scene, center in zip(scenes, centers, strict=True):
        mask = coverage(scene.shape, center)
        color = torch.tensor(COLORS[scene.color]).view(3, 1, 1, 1) / 127.5 - 1
        background = torch.tensor(BACKGROUNDS[scene.background]).view(3, 1, 1, 1) / 127.5 - 1
        clips.append(background + (color - background) * mask)
    return torch.stack(clips)


def random_starts(count: int, generator: torch.Generator) -> torch.Tensor:
    """Start positions (count, 2) in pixels, uniform in the box of frame-0 positions used in training."""
    return SIZE / 2 + START_SPREAD * (2 * torch.rand(count, 2, generator=generator) - 1)


def _bar(distance: torch.Tensor, half_width: float) -> torch.Tensor:
    return (half_width + 0.5 - distance.abs()).clamp(0, 1)
