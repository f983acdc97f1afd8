"""A rollout with a compiled transformer against the eager one, on the same weights.

python -m benchmarks.compiled blocks --chunks 12 --repeats 5
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from benchmarks.clock import interleaved, timed
from benchmarks.experiment import Bench, run_experiment, table_of
from wan_autoregressive import CausalWanTransformer3DModel
from wan_autoregressive.scripts.costs.build import start_rollout

COMPILED_PARTS = ("blocks", "model")


@dataclass
class CompiledResult:
    """Both transformers, measured in turns. Seconds are wall seconds."""

    part: str
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
            "compiling needs a C++ compiler, and torch finds none: install g++ (or clang++), or name one in the "
            "environment variable CXX"
        ) from error


def measure_compiled(bench: Bench, part: str, backend: str | Callable[..., Any] = "inductor") -> CompiledResult:
    """Run the same rollout with both transformers, `bench.repeats` chunks each once the window is full.

    What the process has compiled before is forgotten. The pipeline stays as it is.
    """
    from torch._dynamo.utils import calculate_time_spent, counters
    from torch._inductor.utils import fresh_cache

    pipe, warm_up_chunks = bench.pipe, bench.workload.chunks_to_fill + 1
    compiled_pipe = copy.copy(pipe)
    compiled_pipe.transformer = copy_on_the_same_weights(pipe.transformer)
    if part == "blocks":
        compiled_pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    else:
        compiled_pipe.transformer.compile(fullgraph=True, backend=backend)
    rollouts = {
        "eager": start_rollout(pipe, bench.workload, decode=False),
        "compiled": start_rollout(compiled_pipe, bench.workload, decode=False),
    }
    latents: dict[str, list[torch.Tensor]] = {name: [] for name in rollouts}

    def step(name: str) -> float:
        return timed(lambda: latents[name].append(rollouts[name].step().latents), bench.device)

    torch._dynamo.reset()
    graphs, compile_s = counters["stats"]["unique_graphs"], calculate_time_spent()["total_wall_time"]
    with fresh_cache():
        warm_up_s = sum(step("compiled") for _ in range(warm_up_chunks))
        for _ in range(warm_up_chunks):
            step("eager")
        seconds = interleaved({name: lambda name=name: step(name) for name in rollouts}, bench.repeats)
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


def copy_on_the_same_weights(transformer: CausalWanTransformer3DModel) -> CausalWanTransformer3DModel:
    """Modules of its own, to be changed, with the very parameters and buffers."""
    shared = [*transformer.parameters(), *transformer.buffers()]
    return copy.deepcopy(transformer, {id(tensor): tensor for tensor in shared})


def main(argv: Sequence[str] | None = None) -> None:
    """Measure with the arguments of the command line."""

    def add_flags(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("part", choices=COMPILED_PARTS, help="what is one graph: each block, or the whole model")

    def measure(bench: Bench) -> tuple[dict[str, Any], Table]:
        check_compiler()
        result = measure_compiled(bench, bench.args.part)
        return {"compiled": result.as_dict()}, _table(result)

    run_experiment(__doc__, measure, argv, add_flags)


def _table(result: CompiledResult) -> Table:
    rows = [("eager", f"{statistics.median(result.eager_s):.4f}")]
    rows.append((f"compiled {result.part}", f"{statistics.median(result.compiled_s):.4f}"))
    rows.append(("ratio of medians", f"{result.ratio:.3f}"))
    return table_of(
        ("transformer, without VAE", "s per chunk"),
        rows,
        f"{len(result.compiled_s)} rounds in turns, after {result.warm_up_chunks} chunks that took "
        f"{result.warm_up_s:.1f} s compiled; {result.graphs} graphs took {result.compile_s:.1f} s to compile; "
        f"latents differ by at most {result.largest_difference:.1e}",
    )


if __name__ == "__main__":
    main()
