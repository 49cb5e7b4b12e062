"The miniature world: the same for the same numbers, held-out combinations new, answers fair, partners right."
import random

import numpy as np
import pytest

from mllm_nb.data.world import (ANNOTATIONS, CATEGORIES, FAMILIES, SIDE, Guesser, Objects, Words, World, annotate, film,
                                held_out_questions, is_held_out, make_picture, said)


def test_the_same_number_gives_the_same_sample():
    one, other = World("held_out", 5)[17], World("held_out", 5)[17]
    assert one.turns == other.turns and one.id == other.id
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(one.images, other.images))


def test_no_combination_of_the_test_occurs_in_training():
    train = {key for i in range(3000) for key in make_picture(i)[0].keys()}
    held = [make_picture(i, "held_out")[0].keys() for i in range(1000)]
    assert not any(map(is_held_out, train))
    assert all(any(map(is_held_out, keys)) for keys in held)
    assert not train & {key for keys in held for key in keys if is_held_out(key)}


def test_every_category_occurs_and_no_blind_guess_is_good():
    asked = [question for _, question in held_out_questions(1500)]
    assert {question.category for question in asked} == set(CATEGORIES)
    guesser = Guesser.fit(World(), 2000)
    assert np.mean([guesser.answer(question) == question.answer for question in asked]) < .3


def test_yes_and_no_are_equally_frequent():
    answers = [q.answer for i in range(3000) for q in World().picture(i)[1] if q.answer in ("yes", "no")]
    assert .45 < answers.count("yes") / len(answers) < .55


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_draws_describes_and_asks(family):
    for seed in range(20):
        picture = family.sample(random.Random(seed))
        image, questions = picture.draw(), picture.questions(random.Random(seed))
        assert questions and all(question.answer and question.options >= 2 for question in questions)
        assert (image is None and family is Words) or image.size == (SIDE, SIDE)
        for (left, top, right, bottom), phrase in picture.regions():
            assert phrase and right > left and bottom > top


def test_the_three_views_tell_of_the_same_picture():
    for i in range(30):
        conversation, caption, text = World().conversation(i), World().caption(i), World().text(i)
        assert [t.text for t in conversation.turns if t.role == "gpt"] == [t.text for t in text.turns if t.role == "gpt"]
        assert len(text.images) == 0 and len(conversation.images) == len(caption.images)


def test_a_description_in_random_order_keeps_every_thing():
    picture = Objects.sample(random.Random(8))
    words = lambda text: sorted(text.rstrip(".").split(", "))
    assert words(said(picture, random.Random(1))) == words(picture.describe())


@pytest.mark.parametrize("task", ANNOTATIONS)
def test_annotations_have_the_size_of_their_picture(task):
    question, answer = annotate(Objects.sample(random.Random(2)), task)
    assert question.size == answer.size and not np.array_equal(np.asarray(question), np.asarray(answer))


def test_films_move_and_unknown_names_are_refused():
    frames = film(random.Random(5), 3)
    assert len(frames) == 3
    with pytest.raises(ValueError, match="expected one of"):
        annotate(Objects.sample(random.Random(0)), "smell")
    with pytest.raises(ValueError, match="held_out"):
        make_picture(0, "test")
    with pytest.raises(IndexError, match="expected 0 to 9"):
        World(length=10).picture(10)
