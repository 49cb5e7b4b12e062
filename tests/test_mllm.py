"The whole model: splice, loss, invariants, text alone, any language model, saving and loading, errors."
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm_nb.connectors.mlp import Projector, ProjectorConfig, build_projector, projector_parameters
from mllm_nb.images import Preprocess
from mllm_nb.language.decoder import DecoderConfig
from mllm_nb.mllm import (
    IGNORE,
    MLLM,
    MLLMConfig,
    WeightsError,
    next_labels,
    no_memory,
    segment_positions,
    splice,
    supervised_loss,
)
from mllm_nb.vision.towers import NEWLINE, TEXT, Features, TowerConfig
from mllm_nb.vision.vit import ViTConfig

EYE = ViTConfig(image_size=8, patch_size=4, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
READER = DecoderConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
TINY = MLLMConfig(READER, (TowerConfig("tiny", EYE, Preprocess(size=8)),))
IDS = torch.tensor([[1, 5, 0, 0, 0, 0, 7, 8, 2]])
INDEX = torch.tensor([[TEXT, TEXT, 0, 1, 2, 3, TEXT, TEXT, TEXT]])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MLLM(TINY).eval()


@pytest.fixture
def image():
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# --- the projector

@pytest.mark.parametrize("kind, keys", [
    ("identity", set()), ("linear", {"weight", "bias"}), ("mlp1x_gelu", {"0.weight", "0.bias"}),
    ("mlp3x_gelu", {f"{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")})])
def test_projector_has_published_keys(kind, keys):
    assert set(build_projector(kind, 6, 6).state_dict()) == keys


@pytest.mark.parametrize("kind, widths, message", [
    ("identity", (4, 5), "keeps the width"), ("mlp0x_gelu", (4, 5), "mlpNx_gelu"), ("mlp999999999x_gelu", (4, 5), "mlpNx_gelu"),
    ("sva", (4, 5), "'sva'")])
def test_projector_refuses(kind, widths, message):
    with pytest.raises(ValueError, match=message):
        build_projector(kind, *widths)


def test_projector_sizes_are_published():
    assert projector_parameters("mlp2x_gelu", 1024, 4096) == 20_979_712
    assert projector_parameters("mlp2x_gelu", 1024, 5120) == 31_467_520


def test_projector_uses_the_exact_gelu():
    x = torch.linspace(-3, 3, 7)
    assert torch.equal(build_projector("mlp2x_gelu", 2, 2)[1](x), torch.nn.functional.gelu(x))


def test_projector_joins_towers_on_channels():
    grids = [torch.randn(2, 2, 2, width) for width in (3, 5)]
    features = [Features(grid, torch.ones(2, 2, 2, dtype=torch.bool)) for grid in grids]
    connector = ProjectorConfig("linear").build([3, 5], 7)
    expected = connector.mm_projector(torch.cat([grid.flatten(1, 2) for grid in grids], dim=-1))
    assert torch.equal(connector(features), expected)
    features[1] = Features(torch.randn(2, 3, 3, 5), torch.ones(2, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[4, 9\]"):
        connector(features)


# --- the splice

def test_splice_equals_joining_pieces():
    torch.manual_seed(0)
    words, images = torch.randn(2, 7, 4), torch.randn(5, 4)
    index = torch.tensor([[-1, 0, 1, -2, -1, -1, -1], [-1, -1, 2, 3, -2, -1, -1]])
    newline = images[4]
    found = splice(words, images, index)
    assert torch.equal(found[0], torch.cat([words[0, :1], images[0:2], newline[None], words[0, 4:]]))
    assert torch.equal(found[1], torch.cat([words[1, :2], images[2:4], newline[None], words[1, 5:]]))


@pytest.mark.parametrize("leaf", (False, True))
def test_splice_in_place_gives_the_same_numbers_and_gradients(leaf):
    torch.manual_seed(0)
    index = torch.randint(-2, 6, (3, 11))
    found = []
    for in_place in (False, True):
        torch.manual_seed(1)
        weight, table = torch.randn(3, 11, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
        joined = splice(weight if leaf else weight * 2, table, index, in_place)
        joined.square().sum().backward()
        found.append((joined.detach(), weight.grad, table.grad))
    for plain, fast in zip(*found):
        torch.testing.assert_close(fast, plain)


def test_splice_names_a_row_that_does_not_exist():
    with pytest.raises(IndexError, match="found row 3, expected less than 2"):
        splice(torch.zeros(1, 2, 4), torch.zeros(3, 4), torch.tensor([[-1, 3]]))


def test_splice_gradients_go_where_the_numbers_came_from():
    words, table = torch.randn(1, 3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    splice(words, table, torch.tensor([[-1, 1, -2]])).sum().backward()
    assert words.grad[0].sum(-1).tolist() == [4, 0, 0] and table.grad.sum(-1).tolist() == [0, 4, 4]


# --- loss

def test_labels_do_not_cross_samples():
    labels, segments = torch.tensor([[-100, 5, 6, 7, 8, 9]]), torch.tensor([[1, 1, 1, 2, 2, 0]])
    assert next_labels(labels, segments).tolist() == [[5, 6, -100, 8, -100, -100]]
    assert segment_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0]]


@pytest.mark.parametrize("chunk", [1024, 3])
def test_loss_is_cross_entropy_over_supervised_positions(model, chunk):
    hidden = torch.randn(2, 6, 16, requires_grad=True)
    targets = torch.tensor([[3, -100, 4, 5, -100, 6], [-100, 7, 8, -100, 9, 1]])
    loss, tokens = supervised_loss(model.language, hidden, targets, chunk)
    expected = torch.nn.functional.cross_entropy(model.language.logits(hidden).flatten(0, 1), targets.flatten())
    assert tokens == 8 and torch.allclose(loss, expected, atol=1e-6)
    ours, = torch.autograd.grad(loss, hidden, retain_graph=True)
    theirs, = torch.autograd.grad(expected, hidden)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_loss_without_supervised_tokens_is_no_nan(model):
    output = model(IDS, labels=torch.full_like(IDS, IGNORE))
    assert output.tokens == 0 and output.loss.item() == 0
    output.loss.backward()


def test_scores_of_all_positions_are_made_only_when_asked(model, monkeypatch):
    seen = []
    logits = model.language.logits
    monkeypatch.setattr(model.language, "logits", lambda hidden: seen.append(hidden.shape) or logits(hidden))
    labels = torch.where(IDS == 8, IDS, IGNORE)
    assert model(IDS, labels=labels).logits is None
    assert seen == [(0, 16), (1, 16)]   # the first asks for the size of the vocabulary


# --- invariants

def test_causal_and_not_blind(model, image):
    with torch.no_grad():
        seen, blank = (model(IDS, [pixels], INDEX, logits=True).logits for pixels in (image, torch.zeros_like(image)))
    change = (seen - blank).abs().amax(dim=(0, 2))
    assert change[:2].max() == 0 and change[2:].min() > 1e-6


def test_text_alone_needs_no_tower(model, image, monkeypatch):
    with torch.no_grad():
        mixed = model(torch.cat([IDS, IDS]), [image], torch.cat([INDEX, torch.full_like(INDEX, TEXT)])).hidden
        monkeypatch.setattr(model.towers[0], "forward", lambda *_: pytest.fail("the tower ran"))
        assert torch.allclose(model(IDS).hidden, mixed[1:], atol=1e-6)


def test_batch_without_images_gives_zero_gradients(model):
    model.train()
    model(IDS, [torch.zeros(0, 3, 8, 8)], torch.full_like(IDS, TEXT), labels=IDS).loss.backward()
    for parameter in model.connector.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


def test_order_of_images_is_index_arithmetic(model):
    two = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    ids, rows = torch.ones(1, 9, dtype=torch.long), torch.tensor([[TEXT, *range(8)]])
    other = torch.tensor([[TEXT, *range(4, 8), *range(4)]])
    with torch.no_grad():
        assert torch.allclose(model(ids, [two], rows).hidden, model(ids, [two.flip(0)], other).hidden, atol=1e-6)


def test_packing_and_padding_change_nothing(model, image):
    other = torch.tensor([[1, 20, 21, 2]])
    row = torch.cat([IDS, other, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    index = torch.cat([INDEX, torch.full((1, 7), TEXT)], dim=1)
    segments = torch.tensor([[1] * 9 + [2] * 4 + [0] * 3])
    with torch.no_grad():
        packed = model(row, [image], index, segments).hidden
        assert torch.allclose(packed[:, :9], model(IDS, [image], INDEX).hidden, atol=1e-5)
        assert torch.allclose(packed[:, 9:13], model(other).hidden, atol=1e-5)
        left = model(torch.cat([torch.zeros(1, 2, dtype=torch.long), other], 1), segments=torch.tensor([[0, 0, 1, 1, 1, 1]]))
        assert torch.allclose(left.hidden[:, 2:], model(other).hidden, atol=1e-5)


def test_finished_features_spare_the_tower(model, image):
    features = model.features([image])
    model.towers[0].forward = lambda *_: pytest.fail("the tower ran")
    assert model(IDS, features, INDEX).hidden.shape == (1, 9, 16)


def test_places_without_pixels_are_refused(model):
    with pytest.raises(ValueError, match="found 4 image places, expected none without pixels"):
        model(IDS, image_index=INDEX)
    with pytest.raises(ValueError, match="image_index"):
        model(IDS, [torch.zeros(1, 3, 8, 8)])


def test_newline_row():
    model = MLLM(replace(TINY, mm_patch_merge_type="spatial_unpad"))
    index = torch.tensor([[TEXT, NEWLINE, 0]])
    embedded = model.embed(torch.zeros(1, 3, dtype=torch.long), [torch.randn(1, 3, 8, 8)], index)
    assert torch.equal(embedded[0, 1], model.image_newline)
    assert "model.image_newline" in save_names(model)


def test_towers_are_frozen_and_move_with_the_model(model, image):
    model.train()
    assert not model.towers[0].training and not any(p.requires_grad for p in model.towers.parameters())
    model.to(torch.bfloat16)
    assert model(IDS, [image], INDEX).hidden.dtype == torch.bfloat16
    model.language.float()   # borders cast: tower and projector bf16, language fp32
    assert model(IDS, [image], INDEX).hidden.dtype == torch.float32


def test_two_towers(image):
    config = replace(TINY, towers=(TINY.towers[0], replace(TINY.towers[0], name="second", select_layer=-1)))
    model = MLLM(config)
    assert model(IDS, [image, image], INDEX).hidden.shape == (1, 9, 16)
    with pytest.raises(ValueError, match=r"expected one per tower \(2\)"):
        model(IDS, [image], INDEX)


def test_generate_is_greedy_argmax(model, image):
    new = model.generate(IDS[:, :7], [image], INDEX[:, :7], max_new_tokens=3, stop_ids=[])[0]
    ids, index = IDS[:, :7], INDEX[:, :7]
    for token in new:
        with torch.no_grad():
            assert token == model(ids, [image], index, logits=True).logits[0, -1].argmax()
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        index = torch.cat([index, torch.tensor([[TEXT]])], dim=1)


def test_generate_of_a_padded_batch_equals_each_alone(model, image):
    short = torch.tensor([[1, 9, 11]])
    ids = torch.cat([IDS, torch.cat([torch.zeros(1, 6, dtype=torch.long), short], dim=1)])
    index = torch.cat([INDEX, torch.full_like(INDEX, TEXT)])
    segments = torch.tensor([[1] * 9, [0] * 6 + [1] * 3])
    both = model.generate(ids, [image], index, segments, max_new_tokens=4, stop_ids=[])
    assert both[0] == model.generate(IDS, [image], INDEX, max_new_tokens=4, stop_ids=[])[0]
    assert both[1] == model.generate(short, max_new_tokens=4, stop_ids=[])[0]


# --- configuration, saving, loading

def save_names(model) -> set:
    from mllm_nb.mllm import published_names
    return set(published_names(model).values())


FAMILIES = {"llava_llama": {}, "llava_mistral": {"sliding_window": 5, "num_key_value_heads": 1},
            "llava": {"tie_word_embeddings": True}}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_configuration_round_trip(model_type):
    config = replace(TINY, language=replace(READER, **FAMILIES[model_type]), model_type=model_type, template="plain",
                     image_grid_pinpoints=((8, 16), (16, 8)), other={"bos_token_id": 1})
    assert MLLMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_configuration_writes_published_fields():
    fields = TINY.to_dict()
    expected = {"mm_vision_tower": "tiny", "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 12, "hidden_size": 16,
                "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "model_type": "llava_llama"}
    assert expected.items() <= fields.items()


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("shard_bytes", [5e9, 3000])
def test_save_and_load(tmp_path, image, model_type, shard_bytes):
    torch.manual_seed(0)
    model = MLLM(replace(TINY, language=replace(READER, **FAMILIES[model_type]), model_type=model_type)).eval()
    model.save_pretrained(tmp_path, shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors").exists() == (shard_bytes > 1e6)
    again = MLLM.from_pretrained(tmp_path)
    other = MLLM.from_pretrained(tmp_path, language="transformers")
    with torch.no_grad():
        expected = model(IDS, [image], INDEX, logits=True).logits
        assert torch.equal(again(IDS, [image], INDEX, logits=True).logits, expected)
        assert torch.allclose(other(IDS, [image], INDEX, logits=True).logits, expected, atol=1e-5)
    assert not any(p.requires_grad for p in again.towers.parameters()) and again.language.model.norm.weight.requires_grad


def test_both_language_models_agree_on_packed_rows_and_gradients(tmp_path, image):
    torch.manual_seed(0)
    config = replace(TINY, language=replace(READER, sliding_window=4, num_key_value_heads=1), model_type="llava_mistral")
    MLLM(config).save_pretrained(tmp_path)
    row = torch.cat([IDS, torch.tensor([[1, 20, 21, 2, 0]])], dim=1)
    index = torch.cat([INDEX, torch.full((1, 5), TEXT)], dim=1)
    segments = torch.tensor([[1] * 9 + [2] * 4 + [0]])
    outputs = {}
    for name in ("decoder", "transformers"):
        model = MLLM.from_pretrained(tmp_path, language=name)
        output = model(row, [image], index, segments, labels=row, logits=True)
        output.loss.backward()
        outputs[name] = (output.logits[:, :13].detach(), output.loss.detach(), model.connector.mm_projector[0].weight.grad)
    for ours, theirs in zip(*outputs.values()):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_tied_head_is_saved_once(tmp_path):
    model = MLLM(replace(TINY, language={"model_type": "llama", "vocab_size": 30, "hidden_size": 16, "intermediate_size": 24,
                                         "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": True}))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = MLLM.from_pretrained(tmp_path).language.lm
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_saving_again_leaves_no_old_shards(tmp_path, model):
    model.save_pretrained(tmp_path, shard_bytes=3000)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    MLLM.from_pretrained(tmp_path).save_pretrained(tmp_path)   # over the file that its weights are mapped from
    MLLM.from_pretrained(tmp_path)


def test_tokenizer_is_saved_beside(tmp_path, model):
    class Tokenizer:
        def save(self, folder): (folder / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path, Tokenizer())
    assert (tmp_path / "tokenizer.json").exists()


def test_dtype_on_loading(tmp_path, model):
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in MLLM.from_pretrained(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_misfits_are_listed_in_one_error(tmp_path, model):
    model.save_pretrained(tmp_path)

    def spoil(tensors):
        tensors["model.norm.weight"] = torch.zeros(17)
        tensors["model.surplus"] = torch.zeros(2)
        del tensors["model.mm_projector.2.bias"]
    change_weights(tmp_path, spoil)
    with pytest.raises(WeightsError) as error:
        MLLM.from_pretrained(tmp_path)
    text = str(error.value)
    assert str(tmp_path) in text and "3 weights do not fit" in text
    assert "missing: model.mm_projector.2.bias, expected [16]" in text
    assert "model.safetensors: model.norm.weight: found [17], expected [16]" in text
    assert "model.safetensors: left over: model.surplus [2]" in text


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "cannot be read as safetensors"),
    (lambda folder: (folder / "model.safetensors").unlink(), "found no model.safetensors"),
    (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": "llava"}'), "no entry mllm_nb"),
    (lambda folder: (folder / "config.json").unlink(), "config.json")])
def test_damaged_folders_are_named(tmp_path, model, spoil, message):
    model.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(WeightsError, match=message):
        MLLM.from_pretrained(tmp_path)


def test_missing_shard_is_named(tmp_path, model):
    model.save_pretrained(tmp_path, shard_bytes=3000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(WeightsError, match=shard.name):
        MLLM.from_pretrained(tmp_path)


def test_unknown_model_type():
    with pytest.raises(ValueError, match="model_type: found 'gpt', expected one of"):
        MLLMConfig.from_dict({"model_type": "gpt"})


def test_no_memory_restores_modules():
    with no_memory():
        assert Projector("linear", 3, 4).mm_projector.weight.device.type == "meta"
    assert Projector("linear", 3, 4).mm_projector.weight.device.type == "cpu"


@pytest.mark.parametrize("change", [
    {"vocab_size": "x"}, {"hidden_size": None}, {"num_hidden_layers": 10**9}, {"head_dim": "x"}, {"model_type": []},
    {"mllm_nb": None}, {"mllm_nb": {"towers": [None], "language": "decoder"}}, {"mm_projector_type": 5}, {"mm_projector_type": None},
    {"mm_patch_merge_type": "x"}, {"tokenizer_padding_side": "up"}, {"tokenizer_model_max_length": -1}, {"rope_theta": -1.0},
    {"mm_use_im_start_end": "no"}, {"mllm_nb": {"template": "no such", "language": "decoder"}}])
def test_settings_of_the_wrong_kind_name_the_file(tmp_path, change):
    MLLM(replace(TINY, language=DecoderConfig(30, 16, 24, 1, 2))).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(WeightsError, match="config.json") as caught:
        MLLM.from_pretrained(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("change, said", [
    ({"num_hidden_layers": 10**9}, "num_hidden_layers: found 1000000000, expected a whole number from 0 to 10000"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_theta: found -1"), ({"rms_norm_eps": "x"}, "rms_norm_eps: found 'x'")])
def test_settings_that_transformers_would_take_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        replace(TINY, language={"model_type": "llama", **change})


def test_a_tied_head_may_be_stored_twice_and_integers_are_no_weights(tmp_path):
    language = DecoderConfig(30, 16, 24, 1, 2, tie_word_embeddings=True)
    MLLM(replace(TINY, language=language)).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert MLLM.from_pretrained(tmp_path).language.lm_head is None
    change_weights(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(16, dtype=torch.int64)}))
    with pytest.raises(WeightsError, match="model.norm.weight: found torch.int64, expected numbers like torch.float32"):
        MLLM.from_pretrained(tmp_path)


def test_an_image_s_id_without_an_image_is_refused(model):
    with pytest.raises(ValueError, match="input_ids: found -200, expected words alone"):
        model(torch.tensor([[1, -200, 3]]))
    with pytest.raises(IndexError, match="image_index: found -3, expected -2"):
        splice(torch.zeros(1, 2, 4), torch.zeros(3, 4), torch.tensor([[-1, -3]]))
