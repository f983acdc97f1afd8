"""`wan-ar estimate`: the memory and the FLOPs of a rollout, computed for a model of any size on any machine.

Torch is only imported by `run`, so that the help is there at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from wan_autoregressive.scripts.costs.workload import (
    WEIGHT_FORMATS,
    Workload,
    add_sampler_flags,
    add_workload_flags,
    workload_of,
)

if TYPE_CHECKING:
    from wan_autoregressive.scripts.costs.memory import MemoryEstimate

_DESCRIPTION = """\
Compute what a rollout takes: bytes of weights, cache and VAE state, the most at once, and floating-point operations of
a chunk. Works on torch's meta device: no weights are read and nothing is allocated."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds `estimate` to the command's subparsers; the parsed arguments carry `run` as `args.run`."""
    parser = subparsers.add_parser(
        "estimate", help="compute the memory and the FLOPs of a model of any size", description=_DESCRIPTION
    )
    add_workload_flags(parser)
    parser.add_argument(
        "--weights", choices=WEIGHT_FORMATS, help="of the transformer, in fewer bits (default: in --dtype)"
    )
    parser.add_argument("--preview-vae", action="store_true", help="decode with the tiny VAE first, for a live view")
    add_sampler_flags(parser)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON instead of a table")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs `wan-ar estimate`; returns 0, raises ValueError for sizes that cannot work."""
    workload = workload_of(args, preview_vae=args.preview_vae)

    from wan_autoregressive.scripts.costs.memory import estimate_memory

    estimate = estimate_memory(workload, args.weights)
    if args.json:
        print(json.dumps(_as_dict(workload, estimate), indent=2))
    else:
        weights = "" if args.weights is None else f", transformer's weights {args.weights}"
        print(f"{workload.describe()}{weights}\n")
        Console().print(_table(workload, estimate))
    return 0


def _as_dict(workload: Workload, estimate: MemoryEstimate) -> dict[str, object]:
    from wan_autoregressive.scripts.run_report import versions

    figures = {"held_bytes": estimate.held_bytes, "most_bytes": estimate.most_bytes}
    return {
        "versions": versions(),
        "workload": dataclasses.asdict(workload),
        **dataclasses.asdict(estimate),
        **figures,
    }


_NOT_OF_ALL = (
    *("weights: image encoder", "held: the image, at most"),
    *("weights: preview VAE", "held: preview VAE's state"),
)
"""Rows of what most videos do not have."""


def _table(workload: Workload, estimate: MemoryEstimate) -> Table:
    from wan_autoregressive.scripts.run_report import human_bytes

    rollout, most = workload.rollout, estimate.most_bytes
    frames = rollout.window_frames or workload.chunks * rollout.chunk_frames
    figures = {
        "weights: transformer": estimate.experts * estimate.transformer_bytes,
        "weights: VAE": estimate.vae_bytes,
        "weights: text encoder": estimate.text_encoder_bytes,
        "weights: image encoder": estimate.image_encoder_bytes,
        "weights: preview VAE": estimate.preview_vae_bytes,
        f"held: K/V of {frames} latent frames": estimate.kv_cache_bytes,
        "held: K/V of the text": estimate.text_kv_bytes,
        "held: the image, at most": estimate.image_condition_bytes,
        "held: VAE decoder state": estimate.vae_state_bytes,
        "held: preview VAE's state": estimate.preview_state_bytes,
        "held: latents": estimate.latents_bytes,
        "held: inputs of a forward": estimate.input_bytes,
        "for a while: one forward": estimate.forward_peak_bytes,
        "for a while: decoding a chunk": estimate.decode_peak_bytes,
        "most at once: all models": most["all_models"],
        "most at once: without text encoder": most["without_text_encoder"],
        "most at once: the same, decoding alongside": most["decode_alongside"],
        "most at once: transformer alone, denoising": most["transformer_alone"],
        "most at once: VAE alone, decoding": most["vae_alone"],
    }
    table = Table.grid("computed", "", padding=(0, 2))
    table.columns[1].justify = "right"
    for name, count in figures.items():
        if count or name not in _NOT_OF_ALL:
            table.add_row(name, human_bytes(count))
    for stage, flops in estimate.flops.items():
        table.add_row(f"a chunk: {stage}", f"{flops / 1e12:.4g} TFLOP")
    for model, flops in estimate.image_flops.items():
        table.add_row(f"the image, once: {model}", f"{flops / 1e12:.4g} TFLOP")
    return table
