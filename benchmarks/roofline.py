"""How near the transformer comes to the time of its bare matrix products and attentions.

python -m benchmarks.roofline --preset 1.3b --layers 2 --no-vae
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.clock import interleaved, median_ratio, timed
from benchmarks.counting import count_step
from benchmarks.experiment import Bench, run_experiment
from wan_autoregressive.scripts.costs.build import start_rollout

aten = torch.ops.aten
_ATTENTIONS = {
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
}
BareOperation = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Roofline:
    """Seconds of one steady chunk, its clean pass included, without VAE; lists have one entry per repetition."""

    efficiency: float
    """Bare time by pipeline time: median of the repetitions."""
    pipeline_s: list[float]
    bare_s: list[float]
    cpu_time_efficiency: float | None
    """The same ratio in CPU seconds of the process: steadier than wall time on a busy machine. `None` unless the
    device is the CPU with a single thread, since threads that wait use CPU time too."""
    linear_calls: int
    attention_calls: int
    flops: int
    bare_tflops_per_s: float
    """What the machine reaches on the bare operations."""


class BareChunk:
    """The matrix products and attentions of one chunk in their order, with nothing between them.

    Weights, keys and values are the pipeline's own tensors, so that they come from memory as they do there;
    activations are random tensors of the same shape.
    """

    def __init__(self) -> None:
        self.operations: list[BareOperation] = []
        self.linear_calls = 0
        self.attention_calls = 0
        self._activations: dict[Any, torch.Tensor] = {}

    def note(self, stage: str, func: Any, args: tuple[Any, ...]) -> None:
        """Take over one operation of the pipeline if it is one of those that count."""
        if stage == "decode":
            return
        packet = func._overloadpacket
        if packet in (aten.addmm, aten.mm):
            bias, inputs, weight = args[:3] if packet is aten.addmm else (None, *args[:2])
            self._add_linear(bias, inputs, weight)
        elif packet is aten.bmm:
            left, right = self._like(args[0]), self._like(args[1])
            self.operations.append(lambda: torch.bmm(left, right))
            self.linear_calls += 1
        elif packet is aten.convolution:
            self._add_convolution(*args[:6])
        elif packet in _ATTENTIONS:
            self._add_attention(*args[:3])

    def run(self) -> None:
        for operation in self.operations:
            operation()

    def _add_linear(self, bias: torch.Tensor | None, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        activation, transposed = self._like(inputs), weight.t()
        self.operations.append(lambda: F.linear(activation, transposed, bias))
        self.linear_calls += 1

    def _add_convolution(
        self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Any, padding: Any, _: Any
    ) -> None:
        activation = self._like(inputs)
        self.operations.append(lambda: F.conv3d(activation, weight, bias, stride, padding))
        self.linear_calls += 1

    def _add_attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        activation = self._like(query)
        self.operations.append(lambda: F.scaled_dot_product_attention(activation, key, value))
        self.attention_calls += 1

    def _like(self, tensor: torch.Tensor) -> torch.Tensor:
        layout = (tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if layout not in self._activations:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            self._activations[layout] = empty.normal_()
        return self._activations[layout]


@torch.no_grad()
def measure_roofline(bench: Bench) -> Roofline:
    """Time steady chunks of the pipeline and their bare operations in turns."""
    rollout = start_rollout(bench.pipe, bench.workload, decode=False)
    for _ in range(bench.workload.chunks_to_fill):
        rollout.step()
    bare = BareChunk()
    counts = count_step(rollout, bare.note)
    flops = sum(stage.flops for stage in counts.values())

    cpu_s: dict[str, list[float]] = {"pipeline": [], "bare": []}

    def pipeline() -> float:
        started = time.process_time()
        timings = rollout.step().timings
        cpu_s["pipeline"].append(time.process_time() - started)
        return timings.clean_pass_s + timings.denoise_s

    def bare_chunk() -> float:
        started = time.process_time()
        seconds = timed(bare.run, bench.device)
        cpu_s["bare"].append(time.process_time() - started)
        return seconds

    bare.run()
    seconds = interleaved({"pipeline": pipeline, "bare": bare_chunk}, bench.repeats)
    single_threaded = bench.device.type == "cpu" and torch.get_num_threads() == 1
    return Roofline(
        efficiency=median_ratio(seconds["bare"], seconds["pipeline"]),
        pipeline_s=seconds["pipeline"],
        bare_s=seconds["bare"],
        cpu_time_efficiency=median_ratio(cpu_s["bare"], cpu_s["pipeline"]) if single_threaded else None,
        linear_calls=bare.linear_calls,
        attention_calls=bare.attention_calls,
        flops=flops,
        bare_tflops_per_s=flops / statistics.median(seconds["bare"]) / 1e12,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure with the arguments of the command line."""

    def measure(bench: Bench) -> tuple[dict[str, Any], str]:
        roofline = measure_roofline(bench)
        return {"roofline": asdict(roofline)}, _as_text(roofline)

    run_experiment(__doc__, measure, argv)


def _as_text(roofline: Roofline) -> str:
    pairs = sorted(bare / whole for bare, whole in zip(roofline.bare_s, roofline.pipeline_s, strict=True))
    return (
        f"transformer efficiency {roofline.efficiency:.3f} (bare / pipeline, median of {len(pairs)} rounds, "
        f"{pairs[0]:.3f} to {pairs[-1]:.3f})"
        + (f"; in CPU time {roofline.cpu_time_efficiency:.3f}" if roofline.cpu_time_efficiency else "")
        + f"\nbare: {roofline.linear_calls} matrix products and {roofline.attention_calls} attentions per chunk, "
        f"{roofline.flops / 1e9:.1f} GFLOP at {roofline.bare_tflops_per_s:.3f} TFLOP/s"
    )


if __name__ == "__main__":
    main()
