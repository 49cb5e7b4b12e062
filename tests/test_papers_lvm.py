"LVM: sizes, the export that transformers opens, drawing picture words alone, the shipped pairs and the small model."
import json
import random

import pytest
import torch

from mllm_nb.data.world import ANNOTATIONS
from mllm_nb.drawing.vqgan import load_vqgan
from mllm_nb.language.decoder import Decoder
from mllm_nb.language.generate import Sampling, generate
from mllm_nb.papers import lvm
from mllm_nb.papers.lvm import (
    ARMS, FRAMES, HELD_OUT_PHOTOS, NEXT, SIZES, SIZE_ARMS, WORDS, AnalogyBatches, analogies, digit_picture, digits_of, draw, examine, export_lvm, films_of,
    fingerprint, load_lvm, lvm_config, next_word_loss, pairs_of, parameters_of, photo_crop, power_law, real_of,
    real_sentences, rebuild_lvm,
    run_claims, show_claims, small_config, train_miniature, verdicts)
from mllm_nb.drawing.visual_sentences import Shards
from mllm_nb.samples import digits, photo, samples_path

COUNTS = {"100m": 116_974_720, "300m": 290_968_576, "600m": 648_396_288, "1b": 1_147_119_616, "3b": 3_274_742_400,
          "7b": 6_544_199_680, "13b": 12_773_094_400, "20b": 20_722_710_528, "30b": 32_213_342_720, "debug": 2_451_072}


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_the_published_number_of_parameters(size):
    assert parameters_of(lvm_config(size)) == COUNTS[size]


def test_unknown_size():
    with pytest.raises(ValueError, match="LVM size: found '2b', expected one of 100m"):
        lvm_config("2b")


def small() -> Decoder:
    torch.manual_seed(0)
    return Decoder(small_config(20, width=64, layers=2)).eval()


def test_transformers_opens_the_export(tmp_path):
    from transformers import AutoModelForCausalLM
    ours, ids = small(), torch.randint(0, 20, (1, 12))
    export_lvm(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert (ours(ours.embed(ids)) - theirs(ids).logits).abs().max() < 1e-5
    settings = theirs.generation_config
    assert settings.eos_token_id is None and not settings.top_k
    wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)[0, 12:].tolist()
    assert generate(ours, ids, max_new_tokens=8)[0] == wanted
    assert torch.equal(load_lvm(tmp_path)(ours.embed(ids)), ours(ours.embed(ids)))


def test_only_picture_words_are_drawn():
    decoder = small()
    with torch.no_grad():
        decoder.model.embed_tokens.weight[20:] *= 50          # the special ids would win
    pictures = torch.randint(0, 20, (3, 1, WORDS))
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=0)):
        found = draw(decoder, 20, pictures, sampling)
        assert found.shape == (3, WORDS) and found.max() < 20
    assert max(generate(decoder, torch.tensor([[1, 2]]), max_new_tokens=30)[0]) >= 20
    with pytest.raises(ValueError, match="Sampling.below"):
        Sampling(below=0)


def test_shipped_pairs_belong_to_the_shipped_tokenizer():
    shards, tokenizer = Shards(samples_path("mini", "pairs")), load_vqgan()
    assert shards.fingerprint == fingerprint(tokenizer)
    for split in ("train", "held_out"):
        pairs = pairs_of(split)
        assert set(pairs) == set(ANNOTATIONS) and all(words.shape[1:] == (2, WORDS) for words in pairs.values())
        assert max(words.max().item() for words in pairs.values()) < tokenizer.config.num_embeddings


def test_held_out_photographs_and_digits_never_occur_in_training(monkeypatch):
    seen = {"train": set(), "held_out": set()}
    for split, names in seen.items():
        monkeypatch.setattr(lvm, "whole_photo", lambda name, names=names: names.add(name) or photo(name).convert("RGB"))
        for number in range(60):
            photo_crop(random.Random(number), split)
    assert seen["held_out"] == set(HELD_OUT_PHOTOS) and not seen["held_out"] & seen["train"] and len(seen["train"]) == 8
    images, labels = digits()
    (train, _), (held, held_labels) = digits_of("train"), digits_of("held_out")
    assert len(train) + len(held) == len(images) and set(held_labels.tolist()) == set(range(10))
    twice = {image.tobytes() for image in train} & {image.tobytes() for image in held}
    assert not twice and digit_picture(random.Random(0), "held_out", 3).size == (64, 64)


def test_real_sentences_are_of_both_splits_and_all_kinds():
    found = {split: real_of(split) for split in ("train", "held_out")}
    kinds = {"photo edges", "photo colorization", "photo inpainting", "photo rotation", "digit edges", "digit inpainting",
             "digit rotation", "same digit"}
    assert all(set(blocks) == kinds for blocks in found.values())
    for kind in kinds:
        assert found["train"][kind].shape[1:] == (8 if kind == "same digit" else 2, WORDS)
    drawn = list(real_sentences("held_out", 2))
    again = list(real_sentences("held_out", 2))
    assert all(a[1][0].tobytes() == b[1][0].tobytes() for a, b in zip(drawn, again)) and len(drawn) == 16


def test_rare_tasks_come_half_as_often():
    pairs = {name: torch.full((4, 2, WORDS), number) for number, name in enumerate(("a", "b", "c"))}
    drawn = [task for (task, _), _ in zip(analogies(pairs, 2, 0, rare=("c",)), range(3000))]
    assert abs(drawn.count("c") / 3000 - .2) < .03 and abs(drawn.count("a") / 3000 - .4) < .03


def test_sentences_are_of_one_task():
    pairs = pairs_of("held_out")
    for (task, words), _ in zip(analogies(pairs, 3, seed=0), range(20)):
        known = {pair.tobytes() for pair in pairs[task].numpy()}
        assert words.shape == (6, WORDS) and all(pair.numpy().tobytes() in known for pair in words.unflatten(0, (3, 2)))


def test_batches_are_reproducible_and_padding_teaches_nothing():
    pairs = pairs_of("held_out")
    one, other = (next(iter(AnalogyBatches(pairs, 512, rows=2, seed=4))) for _ in range(2))
    assert torch.equal(one.tokens, other.tokens) and one.tokens.shape == (2, 6 * WORDS + 2)
    decoder = Decoder(small_config(512, width=64, layers=1))
    assert next_word_loss(decoder, one).tokens == 2 * (6 * WORDS + 1)


def test_a_few_steps_teach_and_are_examined(tmp_path):
    trained = train_miniature(tmp_path, steps=6, width=64, layers=1, progress=False)
    losses = trained.histories["analogies"].losses
    assert losses[-1] < losses[0]
    facts = examine(trained, {"edges": pairs_of("held_out")["edges"]}, each=2)["edges"]
    assert set(facts) == {"drawn", "copy question", "copy last answer", "perplexity"}
    assert json.dumps(facts) and facts["perplexity"] > 1


def test_films_are_of_the_shipped_tokenizer_and_go_on():
    films = films_of("held_out")
    assert films.shape[1:] == (FRAMES, WORDS) and films.max() < 512 and len(films_of("train")) > len(films)
    task, words = next(analogies({NEXT: films}, 4, seed=0))
    assert task == NEXT and any(torch.equal(words, film) for film in films)
    first, later = (films[:, 0] == films[:, 1]).float().mean(), (films[:, 0] == films[:, 1].roll(1, 0)).float().mean()
    assert first > later + .1                       # neighbours in time are more alike than strangers


def test_the_shipped_small_lvm_writes_and_knows_its_tasks():
    from mllm_nb.evaluation.visual import word_losses
    decoder, codes = load_lvm(samples_path("mini", "lvm")), load_vqgan().config.num_embeddings
    assert decoder.config.vocab_size == codes + 3
    words = pairs_of("held_out")["segmentation"][:8].reshape(2, 8, WORDS)
    losses = word_losses(decoder, words, codes + 1)
    assert losses.mean() < 3.5 and losses[:, 1::2].mean() < losses[:, ::2].mean()   # answers are easier than questions


def test_power_law():
    factor, exponent = power_law([1e4, 1e5, 1e6], [8 * size ** -.1 for size in (1e4, 1e5, 1e6)])
    assert abs(factor - 8) < 1e-6 and abs(exponent - .1) < 1e-9


def facts(loss: float, parameters: int, error: float, late: float) -> dict:
    task = {"perplexity": 9.0, "error": error, "best": error, "copy_question": 2.0, "copy_last_answer": 1.0,
            "shots": [5.0 if late < 4 else 3.9, 4.0, 3.9, late]}
    return {"parameters": parameters, "loss": loss, "seconds": 1.0, "tasks": {"depth": task, "edges": task}}


def test_verdicts_are_positive_where_claims_hold(capsys):
    sizes = {name: {seed: facts(4 - .2 * n, 10 ** (4 + n), .5, 3.5) for seed in "01"} for n, name in enumerate(SIZE_ARMS)}
    good = sizes | {"one task": {seed: facts(4, 1, .5, 3.6) for seed in "01"}, "mixed tasks": {seed: facts(4, 1, .5, 3.1) for seed in "012"}}
    found = verdicts(good)
    assert all(len(values) == 2 and min(values) > 0 for values in found.values())
    bad = {name: {seed: facts(4, 10 ** (4 + n), 1.5, 4.5) for seed in "01"} for n, name in enumerate(ARMS)}
    assert all(max(values) <= 1e-9 for values in verdicts(bad).values())
    show_claims(good)
    assert capsys.readouterr().out.count("holds") == 4


def test_claims_are_resumed(tmp_path, capsys):
    arms = {"small": {"width": 32, "layers": 1, "films": True, "rows": 1, "shots": 4}}
    first = run_claims(tmp_path, (0,), arms, steps=2, each=1)
    assert set(first["small"]["0"]["tasks"]) == {*ANNOTATIONS, NEXT} and first["small"]["0"]["parameters"] == 53_344
    capsys.readouterr()
    assert run_claims(tmp_path, (0,), arms, steps=2, each=1) == first and capsys.readouterr().out == ""


def test_the_small_lvm_is_rebuilt(tmp_path):
    rebuild_lvm(tmp_path / "run", tmp_path / "part", steps=2)
    assert load_lvm(tmp_path / "part").config.num_hidden_layers == 3
