"""A video at which one process after the other dies is given up, unless it gets on between them."""

import json
from pathlib import Path

import pytest

from wan_autoregressive.scripts.deaths import MOST_DEATHS, Deaths, note_deaths
from wan_autoregressive.scripts.output_files import OutputFiles
from wan_autoregressive.scripts.output_lock import OutputLostError, never_lost


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "x.mp4"


def die_at(output: Path) -> None:
    """What a process leaves that is killed within the block."""
    block = note_deaths(output, never_lost)
    block.__enter__()
    left = OutputFiles(output).deaths.read_text()
    block.__exit__(None, None, None)
    OutputFiles(output).deaths.write_text(left)


def get_on(output: Path) -> None:
    folder = OutputFiles(output).resume_folder
    folder.mkdir(exist_ok=True)
    (folder / f"segment-{len(list(folder.iterdir())):06}.mp4").touch()


def test_so_many_in_a_row_and_no_more(output: Path) -> None:
    for _ in range(MOST_DEATHS):
        die_at(output)
    path = OutputFiles(output).deaths
    for _ in range(2):  # whoever comes
        with pytest.raises(RuntimeError, match=f"{MOST_DEATHS} runs in a row died at it; delete '{path}'"):
            die_at(output)
    path.unlink()
    die_at(output)


def test_who_gets_on_may_die_any_number_of_times(output: Path) -> None:
    for _ in range(4 * MOST_DEATHS):
        die_at(output)
        get_on(output)
    for _ in range(MOST_DEATHS - 1):  # the last one above got on, and died
        die_at(output)
    with pytest.raises(RuntimeError, match="in a row"):
        die_at(output)


def test_an_end_that_is_no_death_leaves_nothing(output: Path) -> None:
    for _ in range(MOST_DEATHS + 1):
        with note_deaths(output, never_lost):
            assert list(output.parent.iterdir())
        with pytest.raises(KeyboardInterrupt), note_deaths(output, never_lost):
            raise KeyboardInterrupt
    assert list(output.parent.iterdir()) == []


def test_a_file_that_is_cut_off_is_a_death(output: Path) -> None:
    OutputFiles(output).deaths.write_text('{"cou')
    with note_deaths(output, never_lost):
        assert json.loads(OutputFiles(output).deaths.read_text())["count"] == 1
    assert Deaths(count=1) == Deaths().one_more(output)


def test_what_was_taken_over_keeps_its_file(output: Path) -> None:
    def lost() -> None:
        raise OutputLostError

    with pytest.raises(OutputLostError), note_deaths(output, lost):
        OutputFiles(output).deaths.write_text("the other's")
    assert OutputFiles(output).deaths.read_text() == "the other's"
