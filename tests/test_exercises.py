"Exercises: stubs from solutions, checks that never raise, errors that say where."
import json
import runpy

import pytest

from mllm_nb.exercises import ExerciseError, check, main, read_exercises, stub_of, with_solutions, write_stubs


def cells(solution: str, stub: str, checked: str, name: str) -> list[dict]:
    task = f"### Exercise 1: it\n\nDo it.\n\n<details><summary>Solution</summary>\n\n```python\n{solution}\n```\n\nWhy it works.\n\n</details>"
    return [{"cell_type": "markdown", "source": [task], "id": "a", "metadata": {}},
            {"cell_type": "code", "source": [f"#| exercise {name}\n", stub], "id": "b", "metadata": {}, "outputs": []},
            {"cell_type": "code", "source": [f"#| check {name}\n", checked], "id": "c", "metadata": {}, "outputs": []}]


SQUARE = ("def square(x):\n    return x * x", "def square(x):\n    ...  # your turn", "@check\ndef works():\n    assert square(3) == 9", "square")


@pytest.mark.parametrize(("solution", "stub"), [
    ("def f(x: int) -> int:\n    'Doc.'\n    return x", "def f(x: int) -> int:\n    'Doc.'\n    ...  # your turn"),
    ("def f(x,\n      y=1):\n    return x", "def f(x,\n      y=1):\n    ...  # your turn"),
    ("@cache\ndef f():\n    return 1", "@cache\ndef f():\n    ...  # your turn"),
    ("import math\nLIMIT = math.pi", "import math\nLIMIT = ...  # your turn"),
    ("x = 1  # given", "x = 1  # given"),
    ("def helper():  # given\n    return 1\n\ndef f():\n    return helper()",
     "def helper():  # given\n    return 1\n\ndef f():\n    ...  # your turn"),
    ("class A:\n    'Doc.'\n    size: int = 1\n\n    def area(self):\n        return self.size",
     "class A:\n    'Doc.'\n    size: int = 1\n    def area(self):\n        ...  # your turn"),
])
def test_stubs(solution, stub):
    assert stub_of(solution) == stub


def test_a_solution_that_computes_at_top_level_is_refused():
    with pytest.raises(ExerciseError, match="expected a def, class, import or assignment"):
        stub_of("print('hello')")


@pytest.mark.parametrize(("wrong", "said"), [
    (lambda: None, "nothing is returned yet (None)"), (lambda: 5, "AttributeError"),
    (lambda: [][0], "IndexError: list index out of range"),
    (lambda: undefined_name, "NameError"), (lambda: 1 / 0, "ZeroDivisionError"),  # noqa: F821
    (lambda: (_ for _ in ()).throw(RuntimeError("deep")), "RuntimeError: deep"),
])
def test_checks_never_raise(wrong, said, capsys):
    @check
    def it_works():
        assert wrong().shape == (1,)
    assert not it_works.outcome.passed
    printed = capsys.readouterr().out
    assert printed.startswith("✗ not yet: ") and said in printed and printed.count("\n") == 1


def test_a_failed_assertion_shows_the_condition_and_the_learners_value(capsys, tmp_path):
    (tmp_path / "learner.py").write_text("from mllm_nb.exercises import check\n@check\ndef sum_works():\n    total = 2 + 2\n"
                                         "    assert total == 5\n\n@check\ndef text():\n    assert False, 'say why'\n")
    runpy.run_path(str(tmp_path / "learner.py"))  # its own file: pytest rewrites the assertions of this one
    assert capsys.readouterr().out == "✗ not yet: total == 5 (yours: 4)\n✗ not yet: say why\n"


def test_a_passed_check_says_so(capsys):
    check(lambda: None)
    assert capsys.readouterr().out.startswith("✓")


def test_reading():
    (exercise,) = read_exercises(cells(*SQUARE))
    assert (exercise.name, exercise.stub_cell, exercise.check_cell) == ("square", 1, 2)


@pytest.mark.parametrize(("broken", "said"), [
    (cells(*SQUARE)[:1], "expected a code cell '#| exercise"), (cells(*SQUARE)[:2], "expected a code cell '#| check square"),
    (cells(SQUARE[0], SQUARE[1], SQUARE[2], "cube"), "defines no 'cube'"), (cells(*SQUARE)[1:], "0 folded solutions"),
    ([*cells(*SQUARE)[:2], *cells(*SQUARE)], "expected a code cell '#| check square"),
])
def test_a_missing_part_is_named(broken, said):
    with pytest.raises(ExerciseError, match="book.ipynb") as error:
        read_exercises(broken, "book.ipynb")
    assert said in str(error.value)


def test_the_command_rewrites_and_reports_drift(tmp_path, capsys):
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps({"cells": cells(SQUARE[0], "def square(y): ...", *SQUARE[2:])}))
    assert main(["--check", str(path)]) == 1 and "'square' differs" in capsys.readouterr().out
    assert main([str(path)]) == 0 and main(["--check", str(path)]) == 0
    assert "".join(json.loads(path.read_text())["cells"][1]["source"]) == "#| exercise square\n" + SQUARE[1]
    assert write_stubs(path) == []


def run(listed: list[dict]) -> list[bool]:
    "The outcomes of the checks of a notebook, run in one namespace."
    outcomes = []

    def kept(function):
        check(function)
        outcomes.append(function.outcome.passed)
        return function
    space = {"check": kept}
    for cell in listed:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
    return outcomes


def test_one_pass_proves_stub_and_solution():
    assert run(with_solutions(cells(*SQUARE))) == [False, True]
    assert run(cells(*SQUARE)) == [False]


def test_a_check_that_proves_nothing_is_seen():
    weak = cells(SQUARE[0], SQUARE[1], "@check\ndef works():\n    square(3)", "square")
    assert run(with_solutions(weak)) == [True, True]
