"""Run notebooks as a learner does: a fresh kernel, top to bottom, in the notebook's own folder, without a network.

python tests/run_notebooks.py [NB ...]   runs them (default: all), stores their outputs, prints seconds and memory
"""
import json
import os
import re
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from mllm_nb.exercises import with_solutions, write_stubs

ROOT = Path(__file__).parent.parent
SETUP_CELL = (ROOT / "nbs" / "setup_cell.txt").read_text(encoding="utf-8").rstrip("\n")
KERNELSPEC = {"display_name": "python3", "language": "python", "name": "python3"}

# The first cell of a run: connections that leave the machine are refused, so that a download cannot hide.
NO_NETWORK = """
import socket as _socket
class _Local(_socket.socket):
    def connect(self, address):
        if self.family in (_socket.AF_INET, _socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise ConnectionRefusedError(f"notebooks run without a network; asked for {address}")
        return super().connect(address)
_socket.socket = _Local
"""
# The last cell: what the run cost, children included.
COST = """
import json as _json, resource as _resource, sys as _sys, time as _time
_own, _children = (_resource.getrusage(who) for who in (_resource.RUSAGE_SELF, _resource.RUSAGE_CHILDREN))
_unit = 1e6 if _sys.platform == "darwin" else 1e3
print(_json.dumps({"seconds": _time.process_time() + _children.ru_utime + _children.ru_stime, "megabytes": _own.ru_maxrss / _unit}))
"""


@dataclass(frozen=True)
class Run:
    "What a run gave: the executed cells (ours removed), processor and wall seconds, peak memory, the error if any."
    cells: list
    seconds: float
    wall: float
    megabytes: float
    error: str


def notebooks() -> list[Path]:
    "Every notebook of the book, in reading order."
    found = [path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts]
    return sorted(found, key=lambda path: (path.parent != ROOT / "nbs", path.relative_to(ROOT).as_posix()))


@contextmanager
def bare_jupyter():
    "A home without the settings, kernels and history of whoever runs this; no downloads; no widgets' state."
    with tempfile.TemporaryDirectory() as home:
        names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
        wanted = {**{name: f"{home}/{name.lower()}" for name in names}, "HF_HUB_OFFLINE": "1",
                  "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield home
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def over_files(home: str):
    "Settings of a kernel spoken to over files in `home` instead of ports: two at once never meet."
    from traitlets.config import Config
    return Config() if os.name == "nt" else Config(AsyncKernelManager={"transport": "ipc", "ip": f"{home}/kernel"})


def run_notebook(path: Path, solve: bool = False, timeout: float = 600) -> Run:
    "Run a notebook; with `solve`, each exercise's check runs on its stub and again on its solution."
    notebook = nbformat.read(path, 4)
    cells = with_solutions(notebook.cells, path.name) if solve else notebook.cells
    code = [nbformat.v4.new_code_cell(source) for source in (NO_NETWORK, COST)]
    notebook.cells = [code[0], *map(nbformat.from_dict, cells), code[1]]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    start, error = time.monotonic(), ""
    with bare_jupyter() as home:
        client = NotebookClient(notebook, config=over_files(home), timeout=timeout, store_widget_state=False,
                                resources={"metadata": {"path": str(path.parent)}})
        client.widget_registry = {}  # nbclient's Output widget can lose a reply and wait for it until the timeout
        try:
            client.execute()
        except (CellExecutionError, TimeoutError) as problem:
            error = re.sub(r"\x1b\[[0-9;]*m", "", str(problem))  # without terminal colours
    cost = json.loads(code_text(notebook.cells[-1])) if not error else {"seconds": 0, "megabytes": 0}
    return Run(notebook.cells[1:-1], cost["seconds"], time.monotonic() - start, cost["megabytes"], error)


def code_text(cell) -> str:
    "What a cell printed."
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def tidy(cell):
    "A cell as it is stored: streams joined, warnings and widget views left out (those need a live kernel)."
    if cell.cell_type != "code":
        return cell
    cell.metadata, cell.execution_count, kept = {}, None, []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stderr":
            continue
        if output.output_type in ("display_data", "execute_result"):
            if "application/vnd.jupyter.widget-view+json" in output.data and len(output.data) <= 2:
                continue
            output.data.pop("application/vnd.jupyter.widget-view+json", None)
            output.metadata = {}
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    cell.outputs = kept
    return cell


def store(path: Path, cells: list) -> None:
    "Write the executed notebook in the form that `nbdev_clean` keeps."
    from nbdev.clean import nbdev_clean
    notebook = nbformat.v4.new_notebook(cells=[tidy(cell) for cell in cells], metadata={"kernelspec": KERNELSPEC})
    notebook.nbformat_minor = 5
    nbformat.write(notebook, path)
    nbdev_clean(str(path))


def stamp_setup(path: Path) -> None:
    "Bring the first code cell in line with the one setup cell of the book."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    first = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    if "".join(first["source"]) != SETUP_CELL and "google.colab" in "".join(first["source"]):
        first["source"] = SETUP_CELL.splitlines(keepends=True)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def main(names: list[str]) -> int:
    failed = 0
    for path in [Path(name).resolve() for name in names] or notebooks():
        stamp_setup(path)
        write_stubs(path)
        run = run_notebook(path)
        if run.error:
            failed += 1
            print(f"FAILED  {path.relative_to(ROOT)}\n{run.error}", flush=True)
            continue
        store(path, run.cells)
        print(f"{run.seconds:6.1f} s  {run.megabytes:6.0f} MB  {path.stat().st_size / 1e3:6.0f} kB  "
              f"{path.relative_to(ROOT)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
