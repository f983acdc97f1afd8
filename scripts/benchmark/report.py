"""The figures as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wan_autoregressive.scripts.benchmark.alongside import AlongsideResult
from wan_autoregressive.scripts.benchmark.baselines import BaselineResult
from wan_autoregressive.scripts.benchmark.compiled import CompiledResult
from wan_autoregressive.scripts.benchmark.counting import STAGES
from wan_autoregressive.scripts.benchmark.measure import ChunkMeasure, RolloutMeasure
from wan_autoregressive.scripts.benchmark.roofline import Roofline
from wan_autoregressive.scripts.benchmark.settings import BenchmarkSettings
from wan_autoregressive.scripts.benchmark.sweep import SweepRow
from wan_autoregressive.scripts.run_report import human_bytes

REPORT_VERSION = 1


@dataclasses.dataclass
class BenchmarkReport:
    """All that one run of the command found; what was not asked for is `None` or empty."""

    settings: BenchmarkSettings
    conditions: dict[str, Any]
    """Versions, device, threads, load of the machine."""
    rollout: RolloutMeasure
    roofline: Roofline | None = None
    baselines: list[BaselineResult] = dataclasses.field(default_factory=list)
    decode_alongside: AlongsideResult | None = None
    compiled: CompiledResult | None = None
    sweep: list[SweepRow] = dataclasses.field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        height, width = self.settings.pixels
        return {
            "report_version": REPORT_VERSION,
            "conditions": self.conditions,
            "settings": {**dataclasses.asdict(self.settings), "height": height, "width": width},
            "geometry": {
                **dataclasses.asdict(self.settings.geometry),
                "layers": self.settings.num_layers,
                "tokens_per_frame": self.settings.tokens_per_frame,
            },
            "rollout": self.rollout.as_dict(),
            "roofline": None if self.roofline is None else dataclasses.asdict(self.roofline),
            "baselines": [dataclasses.asdict(baseline) for baseline in self.baselines],
            "decode_alongside": None if self.decode_alongside is None else self.decode_alongside.as_dict(),
            "compiled": None if self.compiled is None else self.compiled.as_dict(),
            "sweep": [dataclasses.asdict(row) for row in self.sweep],
        }


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Write a report's `as_dict()` atomically; OSError when it cannot be written."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def as_text(report: BenchmarkReport) -> str:
    """The report as tables for a terminal."""
    parts = [_header(report), _stage_table(report), _summary(report.rollout, report.settings)]
    if report.roofline is not None:
        parts.append(_roofline_text(report.roofline))
    if report.baselines:
        parts.append(_baseline_table(report.baselines))
    if report.decode_alongside is not None:
        parts.append(_alongside_table(report.decode_alongside))
    if report.compiled is not None:
        parts.append(_compiled_table(report.compiled))
    if report.sweep:
        parts.append(_sweep_table(report.sweep))
    return "\n\n".join(parts)


def _header(report: BenchmarkReport) -> str:
    settings, conditions = report.settings, report.conditions
    return (
        f"{describe_rollout(settings)}\n{conditions['device']}, {describe_dtype(settings)}, "
        f"{conditions['threads']} threads, torch {conditions['torch']}, load {conditions['load_1_minute']}"
    )


def describe_rollout(settings: BenchmarkSettings) -> str:
    """Model, size, chunk and window in one line."""
    height, width = settings.pixels
    window = "no window" if settings.window_frames is None else f"window {settings.window_frames}"
    return (
        f"{settings.preset}: {settings.num_layers} layers of {settings.geometry.dim}, {height}x{width}, "
        f"{settings.tokens_per_frame} tokens per latent frame, chunk {settings.chunk_frames}, {window}, "
        f"sink {settings.sink_frames}, {settings.steps} steps and a clean pass per chunk"
    )


def describe_dtype(settings: BenchmarkSettings) -> str:
    """The model's dtype, and the cache's if it is another."""
    return settings.dtype + ("" if settings.kv_dtype is None else f", K/V {settings.kv_dtype}")


def _stage_table(report: BenchmarkReport) -> str:
    rows = [("chunk", "stage", "s", "GFLOP", "K/V written", "K/V read", "allocations", "allocated", "peak")]
    shown = _chunks_to_show(report.rollout)
    for chunk in shown:
        for stage in STAGES:
            if chunk.stage_s[stage] == 0.0:
                continue
            counts = None if chunk.counts is None else chunk.counts[stage]
            figures = ("-",) * 6
            if counts is not None:
                figures = (
                    f"{counts.flops / 1e9:.2f}",
                    human_bytes(counts.kv_written_bytes),
                    human_bytes(counts.kv_read_bytes),
                    str(counts.allocations),
                    human_bytes(counts.allocated_bytes),
                    human_bytes(counts.peak_bytes),
                )
            rows.append((str(chunk.index), stage, f"{chunk.stage_s[stage]:.4f}", *figures))
    left_out = len(report.rollout.chunks) - len(shown)
    return table(rows) + (f"\n({left_out} chunks alike are in the JSON)" if left_out else "")


def _chunks_to_show(measure: RolloutMeasure) -> list[ChunkMeasure]:
    """All chunks of a short rollout; of a long one the first and the last few."""
    chunks = measure.chunks
    return chunks if len(chunks) <= 8 else [*chunks[:5], *chunks[-1:]]


def _summary(measure: RolloutMeasure, settings: BenchmarkSettings) -> str:
    lines = [
        f"first frame after {measure.first_frame_latency_s:.3f} s (prompt embeddings ready)",
        f"frames per second, steady: {measure.frames_per_second(with_vae=False):.3f} without VAE"
        + (f", {measure.frames_per_second(with_vae=True):.3f} with VAE" if measure.vae_state_bytes else ""),
        f"memory held: weights {human_bytes(measure.weights_bytes)}, K/V {human_bytes(measure.kv_cache_bytes)}, "
        f"VAE state {human_bytes(measure.vae_state_bytes)}"
        + (f"; device peak {human_bytes(measure.device_peak_bytes)}" if measure.device_peak_bytes else ""),
    ]
    where = "without a window" if settings.window_frames is None else "behind a full window"
    fits = (("wall time", "s", measure.fit), ("CPU time", "s", measure.cpu_time_fit))
    for name, unit, fit in (*fits, ("machine's speed taken out: time", "forwards", measure.relative_fit)):
        if fit is None:
            continue
        lines.append(
            f"{name} per chunk: {fit.mean_s:.4f} {unit}, slope {fit.percent_per_100_chunks:+.2f} % per 100 chunks "
            f"(standard error {fit.standard_error_percent:.2f}) over {fit.chunks} chunks {where}"
        )
    return "\n".join(lines)


def _roofline_text(roofline: Roofline) -> str:
    pairs = sorted(bare / whole for bare, whole in zip(roofline.bare_s, roofline.pipeline_s, strict=True))
    return (
        f"transformer efficiency {roofline.efficiency:.3f} (bare / pipeline, median of {len(pairs)} rounds, "
        f"{pairs[0]:.3f} to {pairs[-1]:.3f})"
        + (f"; in CPU time {roofline.cpu_time_efficiency:.3f}" if roofline.cpu_time_efficiency else "")
        + "\n"
        f"bare: {roofline.linear_calls} matrix products and {roofline.attention_calls} attentions per chunk, "
        f"{roofline.flops / 1e9:.1f} GFLOP at {roofline.bare_tflops_per_s:.3f} TFLOP/s"
    )


def _baseline_table(baselines: list[BaselineResult]) -> str:
    rows = [("without VAE", "s per chunk", "times the pipeline", "GFLOP")]
    rows.append(("pipeline", f"{baselines[0].pipeline_median_s:.4f}", "1.00", ""))
    for result in baselines:
        rows.append((result.name, f"{result.median_s:.4f}", f"{result.ratio:.2f}", f"{result.flops / 1e9:.2f}"))
    return table(rows)


def _alongside_table(result: AlongsideResult) -> str:
    rows: list[tuple[str, ...]] = [("decoding", "s per rollout", "s between chunks")]
    for name, times in (("one after the other", result.one_after_the_other), ("alongside", result.alongside)):
        medians = (statistics.median(seconds) for seconds in (times.total_s, times.interval_s))
        rows.append((name, *(f"{median:.4f}" for median in medians)))
    rows.append(("ratio of medians", f"{result.total_ratio:.3f}", f"{result.interval_ratio:.3f}"))
    rounds, threads = len(result.alongside.total_s), result.torch_threads
    return table(rows) + (
        f"\n({rounds} rounds in turns; alongside, two threads run operations of up to {threads} torch threads each)"
    )


def _compiled_table(result: CompiledResult) -> str:
    rows = [("transformer, without VAE", "s per chunk")]
    rows.append(("eager", f"{statistics.median(result.eager_s):.4f}"))
    rows.append((f"compiled {result.part}", f"{statistics.median(result.compiled_s):.4f}"))
    rows.append(("ratio of medians", f"{result.ratio:.3f}"))
    return table(rows) + (
        f"\n({len(result.compiled_s)} rounds in turns, after {result.warm_up_chunks} chunks that took "
        f"{result.warm_up_s:.1f} s compiled; {result.graphs} graphs took {result.compile_s:.1f} s to compile; "
        f"latents differ by at most {result.largest_difference:.1e})"
    )


def _sweep_table(sweep: list[SweepRow]) -> str:
    rows = [("value", "chunk tokens", "window tokens", "GFLOP", "K/V", "s per chunk", "s per latent frame")]
    for row in sweep:
        rows.append(
            (
                row.value,
                str(row.chunk_tokens),
                str(row.window_tokens),
                f"{row.flops / 1e9:.2f}",
                human_bytes(row.kv_cache_bytes),
                f"{row.median_s:.4f}",
                f"{row.median_s / row.chunk_frames:.4f}",
            )
        )
    return table(rows)


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of as many cells each, in columns that end at the same place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
