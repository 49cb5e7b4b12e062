"""Intervals of a few seeds, verdicts, and trials that can be stopped."""
import json
import math
import statistics

import pytest

from mllm_nb.evaluation.claims import STUDENT, mean_interval, points, run_trials, verdict
from mllm_nb.mllm import WeightsError


def student_cdf(x: float, freedom: int, steps: int = 4000) -> float:
    "Student's distribution by Simpson's rule."
    def density(t):
        return math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi) * (
            1 + t * t / freedom) ** (-(freedom + 1) / 2)
    h = x / steps
    return .5 + h / 3 * sum((1 if i in (0, steps) else 4 if i % 2 else 2) * density(i * h) for i in range(steps + 1))


def test_factors_are_student_s():
    for count, factor in STUDENT.items():
        assert student_cdf(factor, count - 1) == pytest.approx(.975, abs=1e-4)


def test_interval_by_hand():
    values = [.1, .2, .6]
    mean, low, high = mean_interval(values)
    half = 4.303 * statistics.stdev(values) / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((.3, .3 - half, .3 + half))
    assert mean_interval([1.0, 1.0]) == (1, 1, 1)


@pytest.mark.parametrize("values", ([], [1.0], [1.0] * 11))
def test_counts_without_a_factor_are_refused(values):
    with pytest.raises(ValueError, match=f"found {len(values)}, expected 2 to 10"):
        mean_interval(values)


def test_three_verdicts():
    assert verdict([.10, .11, .12]) == "holds" and verdict([-.10, -.11, -.12]) == "does not hold"
    assert verdict([.1, -.1, 0.]) == "undecided"
    assert points([.10, .11, .12]).split() == ["+11.0", "(+8.5", "to", "+13.5)", "holds"]


def test_a_stopped_run_goes_on(tmp_path, capsys):
    file, calls = tmp_path / "new" / "claims.json", []

    def trial(name, breaks=()):
        def run(seed):
            calls.append((name, seed))
            if (name, seed) in breaks:
                raise KeyboardInterrupt
            return {"share": seed / 4}
        return run

    with pytest.raises(KeyboardInterrupt):
        run_trials(file, (0, 1), {"b": trial("b"), "a": trial("a", {("a", 1)})})
    assert json.loads(file.read_text()) == {"a": {"0": {"share": 0}}, "b": {"0": {"share": 0}, "1": {"share": .25}}}
    calls.clear()
    capsys.readouterr()
    results = run_trials(file, (0, 1), {"b": trial("b"), "a": trial("a")}, lambda found: f"{found['share']:.0%}")
    assert calls == [("a", 1)] and capsys.readouterr().out.startswith("a, seed 1: 25%, ")
    assert results == json.loads(file.read_text()) == run_trials(file, (0, 1), {"a": None, "b": None})


def test_a_torn_file_is_named(tmp_path):
    (tmp_path / "claims.json").write_text('{"a": ')
    with pytest.raises(WeightsError, match="claims.json: cannot be read as JSON"):
        run_trials(tmp_path / "claims.json", (0,), {})
