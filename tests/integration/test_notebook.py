"""The notebook, run from top to bottom in a kernel of its own."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
HANGS_S = 600


def test_the_notebook_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_says(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=HANGS_S, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    data = [output.get("data", {}) for output in shown]
    assert sum("<video" in entry.get("text/html", "") for entry in data) == 3
    assert sum("image/png" in entry for entry in data) == 1
    (stats,) = [entry["text/html"] for entry in data if "<table>" in entry.get("text/html", "")]
    assert stats.count("<tr>") == 1 + 8  # 24 latent frames in chunks of 3
    assert any("the same bits: True" in output.get("text", "") for output in shown)
