"""The model card of a demo checkpoint."""

from collections.abc import Mapping
from pathlib import Path

CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---

# Demo checkpoint: a tiny autoregressive Wan

Stock Wan classes, small (a transformer of 3.1 million parameters, a VAE of 2.5 million), trained from nothing on a
toy world of moving shapes. It shows on any CPU what the library does (rolling KV cache, few-step sampling, streaming
VAE) and lets tests measure it. It knows nothing else.

```python
from wan_autoregressive import WanAutoregressivePipeline

pipe = WanAutoregressivePipeline.from_pretrained("PATH_OF_THIS_FOLDER")
video = pipe(
    "a red circle moving right on a navy background", num_frames=81, height=64, width=64, window_frames=12
).frames
```

## The world it knows

Prompts: `a {{color}} {{shape}} moving {{direction}} on a {{background}} background`.
Colours red, green, blue, yellow, purple, cyan; shapes circle, square, triangle, cross; directions left, right, up,
down; backgrounds black, gray, white, navy.
64 x 64 pixels at 16 frames per second; every shape fits a box of 24 x 24 pixels, moves 1.5 pixels per frame and
leaves the picture on one side to come in on the other. All clips were rendered for the purpose; no data set was used.

## How it was trained

`python -m examples.train_demo.train --output DIR`, from this project's repository, in float32 and bfloat16 on two CPU
cores:

1. VAE: 2 x 2 pixel patches, residual blocks, 16 latent channels, 8 x 8 latents per 4 frames; L1 and L2 with more
   weight on edges; then the decoder alone, on noised and spliced latents.
2. Latents of all clips, encoded once.
3. Causal flow matching by teacher forcing over random windows, part of the contexts noised, blended with another
   shape or taken from another scene. The start position is tied to the first noise, so that each noise has one
   answer; seen over all clips the noise is standard normal.
4. The same at the four sampling steps, half of the inputs made by the model's own previous step.
5. Self-rollout: the right continuation of what the model itself generated.

96 of the 384 prompt combinations were held out from all of these; every pair of words was still seen.
{notes}
## Measured

{command}

| figure | value |
|---|---|
{rows}

Background, colour, shape and direction: share of chunks that are right; shape means that the template of the prompted
shape fits best, with an intersection over union of at least 0.7. Speed: pixels per frame, 1.5 is right. Worst chunk:
its overlap with the template over that of the first chunk. Drift: overlap of the last three chunks less the first
three's. Flicker: frame difference at chunk boundaries over that inside chunks. PSNR: the VAE alone, unseen clips.

## Limits

Other words, sizes and styles give nonsense. Sample with the four steps of its scheduler (1000, 750, 500, 250, not
warped), without guidance, in chunks of three latent frames.
"""


def write_card(folder: Path, figures: Mapping[str, object], command: str, notes: str = "") -> None:
    """Write `README.md` of a checkpoint: `figures` measured by `command`, `notes` on how this one was trained."""
    rows = "\n".join(f"| {name.replace('_', ' ')} | {_text(value)} |" for name, value in figures.items())
    card = CARD.format(rows=rows, command=command, notes=f"\n{notes}\n" if notes else "")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _text(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
