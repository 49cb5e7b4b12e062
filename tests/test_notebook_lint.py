"The anatomy of every notebook, and that each rule finds what it is there for."
import json
import re
from pathlib import Path

import notebook_lint as lint
import pytest
from book_table import bring_up_to_date
from run_notebooks import ROOT, notebooks

from mllm_nb.exercises import write_stubs

NAMES = [path.relative_to(ROOT).as_posix() for path in notebooks()]


@pytest.mark.parametrize("name", NAMES)
def test_notebook_keeps_to_the_anatomy(name):
    assert not lint.problems(lint.read(ROOT / name))


@pytest.mark.parametrize("name", NAMES)
def test_stubs_are_made_from_their_solutions(name):
    assert write_stubs(ROOT / name, write=False) == [], "run: python -m mllm_nb.exercises"


def test_the_tables_of_the_book_list_every_notebook():
    assert bring_up_to_date(write=False) == [], "run: make export"


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [target.split("#")[0] for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)]
    assert len(targets) > 5 and not [target for target in targets if not (ROOT / target).exists()]


def test_the_readme_begins_with_the_two_commands():
    head = (ROOT / "README.md").read_text(encoding="utf-8")[:700]
    assert -1 < head.index("make tour") < head.index("make test")


def notebook(*cells: tuple[str, str], outputs: list | None = None, **metadata) -> lint.Notebook:
    "A notebook in memory from (kind, source) pairs; `outputs` go to its last code cell."
    made = [{"cell_type": "markdown" if kind == "md" else "code", "source": source, "metadata": {},
             **({} if kind == "md" else {"outputs": [], "execution_count": None})} for kind, source in cells]
    if outputs:
        made[-1]["outputs"] = outputs
    return lint.Notebook(Path("nbs/1_see/9_made_up.ipynb"), {"cells": made, "metadata": metadata})


HEAD = ("md", "# Title\n\n> A promise.\n\n" + lint.HEADER + "\n|---|---|---|---|\n| 1 | 100 MB | nothing | none |")
STREAM = {"output_type": "stream", "name": "stdout", "text": "x"}


def found(rule, made: lint.Notebook) -> str:
    return "; ".join(rule(made))


@pytest.mark.parametrize(("rule", "cells", "outputs", "expected"), [
    (lint.title_and_promise, [("md", "Title")], None, "# Title"),
    (lint.title_and_promise, [("md", "# Title\n\nno promise")], None, "one-line promise"),
    (lint.badge, [HEAD], None, "expected one Colab badge"),
    (lint.header_table, [("md", "# T\n> p.")], None, "expected the table"),
    (lint.header_table, [("md", HEAD[1].replace("100 MB", "little"))], None, "as numbers"),
    (lint.setup_cell, [HEAD, ("code", "import torch")], None, "differs from"),
    (lint.stored_state, [("code", "1/0")], [{"output_type": "error", "ename": "ZeroDivisionError"}], "an error is stored"),
    (lint.stored_state, [("code", "f()")], [{**STREAM, "name": "stderr"}], "stderr is stored"),
    (lint.was_run, [("code", "f()")], None, "no outputs"),
    (lint.size, [("code", "f()")], [{**STREAM, "text": "x" * 1_600_000}], "at most 1.5 MB"),
    (lint.enough_prose, [HEAD, ("md", "short")], None, "5 characters"),
    (lint.enough_prose, [HEAD, ("md", "word " * 131)], None, "131 words"),
    (lint.pictures, [HEAD], None, "0 pictures"),
    (lint.exercises, [HEAD, ("code", "#| exercise one\n...")], None, "1 exercises, at least 3"),
    (lint.cell_lengths, [("code", "x = 1\n" * 31)], None, "31 lines"),
    (lint.cell_lengths, [("code", "x" * 121)], None, "121 characters"),
    (lint.forbidden_code, [("code", "model.cuda()")], None, "device by name"),
    (lint.forbidden_code, [("code", "from torch import *")], None, "import *"),
    (lint.forbidden_code, [("code", "try:\n    f()\nexcept:\n    pass")], None, "bare except"),
    (lint.merge_markers, [("md", "<<<<<<< HEAD")], None, "merge marker"),
    (lint.machine_paths, [("code", "f()")], [{**STREAM, "text": "saved to /home/someone/x"}], "path of one machine"),
    (lint.links, [("md", "[there](nowhere.ipynb)")], None, "leads nowhere"),
])
def test_rule_finds(rule, cells, outputs, expected):
    assert expected in found(rule, notebook(*cells, outputs=outputs))


def test_widget_state_is_found():
    assert "widget state" in found(lint.stored_state, notebook(HEAD, widgets={"state": {}}))


def test_rules_leave_good_cells_alone():
    good = notebook(HEAD, ("md", "See [samples](../appendix/samples.ipynb#digits), [a page](https://example.org/home/x)."),
                    ("code", "from torch import nn\nmodel.to(device)"), outputs=[{**STREAM, "text": "runs/tour/report.html"}])
    for rule in (lint.title_and_promise, lint.header_table, lint.stored_state, lint.was_run, lint.size,
                 lint.cell_lengths, lint.forbidden_code, lint.merge_markers, lint.machine_paths, lint.links):
        assert found(rule, good) == "", rule.__name__


def test_an_exported_class_may_be_longer():
    long_class = "#| export\nclass Long:\n" + "    x = 1\n" * 50
    assert found(lint.cell_lengths, notebook(("code", long_class))) == ""
    assert found(lint.cell_lengths, notebook(("code", long_class.removeprefix("#| export\n")))) != ""


def test_the_command_prints_problems(tmp_path, capsys, monkeypatch):
    (tmp_path / "nbs").mkdir()
    path = tmp_path / "nbs" / "bad.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": "no title"}], "metadata": {}}))
    monkeypatch.setattr(lint, "ROOT", tmp_path)
    assert lint.main([str(path)]) == 1
    assert "title_and_promise" in capsys.readouterr().out
