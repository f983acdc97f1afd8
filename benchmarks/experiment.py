"""What all experiments share: flags, the pipeline, tables, the JSON."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from wan_autoregressive.pipelines import WanAutoregressivePipeline
from wan_autoregressive.scripts import benchmark
from wan_autoregressive.scripts.costs.workload import Workload, add_workload_flags


@dataclass(frozen=True)
class Bench:
    """What an experiment works with."""

    args: argparse.Namespace
    workload: Workload
    pipe: WanAutoregressivePipeline

    @property
    def device(self) -> torch.device:
        return torch.device(self.workload.device)

    @property
    def repeats(self) -> int:
        return int(self.args.repeats)


def run_experiment(
    description: str | None,
    measure: Callable[[Bench], tuple[dict[str, Any], str | Table]],
    argv: Sequence[str] | None,
    add_flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    needs_window: bool = True,
) -> None:
    """Measure with the flags of the command line; prints the result and writes the JSON. Exits with 2 for wrong flags.

    Args:
        measure: Gives the figures for the JSON and what is printed; raises ValueError for what cannot be measured.
        argv: The arguments; `None` for the process's own.
        add_flags: Adds those of this experiment.
        needs_window: Steady chunks are compared, which there are behind a window only.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_flags(parser)
    benchmark.add_machine_flags(parser)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds of what is compared (default: 3)")
    add_flags(parser)
    args = parser.parse_args(argv)
    threads_before = torch.get_num_threads()
    try:
        if args.repeats < 1:
            raise ValueError(f"repeats is {args.repeats}; it must be at least 1")
        if needs_window and args.window_frames is None:
            raise ValueError("steady chunks are compared, which need a window; set --window-frames")
        bench = Bench(args, *benchmark.prepare(args))
        figures, shown = measure(bench)
        print(benchmark.describe(bench.workload))
        if isinstance(shown, str):
            print(shown)
        else:
            Console().print(shown)
        benchmark.write_json(args.json, bench.workload, figures)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    finally:
        torch.set_num_threads(threads_before)


def table_of(titles: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None) -> Table:
    """A table of these cells, numbers to the right."""
    table = Table(*titles, box=None, caption=caption, caption_justify="left")
    for index, column in enumerate(table.columns):
        column.justify = "right" if index else "left"
    for row in rows:
        table.add_row(*row)
    return table
