"""The table of the book, made from the notebooks themselves, in nbs/index.ipynb and README.md.

python tests/book_table.py [--check]   rewrites both; with --check, exits 1 where they differ from the notebooks
"""
import json
import re
import sys
from pathlib import Path

from notebook_lint import ROOT, badge_start

START, END = "<!-- book: made by tests/book_table.py -->", "<!-- end of book -->"
PARTS = {"1_see": "1 See", "2_read": "2 Read", "3_connect": "3 Connect", "4_draw": "4 Draw", "5_data": "5 Data",
         "6_train": "6 Train", "7_measure": "7 Measure", "8_serve": "8 Serve", "9_papers": "9 Papers", "appendix": "Appendix"}
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def row(path: Path, base: Path) -> str:
    "One notebook as a table row, its link relative to `base`."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    head = "".join(cells[0]["source"]).split("\n")
    title = head[0].removeprefix("# ")
    promise = next((line for line in head[1:] if line.startswith("> ")), "> ").removeprefix("> ")
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    module = re.search(r"^#\|\s*default_exp\s+(\S+)", code, re.MULTILINE)
    link, place = path.relative_to(base).as_posix(), path.relative_to(ROOT).as_posix()
    name = f"`{module[1]}`" if module else ""
    return f"| {PARTS[path.parent.name]} | [{title}]({link}) | {promise} | {name} | [![Colab]({BADGE})]({badge_start()}{place}) |"


def table(base: Path) -> str:
    "All notebooks in reading order."
    paths = sorted((path for name in PARTS for path in (ROOT / "nbs" / name).glob("*.ipynb")),
                   key=lambda path: (list(PARTS).index(path.parent.name), path.name))
    return "\n".join([START, "", "| part | notebook | what it gives you | module | run |", "|---|---|---|---|---|",
                      *[row(path, base) for path in paths], "", END])


def replaced(text: str, base: Path) -> str:
    "`text` with the table between its marks made anew."
    return re.sub(re.escape(START) + ".*?" + re.escape(END), lambda _: table(base), text, flags=re.DOTALL)


def bring_up_to_date(write: bool = True) -> list[str]:
    "The files whose table differed from the notebooks; rewritten unless `write` is False."
    readme, index, changed = ROOT / "README.md", ROOT / "nbs" / "index.ipynb", []
    text = readme.read_text(encoding="utf-8")
    notebook = json.loads(index.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if START in source and (new := replaced(source, ROOT / "nbs")) != source:
            changed, cell["source"] = ["nbs/index.ipynb"], new.splitlines(keepends=True)
    if write and changed:
        index.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    if (new := replaced(text, ROOT)) != text:
        changed.append("README.md")
        if write:
            readme.write_text(new, encoding="utf-8")
    return changed


if __name__ == "__main__":
    found = bring_up_to_date(write="--check" not in sys.argv)
    print("\n".join(f"{name}: {'differs' if '--check' in sys.argv else 'rewritten'}" for name in found) or "up to date")
    sys.exit(1 if found and "--check" in sys.argv else 0)
