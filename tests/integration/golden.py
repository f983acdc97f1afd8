"""Runs recorded cases of the original implementations: `python tests/integration/golden.py FOLDER [--only PREFIX]`.

A case is a json and a safetensors file of the same name, anywhere in FOLDER. Its weights are looked for where its json
says, in `FOLDER/../weights`, in `FOLDER/weights` and beside the cases of this repository. Kinds of cases are the
modules of `golden_kinds`.
"""

import argparse
import importlib
import json
import math
import pkgutil
import sys
import time
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import golden_kinds
import torch
from safetensors.torch import load_file

BOUND = 1e-4
"""Largest absolute difference, in float32 on a CPU."""
REPOSITORY_CASES = Path(__file__).parents[1] / "data" / "golden"


@cache
def kinds() -> list[ModuleType]:
    names = sorted(module.name for module in pkgutil.iter_modules(golden_kinds.__path__))
    modules = [importlib.import_module(f"golden_kinds.{name}") for name in names]
    return [module for module in modules if hasattr(module, "KIND")]


def find_cases(folder: Path, only: str = "") -> list[Path]:
    """The json files of all cases whose name starts with `only`."""
    found = sorted(path for path in folder.rglob("*.json") if path.with_suffix(".safetensors").is_file())
    return [path for path in found if path.stem.startswith(only)]


def load_case(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads(path.read_text(encoding="utf-8")), load_file(path.with_suffix(".safetensors"))


def kind_of(path: Path, meta: dict[str, Any]) -> ModuleType:
    """Raises `ValueError` for a case that no kind knows."""
    for kind in kinds():
        if kind.matches(path.stem, meta):
            return kind
    raise ValueError(f"no kind knows it; there are {', '.join(kind.KIND for kind in kinds())}")


def weights_folder_of(path: Path, meta: dict[str, Any], kind: ModuleType) -> Path:
    """Raises `ValueError` if the weights are nowhere."""
    named = meta.get("weights")
    named = named["file"] if isinstance(named, dict) else (named or getattr(kind, "WEIGHTS", "")).split()[0].strip(",")
    beside = [path.parent.parent, path.parent, REPOSITORY_CASES]
    places = [(folder / named).parent for folder in beside] + [folder / "weights" for folder in beside] + [path.parent]
    for place in places:
        if (place / Path(named).name).is_file():
            return place
    raise ValueError(f"{named} is in none of {', '.join(str(place) for place in dict.fromkeys(places))}")


def differences(path: Path, **changes: Any) -> dict[str, float]:
    """Largest absolute differences of a case by what was recorded.

    Args:
        changes: Passed to the kind, for deliberate mistakes.
    """
    meta, tensors = load_case(path)
    kind = kind_of(path, meta)
    return kind.differences(meta, tensors, weights_folder_of(path, meta, kind), **changes)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare this package with recordings of the originals.")
    parser.add_argument("folder", type=Path, help="where the cases are")
    parser.add_argument("--only", default="", metavar="PREFIX", help="cases whose names start so")
    options = parser.parse_args(arguments)
    paths = find_cases(options.folder, options.only)
    if not paths:
        print(f"no cases {options.only!r} in {options.folder}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)  # tensors are too small for more
    worst = {path.stem: _report(path) for path in paths}
    name = max(worst, key=worst.__getitem__)
    failed = sum(difference > BOUND for difference in worst.values())
    print(f"{len(worst) - failed} of {len(worst)} within {BOUND:g}; the worst is {name} with {worst[name]:.1e}")
    return 1 if failed else 0


def _report(path: Path) -> float:
    """Print the line of a case; its largest difference, `inf` if it could not be run."""
    started = time.perf_counter()
    try:
        found = differences(path)
    except Exception as error:  # the other cases are to be run as well
        print(f"FAILED {path.stem}: {type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        return math.inf
    worst = max(found.values(), default=math.inf)
    listed = "  ".join(f"{of} {difference:.1e}" for of, difference in found.items())
    state = "ok    " if worst <= BOUND else "FAILED"
    print(f"{state} {path.stem}  {listed}  ({time.perf_counter() - started:.1f} s)", flush=True)
    return worst


if __name__ == "__main__":
    sys.exit(main())
