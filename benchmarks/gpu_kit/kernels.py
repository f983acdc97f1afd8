"""Triton's kernels against the operations of PyTorch that they stand in for, one by one and in a whole chunk."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from benchmarks.clock import timed
from benchmarks.gpu_kit.peaks import steady_seconds
from benchmarks.gpu_kit.setting import Record, Setting
from benchmarks.gpu_kit.ways import SIZE
from benchmarks.sweep import sweep_workloads
from wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.cache import int8_buffer, rotary
from wan_autoregressive.models import causal_wan_block, triton_kernels
from wan_autoregressive.scripts.costs.build import build_pipeline, start_rollout
from wan_autoregressive.scripts.costs.workload import Workload

Pair = tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]
"""In PyTorch, and in Triton."""
_CHUNKS = 4


@torch.no_grad()
def measure(setting: Setting, record: Record) -> None:
    """Write down each kernel, then a chunk with the cache in the model's dtype and as int8."""
    workload = setting.workload(*SIZE, with_vae=False)
    for name, (eager, fused) in _pairs(workload).items():
        difference = float((eager().float() - fused().float()).abs().max())
        before, after = (steady_seconds(work, torch.device(workload.device)) for work in (eager, fused))
        record.row(
            "one pass",
            of=name,
            PyTorch_in_us=1e6 * before,
            Triton_in_us=1e6 * after,
            ratio=after / before,
            difference=difference,
        )
    pipe = build_pipeline(workload)
    points = sweep_workloads(workload, "kv-dtype", None)
    before_s = {name: _chunk_s(pipe, point) for name, point in points.items()}
    triton_kernels.use_triton_kernels(pipe.transformer)
    for name, point in points.items():
        after_s = _chunk_s(pipe, point)
        ratio = after_s / before_s[name]
        record.row("a chunk, without VAE", K_V=name, PyTorch_in_s=before_s[name], Triton_in_s=after_s, ratio=ratio)


def _pairs(workload: Workload) -> dict[str, Pair]:
    """On tensors as a steady forward has them."""
    device, dtype, dim = torch.device(workload.device), getattr(torch, workload.dtype), workload.model.dim
    tokens, window = workload.chunk_tokens, workload.window_tokens or 0
    heads = workload.model.transformer["num_attention_heads"]
    x, output = (torch.randn(1, tokens, dim, device=device).to(dtype) for _ in range(2))
    shift, scale, gate, *_ = torch.randn(1, 1, 6, dim, device=device).unbind(dim=2)
    norm = torch.nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
    key = x.unflatten(2, (heads, -1))
    angles = torch.randn(1, tokens, 1, key.shape[-1], device=device)
    tables = angles.cos(), angles.sin()
    kept = int8_buffer.quantize(torch.randn(1, window, *key.shape[2:], device=device).to(dtype))
    return {
        "norm and modulation": (
            lambda: causal_wan_block.norm_and_modulate(norm, x, scale, shift),
            lambda: triton_kernels.norm_and_modulate(x, scale, shift, norm.eps),
        ),
        "gate": (
            lambda: causal_wan_block.add_gated(x, output, gate),
            lambda: triton_kernels.add_gated(x, output, gate),
        ),
        "rotary embedding": (
            lambda: rotary.rotate_pairs(key, *tables),
            lambda: triton_kernels.rotate_pairs(key, *tables),
        ),
        "reading int8": (lambda: int8_buffer.dequantize(*kept), lambda: triton_kernels.dequantize(*kept)),
    }


def _chunk_s(pipe: WanAutoregressivePipeline, workload: Workload) -> float:
    """Of a steady chunk, without VAE: the median of some."""
    rollout = start_rollout(pipe, workload)
    for _ in range(workload.chunks_to_fill + 1):
        rollout.step()
    return statistics.median(timed(rollout.step, torch.device(workload.device)) for _ in range(_CHUNKS))
