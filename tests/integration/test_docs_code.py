"""Every block of code on a page runs as it stands, one after the other, in one folder; so do the figures' tool."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from doc_pages import HELD_ELSEWHERE, PAGES, ROOT, blocks_of

from tools import docs_figures
from wan_autoregressive.scripts import cli

RUN = [
    page
    for page, text in PAGES.items()
    if page not in HELD_ELSEWHERE and any(not block.reason for block in blocks_of(text))
]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    names = {"__name__": "__main__"}
    for number, block in enumerate(blocks_of(PAGES[page])):
        if block.reason:
            continue
        code = block.code.replace("PATH_OF_THIS_FOLDER", str((ROOT / page).parent))
        if block.language == "python":
            exec(compile(code, f"{page}, block {number}", "exec"), names)
        elif page != "README.md" and all(command[0] == "wan-ar" for command in commands_of(code)):
            for command in commands_of(code):  # here, where torch is there already; the README's as people run them
                assert cli.main(command[1:]) == 0, f"{page}, block {number}: {command}"
        else:
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], capture_output=True, text=True)
            assert done.returncode == 0, f"{page}, block {number}: {done.stderr}"


def commands_of(code: str) -> list[list[str]]:
    """Words of every line; a backslash at its end makes one of two."""
    return [shlex.split(line) for line in code.replace("\\\n", " ").splitlines() if line]


@pytest.mark.slow
def test_the_figures_are_what_is_drawn():
    """`python tools/docs_figures.py` draws them anew."""
    for name, svg in docs_figures.figures().items():
        assert (docs_figures.IMAGES / name).read_text() == svg, name
