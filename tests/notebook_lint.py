"""What every notebook of the book keeps to, as a list of small rules: each yields what it finds wrong.

python tests/notebook_lint.py [NB ...]   prints the problems (default: all notebooks)
"""
import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETUP_CELL = (ROOT / "nbs" / "setup_cell.txt").read_text(encoding="utf-8").rstrip("\n")
MEGABYTE = 1_000_000
HEADER = "| minutes | peak memory | needs | paper |"
FOLDED = re.compile(r"<details>.*?</details>|```.*?```", re.DOTALL)
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(work|root|home|tmp|Users|private|opt|mnt)/[\w.]|[A-Z]:\\Users|site-packages|[^/\w]\.venv/")


@dataclass(frozen=True)
class Notebook:
    "A notebook file: where it is (relative to the checkout) and its JSON."
    path: Path
    content: dict

    @cached_property
    def cells(self) -> list[dict]:
        return self.content["cells"]

    @cached_property
    def code(self) -> list[tuple[int, str, dict]]:
        "Position, source and cell of each code cell."
        return [(i, "".join(c["source"]), c) for i, c in enumerate(self.cells) if c["cell_type"] == "code"]

    @cached_property
    def prose(self) -> list[tuple[int, str]]:
        "Position and source of each markdown cell."
        return [(i, "".join(c["source"])) for i, c in enumerate(self.cells) if c["cell_type"] == "markdown"]

    @property
    def is_index(self) -> bool:
        return self.path.as_posix() == "nbs/index.ipynb"

    @property
    def is_appendix(self) -> bool:
        return "appendix" in self.path.parts


def read(path: Path) -> Notebook:
    return Notebook(path.resolve().relative_to(ROOT), json.loads(path.read_text(encoding="utf-8")))


@cache
def tracked() -> frozenset[str]:
    "The paths that git knows; empty outside a git checkout."
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return frozenset(found.stdout.splitlines()) if found.returncode == 0 else frozenset()


@cache
def badge_start() -> str:
    "What a Colab link of this repository begins with."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    settings = parser["DEFAULT"]
    return f"https://colab.research.google.com/github/{settings['user']}/{settings['repo']}/blob/{settings['branch']}/"


def title_and_promise(notebook: Notebook) -> Iterator[str]:
    first = "".join(notebook.cells[0]["source"]).split("\n")
    if notebook.cells[0]["cell_type"] != "markdown" or not first[0].startswith("# "):
        yield "cell 0: expected a markdown cell with '# Title'"
    rest = [line for line in first[1:] if line.strip()]
    if not rest or not rest[0].startswith("> ") or not rest[0].rstrip().endswith("."):
        yield "cell 0: after the title expected '> one-line promise.'"


def badge(notebook: Notebook) -> Iterator[str]:
    links = re.findall(r"\[!\[Open in Colab\]\([^)]*\)\]\(([^)]*)\)", "".join(notebook.cells[0]["source"]))
    expected = badge_start() + notebook.path.as_posix()
    if links != [expected]:
        yield f"cell 0: expected one Colab badge to {expected}, found {links}"
    if tracked() and notebook.path.as_posix() not in tracked():
        yield "not in git: the badge's target would not exist"


def header_table(notebook: Notebook) -> Iterator[str]:
    lines = "".join(notebook.cells[0]["source"]).split("\n")
    if HEADER not in lines:
        yield f"cell 0: expected the table {HEADER}"
        return
    row = (lines[lines.index(HEADER) + 2:] or [""])[0].strip("| ").split("|")
    if len(row) != 4 or not re.fullmatch(r"\s*\d+(\.\d+)?\s*", row[0]) or not re.fullmatch(r"\s*[\d.]+ (MB|GB)\s*", row[1]):
        yield f"cell 0: expected '| minutes | N MB | needs | paper |' as numbers, found {row}"


def setup_cell(notebook: Notebook) -> Iterator[str]:
    if not notebook.code or notebook.code[0][1] != SETUP_CELL:
        yield "first code cell: differs from nbs/setup_cell.txt"


def stored_state(notebook: Notebook) -> Iterator[str]:
    if "widgets" in notebook.content["metadata"]:
        yield "metadata: widget state is stored"
    for index, _, cell in notebook.code:
        if cell.get("execution_count") is not None:
            yield f"cell {index}: an execution count is stored"
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                yield f"cell {index}: an error is stored: {output.get('ename')}"
            if output.get("name") == "stderr":
                yield f"cell {index}: stderr is stored: {''.join(output['text'])[:60]!r}"
            if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
                yield f"cell {index}: a widget view is stored, which is nothing without its kernel"


def was_run(notebook: Notebook) -> Iterator[str]:
    if not any(cell["outputs"] for _, _, cell in notebook.code):
        yield "no outputs are stored: run it (make notebooks NB=...)"


def size(notebook: Notebook) -> Iterator[str]:
    outputs = sum(len(json.dumps(cell["outputs"])) for _, _, cell in notebook.code)
    if outputs > 1.5 * MEGABYTE:
        yield f"outputs of {outputs / MEGABYTE:.2f} MB, at most 1.5 MB"


def words(source: str) -> int:
    "Words of a markdown cell, without tables, headings, fences and folded solutions."
    lines = FOLDED.sub("", source).split("\n")
    return len(" ".join(line for line in lines if not line.lstrip().startswith(("|", "#", "[!["))).split())


def enough_prose(notebook: Notebook) -> Iterator[str]:
    letters = sum(len(FOLDED.sub("", source)) for _, source in notebook.prose[1:])
    if letters < 1500 and not notebook.is_index:
        yield f"{letters} characters of prose, at least 1500"
    for index, source in notebook.prose[1:]:
        if words(source) > 130:
            yield f"cell {index}: {words(source)} words of prose in one cell, aim for 15 to 90, at most 130"


def picture_count(notebook: Notebook) -> int:
    data = [output.get("data", {}) for _, _, cell in notebook.code for output in cell["outputs"]]
    drawn = sum(any(kind.startswith("image/") for kind in bundle) or "data-mllm-widget" in "".join(bundle.get("text/html", ""))
                for bundle in data)
    return drawn + sum(len(re.findall(r"!\[[^\]]*\]\((?!https://colab)", source)) for _, source in notebook.prose)


def pictures(notebook: Notebook) -> Iterator[str]:
    wanted = 1 if notebook.is_index else 2
    if picture_count(notebook) < wanted:
        yield f"{picture_count(notebook)} pictures, at least {wanted}"


def exercises(notebook: Notebook) -> Iterator[str]:
    wanted = 0 if notebook.is_index else 1 if notebook.is_appendix else 3
    found = len(re.findall(r"^#\|\s*exercise\b", "\n".join(source for _, source, _ in notebook.code), re.MULTILINE))
    if found < wanted:
        yield f"{found} exercises, at least {wanted}"


def is_class(source: str) -> bool:
    "Does the cell export one class, and nothing else?"
    try:
        nodes = ast.parse(source).body
    except SyntaxError:
        return False
    return source.startswith("#| export") and sum(isinstance(node, ast.ClassDef) for node in nodes) == 1 and len(nodes) <= 2


def cell_lengths(notebook: Notebook) -> Iterator[str]:
    for index, source, _ in notebook.code:
        limit = 60 if is_class(source) else 30
        lines = source.rstrip().count("\n") + 1
        if lines > limit:
            yield f"cell {index}: {lines} lines of code, at most {limit}"
        wide = max(map(len, source.split("\n")))
        if wide > 120 and source != SETUP_CELL:
            yield f"cell {index}: a line of {wide} characters, at most 120"


def forbidden_code(notebook: Notebook) -> Iterator[str]:
    patterns = {r"\.cuda\(": "a device by name instead of .to(device)", r"^\s*from \S+ import \*": "import *",
                r"^\s*(import|from) torchvision\b": "torchvision", r"^\s*(import|from) pickle\b": "pickle",
                r"^\s*except\s*:": "a bare except", r"^\s*[!%]+(pip|conda|apt)\b": "an installation outside the setup cell"}
    for index, source, _ in notebook.code:
        for pattern, what in patterns.items() if source != SETUP_CELL else ():
            if re.search(pattern, source, re.MULTILINE):
                yield f"cell {index}: {what}"


def merge_markers(notebook: Notebook) -> Iterator[str]:
    for index, cell in enumerate(notebook.cells):
        if re.search(r"^(<{7}|={7}$|>{7})", "".join(cell["source"]), re.MULTILINE):
            yield f"cell {index}: a merge marker"


def output_text(cell: dict) -> str:
    "Everything readable that a cell stored (pictures left out)."
    texts = [output.get("text", "") for output in cell["outputs"]]
    texts += [text for output in cell["outputs"] for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return re.sub(r"[A-Za-z0-9+/=]{200,}", "", "\n".join("".join(text) for text in texts))


def machine_paths(notebook: Notebook) -> Iterator[str]:
    for index, source, cell in notebook.code:
        for where, text in (("source", source), ("output", output_text(cell))):
            found = MACHINE_PATH.search(text)
            if found and source != SETUP_CELL:
                yield f"cell {index}: a path of one machine in its {where}: {text[max(0, found.start() - 5):found.end() + 25]!r}"


def links(notebook: Notebook) -> Iterator[str]:
    folder = (ROOT / notebook.path).parent
    for index, source in notebook.prose:
        for target in re.findall(r"\]\(([^)\s]+)\)", FOLDED.sub("", source)):
            name = target.split("#")[0]
            if re.match(r"[a-z]+:", target) or not name:
                continue
            path = (folder / name).resolve()
            if not path.exists():
                yield f"cell {index}: the link {target} leads nowhere"
            elif tracked() and path.is_file() and path.relative_to(ROOT).as_posix() not in tracked():
                yield f"cell {index}: the link {target} leads to a file that is not in git"


RULES = (title_and_promise, badge, header_table, setup_cell, stored_state, was_run, size, enough_prose, pictures,
         exercises, cell_lengths, forbidden_code, merge_markers, machine_paths, links)


def problems(notebook: Notebook) -> list[str]:
    "All that the rules find, each with its rule's name."
    return [f"{rule.__name__}: {problem}" for rule in RULES for problem in rule(notebook)]


def main(names: list[str]) -> int:
    paths = [Path(name) for name in names] or sorted(p for p in (ROOT / "nbs").rglob("*.ipynb")
                                                     if ".ipynb_checkpoints" not in p.parts)
    found = [(path, problem) for path in paths for problem in problems(read(path))]
    for path, problem in found:
        print(f"{path}: {problem}")
    print(f"{len(paths)} notebooks, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
