"""Experiments of `benchmarks/` on the 1.3B model at 480x832, as parts of the kit."""

from __future__ import annotations

import statistics

from benchmarks.alongside import measure_alongside
from benchmarks.compiled import check_compiler, measure_compiled
from benchmarks.gpu_kit.rollouts import tiny_vae_of
from benchmarks.gpu_kit.setting import Record, Setting
from benchmarks.roofline import measure_roofline
from benchmarks.sweep import run_sweep, sweep_workloads
from wan_autoregressive.scripts.costs.build import start_rollout

SIZE = ("1.3b", 480, 832)


def roofline(setting: Setting, record: Record) -> None:
    """How much of a chunk's time its products and attentions take when nothing is between them."""
    result = measure_roofline(setting.bench(setting.workload(*SIZE, with_vae=False), repeats=5))
    record.row(
        "transformer, without VAE",
        bare_by_pipeline=result.efficiency,
        pipeline_in_s=statistics.median(result.pipeline_s),
        bare_in_s=statistics.median(result.bare_s),
        bare_TFLOP_per_s=result.bare_tflops_per_s,
        products=result.linear_calls,
        attentions=result.attention_calls,
    )


def alongside(setting: Setting, record: Record) -> None:
    """Decoding in the caller's stream while the next chunk is denoised in another, with either VAE."""
    bench = setting.bench(setting.workload(*SIZE, chunks=5), repeats=2)
    for name in ("full", "tiny"):
        if name == "tiny":
            bench.pipe.vae = tiny_vae_of(bench.workload)
        start_rollout(bench.pipe, bench.workload).step()  # loads kernels and picks algorithms
        result = measure_alongside(bench)
        record.row(
            "seconds between chunks, and of a rollout",
            VAE=name,
            one_after_the_other=statistics.median(result.one_after_the_other.interval_s),
            alongside=statistics.median(result.alongside.interval_s),
            ratio=result.interval_ratio,
            rollout_ratio=result.total_ratio,
        )


def int8(setting: Setting, record: Record) -> None:
    """The past as int8 against the past in the model's dtype."""
    workload = setting.workload(*SIZE, with_vae=False)
    points = sweep_workloads(workload, "kv-dtype", None)
    for row in run_sweep(setting.bench(workload, repeats=4), points):
        record.row("transformer, without VAE", K_V=row.value, s_per_chunk=row.median_s, bytes=row.kv_cache_bytes)


def compiled(setting: Setting, record: Record) -> None:
    """Compiled blocks against eager ones. Tiny, nothing is made of the graphs, which would take a minute."""
    check_compiler()
    bench = setting.bench(setting.workload(*SIZE, with_vae=False), repeats=5)
    result = measure_compiled(bench, "blocks", backend="eager" if setting.is_tiny else "inductor")
    record.row(
        "transformer, without VAE",
        eager_in_s=statistics.median(result.eager_s),
        compiled_in_s=statistics.median(result.compiled_s),
        ratio=result.ratio,
        compiling_in_s=result.compile_s,
        graphs=result.graphs,
        largest_difference=result.largest_difference,
    )
