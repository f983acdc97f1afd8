"""`tests/gpu` in a pytest of its own: which tests passed, and what the others said."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu_kit.run_parts import ROOT
from benchmarks.gpu_kit.setting import Record, Setting

_NEEDED = ("pytest", "hypothesis")


def measure(setting: Setting, record: Record) -> None:
    """Run those marked `gpu` on a card, the others of the same files elsewhere; RuntimeError if any failed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"not installed: {', '.join(missing)}, which the tests need")
    marked = "gpu" if setting.device.type == "cuda" else "not gpu"
    tests = "tests/gpu/test_copies.py" if setting.is_tiny else "tests/gpu"
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        words = [sys.executable, "-m", "pytest", "-q", "-m", marked, "-p", "no:cacheprovider"]
        finished = subprocess.run([*words, f"--junitxml={results}", tests], cwd=ROOT)
        cases = ElementTree.parse(results).getroot().iter("testcase") if results.is_file() else ()
        for case in cases:
            problems = [of for of in case if of.tag in ("failure", "error", "skipped")]
            state = problems[0].tag if problems else "passed"
            said = problems[0].get("message", "").splitlines()[0][:120] if problems else None
            record.row("tests", test=case.get("name"), outcome=state, s=float(case.get("time", 0)), said=said)
    if finished.returncode:
        raise RuntimeError(f"pytest ended with {finished.returncode}")
