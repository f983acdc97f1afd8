"""Every cell of the tables in `docs/PERFORMANCE.md` is what the command above it prints."""

import re
from pathlib import Path

import pytest

from wan_autoregressive.scripts.cli import main
from wan_autoregressive.scripts.costs.memory import estimate_memory
from wan_autoregressive.scripts.costs.sizes import ModelSizes
from wan_autoregressive.scripts.costs.workload import make_workload

DOCUMENT = (Path(__file__).parents[2] / "docs" / "PERFORMANCE.md").read_text(encoding="utf-8")
# A block of commands, then a table with a column for each.
TABLES = re.findall(r"```\n((?:wan-ar estimate .*\n)+)```\n\n((?:\|.*\n)+)", DOCUMENT)


@pytest.mark.slow
@pytest.mark.parametrize(("commands", "table"), TABLES, ids=["1.3b", "5b", "14b"])
def test_tables_are_what_the_commands_print(commands, table, capsys):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    for column, command in enumerate(commands.splitlines(), start=1):
        assert main(command.split()[1:]) == 0
        printed = capsys.readouterr().out.splitlines()[3:]
        assert [re.split(r"\s{2,}", line.strip()) for line in printed] == [[row[0], row[column]] for row in rows]


@pytest.mark.slow
def test_81_frames_without_a_window_take_what_a_window_of_21_does():
    shape = {"model": ModelSizes.of_preset("1.3b"), "dtype": "bfloat16", "chunks": 7}
    with_window = estimate_memory(make_workload(**shape, window_frames=21, sink_frames=3))
    without = estimate_memory(make_workload(**shape, window_frames=None))
    chunk_bytes = 16 * 3 * 60 * 104 * 4
    assert with_window.held_bytes - without.held_bytes == chunk_bytes
    for of, most in with_window.most_bytes.items():
        assert most - without.most_bytes[of] == chunk_bytes
