"""The attention backends that are installed, on the self-attention of a steady step."""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from benchmarks.gpu_kit.peaks import steady_seconds
from benchmarks.gpu_kit.setting import Record, Setting
from benchmarks.gpu_kit.ways import SIZE

# Those from the Hub need a network; flex compiles for long; the others are for other devices, ragged batches, or write
# all scores to memory.
_LEFT_OUT = ("hub", "flex", "npu", "xla", "varlen", "math")


@torch.no_grad()
def measure(setting: Setting, record: Record) -> None:
    """Time each backend and compare it with float32; one that is not there says why."""
    workload = setting.workload(*SIZE)
    device, dtype = torch.device(workload.device), getattr(torch, workload.dtype)
    heads, head_dim = (workload.model.transformer[f"{of}"] for of in ("num_attention_heads", "attention_head_dim"))
    tokens, window = workload.chunk_tokens, workload.window_tokens or 0
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, count, heads, head_dim, generator=generator, device=device).to(dtype)
        for count in (tokens, window, window)
    )
    expected = dispatch_attention_fn(query.float(), key.float(), value.float(), backend=AttentionBackendName.NATIVE)
    flops = 4 * tokens * window * heads * head_dim
    table = f"{tokens} queries, {window} keys, {heads} heads of {head_dim}, {workload.dtype}"
    for backend in AttentionBackendName:
        if any(word in backend.value for word in _LEFT_OUT):
            continue
        try:
            difference = float((dispatch_attention_fn(query, key, value, backend=backend) - expected).abs().max())
            seconds = steady_seconds(lambda: dispatch_attention_fn(query, key, value, backend=backend), device)  # noqa: B023
        except Exception as error:  # of a package that is missing, or does not know this device
            record.row(table, backend=backend.value, why_not=f"{type(error).__name__}: {error}".splitlines()[0][:100])
        else:
            rate = flops / seconds / 1e12
            record.row(table, backend=backend.value, ms=1e3 * seconds, TFLOP_per_s=rate, difference=difference)
