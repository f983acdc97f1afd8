"""The small trained checkpoint that comes with the package."""

from pathlib import Path

DEMO = "demo"
"""What `--model` calls it."""


def demo_checkpoint() -> Path:
    """Folder of the demo checkpoint, for `WanAutoregressivePipeline.from_pretrained(demo_checkpoint())`.

    It knows one thing: `a {color} {shape} moving {direction} on a {background} background` at 64 x 64 pixels; its
    README.md says which words, how it was trained and how well it does. It loads in stock `WanPipeline` too.
    """
    return Path(__file__).parent / "demo_checkpoint"
