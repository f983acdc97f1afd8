"""`wan-ar benchmark`: seconds of every stage of a rollout with random weights, beside its exact costs.

Torch is only imported by `run`, so that the help is there at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from wan_autoregressive.scripts.costs.formulas import StageCosts, costs_per_chunk
from wan_autoregressive.scripts.costs.workload import Workload, add_workload_flags, workload_of

if TYPE_CHECKING:
    from wan_autoregressive.pipelines import WanAutoregressivePipeline

STAGES = ("clean_pass", "denoise", "decode")
_DESCRIPTION = """\
Measure a rollout with random weights: seconds per stage and chunk, the first frame, the steady rate. Beside them stand
the exact floating-point operations and bytes of keys and values, which follow from the shapes."""


@dataclasses.dataclass(frozen=True)
class ChunkMeasure:
    """One chunk. The clean pass in it is the one of the chunk before."""

    index: int
    pixel_frames: int
    wall_s: float
    stage_s: dict[str, float]
    costs: dict[str, StageCosts]


@dataclasses.dataclass(frozen=True)
class RolloutMeasure:
    """A whole rollout, for the tables and, as a dict, for the JSON."""

    first_frame_latency_s: float
    """From the call with ready embeddings to the first chunk's frames."""
    chunks: list[ChunkMeasure]
    steady_chunks: int
    """The last ones, over which medians are taken: those behind a full window, or without one all but the first."""
    steady_stage_s: dict[str, float]
    frames_per_second_without_vae: float
    frames_per_second: float | None
    """With it; `None` if nothing is decoded."""
    weights_bytes: int
    kv_cache_bytes: int
    vae_state_bytes: int
    device_peak_bytes: int | None
    """By CUDA's allocator; `None` elsewhere."""


def measure_rollout(pipe: WanAutoregressivePipeline, workload: Workload) -> RolloutMeasure:
    """Time `workload.chunks` chunks on the pipeline that `build_pipeline` made for the workload."""
    import torch

    from wan_autoregressive.scripts.costs.build import start_rollout, weights_bytes
    from wan_autoregressive.scripts.costs.memory import count_decode

    device, on_cuda = torch.device(workload.device), workload.device.startswith("cuda")
    _, decode_flops = count_decode(workload)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    rollout = start_rollout(pipe, workload)
    chunks: list[ChunkMeasure] = []
    ready_at: list[float] = []
    for index in range(workload.chunks):
        chunk_started = time.perf_counter()
        chunk = rollout.step()
        stage_s = {stage: float(getattr(chunk.timings, f"{stage}_s")) for stage in STAGES}  # waits for a GPU
        ready_at.append(time.perf_counter())
        costs = costs_per_chunk(workload, index) | {"decode": StageCosts(decode_flops[min(index, 1)])}
        frames = _pixel_frames(workload, index)
        chunks.append(ChunkMeasure(index, frames, ready_at[-1] - chunk_started, stage_s, costs))
    # The chunk that fills the window still follows a shorter clean pass.
    first_steady = 1 if workload.window_tokens is None else workload.chunks_to_fill
    steady = chunks[first_steady:] or chunks[-1:]
    held = pipe.estimate(**dataclasses.asdict(workload.rollout))

    def median_s(*stages: str) -> float:
        return statistics.median(sum(chunk.stage_s[stage] for stage in stages) for chunk in steady)

    return RolloutMeasure(
        first_frame_latency_s=ready_at[0] - started,
        chunks=chunks,
        steady_chunks=len(steady),
        steady_stage_s={stage: median_s(stage) for stage in STAGES},
        frames_per_second_without_vae=steady[-1].pixel_frames / median_s("clean_pass", "denoise"),
        frames_per_second=steady[-1].pixel_frames / median_s(*STAGES) if workload.with_vae else None,
        weights_bytes=weights_bytes(pipe.transformer, pipe.transformer_2, pipe.vae),
        kv_cache_bytes=held.kv_cache_bytes or 0,
        vae_state_bytes=held.vae_state_bytes or 0,
        device_peak_bytes=torch.cuda.max_memory_allocated(device) if on_cuda else None,
    )


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds `benchmark` to the command's subparsers; the parsed arguments carry `run` as `args.run`."""
    parser = subparsers.add_parser(
        "benchmark", help="measure the seconds of every stage with random weights", description=_DESCRIPTION
    )
    add_workload_flags(parser)
    add_machine_flags(parser)
    parser.set_defaults(run=run)
    return parser


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what is measured on a machine, rather than computed."""
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch on the CPU (default: torch's)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and noise (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")


def run(args: argparse.Namespace) -> int:
    """Runs `wan-ar benchmark`; returns 0, raises ValueError or OSError for wrong input before anything is measured."""
    workload, pipe = prepare(args)
    measure = measure_rollout(pipe, workload)
    print(describe(workload))
    Console().print(_stage_table(measure))
    print(_summary(measure))
    write_json(args.json, workload, {"rollout": dataclasses.asdict(measure)})
    return 0


def prepare(args: argparse.Namespace) -> tuple[Workload, WanAutoregressivePipeline]:
    """Workload and pipeline that the flags ask for, with torch set to their threads; ValueError for wrong flags."""
    workload = workload_of(args, device=args.device, seed=args.seed)
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ValueError(f"the folder of {args.json} does not exist")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"threads is {args.threads}; it must be at least 1")

    import torch

    from wan_autoregressive.scripts.costs.build import build_pipeline

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return workload, build_pipeline(workload)


def describe(workload: Workload) -> str:
    """The workload, and what it is measured on."""
    conditions = _conditions(workload)
    return (
        f"{workload.describe()}, {conditions['device']}, {conditions['threads']} threads, "
        f"torch {conditions['torch']}, load {conditions['load_1_minute']}\n"
    )


def write_json(path: Path | None, workload: Workload, figures: dict[str, Any]) -> None:
    """Write figures with what they were measured on, if there is a path."""
    if path is not None:
        report = {"conditions": _conditions(workload), "workload": dataclasses.asdict(workload), **figures}
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _pixel_frames(workload: Workload, index: int) -> int:
    """Of one chunk; the first latent frame of a video is a single pixel frame."""
    frames = workload.rollout.chunk_frames * workload.model.temporal_factor
    return frames if index else frames - workload.model.temporal_factor + 1


def _conditions(workload: Workload) -> dict[str, Any]:
    import torch

    from wan_autoregressive.scripts.run_report import describe_device, versions

    return {
        **versions(),
        "device": describe_device(torch.device(workload.device)),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1_minute": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _stage_table(measure: RolloutMeasure) -> Table:
    """All chunks of a short rollout; of a long one the first and the last few."""
    from wan_autoregressive.scripts.run_report import human_bytes

    table = Table(box=None)
    for title in ("chunk", "stage", "s", "GFLOP", "K/V written", "K/V read"):
        table.add_column(title, justify="right", no_wrap=True)
    shown = measure.chunks if len(measure.chunks) <= 8 else [*measure.chunks[:5], measure.chunks[-1]]
    for chunk in shown:
        for stage in STAGES:
            costs = chunk.costs[stage]
            if costs.flops:
                seconds, gflop = f"{chunk.stage_s[stage]:.4f}", f"{costs.flops / 1e9:.2f}"
                written, read = human_bytes(costs.kv_written_bytes), human_bytes(costs.kv_read_bytes)
                table.add_row(str(chunk.index), stage, seconds, gflop, written, read)
    if len(shown) < len(measure.chunks):
        table.caption = f"{len(measure.chunks) - len(shown)} chunks are only in the JSON"
    return table


def _summary(measure: RolloutMeasure) -> str:
    from wan_autoregressive.scripts.run_report import human_bytes

    with_vae = "" if measure.frames_per_second is None else f", {measure.frames_per_second:.3f} with VAE"
    peak = "" if measure.device_peak_bytes is None else f"; device peak {human_bytes(measure.device_peak_bytes)}"
    return (
        f"\nfirst frame after {measure.first_frame_latency_s:.3f} s (prompt embeddings ready)\n"
        f"frames per second over {measure.steady_chunks} steady chunks: "
        f"{measure.frames_per_second_without_vae:.3f} without VAE{with_vae}\n"
        f"memory held: weights {human_bytes(measure.weights_bytes)}, K/V {human_bytes(measure.kv_cache_bytes)}, "
        f"VAE state {human_bytes(measure.vae_state_bytes)}{peak}"
    )
