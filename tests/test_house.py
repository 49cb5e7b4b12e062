"The house rules that a program can check: library in sync, imports one way, sizes, nothing heavy on import."
import ast
import filecmp
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

LIBRARY = ROOT / "mllm_nb"
# each part may import the parts before it, and the ones at the bottom serve all
ORDER = ["device", "images", "vision", "language", "connectors", "drawing", "mllm", "data", "training", "evaluation",
         "serving", "papers", "parity", "parity_cambrian", "parity_lvm", "tour", "planner", "command"]
BOTTOM = {"plots", "widgets", "exercises", "device", "samples"}
MODULES = sorted(path for path in LIBRARY.rglob("*.py") if path.name not in ("_modidx.py", "__init__.py"))
NAMES = [path.relative_to(LIBRARY).as_posix() for path in MODULES]


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def sources(base: Path) -> list[str]:
    "The notebooks and the library's modules below `base`, as paths from there."
    found = [path.relative_to(base) for folder, kind in (("nbs", "*.ipynb"), ("mllm_nb", "*.py"))
             for path in (base / folder).rglob(kind)]
    return sorted(path.as_posix() for path in found if not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts))


def test_the_library_is_what_the_notebooks_export(tmp_path):
    "Export and clean a copy: nothing may change."
    for name in ("settings.ini", "README.md", "setup.py", "pyproject.toml", "mllm_nb/__init__.py", *sources(ROOT)):
        if name.endswith("__init__.py") or not name.startswith("mllm_nb/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    for program in ("nbdev_export", "nbdev_clean"):
        done = run(str(Path(sys.executable).with_name(program)), cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    listed = [sources(ROOT), sources(tmp_path)]
    assert listed[0] == listed[1], f"only on one side: {sorted(set(listed[0]) ^ set(listed[1]))}"
    _, differing, unread = filecmp.cmpfiles(ROOT, tmp_path, listed[0], shallow=False)
    assert not differing + unread, "run: make export (library), make notebooks (notebooks)"


def test_the_build_tools_import():
    "nbdev 2.4 with unpinned dependencies installs and does not import."
    import nbdev.clean
    import nbdev.cli
    import nbdev.export
    import nbdev.quarto
    import nbdev.test
    assert nbdev.__version__.startswith("2.4.")


def test_lint():
    done = run(sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "mllm_nb", "tests")
    assert done.returncode == 0, done.stdout[-3000:]


def test_importing_the_library_loads_nothing_heavy():
    code = ("import sys, mllm_nb; print([name for name in ('torch', 'transformers', 'matplotlib', 'PIL', 'ipywidgets', "
            "'fastcore', 'nbdev') if name in sys.modules])")
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"


def part(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    "The parts of the library that a module imports, relative and absolute forms, also inside functions."
    depth = len(path.relative_to(LIBRARY).parts)
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names |= {(node.module or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("mllm_nb."):
            names.add(node.module.split(".")[1])
    return names


@pytest.mark.parametrize("name", NAMES)
def test_imports_run_one_way(name):
    own, used = part(name), imported_parts(LIBRARY / name)
    assert not used & {"nbdev", "fastcore"}
    if own in BOTTOM:
        assert used <= BOTTOM, f"{own} serves every part and may import only {sorted(BOTTOM)}"
    else:
        allowed = BOTTOM | set(ORDER[:ORDER.index(own) + 1])
        assert used <= allowed, f"{own} comes before {sorted(used - allowed)}"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_forbidden_in_the_library(name):
    text = (LIBRARY / name).read_text(encoding="utf-8")
    for pattern, what in {r"\.cuda\(": "a device by name", r"^\s*(import|from) (torchvision|pickle|nbdev|fastcore)\b": "an import",
                          r"^\s*except\s*:": "a bare except", r"^from \S+ import \*": "import *"}.items():
        assert not re.search(pattern, text, re.MULTILINE), what


def length(node: ast.AST) -> int:
    "Lines of a definition without its docstring."
    body = node.body[0]
    documented = isinstance(body, ast.Expr) and isinstance(getattr(body, "value", None), ast.Constant)
    return node.end_lineno - node.lineno + 1 - (body.end_lineno - body.lineno + 1 if documented else 0)


def definitions(kind: type) -> list[tuple[str, ast.AST]]:
    return [(f"{name}: {node.name}", node) for name in NAMES
            for node in ast.walk(ast.parse((LIBRARY / name).read_text(encoding="utf-8"))) if isinstance(node, kind)]


def test_functions_are_short():
    lengths = {name: length(node) for name, node in definitions(ast.FunctionDef)}
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= 30
    assert not {name: lines for name, lines in lengths.items() if lines > 60}


def test_classes_are_short():
    lengths = {name: length(node) for name, node in definitions(ast.ClassDef)}
    assert not {name: lines for name, lines in lengths.items() if lines > 60}


def test_public_definitions_say_what_they_do():
    missing = [name for kind in (ast.FunctionDef, ast.ClassDef) for name, node in definitions(kind)
               if node.col_offset == 0 and not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not missing
