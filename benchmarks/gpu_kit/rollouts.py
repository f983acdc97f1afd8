"""A rollout with random weights: rates with either VAE, stages against what bounds them, memory against computed."""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.clock import timed
from benchmarks.gpu_kit.peaks import Peaks, measure_peaks
from benchmarks.gpu_kit.setting import Record, Setting
from wan_autoregressive import AutoencoderTinyWan, SelfForcingScheduler, WanAutoregressivePipeline
from wan_autoregressive.scripts.benchmark import STAGES, RolloutMeasure, measure_rollout
from wan_autoregressive.scripts.costs.build import build_pipeline, cast_weights, start_rollout, weights_bytes
from wan_autoregressive.scripts.costs.memory import estimate_memory
from wan_autoregressive.scripts.costs.workload import Workload

_TINY_VAE_CHUNKS = 4


def measure(setting: Setting, record: Record, preset: str, height: int, width: int) -> None:
    """Write down rates, stages and memory, in this order."""
    workload = setting.workload(preset, height, width)
    device, dtype = torch.device(workload.device), getattr(torch, workload.dtype)
    pipe = build_pipeline(workload)
    record.row("workload", what=workload.describe())
    # The first forward of a process loads kernels and picks algorithms.
    cold_s = timed(lambda: start_rollout(pipe, workload).step(), device)
    full = measure_rollout(pipe, workload)
    record.row(
        "frames per second of steady chunks",
        VAE="full",
        without_VAE=full.frames_per_second_without_vae,
        with_VAE=full.frames_per_second,
        first_frame_in_s=full.first_frame_latency_s,
        first_of_the_process_in_s=cold_s,
    )
    _write_stages(record, full, measure_peaks(device, dtype, setting.is_tiny), pipe, workload)
    _measure_tiny_vae(record, full, pipe, workload)
    _write_memory(record, full, workload)


def _write_stages(
    record: Record, full: RolloutMeasure, peaks: Peaks, pipe: WanAutoregressivePipeline, workload: Workload
) -> None:
    """Each stage beside the least seconds that its products and its memory take at the device's own rates."""
    steady = full.chunks[-1]
    forwards = {"denoise": workload.steps, "clean_pass": 1}
    for stage in STAGES:
        costs, seconds = steady.costs[stage], full.steady_stage_s[stage]
        model = pipe.vae if stage == "decode" else pipe.transformer
        moved = forwards.get(stage, 1) * weights_bytes(model) + costs.kv_read_bytes + costs.kv_written_bytes
        record.row(
            "a steady chunk by stage",
            stage=stage,
            s=seconds,
            TFLOP=costs.flops / 1e12,
            TFLOP_per_s=costs.flops / seconds / 1e12,
            least_time_by_measured=peaks.least_s(costs.flops, moved) / seconds,
        )


def _measure_tiny_vae(
    record: Record, full: RolloutMeasure, pipe: WanAutoregressivePipeline, workload: Workload
) -> None:
    """Its decoding, beside the denoising that was measured with the full one."""
    tiny = WanAutoregressivePipeline(None, None, pipe.transformer, tiny_vae_of(workload), SelfForcingScheduler())
    tiny.set_progress_bar_config(disable=True)
    start_rollout(tiny, workload).step()
    started = time.perf_counter()
    rollout = start_rollout(tiny, workload)
    rollout.step()  # returns when the device is done
    first_s = time.perf_counter() - started
    decode_s = statistics.median(rollout.step().timings.decode_s for _ in range(_TINY_VAE_CHUNKS - 1))
    denoise_s = full.steady_stage_s["clean_pass"] + full.steady_stage_s["denoise"]
    record.row("a steady chunk by stage", stage="decode with the tiny VAE", s=decode_s)
    record.row(
        "frames per second of steady chunks",
        VAE="tiny",
        without_VAE=full.frames_per_second_without_vae,
        with_VAE=full.chunks[-1].pixel_frames / (denoise_s + decode_s),
        first_frame_in_s=first_s,
    )


def _write_memory(record: Record, full: RolloutMeasure, workload: Workload) -> None:
    estimate = estimate_memory(workload)
    computed = estimate.most_bytes["without_text_encoder"]
    peak = full.device_peak_bytes
    record.row(
        "memory with the full VAE, in GiB",
        weights=full.weights_bytes / 2**30,
        keys_and_values=full.kv_cache_bytes / 2**30,
        VAE_state=full.vae_state_bytes / 2**30,
        peak_computed=computed / 2**30,
        peak_measured=None if peak is None else peak / 2**30,
        measured_by_computed=None if peak is None else peak / computed,
    )


def tiny_vae_of(workload: Workload) -> AutoencoderTinyWan:
    """A tiny VAE of the published width, with random weights, for the latents of this workload."""
    device, dtype = torch.device(workload.device), getattr(torch, workload.dtype)
    spatial = workload.model.spatial_factor
    sizes = {"z_dim": workload.model.channels, "scale_factor_spatial": spatial, "patch_size": spatial // 8}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(workload.seed)
        vae = AutoencoderTinyWan(**sizes)
    cast_weights(vae.eval().requires_grad_(False), dtype)
    return vae
