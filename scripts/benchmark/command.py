"""`wan-ar benchmark`: measures a rollout of random weights at the shapes of a published model.

Torch is only imported by `run`, so that the help is there at once.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_autoregressive.configs.choices import KV_DTYPES, POSITION_MODES
from wan_autoregressive.scripts.benchmark.presets import PRESETS
from wan_autoregressive.scripts.benchmark.settings import (
    COMPILED_PARTS,
    DTYPES,
    SWEEPS,
    BenchmarkSettings,
)

if TYPE_CHECKING:
    from wan_autoregressive.scripts.benchmark.measure import RolloutMeasure

_DESCRIPTION = """\
Measure a rollout with random weights: seconds per stage and chunk, and exact counts of FLOPs, allocations and bytes of
keys and values. With --roofline, how near the transformer comes to its bare matrix products and attentions; with
--baseline, other implementations on the same weights. What is compared is measured in turns within one run.
With --dry-run nothing is measured: what memory the model would take is computed, on any machine."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds `benchmark` to the command's subparsers; the parsed arguments carry `run` as `args.run`."""
    parser = subparsers.add_parser(
        "benchmark",
        help="measure speed, memory and exact costs with random weights",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="demo", help="shapes of the model (default: demo)")
    add("--layers", type=int, metavar="N", help="transformer blocks (default: the preset's)")
    add("--height", type=int, metavar="PX", help="pixels (default: the preset's)")
    add("--width", type=int, metavar="PX", help="pixels (default: the preset's)")
    add("--chunk-frames", type=int, default=3, metavar="N", help="latent frames per chunk (default: 3)")
    add("--window-frames", type=_frames_or_none, default=9, metavar="N", help="or `none` (default: 9)")
    add("--sink-frames", type=int, metavar="N", help="default: 3, or 0 without a window")
    add("--position-mode", choices=POSITION_MODES, default="absolute", help="default: absolute")
    add("--kv-dtype", choices=KV_DTYPES, help="how the past is kept (default: in --dtype)")
    add("--steps", type=int, default=4, metavar="N", help="denoising steps per chunk (default: 4)")
    add("--chunks", type=int, default=6, metavar="N", help="chunks of the rollout (default: 6)")
    add("--vae", action=argparse.BooleanOptionalAction, help="decode as well (default: for demo and --dry-run)")
    add("--vae-tiling", action="store_true", help="decode in tiles")
    add("--dry-run", action="store_true", help="print the memory and FLOPs it would take; allocates nothing")
    add("--device", default="cpu", help="default: cpu")
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")
    add("--threads", type=int, metavar="N", help="of torch on the CPU (default: torch's)")
    add("--repeats", type=int, default=3, metavar="N", help="rounds of what is compared (default: 3)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and noise (default: 0)")
    add("--roofline", action="store_true", help="compare with the bare matrix products and attentions")
    add(
        "--baseline",
        action="append",
        default=[],
        metavar="NAME",
        help="compare with `recompute` (no cache), `concat` (cache by concatenation), `fused-qkv` (the pipeline after "
        "fuse_qkv_projections) or any importable `module:function` (see wan_autoregressive.scripts.benchmark."
        "baselines); may be given several times",
    )
    add("--decode-alongside", action="store_true", help="compare with decoding while the next chunk is denoised")
    add("--compile", choices=COMPILED_PARTS, help="compare with torch.compile over each block or the whole model")
    add(
        "--sweep",
        choices=SWEEPS,
        help="cost of a chunk against window, resolution, chunk size, position mode or storage of the cache",
    )
    add("--sweep-values", metavar="LIST", help="comma-separated, such as 6,9,12 or 240x416,480x832")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--plot", type=Path, metavar="FILE", help="write a PNG of the seconds per chunk")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs `wan-ar benchmark`; returns 0, raises ValueError or OSError for wrong input before anything is measured."""
    settings = settings_of(args)
    for path in (args.json, args.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"the folder of {path} does not exist")
    needs_window = args.roofline or args.baseline or args.compile or args.sweep
    if needs_window and settings.window_frames is None:
        raise ValueError(
            "--roofline, --baseline, --compile and --sweep compare steady chunks, which need --window-frames"
        )
    if args.decode_alongside and not (settings.with_vae and settings.chunks > 1):
        raise ValueError("--decode-alongside compares ways to decode chunks, which needs --vae and at least 2 chunks")
    if args.sweep_values and not args.sweep:
        raise ValueError("--sweep-values needs --sweep")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"threads is {args.threads}; it must be at least 1")

    from wan_autoregressive.scripts.benchmark import report as reports

    if args.dry_run:
        _check_dry_run(args)
        from wan_autoregressive.scripts.benchmark.memory import as_text, plan_memory

        plan = plan_memory(settings)
        print(as_text(plan))
        if args.json is not None:
            reports.write_json(args.json, plan.as_dict())
        return 0
    report = _measure(args, settings)
    print(reports.as_text(report))
    if args.json is not None:
        reports.write_json(args.json, report.as_dict())
    if args.plot is not None:
        _plot(args.plot, settings, report.rollout)
    return 0


def settings_of(args: argparse.Namespace) -> BenchmarkSettings:
    """The settings that the flags ask for; ValueError for values that cannot work."""
    sink = args.sink_frames
    if sink is None:
        sink = 0 if args.window_frames is None else 3
    return BenchmarkSettings(
        preset=args.preset,
        layers=args.layers,
        height=args.height,
        width=args.width,
        chunk_frames=args.chunk_frames,
        window_frames=args.window_frames,
        sink_frames=sink,
        position_mode=args.position_mode,
        kv_dtype=args.kv_dtype,
        steps=args.steps,
        chunks=args.chunks,
        repeats=args.repeats,
        with_vae=args.preset == "demo" or args.dry_run if args.vae is None else args.vae,
        vae_tiling=args.vae_tiling,
        device=args.device,
        dtype=args.dtype,
        seed=args.seed,
    )


def _check_dry_run(args: argparse.Namespace) -> None:
    for name in ("roofline", "baseline", "decode_alongside", "compile", "sweep", "plot"):
        if getattr(args, name):
            raise ValueError(f"--dry-run measures nothing; leave out --{name.replace('_', '-')}")


def _measure(args: argparse.Namespace, settings: BenchmarkSettings) -> Any:
    import torch

    from wan_autoregressive.scripts.benchmark.alongside import measure_alongside
    from wan_autoregressive.scripts.benchmark.baselines import compare, resolve_baseline
    from wan_autoregressive.scripts.benchmark.build import build_pipeline
    from wan_autoregressive.scripts.benchmark.compiled import check_compiler, measure_compiled
    from wan_autoregressive.scripts.benchmark.measure import measure_rollout
    from wan_autoregressive.scripts.benchmark.report import BenchmarkReport
    from wan_autoregressive.scripts.benchmark.roofline import measure_roofline
    from wan_autoregressive.scripts.benchmark.sweep import run_sweep, sweep_settings

    points = {}
    if args.sweep:
        values = args.sweep_values.split(",") if args.sweep_values else None
        points = sweep_settings(settings, args.sweep, values)
    for name in args.baseline:
        resolve_baseline(name)
    if args.compile:
        check_compiler()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads_before)
    try:
        pipe = build_pipeline(settings)
        report = BenchmarkReport(settings, _conditions(settings), measure_rollout(pipe, settings))
        if args.roofline:
            report.roofline = measure_roofline(pipe, settings)
        if args.baseline:
            report.baselines = compare(pipe, settings, args.baseline)
        if args.decode_alongside:
            report.decode_alongside = measure_alongside(pipe, settings)
        if args.compile:
            report.compiled = measure_compiled(pipe, settings, args.compile)
        if points:
            report.sweep = run_sweep(pipe, points, settings.repeats)
    finally:
        torch.set_num_threads(threads_before)
    return report


def _conditions(settings: BenchmarkSettings) -> dict[str, Any]:
    import torch

    from wan_autoregressive.scripts.run_report import describe_device, versions

    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {
        **versions(),
        "device": describe_device(torch.device(settings.device)),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1_minute": load,
    }


def _plot(path: Path, settings: BenchmarkSettings, measure: RolloutMeasure) -> None:
    """Draw CPU seconds if they say more than wall seconds: a CPU with a single thread."""
    from wan_autoregressive.scripts.benchmark.plot import draw_chunk_times

    height, width = settings.pixels
    window = "no window" if settings.window_frames is None else f"window {settings.window_frames}"
    title = f"{settings.preset}, {height}x{width}, chunk {settings.chunk_frames}, {window}, {settings.dtype}"
    if measure.cpu_time_fit is not None:
        draw_chunk_times(path, [chunk.cpu_s for chunk in measure.chunks], title, measure.cpu_time_fit, "CPU seconds")
    else:
        draw_chunk_times(path, [chunk.wall_s for chunk in measure.chunks], title, measure.fit)


def _frames_or_none(word: str) -> int | None:
    return None if word == "none" else int(word)
