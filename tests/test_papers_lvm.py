"LVM: sizes, the export that transformers opens, drawing picture words alone, the shipped pairs and the small model."
import json

import pytest
import torch

from mllm_nb.data.world import ANNOTATIONS
from mllm_nb.drawing.vqgan import load_vqgan
from mllm_nb.language.decoder import Decoder
from mllm_nb.language.generate import Sampling, generate
from mllm_nb.papers.lvm import (
    SIZES, WORDS, AnalogyBatches, analogies, draw, examine, export_lvm, fingerprint, load_lvm, lvm_config, next_word_loss,
    pairs_of, parameters_of, small_config, train_miniature)
from mllm_nb.drawing.visual_sentences import Shards
from mllm_nb.samples import samples_path

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
