"""Every notebook, run as a learner runs it, and every exercise in it, in one pass.

MLLM_NB_PATIENCE (default 2) stretches the minute that a notebook may take on slow machines.
"""
import os

import pytest
from run_notebooks import ROOT, code_text, notebooks, run_notebook

MINUTE = 60 * float(os.environ.get("MLLM_NB_PATIENCE", "2"))
NAMES = [path.relative_to(ROOT).as_posix() for path in notebooks()]


def has_output(cell: dict) -> bool:
    "Does a cell show something that is stored (a widget's view and warnings are not)?"
    def stored(output: dict) -> bool:
        view = "application/vnd.jupyter.widget-view+json" in output.get("data", {}) and len(output["data"]) <= 2
        return output.get("name") != "stderr" and not view
    return any(stored(output) for output in cell.get("outputs", []))


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_and_its_exercises_are_sound(name):
    path = ROOT / name
    beside = {item.name for item in path.parent.iterdir()}
    stored = {cell["id"]: has_output(cell) for cell in notebook_cells(path)}
    run = run_notebook(path, solve=True, timeout=10 * MINUTE)
    assert not run.error, run.error
    for cell in run.cells:
        proves = cell.metadata.get("proves")
        if proves == "stub":
            assert "✗" in code_text(cell), f"the check accepts the stub:\n{cell.source}\nprinted: {code_text(cell)}"
        if proves == "solution":
            assert "✓" in code_text(cell) and "✗" not in code_text(cell), f"the solution fails:\n{cell.source}\n{code_text(cell)}"
    shown = {cell["id"]: has_output(cell) for cell in run.cells if cell["id"] in stored}
    differing = [cell_id for cell_id, shows in shown.items() if shows != stored[cell_id]]
    assert not differing, f"outputs are not stored as the code gives them (make notebooks NB={name}): cells {differing}"
    left = {item.name for item in path.parent.iterdir() if item.suffix != ".ipynb"} - beside - {"__pycache__", ".ipynb_checkpoints"}
    assert not left, f"the notebook leaves files behind: {sorted(left)}"
    assert run.seconds <= MINUTE, f"{run.seconds:.0f} s of processor time, at most {MINUTE:.0f}"


def notebook_cells(path) -> list[dict]:
    import nbformat
    return nbformat.read(path, 4).cells


def test_there_are_notebooks():
    assert len(NAMES) >= 5
