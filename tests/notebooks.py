"""Runs a notebook of the repository from top to bottom, as tests of several folders do."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(notebook, tag):
    """The cells that bear a tag."""
    return [cell for cell in notebook["cells"] if tag in cell["metadata"].get("tags", ())]


def run_notebook(name, folder, *, parameters, run):
    """Run it in ``folder`` without its installation, and check what it shows and leaves in the folder ``run``.

    Args:
        name: The file's name in notebooks/.
        folder: Where it runs.
        parameters: What stands in the place of its cell of parameters.
        run: Where its training leaves a record and a card, within ``folder``.
    """
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", ())]
    cells(notebook, "parameters")[0].source = parameters
    where = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where)
    session = {"JPY_SESSION_NAME": str(folder / name), "PYTHONPATH": str(ROOT)}
    client.execute(env={**os.environ, **session})

    record = json.loads((folder / run / "run_record.json").read_text())
    assert [one["command"] for one in record["run"]["sessions"]] == [f"# in the notebook {name}"]
    card = (folder / run / "README.md").read_text()
    assert name in card
    assert "ipykernel" not in card
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())]
    tables = [data for data in shown if "<table><tr><th>" in data.get("text/html", "")]
    assert tables, "no report and no group table was shown as HTML"
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert losses[-1] < losses[0]
    return notebook
