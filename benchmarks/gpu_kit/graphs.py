"""A rollout whose steady forwards are CUDA graphs against an eager one, on the same weights."""

from __future__ import annotations

import statistics

import torch

from benchmarks.clock import interleaved, timed
from benchmarks.gpu_kit.captured_forwards import CapturedForwards
from benchmarks.gpu_kit.setting import Record, Setting
from benchmarks.gpu_kit.ways import SIZE
from wan_autoregressive.scripts.costs.build import build_pipeline, start_rollout


def measure(setting: Setting, record: Record) -> None:
    """Compare chunk by chunk, in turns; RuntimeError if a single bit differs."""
    workload = setting.workload(*SIZE, with_vae=False)
    device = torch.device(workload.device)
    pipe = build_pipeline(workload)
    eager, captured = start_rollout(pipe, workload), start_rollout(pipe, workload)
    latents: dict[str, list[torch.Tensor]] = {"eager": [], "captured": []}
    for _ in range(workload.chunks_to_fill):
        latents["eager"].append(eager.step().latents)
        latents["captured"].append(captured.step().latents)
    forwards = CapturedForwards(pipe.transformer)

    def eager_step() -> float:
        return timed(lambda: latents["eager"].append(eager.step().latents), device)

    def captured_step() -> float:
        with forwards:
            return timed(lambda: latents["captured"].append(captured.step().latents), device)

    eager_step()
    capturing_s = captured_step()
    seconds = interleaved({"eager": eager_step, "captured": captured_step}, repeats=5)
    pairs = zip(latents["eager"], latents["captured"], strict=True)
    differing = [index for index, (one, other) in enumerate(pairs) if not torch.equal(one, other)]
    eager_s, captured_s = (statistics.median(seconds[name]) for name in ("eager", "captured"))
    record.row(
        "steady chunks, without VAE",
        eager_in_s=eager_s,
        graphs_in_s=captured_s,
        ratio=captured_s / eager_s,
        graphs=forwards.graphs,
        replays=forwards.replays,
        chunk_with_capturing_in_s=capturing_s,
        bit_equal=not differing,
    )
    if differing:
        raise RuntimeError(f"the latents of chunks {differing} differ from eager ones")
