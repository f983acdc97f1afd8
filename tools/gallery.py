"""Renders the demo with every sampler, switch policy and preset that it makes sense for, into one page.

    python tools/gallery.py outputs/gallery              # or: make gallery
    python tools/gallery.py outputs/gallery --only recache

Same seed, same first noise, so that the videos can be compared. The demo checkpoint was trained with chunks of 3 and
windows of up to 12 latent frames; a preset for other chunks is listed with that reason.
"""

import argparse
import dataclasses
import html
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wan_autoregressive import WanAutoregressivePipeline, demo_checkpoint
from wan_autoregressive.configs import load_preset, preset_names
from wan_autoregressive.configs.registry import SAMPLERS, SWITCH_POLICIES
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.media.video_writer import VideoWriter

SEED = 0
NUM_FRAMES = 141  # pixel frames: 12 chunks
CHANGE_AT = 18  # latent frame
CIRCLE, CROSS = "a red circle moving right on a navy background", "a green cross moving right on a navy background"
SHARED: dict[str, Any] = {"height": 64, "width": 64, "window_frames": 12, "position_mode": "sink_relative"}
# What each needs beside, in the range that the demo was trained for.
OF_SAMPLER: dict[str, dict[str, Any]] = {
    "chunkwise": {},
    "rolling": {"window_frames": 24, "sink_frames": 3, "switch_policy": "cross_attention"},
    "recompute": {"window_frames": 6, "switch_policy": "blend"},
    "stream_batch": {"switch_policy": "cross_attention", "position_mode": "absolute"},
    "memory_bank": {"memory_bank_frames": 3, "window_frames": 9, "sink_frames": 3, "position_mode": "absolute"},
}
OF_POLICY: dict[str, dict[str, Any]] = {"scene_cut": {"sink_frames": 3, "position_mode": "relative"}}
# Settings of a preset that belong to its checkpoint.
OF_CHECKPOINT = {
    *("height", "width", "num_frames", "fps", "scale", "guidance_scale", "denoising_steps", "first_chunk_steps"),
    *("shift", "warp", "context_noise"),
}


@dataclass(frozen=True)
class Entry:
    """One video of the page."""

    group: str
    name: str
    settings: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)
    """Prompts and given frames."""


@dataclass(frozen=True)
class LeftOut:
    """A preset that the demo cannot show."""

    name: str
    reason: str


def entries(clip: np.ndarray | None = None) -> Iterator[Entry | LeftOut]:
    """Every entry of the page; `clip` `(frames, 64, 64, 3)` is what the last group starts from."""
    for name in SAMPLERS.names:
        yield Entry("Samplers", name, SHARED | {"sampler": name} | OF_SAMPLER.get(name, {}), {"prompt": CIRCLE})
    change = {"prompt": CIRCLE, "prompt_schedule": {CHANGE_AT: CROSS}}
    for name in SWITCH_POLICIES.names:
        yield Entry("Prompt changes", name, SHARED | {"switch_policy": name} | OF_POLICY.get(name, {}), change)
    for name in preset_names():
        preset = load_preset(name)
        if (preset.get("chunk_frames", 3), preset.get("first_chunk_frames")) != (3, None):
            lengths = [preset.get("first_chunk_frames"), preset.get("chunk_frames", 3)]
            chunks = ", then ".join(str(length) for length in lengths if length)
            yield LeftOut(name, f"for chunks of {chunks} latent frames")
        else:
            settings = {key: value for key, value in preset.items() if key not in OF_CHECKPOINT}
            yield Entry("Presets", name, {"height": 64, "width": 64} | settings, change)
    given = clip if clip is not None else np.zeros((9, 64, 64, 3), np.uint8)
    yield Entry("From pictures", "image", SHARED, {"prompt": CIRCLE, "image": given[:1]})
    yield Entry("From pictures", "clip, extended", SHARED, {"prompt": CROSS, "video": given[None]})
    source = SHARED | {"strength": 0.6}
    yield Entry("From pictures", "video to video, strength 0.6", source, {"prompt": CROSS, "video": given})
    yield Entry("Less work", "int8 keys and values", SHARED | {"kv_dtype": "int8"}, {"prompt": CIRCLE})
    yield Entry("Less work", "no context pass", SHARED | {"clean_pass": False}, {"prompt": CIRCLE})
    two = SHARED | {"denoising_steps": (1000, 500), "first_chunk_steps": (1000, 750, 500, 250)}
    yield Entry("Less work", "two steps after the first chunk", two, {"prompt": CIRCLE})


@dataclass(frozen=True)
class Rendered:
    """What the page says of one video."""

    entry: Entry
    file: str
    frames: int
    first_s: float
    """Seconds until the first chunk was decoded, encoding of the prompt included."""
    chunk_s: float
    """Median seconds of the later chunks."""


def render(pipe: WanAutoregressivePipeline, entry: Entry, folder: Path) -> Rendered:
    """Make the video of an entry."""
    generator = torch.Generator().manual_seed(SEED)
    length = {} if "strength" in entry.settings else {"num_frames": NUM_FRAMES}
    times, frames = [time.perf_counter()], []
    rollout = pipe.rollout(generator=generator, output_type="uint8", **length, **entry.settings, **entry.inputs)
    for chunk in rollout:
        times.append(time.perf_counter())
        frames.append(chunk.frames[0])
    file = f"{entry.group}-{entry.name}.mp4".lower().replace(" ", "-").replace(",", "")
    video = np.concatenate(frames)
    with VideoWriter(folder / file, fps=16, scale=4) as writer:
        writer.write(video)
    seconds = np.diff(times)
    return Rendered(entry, file, len(video), float(seconds[0]), float(np.median(seconds[1:])))


def page(rendered: list[Rendered], left_out: list[LeftOut]) -> str:
    """The page, without anything from elsewhere."""
    parts = [
        _HEAD,
        f"<p>The demo checkpoint, seed {SEED}, float32, torch {torch.__version__} on one thread of a CPU. Seconds are "
        "those of this one run: to the first chunk (prompt encoded, chunk decoded), and the median of later chunks, "
        f"most of 12 frames. Where the prompt changes, it does so at {(4 * CHANGE_AT - 3) / 16:.1f} s.</p>",
    ]
    for group in dict.fromkeys(item.entry.group for item in rendered):
        parts.append(f"<h2>{group}</h2><div class=grid>")
        parts += [_card(item) for item in rendered if item.entry.group == group]
        parts.append("</div>")
    if left_out:
        names = "".join(f"<li><code>{item.name}</code>: {item.reason}</li>" for item in left_out)
        parts.append(f"<h2>Presets that the demo cannot show</h2><ul>{names}</ul>")
    return "\n".join(parts) + "\n"


def _card(item: Rendered) -> str:
    defaults = {own.name: own.default for own in dataclasses.fields(RolloutConfig)}
    shown = {key: value for key, value in item.entry.settings.items() if key not in ("height", "width")}
    words = ", ".join(f"{key}={value!r}" for key, value in shown.items() if defaults.get(key) != value)
    return (
        f"<figure><video src='{item.file}' width=256 height=256 autoplay loop muted playsinline controls></video>"
        f"<figcaption><b>{html.escape(item.entry.name)}</b><br>{html.escape(words)}<br>"
        f"{item.frames} frames; first chunk {item.first_s:.2f} s, later {item.chunk_s:.2f} s</figcaption></figure>"
    )


_HEAD = """<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>
<title>wan-autoregressive: gallery</title>
<style>
body { font: 15px/1.4 sans-serif; max-width: 1120px; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }
.grid { display: grid; grid-template-columns: repeat(auto-fill, 256px); gap: 20px }
figure { margin: 0 } figcaption { font-size: 13px; overflow-wrap: anywhere } video { background: #ddd; display: block }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 } }
</style>
<h1>Gallery</h1>"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="names that hold this")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # small tensors gain nothing from more
    pipe = WanAutoregressivePipeline.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED + 1)
    clip = pipe(CIRCLE, num_frames=69, generator=generator, output_type="uint8", **SHARED).frames[0]
    chosen = [entry for entry in entries(clip) if options.only in entry.name]
    rendered = []
    for entry in chosen:
        if isinstance(entry, Entry):
            rendered.append(render(pipe, entry, options.folder))
            print(f"{entry.group}: {entry.name}, {rendered[-1].frames} frames")
    left_out = [entry for entry in chosen if isinstance(entry, LeftOut)]
    (options.folder / "index.html").write_text(page(rendered, left_out), encoding="utf-8")
    print(options.folder / "index.html")


if __name__ == "__main__":
    main()
