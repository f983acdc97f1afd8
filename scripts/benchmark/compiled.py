"""A rollout with a compiled transformer against the eager one, on the same weights."""

from __future__ import annotations

import copy
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch

from wan_autoregressive.pipelines import WanAutoregressivePipeline
from wan_autoregressive.scripts.benchmark.build import copy_on_the_same_weights, start_rollout
from wan_autoregressive.scripts.benchmark.clock import interleaved, timed
from wan_autoregressive.scripts.benchmark.settings import BenchmarkSettings, CompiledPart


@dataclass
class CompiledResult:
    """Both transformers, measured in turns. Seconds are wall seconds."""

    part: CompiledPart
    """What is one graph: a block, or the whole model."""
    eager_s: list[float]
    """Of a steady chunk without VAE, in every round."""
    compiled_s: list[float]
    warm_up_chunks: int
    """Chunks before the first round: as many as fill the window, and one that evicts."""
    warm_up_s: float
    """Of these chunks with the compiled transformer."""
    compile_s: float
    """Of all compilation, from empty caches."""
    graphs: int
    """Compiled in all chunks, those that replace others included."""
    largest_difference: float
    """Between the latents of both, in any chunk."""

    @property
    def ratio(self) -> float:
        """Median compiled by median eager: below 1 it pays."""
        return statistics.median(self.compiled_s) / statistics.median(self.eager_s)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def check_compiler() -> None:
    """Raise `ValueError` if there is no C++ compiler, which inductor needs on every device."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ValueError(
            "--compile needs a C++ compiler, and torch finds none: install g++ (or clang++), or name one in the "
            "environment variable CXX"
        ) from error


def measure_compiled(
    pipe: WanAutoregressivePipeline, settings: BenchmarkSettings, part: CompiledPart, backend: str = "inductor"
) -> CompiledResult:
    """Run the same rollout with both transformers, `settings.repeats` chunks each once the window is full.

    What the process has compiled before is forgotten. The pipeline stays as it is.

    Raises:
        ValueError: no window.
    """
    from torch._dynamo.utils import calculate_time_spent, counters
    from torch._inductor.utils import fresh_cache

    device, warm_up_chunks = torch.device(settings.device), settings.chunks_to_fill + 1
    compiled_pipe = copy.copy(pipe)
    compiled_pipe.transformer = copy_on_the_same_weights(pipe.transformer)
    if part == "blocks":
        compiled_pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    else:
        compiled_pipe.transformer.compile(fullgraph=True, backend=backend)
    rollouts = {
        "eager": start_rollout(pipe, settings, decode=False),
        "compiled": start_rollout(compiled_pipe, settings, decode=False),
    }
    latents: dict[str, list[torch.Tensor]] = {name: [] for name in rollouts}

    def step(name: str) -> float:
        return timed(lambda: latents[name].append(rollouts[name].step().latents), device)

    torch._dynamo.reset()
    graphs, compile_s = counters["stats"]["unique_graphs"], calculate_time_spent()["total_wall_time"]
    with fresh_cache():
        warm_up_s = sum(step("compiled") for _ in range(warm_up_chunks))
        for _ in range(warm_up_chunks):
            step("eager")
        seconds = interleaved({name: lambda name=name: step(name) for name in rollouts}, settings.repeats)  # type: ignore[misc]
    return CompiledResult(
        part=part,
        eager_s=seconds["eager"],
        compiled_s=seconds["compiled"],
        warm_up_chunks=warm_up_chunks,
        warm_up_s=warm_up_s,
        compile_s=calculate_time_spent()["total_wall_time"] - compile_s,
        graphs=counters["stats"]["unique_graphs"] - graphs,
        largest_difference=max(
            float((compiled - eager).abs().max())
            for compiled, eager in zip(latents["compiled"], latents["eager"], strict=True)
        ),
    )
