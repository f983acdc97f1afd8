"""The outcomes of a run as one Markdown page and one JSON."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_kit.run_parts import Outcome


def write_report(folder: Path, outcomes: Sequence[Outcome], device: str, tiny: bool) -> None:
    """Write `gpu.md` and `gpu.json` into a folder that is there."""
    report = {
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device,
        "tiny": tiny,
        "seconds": sum(outcome.seconds for outcome in outcomes),
        "parts": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    (folder / "gpu.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text(_page(outcomes, device, tiny), encoding="utf-8")


def _page(outcomes: Sequence[Outcome], device: str, tiny: bool) -> str:
    lines = [f"# GPU kit on `{device}`", ""]
    if tiny:
        lines += ["Tiny sizes, to try the kit: **the figures mean nothing**.", ""]
    parts = [
        {"part": o.name, "outcome": o.state, "s": round(o.seconds, 1), "of at most s": round(o.limit_s, 1)}
        for o in outcomes
    ]
    lines += [*_table(parts), ""]
    for outcome in outcomes:
        lines += [f"## {outcome.title}", ""]
        if outcome.failed:
            lines += [f"**{outcome.state}** after {outcome.seconds:.0f} s; what it had until then:", ""]
        elif outcome.state != "ok":
            lines += [f"{outcome.state}.", ""]
        for title, rows in outcome.tables.items():
            lines += [f"**{title}**", "", *_table(rows), ""]
        if outcome.log:
            lines += ["```", outcome.log.replace("```", "'''"), "```", ""]
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows with all columns that any of them has, in the order in which they come up."""
    titles = list(dict.fromkeys(title for row in rows for title in row))
    lines = [titles, ["---"] * len(titles), *([_cell(row.get(title)) for title in titles] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).replace("|", "\\|").split())
