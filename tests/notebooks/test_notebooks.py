"""Every notebook runs from its text, and its executed twin is that text."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.md"))
SLOW = {"kernel_finetuning", "likelihood_displacement", "mode_connectivity", "pcfg_parsing"}
"""Notebooks of minutes; the tour runs in the fast suite."""
jupytext = pytest.importorskip("jupytext", reason="the notebook runner comes with the extra test")
nbclient = pytest.importorskip("nbclient", reason="the notebook runner comes with the extra test")


def sources(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in NOTEBOOKS])
def test_notebook_runs(name, tmp_path):
    notebook = jupytext.read(FOLDER / f"{name}.md")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "verdict" in printed or "kernel method" in printed


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_executed_notebook_is_paired_with_its_text(name):
    text, executed = jupytext.read(FOLDER / f"{name}.md"), jupytext.read(FOLDER / f"{name}.ipynb")
    assert sources(text) == sources(executed)
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
