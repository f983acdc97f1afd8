"""How `benchmarks.gpu` runs its parts and what it reports: by parts that fail in every way there is."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu_kit.parts import PARTS, Part
from benchmarks.gpu_kit.report import write_report
from benchmarks.gpu_kit.run_parts import run_parts

ROOT = Path(__file__).parents[2]

FAKE_PARTS = """
import os, pathlib, subprocess, sys, time

def good(setting, record, factor):
    record.row("figures", a_b=setting.device_name, c=2.0 * factor)
    record.row("figures", a_b=None, d=setting.is_tiny)

def raising(setting, record):
    record.row("until then", x=1)
    raise ZeroDivisionError("the card caught fire")

def crashing(setting, record):
    record.row("until then", x=1)
    print("the last word", flush=True)
    os.abort()

def hanging(setting, record, note):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path(note).write_text(str(child.pid))
    record.row("until then", x=1)
    time.sleep(600)

def leaving(setting, record, note):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path(note).write_text(str(child.pid))
"""


@pytest.fixture
def fake_parts(tmp_path, monkeypatch):
    (tmp_path / "fake_parts.py").write_text(FAKE_PARTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def part(name: str, share: float = 1, function: str | None = None, **options) -> Part:
        return Part(name, f"The {name} part", f"fake_parts:{function or name}", share, **options)

    return part


def run(parts, folder, device="cpu", tiny=False, total_s=600.0):
    (folder / "scratch").mkdir()
    return list(run_parts(parts, device, tiny, total_s, folder / "scratch"))


def is_there(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while is_there(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_there(pid)


def test_a_part_that_fails_is_recorded_and_the_rest_runs(fake_parts, tmp_path):
    parts = [fake_parts("raising"), fake_parts("crashing"), fake_parts("missing")]
    parts += [fake_parts("good", arguments={"factor": 3})]
    raising, crashing, missing, good = run(parts, tmp_path, tiny=True)
    assert [o.state for o in (raising, crashing, missing, good)] == ["failed", "failed", "failed", "ok"]
    assert "Traceback" in raising.log
    assert raising.log.endswith("ZeroDivisionError: the card caught fire")
    assert "the last word" in crashing.log
    assert "has no attribute 'missing'" in missing.log
    assert raising.tables == crashing.tables == {"until then": [{"x": 1}]}
    assert missing.tables == {}
    assert good.tables == {"figures": [{"a b": "cpu", "c": 6.0}, {"a b": None, "d": True}]}
    assert good.log == ""


def test_a_part_that_hangs_is_ended_with_all_that_it_started(fake_parts, tmp_path):
    note = tmp_path / "pid"
    parts = [fake_parts("hanging", 1, arguments={"note": str(note)}), fake_parts("good", 99, arguments={"factor": 1})]
    hanging, good = run(parts, tmp_path, total_s=800.0)
    assert (hanging.state, good.state) == ("out of time", "ok")
    assert hanging.tables == {"until then": [{"x": 1}]}
    wait_until_gone(int(note.read_text()))


def test_what_a_part_left_running_ends_with_it(fake_parts, tmp_path):
    note = tmp_path / "pid"
    (outcome,) = run([fake_parts("leaving", arguments={"note": str(note)})], tmp_path)
    assert outcome.state == "ok"
    wait_until_gone(int(note.read_text()))


def test_time_is_shared_and_what_is_left_over_goes_to_those_behind(fake_parts, tmp_path):
    parts = [
        fake_parts(name, share, "good", arguments={"factor": 1}) for name, share in (("a", 1), ("b", 1), ("c", 2))
    ]
    first, second, third = run(parts, tmp_path, total_s=4000.0)
    assert first.limit_s == pytest.approx(1000, rel=0.05)
    assert 1000 < second.limit_s < 4000 / 3
    assert 2000 < third.limit_s < 4000
    spent = first.seconds + second.seconds
    assert third.limit_s == pytest.approx(4000 - spent, abs=5)


def test_without_cuda_a_part_that_needs_it_is_not_begun(fake_parts, tmp_path):
    parts = [fake_parts("raising", needs_cuda=True)]
    (outcome,) = run(parts, tmp_path)
    assert (outcome.state, outcome.failed, outcome.log) == ("needs CUDA", False, "")


def test_the_report_has_every_figure_twice(fake_parts, tmp_path):
    parts = [fake_parts("raising"), fake_parts("good", arguments={"factor": 1 / 7})]
    outcomes = [*run(parts, tmp_path), *run_parts([fake_parts("good", needs_cuda=True)], "cpu", False, 9, tmp_path)]
    write_report(tmp_path, outcomes, "cpu", tiny=True)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["state"] for part in report["parts"]] == ["failed", "ok", "needs CUDA"]
    assert report["parts"][1]["tables"]["figures"][0] == {"a b": "cpu", "c": 2 / 7}
    page = (tmp_path / "gpu.md").read_text()
    assert "the figures mean nothing" in page
    assert "| a b | c | d |\n| --- | --- | --- |\n| cpu | 0.2857 |  |\n|  |  | no |\n" in page
    assert "**failed** after" in page
    assert "ZeroDivisionError: the card caught fire\n```" in page
    write_report(tmp_path, outcomes, "cpu", tiny=False)
    assert "mean nothing" not in (tmp_path / "gpu.md").read_text()


def test_the_command_writes_after_every_part_and_fails_if_one_did(fake_parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PARTS", (fake_parts("raising"), fake_parts("good", arguments={"factor": 1})))
    assert gpu.main(["--output", str(tmp_path / "new"), "--device", "cpu"]) == 1
    assert gpu.main(["--output", str(tmp_path / "new"), "--device", "cpu", "--only", "good"]) == 0
    assert capsys.readouterr().out.startswith("raising: failed, ")
    parts = json.loads((tmp_path / "new" / "gpu.json").read_text())["parts"]
    assert [part["name"] for part in parts] == ["good"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_command_that_is_ended_takes_its_part_along(fake_parts, tmp_path):
    note = tmp_path / "pid"
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks import gpu
from benchmarks.gpu_kit.parts import Part
gpu.PARTS = (Part("hanging", "", "fake_parts:hanging", 1, {{"note": {str(note)!r}}}),)
sys.exit(gpu.main(["--output", {str(tmp_path)!r}, "--device", "cpu"]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], env=os.environ)
    deadline = time.monotonic() + 60
    while not (note.is_file() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    wait_until_gone(int(note.read_text()))


def test_the_page_names_the_parts_and_their_shares():
    page = (ROOT / "docs" / "GPU.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w.-]+)` \| (\d+) %", page, flags=re.MULTILINE)
    assert listed == [(part.name, f"{part.share:g}") for part in PARTS]
    assert sum(part.share for part in PARTS) == 100


def test_no_module_but_a_parts_own_needs_torch():
    """The report is written whatever is missing."""
    program = "import sys, benchmarks.gpu, benchmarks.gpu_kit.one_part; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
