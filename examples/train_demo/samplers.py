"""The demo checkpoint with every sampler, judged: it was trained for `chunkwise` alone.

    python -m examples.train_demo.samplers --limit 12 --chunks 10 --sheets build/samplers

Prints a table for `docs/SAMPLERS.md`; a contact sheet for each sampler shows what the figures mean.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.train_demo import world
from examples.train_demo.evaluate import evaluate_pipeline
from examples.train_demo.rolling_window import Sight
from examples.train_demo.score import summarize
from wan_autoregressive import WanAutoregressivePipeline, demo_checkpoint

SAMPLERS: dict[str, dict[str, Any]] = {
    "`chunkwise`": {"window_frames": 12},
    "`chunkwise`, no context pass": {"window_frames": 12, "clean_pass": False},
    "`memory_bank`, 3 frames": {
        **{"sampler": "memory_bank", "window_frames": 12, "sink_frames": 3, "memory_bank_frames": 3},
    },
    "`rolling`": Sight().sampler_settings,
    "`recompute`": {"sampler": "recompute", "window_frames": 6, "switch_policy": "cross_attention"},
    "`recompute`, 6 context frames": {
        **{"sampler": "recompute", "window_frames": 9, "switch_policy": "cross_attention"},
        "sampler_options": {"context_frames": 6},
    },
    "`stream_batch`": {"sampler": "stream_batch", "window_frames": 12, "switch_policy": "cross_attention"},
}
FIGURES = ("background", "color", "shape", "direction", "overlap", "drift", "flicker", "intact_at_end")


def main(argv: Sequence[str] | None = None) -> None:
    """Judge every sampler with the arguments of the command line and print a table of figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint folder (default: the packaged demo)")
    names = {settings.get("sampler", "chunkwise") for settings in SAMPLERS.values()}
    parser.add_argument("--only", choices=sorted(names), help="judge this sampler alone")
    parser.add_argument("--limit", type=int, default=12, help="held-out prompts, spread evenly (default: 12)")
    parser.add_argument("--chunks", type=int, default=10, help="chunks of 3 latent frames (default: 10)")
    parser.add_argument("--sheets", type=Path, metavar="DIR", help="write a contact sheet for each sampler there")
    args = parser.parse_args(argv)
    pipe = WanAutoregressivePipeline.from_pretrained(args.model or demo_checkpoint(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    scenes = world.spread(world.held_out_scenes(), args.limit)
    print(f"| sampler | {' | '.join(name.replace('_', ' ') for name in FIGURES)} |")
    print(f"|---{'|---' * len(FIGURES)}|")
    for number, (name, settings) in enumerate(SAMPLERS.items()):
        sampler, sheet = settings.get("sampler", "chunkwise"), None
        if args.only not in (None, sampler):
            continue
        if args.sheets is not None:
            args.sheets.mkdir(parents=True, exist_ok=True)
            sheet = args.sheets / f"{number}_{sampler}.png"
        scores = evaluate_pipeline(pipe, scenes, chunks=args.chunks, sheet=sheet, **settings)
        figures = summarize(scores)
        print(f"| {name} | {' | '.join(f'{figures[key]:.2f}' for key in FIGURES)} |", flush=True)


if __name__ == "__main__":
    main()
