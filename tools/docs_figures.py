"""Draws the figures of the documentation from what the library does: `python tools/docs_figures.py [FOLDER]`.

The cache is asked which frames an attention sees; for the samplers every forward of a short video of the demo
checkpoint is written down. Nothing is drawn by hand, so a figure that differs from `docs/images/` shows a change.
"""

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wan_autoregressive import WanAutoregressivePipeline, WanKVCache, demo_checkpoint
from wan_autoregressive.pipelines.denoiser import Denoiser

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
SIZE = {
    "height": 64,
    "width": 64,
    "num_frames": 69,
    "output_type": "np",
    "switch_policy": "cross_attention",
}  # 18 latent frames
STEPS = [1000, 750, 500, 250]
SAMPLERS: dict[str, dict[str, Any]] = {
    "chunkwise": {"window_frames": 9, "sink_frames": 3, "denoising_steps": STEPS},
    "rolling": {"window_frames": 24, "sink_frames": 3, "position_mode": "sink_relative", "denoising_steps": STEPS},
    "recompute": {"window_frames": 6, "position_mode": "sink_relative", "denoising_steps": [1000, 667, 333, 0]},
    "stream_batch": {"window_frames": 9, "sink_frames": 3, "denoising_steps": STEPS},
    "memory_bank": {"window_frames": 9, "sink_frames": 3, "memory_bank_frames": 3, "denoising_steps": STEPS},
}
CELL, GAP = 11, 1
LEFT, TOP = 56, 22
INK, SINK, WINDOW, CHUNK, CONTEXT = "#333", "#7a5195", "#9fb6cd", "#ef8250", "#2f7d4f"


@dataclass
class Forward:
    """One forward of the transformer: the noise of each latent frame, and whether it only writes the cache."""

    noise: dict[int, float]
    is_context: bool = False


@dataclass
class Timeline:
    """All forwards of a video, and after which of them how many frames had been handed out."""

    forwards: list[Forward] = field(default_factory=list)
    handed_out: list[tuple[int, range]] = field(default_factory=list)


@contextmanager
def recorded(forwards: list[Forward]) -> Iterator[None]:
    """Write down every forward of every rollout inside of the block."""
    names = ("predict", "cache_context", "rewrite_context", "_predict_together")
    originals = {name: getattr(Denoiser, name) for name in names}

    def recording(name: str) -> Any:
        def call(self: Denoiser, latents: Any, windows: Any, *rest: Any, **named: Any) -> Any:
            noise: dict[int, float] = {}
            for window in windows if name == "_predict_together" else [windows]:  # lanes that share a forward
                noise |= zip(window.frames, itertools.cycle(window.timesteps), strict=False)
            forwards.append(Forward(noise, is_context="context" in name))
            return originals[name](self, latents, windows, *rest, **named)

        return call

    for name in originals:
        setattr(Denoiser, name, recording(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(Denoiser, name, original)


def record(pipe: WanAutoregressivePipeline, sampler: str) -> Timeline:
    """The forwards of a short video."""
    timeline = Timeline()
    generator = torch.Generator().manual_seed(0)
    with recorded(timeline.forwards):
        rollout = pipe.rollout(
            "a red circle moving right on a navy background",
            sampler=sampler,
            generator=generator,
            **SIZE,
            **SAMPLERS[sampler],
        )
        for chunk in rollout:
            if sampler == "recompute":  # its positions start again at 0 with every chunk
                _move(timeline.forwards[timeline.handed_out[-1][0] if timeline.handed_out else 0 :], chunk.start_frame)
            frames = range(chunk.start_frame, chunk.start_frame + chunk.latents.shape[2])
            timeline.handed_out.append((len(timeline.forwards), frames))
    return timeline


def _move(forwards: list[Forward], start: int, context: int = 3) -> None:
    """Number the frames of a chunk that starts at frame `start`, and its context, by the video."""
    for forward in forwards:
        forward.noise = {frame + max(0, start - context): level for frame, level in forward.noise.items()}


def frames_in_view(chunks: int, chunk: int = 3, window: int = 12, sink: int = 3) -> list[list[int]]:
    """Which latent frames each chunk attends to, asked of a cache whose keys are the numbers of the frames."""
    cache = WanKVCache(num_blocks=1, window_size=window, sink_size=sink)
    seen = []
    for first in range(0, chunks * chunk, chunk):
        numbers = torch.arange(first, first + chunk, dtype=torch.float32).reshape(1, -1, 1, 1)
        cache.enable_append_mode()
        keys, _ = cache.update(0, numbers, numbers)
        seen.append(sorted(int(key) for key in keys.flatten()))
    return seen


def draw_cache() -> str:
    chunks, chunk, sink = 8, 3, 3
    seen = frames_in_view(chunks, chunk, sink=sink)
    drawing = Drawing(columns=chunks * chunk, rows=chunks)
    for row, frames in enumerate(seen):
        own = range(row * chunk, (row + 1) * chunk)
        drawing.label(LEFT - 6, TOP + row * (CELL + GAP) + CELL - 2, f"chunk {row}", "end")
        for frame in range(own.stop):
            color = CHUNK if frame in own else SINK if frame < sink else WINDOW
            drawing.cell(frame, row, color if frame in frames else "none")
    drawing.axis("latent frames →")
    drawing.legend([(SINK, "sink: stays"), (WINDOW, "window"), (CHUNK, "chunk in the making"), ("none", "evicted")])
    return drawing.svg()


def draw_timeline(sampler: str, timeline: Timeline) -> str:
    rows = max(max(forward.noise) for forward in timeline.forwards) + 1
    drawing = Drawing(columns=len(timeline.forwards), rows=rows)
    for frame in range(0, rows, 3):
        drawing.label(LEFT - 6, TOP + frame * (CELL + GAP) + CELL - 2, str(frame), "end")
    for column, forward in enumerate(timeline.forwards):
        for frame, level in forward.noise.items():
            drawing.cell(column, frame, CONTEXT if forward.is_context else noise_color(level))
    for column, frames in timeline.handed_out:
        drawing.bracket(column, frames)
    drawing.axis("forwards of the transformer →")
    drawing.legend([(noise_color(1000), "much noise"), (noise_color(250), "little"), (CONTEXT, "context pass")])
    drawing.legend_mark("handed out")
    return drawing.svg(title=sampler)


def noise_color(timestep: float) -> str:
    """From pale to deep orange."""
    share = timestep / 1000
    red, green, blue = (round(pale + share * (deep - pale)) for pale, deep in ((253, 200), (232, 60), (208, 20)))
    return f"rgb({red},{green},{blue})"


class Drawing:
    """A grid of cells with labels, as SVG."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows, self.parts = columns, rows, []
        self.width = max(LEFT + columns * (CELL + GAP) + 12, 420)
        self.height = TOP + rows * (CELL + GAP) + 48
        self._legend_x = LEFT

    def cell(self, column: int, row: int, color: str) -> None:
        x, y = LEFT + column * (CELL + GAP), TOP + row * (CELL + GAP)
        edge = ' stroke="#bbb" stroke-dasharray="2 2"' if color == "none" else ""
        self.parts.append(f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{color}"{edge}/>')

    def bracket(self, column: int, frames: range) -> None:
        x = LEFT + column * (CELL + GAP) - GAP
        top, bottom = (TOP + frame * (CELL + GAP) for frame in (frames.start, frames.stop))
        self.parts.append(f'<path d="M{x} {top}V{bottom - GAP}" stroke="{INK}" stroke-width="2"/>')

    def label(self, x: int, y: int, text: str, anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>')

    def axis(self, text: str) -> None:
        self.label(LEFT, TOP - 8, text)

    def legend(self, entries: list[tuple[str, str]]) -> None:
        for color, text in entries:
            y = self.height - 24
            edge = ' stroke="#bbb" stroke-dasharray="2 2"' if color == "none" else ""
            self.parts.append(f'<rect x="{self._legend_x}" y="{y}" width="10" height="10" fill="{color}"{edge}/>')
            self.label(self._legend_x + 14, y + 9, text)
            self._legend_x += 26 + 6 * len(text)

    def legend_mark(self, text: str) -> None:
        y = self.height - 24
        self.parts.append(f'<path d="M{self._legend_x + 4} {y}v11" stroke="{INK}" stroke-width="2"/>')
        self.label(self._legend_x + 14, y + 9, text)

    def svg(self, title: str = "") -> str:
        name = f"<title>{title}</title>" if title else ""
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        style = f'font-family="sans-serif" font-size="10" fill="{INK}"'
        back = f'<rect width="{self.width}" height="{self.height}" fill="#fff"/>'
        body = "\n".join(self.parts)
        return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{name}\n{back}\n<g {style}>\n{body}\n</g>\n</svg>\n'


def figures() -> dict[str, str]:
    """All of them by file name."""
    pipe = WanAutoregressivePipeline.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    drawn = {f"sampler-{name}.svg": draw_timeline(name, record(pipe, name)) for name in SAMPLERS}
    return {"cache.svg": draw_cache(), **drawn}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in figures().items():
        (folder / name).write_text(svg)
        print(f"{folder / name}: {len(svg) / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES)
