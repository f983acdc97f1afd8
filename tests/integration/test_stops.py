"""What ends `wan-ar generate` from outside: signals while it loads, streams that are closed or full."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from saved_runs import start, wait_until, words

from wan_autoregressive.scripts import cli, generate, interrupts

MAIN = "import sys; from wan_autoregressive.scripts.cli import main; sys.exit(main(sys.argv[1:]))"
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def hang_while_loading() -> None:
    generate.load_pipeline = lambda config: time.sleep(60)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_stop_while_loading_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path, capfd, number: int) -> None:
    process = start(words(tiny_checkpoint, tmp_path / "x.mp4"), hang_while_loading)
    assert wait_until(lambda: list(tmp_path.iterdir()), process)  # the lock
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == 128 + number
    assert not list(tmp_path.iterdir())
    expected = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    assert capfd.readouterr().err == f"wan-ar: error: {expected}\n"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_a_stop_at_any_moment_is_one_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Real processes: importing and loading are what takes the time."""
    for index in range(12):
        folder = tmp_path / "out"
        folder.mkdir()
        arguments = words(tiny_checkpoint, folder / "x.mp4")
        process = run(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while not catches(process.pid, signal.SIGTERM):  # while Python itself starts, signals are Python's
            time.sleep(0.002)
        time.sleep(index * 0.35)
        number = NUMBERS[index % 3]
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        lines = [line for line in err.splitlines() if line and "stopping after this chunk" not in line]
        assert process.returncode in (0, 128 + number), err
        assert process.returncode == 0 or len(lines) == 1, err
        assert not list(folder.glob(".*"))
        shutil.rmtree(folder)


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def run(arguments: list[str], **streams: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", MAIN, *arguments], text=True, **streams)


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with interrupts.handle_stops(interrupts.raise_stopped):
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(interrupts.Stopped):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("closing", ["2>&-", "<&- >&- 2>&-"])
def test_a_closed_stderr_does_not_change_the_exit_code(closing: str, tmp_path: Path) -> None:
    command = f'"{sys.executable}" -c "{MAIN}" generate --prompt x --output x.avi {closing}'
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_stdout_does_not_pass_for_wrong_input(tiny_checkpoint: Path, tmp_path: Path, capfd) -> None:
    def fill_stdout() -> None:
        sys.stdout = open("/dev/full", "w")  # noqa: SIM115

    process = start(words(tiny_checkpoint, tmp_path / "x.mp4", "--num-frames", "5"), fill_stdout)
    process.join()
    assert process.exitcode == 1
    problem = "is whole, but standard output cannot be written: No space left on device"
    assert capfd.readouterr().err == f"wan-ar: error: '{tmp_path / 'x.mp4'}' {problem}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.mp4"]


def test_a_report_that_fails_does_not_pass_for_a_video_that_failed(
    tiny_checkpoint: Path, tmp_path: Path, capfd, monkeypatch
) -> None:
    def fail(*args: Any) -> None:
        raise PermissionError(13, "Permission denied", "x.json")

    monkeypatch.setattr("wan_autoregressive.scripts.render_job.write_report", fail)
    assert cli.main(words(tiny_checkpoint, tmp_path / "x.mp4", "--num-frames", "5")) == 1
    assert f"'{tmp_path / 'x.mp4'}' is whole, but what comes with it failed: " in capfd.readouterr().err
    assert (tmp_path / "x.mp4").exists()
    monkeypatch.undo()
    # What was saved is still there: the report can be made without rendering again.
    assert cli.main(words(tiny_checkpoint, tmp_path / "x.mp4", "--num-frames", "5", "--resume")) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.mp4"]
