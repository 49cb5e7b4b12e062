"The decoder against transformers and EasyLM, its invariants, and what it refuses."
import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT
from safetensors.torch import load_file

from mllm_nb.language.decoder import (Decoder, DecoderConfig, TransformersDecoder, attend, attend_plain, attention_mask,
                                      causal_mask, load_transformers_state, parameters_by_part, rope_table, rotate,
                                      transformers_keys)

GOLDEN = ROOT / "tests" / "golden"
COMMON = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
              max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
LONG = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.1, 1.3, 2.0, 2.1, 2.2],
            long_factor=[1.5, 2.0, 4.0, 9.0, 10.0, 12.0])
FAMILIES = {
    "llama": ("llama", {}),
    "llama grouped, llama3 rope": ("llama", dict(num_key_value_heads=2, rope_parameters=LLAMA3)),
    "llama biased, linear rope": ("llama", dict(attention_bias=True,
                                                rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    "mistral": ("mistral", dict(num_key_value_heads=2, sliding_window=7)),
    "qwen2 tied": ("qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "gemma": ("gemma", dict(num_key_value_heads=1, head_dim=16)),
    "phi3": ("phi3", dict(num_key_value_heads=2, sliding_window=9)),
    "phi3, short": ("phi3", dict(rope_parameters=LONG | {"original_max_position_embeddings": 32})),
    "phi3, outgrown": ("phi3", dict(rope_parameters=LONG | {"original_max_position_embeddings": 11})),
    "mixtral": ("mixtral", dict(num_key_value_heads=2, num_local_experts=4)),
}
SMALL = DecoderConfig(61, 32, 48, 2, 4, 2)


def theirs(model_type: str, seed: int = 0, **settings):
    "A small model of transformers whose random weights are large enough to tell mistakes."
    config = transformers.AutoConfig.for_model(model_type, **COMMON | {"attn_implementation": "eager"} | settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model


def pair(model_type: str, **settings):
    model = theirs(model_type, **settings)
    ours = Decoder(DecoderConfig.from_transformers(model.config.to_dict())).eval()
    load_transformers_state(ours, model.state_dict())
    return model, ours


def padded_batch(length: int = 20):
    "Ids, mask and positions; row 0 is padded on the right, row 1 on the left, row 2 not."
    torch.manual_seed(1)
    valid = torch.ones(3, length, dtype=torch.long)
    valid[0, -3:], valid[1, :5] = 0, 0
    return torch.randint(3, 97, (3, length)), valid, (valid.cumsum(1) - 1).clamp(min=0)


def largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    "Largest difference, in units of the expected values' size where that is above 1."
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize("path", ["plain", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_layers_and_gradients_equal_transformers(name, path):
    model, ours = pair(FAMILIES[name][0], **FAMILIES[name][1])
    ours.attention_path = path
    ids, valid, positions = padded_batch()
    kept = valid.bool()
    expected = model(ids, attention_mask=valid, position_ids=positions, output_hidden_states=True)
    layers = ours.hidden(ours.embed(ids), attention_mask(valid), positions, return_layers=True)
    logits = ours.logits(layers[-1])
    assert len(layers) == len(expected.hidden_states) == 4
    assert max(largest(a[kept], b[kept]) for a, b in zip(layers, expected.hidden_states)) < 1e-5
    assert largest(logits[kept], expected.logits[kept]) < 1e-5
    weight = torch.randn_like(logits[kept])
    (expected.logits[kept] * weight).mean().backward()
    (logits[kept] * weight).mean().backward()
    gradients = transformers_keys({key: p.grad for key, p in model.named_parameters()}, ours.config)
    assert max(largest(p.grad, gradients[key]) for key, p in ours.named_parameters()) < 1e-4
    assert max((p.grad - gradients[key]).abs().max() / gradients[key].abs().max()
               for key, p in ours.named_parameters()) < 1e-4


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_half_precision_weights_round_no_worse_than_transformers(name):
    model, ours = pair(FAMILIES[name][0], **FAMILIES[name][1])
    ids, valid, positions = padded_batch()
    inputs = dict(attention_mask=valid, position_ids=positions)
    exact = model.bfloat16().float()(ids, **inputs).logits[valid.bool()]
    found = ours.bfloat16()(ours.embed(ids), attention_mask(valid), positions)[valid.bool()]
    expected = model.bfloat16()(ids, **inputs).logits[valid.bool()]
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 1.3 * (expected - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("name", ["llama", "qwen2 tied", "phi3", "mixtral", "gemma"])
def test_a_folder_saved_by_transformers_loads(name, tmp_path):
    model = theirs(FAMILIES[name][0], **FAMILIES[name][1])
    model.save_pretrained(tmp_path)
    config = DecoderConfig.from_transformers(json.loads((tmp_path / "config.json").read_text()))
    ours = Decoder(config)
    load_transformers_state(ours, load_file(tmp_path / "model.safetensors"))
    ids = padded_batch()[0]
    assert largest(ours(ours.embed(ids)), model(ids).logits) < 1e-5


# EasyLM, the original of LVM

@pytest.fixture(scope="module")
def easylm():
    tensors = load_file(GOLDEN / "parity" / "lvm_llama_easylm.safetensors")
    settings = json.loads((GOLDEN / "parity" / "lvm_llama_easylm.json").read_text())["hf_config"]
    decoder = Decoder(DecoderConfig.from_transformers(settings, "llama"))
    load_transformers_state(decoder, {key.removeprefix("weights."): tensor.float() for key, tensor in tensors.items()
                                      if key.startswith("weights.")})
    return decoder, tensors


def test_easylm_outputs(easylm):
    decoder, golden = easylm
    layers = decoder.hidden(decoder.embed(golden["in.input_ids"]), return_layers=True)
    for found, name in ((layers[1], "hidden_1"), (layers[-1], "hidden_final_normed"),
                        (decoder.logits(layers[-1]), "logits")):
        assert (found - golden[f"out.{name}"]).abs().max() < 2e-5, name


def test_easylm_left_padding(easylm):
    decoder, golden = easylm
    valid = golden["in.attention_mask"]
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    found = decoder(decoder.embed(golden["in.input_ids"]), attention_mask(valid), positions)
    assert (found - golden["out.logits_padded"])[valid.bool()].abs().max() < 2e-5


def test_easylm_loss_accuracy_and_gradients(easylm):
    decoder, golden = easylm
    decoder.zero_grad()
    targets, mask = golden["in.target_ids"].long(), golden["in.loss_mask"]
    logits = decoder(decoder.embed(golden["in.input_ids"]))
    each = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    row_mean = lambda values, weights: ((values * weights).sum(1) / weights.sum(1)).mean()
    loss = row_mean(each, mask)
    assert abs(loss.item() - golden["out.loss"].item()) < 1e-6
    assert abs(each.mean().item() - golden["out.loss_unmasked"].item()) < 1e-6
    assert abs(row_mean((logits.argmax(-1) == targets).float(), mask).item() - golden["out.accuracy"].item()) < 1e-6
    loss.backward()
    gradients = {key: p.grad for key, p in decoder.named_parameters()}
    for key in [key for key in golden if key.startswith("grad.")]:
        assert (gradients[key.removeprefix("grad.")] - golden[key]).abs().max() < 1e-6, key
    total = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
    assert abs(total - golden["out.grad_norm_all"].item()) < 1e-5


def test_phi_3_s_first_files_say_su_and_name_the_old_context_beside():
    sizes = dict(model_type="phi3", vocab_size=61, hidden_size=48, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                 max_position_embeddings=64, original_max_position_embeddings=16)
    config = DecoderConfig.from_transformers(sizes | {"rope_scaling": LONG | {"type": "su", "rope_type": "su"}})
    for reach, factors in ((16, LONG["short_factor"]), (17, LONG["long_factor"])):
        cos, sin = rope_table(torch.arange(reach)[None], config)
        angles = torch.arange(reach)[:, None] / (torch.tensor(factors) * 1e4 ** (torch.arange(6) / 6))
        size = (1 + torch.tensor(64 / 16).log() / torch.tensor(16.).log()).sqrt()
        torch.testing.assert_close((cos[0], sin[0]), (angles.cos() * size, angles.sin() * size))


def test_rotary_table_is_fp32_everywhere():
    golden = load_file(GOLDEN / "parity" / "lvm_rope.safetensors")
    positions, pairs = golden["in.positions"], golden["out.fp32.cos"].shape[1]
    config = DecoderConfig(8, 2 * pairs, 8, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        table = rope_table(positions[None].long(), config)
    for found, name in zip(table, ("cos", "sin")):
        difference = (found[0] - golden[f"out.fp32.{name}"]).abs().amax(1)
        assert found.dtype == torch.float32 and difference.max() < 3e-4 and difference[positions < 300].max() < 2e-5
        if (golden["out.bf16run.cos"] - golden["out.fp32.cos"]).abs().max() > 0.1:   # and not what LVM computed
            assert (found[0] - golden[f"out.bf16run.{name}"]).abs().max() > 0.1


def test_rotation_in_bf16_is_rounded_once():
    heads, rope = torch.randn(1, 2, 5, 8).bfloat16(), rope_table(torch.arange(3000, 3005)[None], DecoderConfig(8, 16, 8, 1, 2))
    assert torch.equal(rotate(heads, rope), rotate(heads.float(), rope).bfloat16())


def test_published_sizes_of_lvm():
    sizes = json.loads((GOLDEN / "manifests" / "lvm_sizes.json").read_text())
    for name in ("vqlm_100m", "vqlm_1b", "vqlm_7b"):
        counts = parameters_by_part(DecoderConfig.from_transformers(sizes[name], "llama"))
        assert sum(counts.values()) == sizes[name]["params_total"]
        assert counts["embeddings"] == sizes[name]["params_embedding"]


# masks, attention, packing

def test_masks():
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True] * 4]
    for window in (1, 2, 5):
        mask = causal_mask(6, 6, window)
        assert all(bool(mask[i, j]) == (i - window < j <= i) for i in range(6) for j in range(6))
    segments = torch.tensor([[0, 1, 1, 2, 2, 0]])
    mask = attention_mask(segments, window=2)[0]
    for i in range(6):
        for j in range(6):
            same = segments[0, i] == segments[0, j] > 0
            assert bool(mask[i, j]) == bool(i == j or (same and i - 2 < j <= i))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 3, 9])
def test_attention_paths_agree(kv_heads, queries):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, length, 8) for heads, length in ((4, queries), (kv_heads, 9), (kv_heads, 9)))
    mask = causal_mask(queries, 9, 4).expand(2, -1, -1)
    for chosen in (None, mask):
        plain, fused = (attend(query, key, value, chosen, path) for path in ("plain", "sdpa"))
        assert torch.allclose(plain, fused, atol=1e-6)
        visible = causal_mask(queries, 9) if chosen is None else chosen[0]
        scores = query[1, 3] @ key[1, -1].T / math.sqrt(8)
        by_hand = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value[1, -1]
        assert torch.allclose(plain[1, 3], by_hand, atol=1e-6)
    with pytest.raises(ValueError, match="attention path: found 'flash', expected 'auto' or one of"):
        attend(query, key, value, mask, "flash")


def test_gradients_of_the_attention_paths_agree():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, 9, 8, requires_grad=True) for _ in range(3)]
    mask = attention_mask(torch.tensor([[1] * 4 + [2] * 5, [0] * 2 + [1] * 7]))
    gradients = [torch.autograd.grad(attend(*inputs, mask, path).square().sum(), inputs) for path in ("plain", "sdpa")]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


@pytest.mark.parametrize("window", [None, 3])
def test_packed_rows_equal_separate_rows(window):
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(61, 32, 48, 2, 4, 2, sliding_window=window))
    samples = [torch.randint(0, 61, (1, length)) for length in (6, 4, 5)]
    segments = torch.tensor([[1] * 6 + [2] * 4 + [3] * 5 + [0] * 2])
    positions = torch.tensor([[*range(6), *range(4), *range(5), 0, 0]])
    row = torch.cat([*samples, torch.zeros(1, 2, dtype=torch.long)], dim=1)
    embeddings = decoder.embed(row).detach().requires_grad_()
    packed = decoder(embeddings, attention_mask(segments), positions)
    for sample, found in zip(samples, packed.split([6, 4, 5, 2], dim=1)):
        assert torch.allclose(found, decoder(decoder.embed(sample)), atol=1e-5)
    gradient, = torch.autograd.grad(packed[:, 6:10].sum(), embeddings)
    assert gradient[:, 6:10].abs().min() > 0 and gradient[:, :6].abs().max() == gradient[:, 10:].abs().max() == 0
    assert packed.isfinite().all()   # padding too


def test_the_future_changes_nothing():
    decoder, ids = Decoder(SMALL), torch.randint(0, 61, (2, 9))
    changed = ids.clone()
    changed[:, 5:] = 3
    assert torch.equal(decoder(decoder.embed(ids))[:, :5], decoder(decoder.embed(changed))[:, :5])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma"])
def test_pieces_with_a_cache_equal_one_pass(name):
    _, ours = pair(FAMILIES[name][0], **FAMILIES[name][1])
    ids, valid, positions = padded_batch()
    valid, positions = valid[1:], positions[1:]
    embeddings = ours.embed(ids[1:])
    for masked in (False, True):
        mask, places = (attention_mask(valid), positions) if masked else (None, None)
        whole, cache, found = ours(embeddings, mask, places), ours.new_cache(2, 20), []
        for start, end in ((0, 8), (8, 9), (9, 14), (14, 20)):
            part = [None if x is None else x[:, start:end] for x in (mask, places)]
            part[0] = None if mask is None else part[0][:, :, :end]
            found.append(ours(embeddings[:, start:end], *part, cache))
        assert largest(torch.cat(found, dim=1)[valid.bool()], whole[valid.bool()]) < 2e-5
    assert cache.filled == 20
    with pytest.raises(ValueError, match="cache: found 21 places, expected at most its length of 20"):
        ours(embeddings[:, :1], cache=cache)


def test_autocast_keeps_norms_and_rotation_exact():
    torch.manual_seed(0)
    decoder, ids = Decoder(SMALL), torch.randint(0, 61, (2, 40))
    seen = []
    decoder.model.layers[0].input_layernorm.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    full = decoder(decoder.embed(ids))
    with torch.autocast("cpu", torch.bfloat16):
        half = decoder(decoder.embed(ids))
        assert decoder.new_cache(1, 4).layers[0].keys.dtype == torch.bfloat16
    assert half.dtype == torch.bfloat16 and seen == [torch.float32] * 2
    assert (half.float() - full).abs().max() < 0.03 * full.abs().max() + 0.01
    half.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in decoder.parameters())


def test_attention_in_bf16_sums_in_fp32():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 400, 16) for _ in range(3))
    found = attend_plain(query.bfloat16(), key.bfloat16(), torch.ones_like(value).bfloat16())
    assert (found.float() - 1).abs().max() < 0.01   # shares of 400 keys still sum to one


def test_key_names_and_tied_heads():
    names = set(Decoder(SMALL).state_dict())
    llama = theirs("llama", num_key_value_heads=2, num_hidden_layers=2)
    assert names == set(llama.state_dict())
    tied = Decoder(DecoderConfig(61, 32, 48, 1, 4, tie_word_embeddings=True))
    assert "lm_head.weight" not in tied.state_dict()
    state = dict(tied.state_dict())
    load_transformers_state(tied, state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    hidden = torch.randn(2, 32)
    assert torch.equal(tied.logits(hidden), hidden @ tied.model.embed_tokens.weight.T)


def test_settings_survive_json():
    from dataclasses import asdict
    for name, (model_type, settings) in FAMILIES.items():
        config = DecoderConfig.from_transformers(theirs(model_type, **settings).config.to_dict())
        assert DecoderConfig(**json.loads(json.dumps(asdict(config)))) == config


# what is refused

@pytest.mark.parametrize("settings, message", [
    (dict(num_key_value_heads=3), "num_key_value_heads: found 3, expected a divisor of num_attention_heads = 4"),
    (dict(head_dim=5), "head_dim: found 5, expected an even number"),
    (dict(hidden_act="relu"), "hidden_act: found 'relu', expected one of"),
    (dict(rope_scaling={"rope_type": "yarn"}), "rope_scaling: found 'yarn', expected 'linear', 'llama3' or 'longrope'"),
    (dict(rope_scaling={"rope_type": "longrope", "short_factor": [1.0] * 4}), "rope_scaling, long_factor: found None, expected 4 numbers"),
    (dict(rope_scaling={"type": "su", "short_factor": [1.0] * 3, "long_factor": [1.0] * 4}), "rope_scaling, short_factor: found"),
    (dict(rope_scaling={"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}), "original_max_position_embeddings"),
    (dict(rope_scaling={"rope_type": "linear"}), "rope_scaling, factor: found None, expected a number above 0"),
    (dict(rms_norm_eps="x"), "rms_norm_eps: found 'x', expected a number"), (dict(rms_norm_eps=-1e-5), "rms_norm_eps: found -1e-05"),
    (dict(rope_theta=-1.0), "rope_theta: found -1.0, expected more than 0"), (dict(rope_theta=float("nan")), "rope_theta: found nan"),
    (dict(tie_word_embeddings="no"), "tie_word_embeddings: found 'no', expected true or false"),
    (dict(sliding_window=[4]), "sliding_window: found .4., expected a whole number or nothing"),
    (dict(hidden_act=[]), "hidden_act: found .., expected a text"), (dict(hidden_size=30), "hidden_size: found 30, expected a multiple"),
    (dict(num_key_value_heads=0), "num_key_value_heads: found 0, expected a whole number from 1"),
])
def test_contradicting_settings(settings, message):
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**sizes | settings)


@pytest.mark.parametrize("settings, message", [
    ({"model_type": "mpt"}, "model_type: found 'mpt', expected one of"),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}, "use_sliding_window: found true"),
    ({"model_type": "phi3", "rope_scaling": {"type": "yarn"}}, "rope_scaling: found 'yarn'"),
    ({"model_type": "phi3", "partial_rotary_factor": 0.75}, "partial_rotary_factor: found 0.75, expected 1.0"),
    ({"model_type": "llama", "mlp_bias": True}, "mlp_bias: found true"),
    ({"model_type": []}, "model_type: found .., expected one of"), ({"model_type": "llama", "rope_parameters": 7}, "rope_parameters"),
    ({"model_type": "llama", "attention_bias": "x"}, "attention_bias: found 'x', expected true or false"),
])
def test_published_settings_that_are_not_built(settings, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_transformers(COMMON | settings)


def test_a_state_that_does_not_fit_is_listed():
    decoder = Decoder(SMALL)
    state = dict(decoder.state_dict())
    del state["model.norm.weight"]
    state |= {"model.extra.weight": torch.zeros(1), "lm_head.weight": torch.zeros(60, 32)}
    with pytest.raises(ValueError) as caught:
        load_transformers_state(decoder, state)
    for part in ("3 names", "missing model.norm.weight", "left over model.extra.weight",
                 "lm_head.weight: found (60, 32), expected (61, 32)"):
        assert part in str(caught.value)


def test_a_decoder_made_without_memory_takes_the_weights_as_its_own():
    ours = Decoder(SMALL)
    with torch.device("meta"):
        empty = Decoder(SMALL)
    load_transformers_state(empty, ours.state_dict())
    ids = torch.arange(5)[None]
    assert torch.equal(empty(empty.embed(ids)), ours(ours.embed(ids)))


def test_a_mask_of_another_size():
    decoder = Decoder(SMALL)
    with pytest.raises(ValueError, match=r"mask: found \(1, 4, 4\), expected \(batch, 5, 5\)"):
        decoder(decoder.embed(torch.zeros(1, 5, dtype=torch.long)), torch.ones(1, 4, 4, dtype=torch.bool))


# transformers' own models under the same methods

MPT = dict(d_model=48, n_heads=4, n_layers=3, vocab_size=97, max_seq_len=64)
WRAPPED = FAMILIES | {"qwen2, window on some layers": ("qwen2", dict(num_key_value_heads=2, use_sliding_window=True,
                                                                   sliding_window=5, max_window_layers=1)),
                      "mistral sdpa": ("mistral", dict(num_key_value_heads=2, sliding_window=7,
                                                       attn_implementation="sdpa"))}


def wrapped_model(name: str):
    if name != "mpt":
        return theirs(WRAPPED[name][0], **WRAPPED[name][1])
    torch.manual_seed(0)
    return transformers.MptForCausalLM(transformers.MptConfig(**MPT, attn_implementation="eager")).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", [*WRAPPED, "mpt"])
def test_wrapped_models_equal_themselves(name):
    model = wrapped_model(name)
    decoder = TransformersDecoder(model)
    ids, valid, positions = padded_batch()
    kept, places = valid.bool(), {} if name == "mpt" else {"position_ids": positions}
    expected = model(ids, attention_mask=valid, output_hidden_states=True, **places)
    layers = decoder.hidden(decoder.embed(ids), attention_mask(valid), positions, return_layers=True)
    assert max(largest(a[kept], b[kept]) for a, b in zip(layers, expected.hidden_states)) < 1e-5
    assert largest(decoder.logits(layers[-1])[kept], expected.logits[kept]) < 1e-5
    assert largest(decoder(decoder.embed(ids)), model(ids).logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["mistral", "gemma", "qwen2, window on some layers", "mpt"])
def test_wrapped_models_with_a_cache(name):
    decoder = TransformersDecoder(wrapped_model(name))
    ids, valid, positions = (x[1:] for x in padded_batch())
    mask, cache = attention_mask(valid), decoder.new_cache(2, 20)
    whole = decoder(decoder.embed(ids), mask, positions)
    found = []
    for start, end in ((0, 12), (12, 13), (13, 16), (16, 20)):
        found.append(decoder(decoder.embed(ids[:, start:end]), mask[:, start:end, :end], positions[:, start:end], cache))
        assert cache.filled == end
    assert largest(torch.cat(found, dim=1)[valid.bool()], whole[valid.bool()]) < 2e-5


@torch.no_grad()
def test_wrapped_and_own_decoder_treat_images_alike():
    "Gemma scales what enters, words and images; packed segments hold for both."
    for name in ("gemma", "mistral"):
        model, ours = pair(FAMILIES[name][0], **FAMILIES[name][1])
        decoder, ids = TransformersDecoder(model), torch.randint(3, 97, (1, 12))
        embeddings = ours.embed(ids)
        assert torch.equal(decoder.embed(ids), embeddings)
        embeddings[:, 3:6] = torch.randn(1, 3, 48)
        arguments = attention_mask(torch.tensor([[1] * 7 + [2] * 5])), torch.tensor([[*range(7), *range(5)]])
        assert largest(decoder(embeddings, *arguments), ours(embeddings, *arguments)) < 1e-5


def test_wrapped_models_train_under_autocast():
    decoder = TransformersDecoder(theirs("llama", attn_implementation="sdpa"))
    ids, valid, positions = padded_batch()
    with torch.autocast("cpu", torch.bfloat16):
        decoder(decoder.embed(ids), attention_mask(valid), positions).float().square().mean().backward()
    assert all(p.grad is not None for p in decoder.parameters())


def test_models_that_cannot_be_wrapped():
    with pytest.raises(ValueError, match="config.final_logit_softcapping: found 30.0, expected none"):
        TransformersDecoder(theirs("gemma2", head_dim=16, num_key_value_heads=2))


def test_sizes_are_whole_numbers_and_all_there():
    for name, value in (("vocab_size", "x"), ("hidden_size", 1.5), ("num_hidden_layers", 10**9), ("head_dim", []), ("num_key_value_heads", -1)):
        if value:
            with pytest.raises(ValueError, match=f"DecoderConfig.{name}: found .*, expected a whole number"):
                DecoderConfig(**{**dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2), name: value})
    with pytest.raises(ValueError, match="config.json: found no vocab_size, expected"):
        DecoderConfig.from_transformers({"model_type": "llama"} | {name: value for name, value in COMMON.items() if name != "vocab_size"})


def test_gemma_may_have_a_head_of_its_own():
    untied = DecoderConfig.from_transformers(COMMON | {"model_type": "gemma", "tie_word_embeddings": False})
    assert not untied.tie_word_embeddings and Decoder(untied).lm_head is not None
    assert DecoderConfig.from_transformers({name: value for name, value in COMMON.items() if name != "tie_word_embeddings"}
                                           | {"model_type": "gemma"}).tie_word_embeddings
