"""Every table in `docs/SCALING.md` is what the command above it prints."""

import re
from pathlib import Path

import pytest

from benchmarks.rank_scaling import main

DOCUMENT = (Path(__file__).parents[2] / "docs" / "SCALING.md").read_text(encoding="utf-8")
TABLES = re.findall(r"```\npython -m benchmarks.rank_scaling (.*)\n```\n\n((?:\|.*\n)+)", DOCUMENT)


@pytest.mark.parametrize(("words", "table"), TABLES, ids=[words for words, _ in TABLES])
def test_tables_are_what_the_command_prints(words, table, capsys):
    main(words.split())
    assert capsys.readouterr().out == table


def test_there_are_tables():
    assert len(TABLES) == 4
