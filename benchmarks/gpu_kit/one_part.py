"""Run one part in this process: `python -m benchmarks.gpu_kit.one_part FUNCTION ARGUMENTS DEVICE RECORD [--tiny]`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
from pathlib import Path

from benchmarks.gpu_kit.setting import Record, Setting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("function", help="module:function")
    parser.add_argument("arguments", type=json.loads, help="of the function, as JSON")
    parser.add_argument("device")
    parser.add_argument("record", type=Path, help="the JSON to write")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny:  # small tensors gain nothing from threads, and on a busy machine they lose by an order of magnitude
        os.environ["OMP_NUM_THREADS"] = "1"
    module, _, name = args.function.partition(":")
    measure = getattr(importlib.import_module(module), name)
    measure(Setting(args.device, args.tiny), Record(args.record), **args.arguments)


if __name__ == "__main__":
    main()
