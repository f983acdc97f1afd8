"""What only a GPU can show, in one command: figures, parity and GPU tests as one Markdown page and one JSON.

    python -m benchmarks.gpu --output DIR                         # on a card: ends within --minutes (8.8)
    python -m benchmarks.gpu --output DIR --device cpu --tiny     # the kit itself, on any machine

`docs/GPU.md` tells what is in it and how to read the page. Exits with 1 if a part failed, after the others have run.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# The root, which `python benchmarks/gpu.py` leaves out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_kit.parts import PARTS
from benchmarks.gpu_kit.report import write_report
from benchmarks.gpu_kit.run_parts import Outcome, run_parts


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts, or those that are named; 0 if none of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, names = parser.add_argument, [part.name for part in PARTS]
    add("--output", type=Path, required=True, metavar="DIR", help="for gpu.md and gpu.json; made if it is not there")
    add("--device", default="cuda", help="default: cuda")
    add("--tiny", action="store_true", help="sizes of the demo checkpoint, to try the kit; the figures mean nothing")
    add("--minutes", type=float, default=8.8, metavar="N", help="for all parts together (default: 8.8)")
    add("--only", nargs="+", choices=names, metavar="PART", help=f"of {', '.join(names)}")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"minutes is {args.minutes}; it must be above 0")
    parts = [part for part in PARTS if args.only is None or part.name in args.only]
    args.output.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    # So that the part under way ends with the command.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for outcome in run_parts(parts, args.device, args.tiny, 60 * args.minutes, Path(scratch)):
                outcomes.append(outcome)
                print(f"{outcome.name}: {outcome.state}, {outcome.seconds:.0f} of {outcome.limit_s:.0f} s", flush=True)
                # After every part, so that a run that is killed leaves what it has.
                write_report(args.output, outcomes, args.device, args.tiny)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"the report is in {args.output / 'gpu.md'}")
    return 1 if any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
