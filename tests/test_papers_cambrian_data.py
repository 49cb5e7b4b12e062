"Cambrian's claims about data: the pile and its mixtures, the fair examination, trials that resume, requests behind short answers."
import json
import math
from collections import Counter
from functools import partial

import pytest
import torch
from mllm_nb.data.records import Records
from mllm_nb.data.world import CATEGORIES, World
from mllm_nb.papers.cambrian_data import (
    ASKED_BY, MIXTURES, PILE, RATES, REQUEST, SENTENCE, SWEEP, TRIALS, Mixed, MixedLesson, PlanLesson, best_rate, category_mean,
    every_token_loss, fair_questions, mix, mixture_trial, rate_powers, rate_trial, rows_of, run_claims, text_rows, tiny_decoder, verdicts, write_pile)
from mllm_nb.training.miniatures import TUNE, load_tokenizer, miniature_processor
from mllm_nb.training.recipes import square_root_rule

SMALL = {"general": 24, "ocr": 6, "counting": 4, "language": 4, "math": 3, "code": 2, "science": 2}


def test_the_pile_asks_about_one_category_at_a_time_and_from_the_training_split(tmp_path):
    sources = write_pile(tmp_path, 0, SMALL)
    assert {source.category: len(Records(tmp_path / source.file)) for source in sources} == SMALL and set(PILE) == set(ASKED_BY) == set(CATEGORIES)
    questions = {category: {question.text for index in range(800) for question in World(seed=7).picture(index)[1] if question.category == category}
                 for category in ("math", "code")}
    for category, others in (("math", "code"), ("code", "math")):
        asked = {turn.text.removeprefix("<image>\n") for sample in Records(tmp_path / category / "records.jsonl") for turn in sample.turns if turn.role == "human"}
        assert asked and not asked & questions[others]
    before = (tmp_path / "general" / "records.jsonl").stat().st_mtime_ns
    write_pile(tmp_path, 0, SMALL)
    assert (tmp_path / "general" / "records.jsonl").stat().st_mtime_ns == before
    write_pile(tmp_path / "other", 1, SMALL)
    assert (tmp_path / "general" / "records.jsonl").read_bytes() != (tmp_path / "other" / "general" / "records.jsonl").read_bytes()


def test_mixtures_take_what_they_say(tmp_path):
    raw, capped, balanced = (mix(tmp_path, 0, sizes=SMALL, **how | ({"threshold": 5} if how else {})) for how in MIXTURES.values())
    taken = [Counter(sample.id.split("/")[0] for sample in plan) for plan in (raw, capped, balanced)]
    assert taken[0] == SMALL and taken[1] == {name: min(5, count) for name, count in SMALL.items()} and set(taken[2].values()) == {2}
    assert [sample.id for sample in mix(tmp_path, 0, sizes=SMALL)] == [sample.id for sample in raw]


def test_the_examination_is_fair_and_held_out():
    found = fair_questions(miniature_processor(load_tokenizer()), 5)
    assert Counter(question.category for question in found.questions) == dict.fromkeys(CATEGORIES, 5)
    assert all(sample.id.startswith("held_out") and sample.turns[1].text == question.answer for sample, question in zip(found.samples, found.questions))
    assert all(not sample.images for sample, question in zip(found.samples, found.questions) if question.category == "language")


def test_a_plan_shorter_than_the_lesson_comes_again():
    lesson = PlanLesson(**vars(TUNE), plan="abc")
    assert list(lesson.world(7)) == list("abcabca")


def test_a_mixture_is_trained_on_and_its_first_lesson_given_once(tmp_path):
    first, again = (mixture_trial(tmp_path, 0, align_steps=1, tune_steps=1, each=1, sizes=SMALL, threshold=5) for _ in range(2))
    assert first == again and first["records"] == 25 and set(first["accuracy"]) == set(CATEGORIES)
    assert len(list((tmp_path / "aligned_0" / "checkpoints").iterdir())) >= 1


def test_every_token_loss_is_that_of_the_texts_one_by_one():
    torch.manual_seed(0)
    decoder, rows = tiny_decoder(32, 1), text_rows(3, 4)
    total, count = 0.0, 0
    for row in range(4):
        for segment in range(1, int(rows.segments[row].max()) + 1):
            ids = rows.input_ids[row][rows.segments[row] == segment][None]
            scores = decoder(decoder.embed(ids))[0, :-1]
            total += torch.nn.functional.cross_entropy(scores, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    found = every_token_loss(decoder, rows)
    assert int(found.tokens) == count and found.loss.item() == pytest.approx(total / count, rel=1e-5)
    parts = [every_token_loss(decoder, rows_of(rows, at, at + 1)) for at in range(4)]
    assert sum(part.loss.item() * int(part.tokens) for part in parts) == pytest.approx(total, rel=1e-5)


def test_a_trial_learns_and_repeats_itself(tmp_path):
    slow, fast = (rate_trial(tmp_path, 0, 8, rate, total=96) for rate in (1e-6, 1e-2))
    assert fast < slow - 1 and rate_trial(tmp_path, 0, 8, 1e-2, total=96) == fast


@pytest.mark.parametrize("power", [0.0, 0.12, 0.2])
def test_the_power_of_the_rule_is_found(power):
    def loss(rows: int, rate: float, seed: int) -> float:
        best = square_root_rule(7e-3, 4, rows) * (rows / 4) ** (power - .5)
        return seed + rows + 3 * math.log(rate / best) ** 2
    results = {name: {str(seed): loss(rows, rate, seed) for seed in range(2)} for name, (rows, rate) in RATES.items()}
    assert rate_powers(results) == pytest.approx([power, power]) and set(SWEEP) == {4, 16, 64}
    assert best_rate({1.0: 5.0, 2.0: 4.0, 4.0: 5.0}) == pytest.approx(2)
    with pytest.raises(ValueError, match="at an end"):
        best_rate({1.0: 1.0, 2.0: 2.0, 4.0: 3.0})


def test_trials_resume_and_are_not_repeated(tmp_path, capsys):
    trials = {"batch 8": partial(rate_trial, rows=8, rate=1e-2, total=16)}
    first = run_claims(tmp_path, (0,), trials)
    assert json.loads((tmp_path / "cambrian_data_claims.json").read_text()) == first and "nats" in capsys.readouterr().out

    def never(*_, **__):
        raise AssertionError("was there already")
    assert run_claims(tmp_path, (0,), {"batch 8": never}) == first and capsys.readouterr().out == ""
    assert set(MIXTURES) | set(RATES) == set(TRIALS)


def test_verdicts_compare_seed_by_seed():
    results = {"a": {"0": {"accuracy": {"x": .5, "y": .7}}, "1": {"accuracy": {"x": .6, "y": .8}}}, "b": {"0": {"accuracy": {"x": .4}}, "1": {"accuracy": {"x": .5}}, "2": {}}}
    assert category_mean(results["a"]["0"]) == pytest.approx(.6)
    mean, low, high = verdicts(results, "a", "b")
    assert mean == pytest.approx(.2) and low == pytest.approx(high)


def test_requests_stand_behind_short_answers_alone():
    world = World(length=60, questions=2)
    for asking in (False, True):
        for i, sample in enumerate(Mixed(world, asking)):
            question, answer = sample.turns[:2]
            sentence, plain = answer.text.startswith(SENTENCE[:14]), world[i].turns[1].text
            assert answer.text == (SENTENCE.format(plain) if sentence else plain)
            assert question.text.endswith(REQUEST.short) == (asking and not sentence and len(plain.split()) <= 3)
    lesson = MixedLesson(**vars(TUNE), asking=True)
    assert lesson.world(10).asking and len(lesson.world(10)) == 10
