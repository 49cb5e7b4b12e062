"Generation against transformers, batches against single rows, the packed way against the plain one."
import gc
import weakref

import pytest
import torch
import transformers
from torch import nn
from transformers.generation.logits_process import (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)

from mllm_nb.language.decoder import Decoder, DecoderConfig, TransformersDecoder, load_transformers_state
from test_decoder import LONG
from mllm_nb.language.generate import (PackedDecoder, Panels, Sampling, choose, generate, next_token_probabilities,
                                       panel_product, why_not_packed)

COMMON = dict(vocab_size=97, hidden_size=64, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
              bos_token_id=1, eos_token_id=None, pad_token_id=0, attn_implementation="eager")
FAMILIES = {
    "llama": {}, "mistral": dict(num_key_value_heads=2, sliding_window=7),
    "qwen2": dict(num_key_value_heads=2, tie_word_embeddings=True), "gemma": dict(num_key_value_heads=2, head_dim=16),
    "phi3": dict(num_key_value_heads=2), "mixtral": dict(num_local_experts=4, num_key_value_heads=2),
}


def theirs(name: str):
    if name == "mpt":
        config = transformers.MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=97, max_seq_len=64)
    else:
        config = transformers.AutoConfig.for_model(name, **COMMON | FAMILIES[name])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model


def ours(model) -> Decoder:
    decoder = Decoder(DecoderConfig.from_transformers(model.config.to_dict())).eval()
    load_transformers_state(decoder, model.state_dict())
    return decoder


def prompts():
    torch.manual_seed(1)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, :4] = mask[2, :9] = False
    return torch.randint(3, 97, (3, 12)), mask


def small(**settings) -> Decoder:
    torch.manual_seed(2)
    decoder = Decoder(DecoderConfig(61, 64, 88, 2, 4, 2, **settings)).eval()
    for parameter in decoder.parameters():
        parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return decoder


@pytest.mark.parametrize("name", [*FAMILIES, "mpt"])
def test_the_same_tokens_as_transformers(name):
    model, (ids, mask) = theirs(name), prompts()
    expected = model.generate(ids, attention_mask=mask.long(), max_new_tokens=16, do_sample=False, pad_token_id=0,
                              eos_token_id=None)[:, 12:].tolist()
    assert generate(TransformersDecoder(model), ids, mask=mask, max_new_tokens=16) == expected
    if name == "mpt":
        return
    decoder = ours(model)
    assert generate(decoder, ids, mask=mask, max_new_tokens=16) == expected
    for row in range(3):   # alone, without its padding, and packed with it
        alone = ids[row:row + 1, mask[row]]
        assert generate(decoder, alone, max_new_tokens=16, pack=False) == [expected[row]]
        if name != "mixtral":
            assert generate(decoder, ids[row:row + 1], mask=mask[row:row + 1], max_new_tokens=16, pack=True) == [expected[row]]


@pytest.mark.parametrize("settings", [
    {}, dict(sliding_window=5), dict(attention_bias=True, attention_output_bias=True), dict(tie_word_embeddings=True),
    dict(norm_offset=1.0, embedding_scale=True, hidden_act="gelu_pytorch_tanh"), dict(rope_theta=1e6, head_dim=32),
])
@torch.inference_mode()
def test_packed_scores_equal_plain_scores(settings):
    decoder = small(**settings)
    ids = torch.randint(0, 61, (1, 24))
    packed, cache, plain = PackedDecoder(decoder), decoder.new_cache(1, 24), decoder.new_cache(1, 24)
    for kept in (cache, plain):
        decoder.hidden(decoder.embed(ids[:, :9]), cache=kept)
    for token in ids[0, 9:]:
        expected = decoder(decoder.embed(token[None, None]), cache=plain)[0, 0]
        assert torch.allclose(packed.step(int(token), cache), expected, atol=1e-4 * expected.abs().max())
    assert cache.filled == plain.filled == 24


@pytest.mark.parametrize("outputs, inputs", [(32, 5), (64, 640), (61, 7), (1, 3)])
def test_panels(outputs, inputs):
    weight, other, vector = (torch.randn(shape) / inputs for shape in ((outputs, inputs), (40, inputs), (inputs,)))
    whole = -(-outputs // 32) * 32
    panels = Panels((whole + 64) * inputs).add(weight, other, per_input=torch.arange(inputs).float())
    product = panel_product(vector, panels)
    assert torch.allclose(product[:outputs], weight @ (vector * torch.arange(inputs)), atol=1e-3)
    assert torch.allclose(product[whole:whole + 40], other @ (vector * torch.arange(inputs)), atol=1e-3)
    assert product[outputs:whole].abs().sum() == 0 == product[whole + 40:].abs().sum()


def test_embeddings_as_prompt():
    decoder, (ids, mask) = small(), prompts()
    ids = ids % 61
    embeddings = decoder.embed(ids)
    assert generate(decoder, embeddings=embeddings, mask=mask, max_new_tokens=9) == generate(decoder, ids, mask=mask, max_new_tokens=9)
    image = embeddings[:1].clone()
    image[:, 3:7] = torch.randn(1, 4, 64) * 0.2
    plain, packed = (generate(decoder, embeddings=image, max_new_tokens=20, pack=pack) for pack in (False, True))
    assert plain == packed


def test_stop_tokens_end_each_row_alone():
    decoder, (ids, mask) = small(), prompts()
    free = generate(decoder, ids % 61, mask=mask, max_new_tokens=16)
    stops = {free[0][3], free[1][6]}
    stopped = generate(decoder, ids % 61, mask=mask, max_new_tokens=16, stop_ids=stops)
    for row, answer in zip(free, stopped):
        end = next((place + 1 for place, token in enumerate(row) if token in stops), 16)
        assert answer == row[:end]
    assert len({len(row) for row in stopped}) > 1


@pytest.mark.parametrize("pack", [False, True])
def test_no_step_too_many(pack, monkeypatch):
    decoder, calls = small(), []
    owner, name = (PackedDecoder, "step") if pack else (Decoder, "forward")
    inner = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs))
    ids = torch.randint(0, 61, (1, 8))
    tokens = generate(decoder, ids, max_new_tokens=5, pack=pack)[0]
    assert len(tokens) == 5 and len(calls) == 4   # the first token comes from the prefill
    calls.clear()
    generate(decoder, ids, max_new_tokens=5, stop_ids=[tokens[2]], pack=pack)
    assert len(calls) == tokens.index(tokens[2])


def test_streaming():
    decoder, (ids, mask) = small(), prompts()
    seen = {0: [], 1: [], 2: []}

    def listen(row: int, token: int) -> bool | None:
        seen[row].append(token)
        return row == 1 and len(seen[row]) == 4

    rows = generate(decoder, ids % 61, mask=mask, max_new_tokens=10, streamer=listen)
    assert rows == list(seen.values()) and [len(row) for row in rows] == [10, 4, 10]


@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(1.3, top_k=5), Sampling(1, top_p=0.6), Sampling(2, 20, 0.8)])
def test_probabilities_equal_transformers(sampling):
    torch.manual_seed(0)
    logits = torch.randn(6, 50) * 3
    expected = TemperatureLogitsWarper(float(sampling.temperature))(None, logits)
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p:
        expected = TopPLogitsWarper(sampling.top_p)(None, expected)
    assert torch.allclose(next_token_probabilities(logits, sampling), expected.softmax(-1), atol=1e-6)


@pytest.mark.parametrize("scale, p", [(1.0, 0.999), (8.0, 0.999), (8.0, 0.5), (0.01, 0.9), (3.0, 1.0)])
def test_top_p_keeps_the_tokens_that_transformers_keeps(scale, p):
    torch.manual_seed(0)
    logits = scale * torch.randn(4, 20_000)
    expected = TopPLogitsWarper(p)(None, logits - logits.amax(1, keepdim=True)) if p < 1 else logits
    found = next_token_probabilities(logits, Sampling(1, top_p=p))
    assert torch.equal(found > 0, expected.softmax(-1) > 0)
    if p == 1:
        assert (found > 0).all()     # none is lost although 20,000 small numbers have been summed


def test_the_best_token_always_stays():
    logits = torch.tensor([[0.0, 50.0, 0.0]])
    for sampling in (Sampling(1, top_p=0.01), Sampling(1, top_k=1), Sampling(1, top_k=100)):
        assert next_token_probabilities(logits, sampling).argmax() == 1
    assert next_token_probabilities(logits, Sampling(1, top_p=1.0)).sum() == 1


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20000, -1)
    drawn = choose(logits, Sampling(1), torch.Generator().manual_seed(0)).bincount(minlength=4) / 20000
    assert torch.allclose(drawn, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.01)
    cut = choose(logits, Sampling(1, top_p=0.7), torch.Generator().manual_seed(0)).bincount(minlength=4) / 20000
    assert torch.allclose(cut, torch.tensor([0.625, 0.375, 0, 0]), atol=0.01)


def test_seeds():
    decoder, (ids, mask) = small(), prompts()
    draw = lambda seed: generate(decoder, ids % 61, mask=mask, max_new_tokens=12, sampling=Sampling(1.5, seed=seed))
    assert draw(1) == draw(1) != draw(2)
    state = torch.get_rng_state()
    draw(3)
    assert torch.equal(state, torch.get_rng_state())   # a seed of one's own leaves the global generator alone
    torch.manual_seed(5)
    first = draw(None)
    torch.manual_seed(5)
    assert draw(None) == first


@pytest.mark.parametrize("settings, message", [
    (dict(temperature=-1), "temperature: found -1"), (dict(top_k=0), "top_k: found 0"), (dict(top_p=0), "top_p: found 0"),
    (dict(top_p=1.5), "top_p: found 1.5"),
])
def test_bad_sampling(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_bad_prompts():
    decoder, (ids, mask) = small(), prompts()
    ids = ids % 61
    for arguments in ({}, {"input_ids": ids, "embeddings": decoder.embed(ids)}):
        with pytest.raises(ValueError, match="either input_ids or embeddings"):
            generate(decoder, **arguments)
    with pytest.raises(ValueError, match="mask, row 1: found padding behind a token, expected padding on the left only"):
        generate(decoder, ids, mask=mask.flip(1))
    with pytest.raises(ValueError, match="mask, row 2: found padding alone"):
        generate(decoder, ids, mask=torch.tensor([[True], [True], [False]]).expand(3, 12))
    with pytest.raises(ValueError, match=r"mask: found shape \(3, 11\), expected \(3, 12\)"):
        generate(decoder, ids, mask=mask[:, 1:])
    with pytest.raises(ValueError, match="pack: found 3 rows, expected one"):
        generate(decoder, ids, mask=mask, pack=True)
    assert generate(decoder, ids, mask=mask.long(), max_new_tokens=3) == generate(decoder, ids, mask=mask, max_new_tokens=3)


def test_changed_weights_are_noticed():
    decoder, ids = small(), torch.randint(0, 61, (1, 8))
    packed = PackedDecoder(decoder)
    assert generate(packed, ids, max_new_tokens=30) == generate(decoder, ids, max_new_tokens=30)
    with torch.no_grad():
        decoder.model.norm.weight += 1
    with pytest.raises(RuntimeError, match="weights have changed since it was packed"):
        generate(packed, ids)
    plain = generate(decoder, ids, max_new_tokens=30, pack=False)
    assert generate(decoder, ids, max_new_tokens=30) == plain   # by itself it packs again
    decoder.model.layers[0].mlp.down_proj.weight.data.mul_(-2)   # as merging an adapter does: no version counts it
    assert generate(decoder, ids, max_new_tokens=30) == generate(decoder, ids, max_new_tokens=30, pack=False) != plain


def test_a_decoder_is_packed_once_and_let_go_with_it():
    decoder, ids = small(), torch.randint(0, 61, (1, 8))
    assert PackedDecoder(decoder).head is PackedDecoder(decoder).head
    generate(decoder, ids, max_new_tokens=30)
    gone = weakref.ref(decoder)
    del decoder
    gc.collect()
    assert gone() is None


def test_packed_decoder_writes_batches_the_plain_way():
    decoder, (ids, mask) = small(), prompts()
    packed = PackedDecoder(decoder)
    assert generate(packed, ids % 61, mask=mask, max_new_tokens=6) == generate(decoder, ids % 61, mask=mask, max_new_tokens=6)


class Doubled(nn.Module):
    "A wrapper around a layer, as an adapter or a sampler inside the language model."

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden, *rest):
        return self.layer(hidden * 2, *rest)


def test_only_unchanged_decoders_are_packed():
    assert why_not_packed(small()) is None
    wrapped, hooked, ids = small(), small(), torch.randint(0, 61, (1, 8))
    wrapped.model.layers[1] = Doubled(wrapped.model.layers[1])
    hooked.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output * 2)
    for decoder, reason in ((wrapped, "layers.1"), (hooked, "layers.0.mlp"), (small(head_dim=12), "widths"),
                            (small(num_experts=2), "block_sparse_moe"), (small().bfloat16(), "torch.bfloat16 on cpu")):
        assert reason in why_not_packed(decoder)
        with pytest.raises(ValueError, match="PackedDecoder: found"):
            generate(decoder, ids, pack=True)
        assert len(generate(decoder, ids, max_new_tokens=30)[0]) == 30   # by itself it takes the plain way
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in why_not_packed(small())
        assert len(generate(small(), ids, max_new_tokens=30)[0]) == 30
    assert generate(wrapped, ids, max_new_tokens=30) != generate(small(), ids, max_new_tokens=30)


def test_a_wrapped_layer_is_obeyed_at_every_step():
    decoder, ids = small(), torch.randint(0, 61, (1, 8))
    decoder.model.layers[1] = Doubled(decoder.model.layers[1])
    written = ids.clone()
    with torch.inference_mode():
        for _ in range(12):
            written = torch.cat([written, decoder(decoder.embed(written))[:, -1:].argmax(-1)], dim=1)
    assert generate(decoder, ids, max_new_tokens=12) == written[:, 8:].tolist()


SMALL = DecoderConfig(97, 64, 88, 2, 4)


@pytest.mark.parametrize("change, reason", [
    ({"max_new_tokens": -1}, "max_new_tokens: found -1"), ({"max_new_tokens": 2.5}, "max_new_tokens: found 2.5"),
    ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"shape \(2, 0\)"), ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"shape \(3,\)")])
def test_prompts_that_make_no_sense(change, reason):
    with pytest.raises(ValueError, match=reason):
        generate(Decoder(SMALL), **{"input_ids": torch.ones(2, 3, dtype=torch.long), "max_new_tokens": 2} | change)


def test_stop_ids_may_be_a_tensor_and_zero_new_tokens_are_none():
    decoder, prompt = Decoder(SMALL), torch.ones(1, 3, dtype=torch.long)
    first = generate(decoder, prompt, max_new_tokens=5)[0][0]
    assert generate(decoder, prompt, max_new_tokens=5, stop_ids=torch.tensor([first])) == [[first]]
    assert generate(decoder, prompt, max_new_tokens=0) == [[]]


def test_weights_that_are_no_numbers_give_an_error_instead_of_words():
    decoder = Decoder(SMALL)
    decoder.model.norm.weight.data[0] = float("nan")
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        with pytest.raises(ValueError, match="NaN"):
            generate(decoder, torch.ones(2, 3, dtype=torch.long), max_new_tokens=2, sampling=sampling)


def test_the_coldest_temperatures_are_greedy():
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 20
    cold = next_token_probabilities(scores, Sampling(temperature=1e-38))
    assert torch.equal(cold.argmax(dim=-1), scores.argmax(dim=-1)) and torch.equal(cold.sum(dim=-1), torch.ones(4))
    with pytest.raises(ValueError, match="temperature: found nan"):
        Sampling(temperature=float("nan"))


BORDER = dict(hidden_size=96, intermediate_size=96, num_attention_heads=8, original_max_position_embeddings=16,
              rope_parameters=LONG | {"original_max_position_embeddings": 16})


@pytest.mark.parametrize("pack", [True, False, None])
@pytest.mark.parametrize("prompt, new", [(12, 24), (16, 3), (15, 1), (20, 6), (4, 6), (1, 40)])
def test_longrope_reads_anew_where_the_text_outgrows_it(pack, prompt, new):
    from test_decoder import pair
    model, ours = pair("phi3", **BORDER)
    ids = torch.randint(3, 97, (1, prompt), generator=torch.Generator().manual_seed(prompt))
    expected = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)[0, prompt:].tolist()
    assert generate(ours, ids, max_new_tokens=new, pack=pack) == [expected]


def test_longrope_in_a_padded_batch_and_behind_a_cache():
    from test_decoder import pair
    ours = pair("phi3", **BORDER)[1]
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :5] = False
    written = generate(ours, ids, mask=mask, max_new_tokens=10)
    for row in range(2):   # every token follows from a whole pass over what stands before it, beside the longer row
        for count in range(10):
            more = torch.tensor([tokens[:count] for tokens in written], dtype=torch.long)
            whole = torch.cat([ids, more], dim=1)
            real = torch.cat([mask, torch.ones_like(more, dtype=torch.bool)], dim=1)
            assert generate(ours, whole, mask=real, max_new_tokens=1)[row] == [written[row][count]]
    cache = ours.new_cache(1, 40)
    generate(ours, ids[:1, :8], max_new_tokens=2, cache=cache)
    with pytest.raises(ValueError, match="generate, cache: found 9 tokens, and with the new ones more than 16"):
        generate(ours, ids[:1, 8:10], max_new_tokens=20, cache=cache)
