"""Leases: who makes a video among runs on several machines, and what becomes of one that is no longer heard from."""

import socket
import time
from pathlib import Path

import pytest

from wan_autoregressive.scripts.output_files import OutputFiles
from wan_autoregressive.scripts.output_lease import OutputLeases
from wan_autoregressive.scripts.output_lock import OutputHeldError, OutputLostError, hold_output


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "x.mp4"


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def move_to_another_machine(lease: Path) -> None:
    """Make it another machine's, of which nobody here can say whether the process is alive."""
    text = lease.read_text()
    elsewhere = text.replace(socket.gethostname(), "elsewhere")
    assert elsewhere != text
    lease.unlink()
    lease.write_text(elsewhere)


def test_one_run_at_a_time(output: Path) -> None:
    first, second = OutputLeases(), OutputLeases()
    with first.hold(output) as still_held:
        with pytest.raises(OutputHeldError, match="another run is writing"), second.hold(output):
            pass
        with second.hold(output.with_name("y.mp4")):
            pass
        still_held()
    with second.hold(output) as still_held:
        still_held()
    assert files_in(output.parent) == []


def test_it_ends_with_the_block_also_where_that_fails(output: Path) -> None:
    def fail() -> None:
        with OutputLeases().hold(output):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert files_in(output.parent) == []


def test_a_machine_that_is_not_heard_from_loses_it_after_the_lease_and_not_before(output: Path) -> None:
    lease_s = 0.4
    lost, others = OutputLeases(lease_s), OutputLeases(lease_s)
    with lost.hold(output) as still_held:
        move_to_another_machine(OutputFiles(output).lease)  # whose owner touches nothing
        begun = time.monotonic()
        refused = 0
        while True:
            try:
                with others.hold(output) as held_now:
                    waited = time.monotonic() - begun
                    held_now()
                    with pytest.raises(OutputLostError, match=r"taken .* over"):
                        still_held()
                    break
            except OutputHeldError:
                refused += 1
                assert time.monotonic() - begun < 30
                time.sleep(0.02)
        assert refused > 0
        assert waited >= lease_s
    assert files_in(output.parent) == []


def test_one_that_is_heard_from_keeps_it_for_longer_than_a_lease(output: Path) -> None:
    others, begun = OutputLeases(2.0), time.monotonic()
    with OutputLeases(2.0).hold(output) as still_held:
        while time.monotonic() - begun < 2.6:
            with pytest.raises(OutputHeldError), others.hold(output):
                pass
            time.sleep(0.05)
        still_held()


def test_what_was_taken_over_is_not_released_by_who_lost_it(output: Path) -> None:
    lease = OutputFiles(output).lease
    with OutputLeases().hold(output):
        move_to_another_machine(lease)
    assert "elsewhere" in lease.read_text()


def test_runs_with_and_without_share_keep_off_each_other(output: Path) -> None:
    with OutputLeases().hold(output) as still_held:
        with pytest.raises(OutputHeldError, match=r"--share .* delete '.*\.lease'"), hold_output(output):
            pass
        still_held()
    with hold_output(output):
        with pytest.raises(OutputHeldError), OutputLeases().hold(output):
            pass
        assert not OutputFiles(output).lease.exists()
    OutputFiles(output).lock.touch()  # as a run without --share leaves it that was killed
    with OutputLeases().hold(output):
        pass
    assert files_in(output.parent) == []
