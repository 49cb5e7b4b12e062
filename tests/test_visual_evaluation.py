"Judging a model that draws: losses, published perplexity and error, curves, and the whole examination of a task."
import math

import pytest
import torch

from conftest import decided_decoder
from mllm_nb.drawing.vqgan import VQGAN, VQGANConfig
from mllm_nb.evaluation.metrics import perplexity
from mllm_nb.evaluation.visual import (
    candidate_errors, draw_candidates, examine_task, in_context_gain, place_curve, same_answer_curve, shot_curve,
    show_table, target_perplexity, word_losses)
from mllm_nb.language.decoder import Decoder
from mllm_nb.language.generate import Sampling

CODES, WORDS = 16, 4


def decoder(**changes) -> Decoder:
    return decided_decoder(**{"vocab_size": 19, "hidden_size": 32, "intermediate_size": 48} | changes)


def tokenizer() -> VQGAN:
    torch.manual_seed(1)
    model = VQGAN(VQGANConfig(resolution=4, hidden_channels=8, channel_mult=(1, 2), num_res_blocks=1, z_channels=4,
                              num_embeddings=CODES, quantized_embed_dim=4, norm_groups=4)).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


def sentences(examples: int = 5, pictures: int = 6) -> torch.Tensor:
    return torch.randint(0, CODES, (examples, pictures, WORDS), generator=torch.Generator().manual_seed(0))


class Copies(torch.nn.Module):
    "A decoder that is nearly sure that each word is the one a picture (or two) before it."
    def __init__(self, back: int):
        super().__init__()
        self.back = back

    def embed(self, ids):
        return torch.nn.functional.one_hot(ids, 19).float()

    def hidden(self, embeddings, *_, **__):
        ahead = torch.nn.functional.pad(embeddings, (0, 0, self.back - 1, 0))[:, :embeddings.shape[1]]
        return ahead

    def logits(self, hidden):
        return 20 * hidden


@torch.no_grad()
def test_losses_are_those_of_each_prefix():
    model, given = decoder(), sentences(2, 3)
    losses = word_losses(model, given, begin=17)
    ids = torch.cat([torch.full((2, 1), 17), given.flatten(1)], 1)
    for place in range(12):
        scores = model(model.embed(ids[:, :place + 1]))[:, -1].log_softmax(-1)
        assert torch.allclose(losses.flatten(1)[:, place], -scores.gather(1, ids[:, place + 1:place + 2])[:, 0], atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_rows_at_once_change_nothing(rows):
    assert torch.allclose(word_losses(decoder(), sentences(), 17, rows), word_losses(decoder(), sentences(), 17), atol=1e-5)


@torch.no_grad()
def test_perplexity_is_the_published_one():
    model, given = decoder(), sentences()
    flat = given.flatten(1)
    published = perplexity(model(model.embed(flat)), flat, context=5 * WORDS)
    found = target_perplexity(word_losses(model, given))
    assert torch.allclose(found, published, rtol=1e-4) and found.mean() >= word_losses(model, given)[:, -1].mean().exp()


def test_without_a_begin_the_first_word_has_no_loss():
    losses = word_losses(decoder(), sentences(3))
    assert losses.isnan().sum() == 3 and losses[:, 0, 0].isnan().all()


def test_curves():
    losses = torch.arange(12.0).reshape(1, 6, 2)
    assert place_curve(losses).tolist() == [10, 11] and place_curve(losses, 0).tolist() == [0, 1]
    assert shot_curve(losses).tolist() == [2.5, 6.5, 10.5] and in_context_gain(shot_curve(losses)).tolist() == [0, -4, -8]
    with pytest.raises(ValueError, match="found 5 pictures, expected pairs"):
        shot_curve(torch.zeros(1, 5, 2))


def test_a_model_that_copies_gains_from_examples():
    "Sentences whose answers are all alike: sure from the second answer on."
    given, model = sentences(8, 2).repeat(1, 3, 1), Copies(2 * WORDS)
    for curve in (shot_curve(word_losses(model, given, begin=17)), same_answer_curve(model, given, 17)):
        gain = in_context_gain(curve)
        assert gain[0] == 0 and gain[1] > 2 and abs(gain[1] - gain[2]) < .5
    last = word_losses(model, given, 17)[:, -1].mean()
    assert torch.isclose(same_answer_curve(model, given, 17)[-1], last)


def test_errors_are_summed_over_channels_and_kept_apart():
    true, painted = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 3, 4, 4)
    painted[1, 2, 0] = 1.0                                   # one channel of one candidate
    assert candidate_errors(painted, true).tolist() == [[0, 0, 0], [0, 0, 1]]


def test_candidates_stay_with_their_prompt_and_in_the_codebook():
    model, given = decoder(), sentences(3)
    greedy = draw_candidates(model, given, CODES, 17, candidates=2, sampling=Sampling())
    assert greedy.shape == (3, 2, WORDS) and torch.equal(greedy[:, 0], greedy[:, 1]) and greedy.max() < CODES
    alone = torch.cat([draw_candidates(model, one[None], CODES, 17, sampling=Sampling()) for one in given])
    assert torch.equal(alone[:, 0], greedy[:, 0])
    bold = draw_candidates(model, given, CODES, 17, candidates=4, sampling=Sampling(2.0, seed=0))
    assert len({tuple(row) for row in bold[0].tolist()}) > 1 and bold.max() < CODES


def test_a_whole_examination(capsys):
    given = sentences(4)
    found = examine_task(decoder(), tokenizer(), given, 17, candidates=3, sampling=Sampling(1.0, seed=0))
    assert found.perplexity > 1 and 0 < found.best <= found.error and len(found.shots) == 3
    same = given.clone()
    same[:, -1] = same[:, -2]                                 # the answer is the question
    assert examine_task(decoder(), tokenizer(), same, 17).copy_question == 0
    same[:, -3] = same[:, -1]
    assert examine_task(decoder(), tokenizer(), same, 17).copy_last_answer == 0
    assert not examine_task(decoder(), tokenizer(), same, 17).learned
    show_table({"edges": found})
    assert "copy question" in capsys.readouterr().out and math.isfinite(found.error)
