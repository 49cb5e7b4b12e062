"The published forms of LLaVA: whole, shards, projector, adapter, transformers' own; and what is refused."
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from mllm_nb.mllm import MLLM, WeightsError
from mllm_nb.papers.llava import (
    BAKLLAVA_1,
    LLAVA_1_5_7B,
    LLAVA_LIGHTNING_MPT_7B,
    PUBLISHED,
    convert_folder,
    convert_pickle,
    cover,
    load_llava,
    processor_for,
)
from mllm_nb.samples import samples_path

MANIFESTS = Path(__file__).parent / "golden/manifests"
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
PIXELS = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
IDS = torch.tensor([[1, *[0] * 4, 30, 31, 32, 33, 2]])
INDEX = torch.tensor([[-1, *range(4), -1, -1, -1, -1, -1]])


def make_text(kind: str):
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    if kind == "mistral":
        config = MistralConfig(**SIZES, num_key_value_heads=2, head_dim=4, sliding_window=4, attn_implementation="eager")
        return MistralForCausalLM(config).eval()
    return MptForCausalLM(MptConfig(vocab_size=40, d_model=16, n_heads=4, n_layers=2, max_seq_len=64)).eval()


def make_vision():
    torch.manual_seed(1)
    return CLIPVisionModel(CLIPVisionConfig(hidden_size=12, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
                                            image_size=8, patch_size=4)).eval()


def make_projector() -> dict:
    torch.manual_seed(2)
    shapes = {"0.weight": (16, 12), "0.bias": (16,), "2.weight": (16, 16), "2.bias": (16,)}
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def write(folder: Path, text, extra: dict | None = None, tower: bool = False, **fields) -> Path:
    "A folder as LLaVA's code writes it; the encoder lies beside it."
    kind = text.config.model_type
    trunk = "transformer" if kind == "mpt" else "model"
    vision = make_vision()
    state = {**text.state_dict(), **{f"{trunk}.mm_projector.{name}": value for name, value in make_projector().items()}}
    if tower:
        state |= {f"{trunk}.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}": value
                  for name, value in vision.state_dict().items()}
    if text.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    settings = {**text.config.to_dict(), "model_type": f"llava_{kind}", "mm_vision_tower": "../eye",
                "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
                "image_aspect_ratio": "pad", **fields}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {**state, **(extra or {})}
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings, default=str))
    vision.save_pretrained(folder.parent / "eye")
    return folder


@torch.no_grad()
def by_hand(text, projector: dict | None = None) -> torch.Tensor:
    "What transformers' parts give when they are put together by hand."
    projector = projector or make_projector()
    seen = make_vision()(PIXELS, output_hidden_states=True).hidden_states[-2][:, 1:]
    seen = torch.nn.functional.gelu(seen @ projector["0.weight"].T + projector["0.bias"])
    image = seen @ projector["2.weight"].T + projector["2.bias"]
    words = text.get_input_embeddings()(IDS)
    return text(inputs_embeds=torch.cat([words[:, :1], image, words[:, 5:]], dim=1)).logits


@torch.no_grad()
def scores(model: MLLM) -> torch.Tensor:
    return model(IDS, [PIXELS], INDEX, logits=True).logits


# --- coverage at real size

@pytest.mark.parametrize("language", ["decoder", "transformers"])
@pytest.mark.parametrize("file", ["liuhaotian__llava-v1.5-7b.json", "SkunkworksAI__BakLLaVA-1.json"])
def test_manifest_is_covered(file, language):
    manifest = json.loads((MANIFESTS / file).read_text())
    model = cover(manifest, language)
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("towers.")}
    assert len(own) == manifest["n_keys_total"]
    assert sum(tensor.numel() for tensor in own.values()) == manifest["params_total"]


def test_manifest_configurations_are_ours():
    for name, ours in (("liuhaotian__llava-v1.5-7b", LLAVA_1_5_7B), ("SkunkworksAI__BakLLaVA-1", BAKLLAVA_1)):
        found = cover(json.loads((MANIFESTS / f"{name}.json").read_text())).config
        assert found.language == ours.language and found.connector == ours.connector
        assert found.towers[0].vit == ours.towers[0].vit and found.towers[0].tokens == 576


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_build(name):
    with torch.device("meta"):
        model = MLLM(PUBLISHED[name])
    assert model.towers[0].config.select_layer == -2 and model.width == (5120 if "13b" in name else 4096)


def test_mpt_has_its_published_names():
    from mllm_nb.mllm import published_names
    with torch.device("meta"):
        names = set(published_names(MLLM(LLAVA_LIGHTNING_MPT_7B)).values())
    assert {"transformer.mm_projector.weight", "transformer.wte.weight", "transformer.blocks.31.ffn.up_proj.weight"} <= names


# --- whole folders

@pytest.mark.parametrize("kind", ["llama", "mistral", "mpt"])
@pytest.mark.parametrize("tower", [False, True])
def test_folder_in_the_published_form(tmp_path, kind, tower):
    text = make_text(kind)
    model = load_llava(write(tmp_path / "any-name", text, tower=tower))
    assert torch.allclose(scores(model), by_hand(text), atol=1e-5)
    assert model.config.template == ("mpt" if kind == "mpt" else "v1")


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_folder_into_the_books_decoder(tmp_path, kind):
    text = make_text(kind)
    model = load_llava(write(tmp_path / "model", text), language="decoder")
    assert torch.allclose(scores(model), by_hand(text), atol=1e-5)


def test_sliding_window_survives_in_any_folder_name(tmp_path):
    text = make_text("mistral")
    model = load_llava(write(tmp_path / "llava-llama-v1", text), language="decoder")
    assert model.language.config.sliding_window == 4
    wide = make_text("mistral")
    wide.config.sliding_window = None
    assert not torch.allclose(scores(model), by_hand(wide), atol=1e-3)   # the window is shorter than the sequence


def test_mistral_file_without_window_gets_its_class_default(tmp_path):
    folder = write(tmp_path / "model", make_text("mistral"))
    settings = json.loads((folder / "config.json").read_text())
    del settings["sliding_window"]
    (folder / "config.json").write_text(json.dumps(settings))
    assert load_llava(folder, language="decoder").language.config.sliding_window == 4096


def test_tower_folder_by_argument(tmp_path):
    text = make_text("llama")
    folder = write(tmp_path / "model", text, mm_vision_tower="openai/no-such-tower")
    with pytest.raises(WeightsError, match="vision_tower="):
        load_llava(folder)
    assert torch.allclose(scores(load_llava(folder, vision_tower=tmp_path / "eye")), by_hand(text), atol=1e-5)
    with pytest.raises(WeightsError, match="nowhere"):
        load_llava(folder, vision_tower=tmp_path / "nowhere")


def test_shards_and_old_extras(tmp_path):
    text = make_text("llama")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2), "model.image_newline": torch.zeros(16)}
    folder = write(tmp_path / "model", text, extra)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    assert torch.allclose(scores(load_llava(folder)), by_hand(text), atol=1e-5)


@pytest.mark.parametrize("language", ["decoder", "transformers"])
def test_tables_grown_by_a_token(tmp_path, language):
    text = make_text("llama")
    text.resize_token_embeddings(41)
    model = load_llava(write(tmp_path / "model", text, vocab_size=40), language=language)
    assert torch.allclose(scores(model), by_hand(text), atol=1e-5)


def test_half_precision_is_kept_or_changed(tmp_path):
    text = make_text("llama").half()
    model = load_llava(write(tmp_path / "model", text))
    assert {p.dtype for p in model.language.parameters()} == {p.dtype for p in model.towers.parameters()} == {torch.float16}
    model = load_llava(tmp_path / "model", dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_saved_again_and_loaded(tmp_path):
    model = load_llava(write(tmp_path / "model", make_text("llama")))
    model.save_pretrained(tmp_path / "ours")
    for again in (load_llava(tmp_path / "ours"), load_llava(tmp_path / "ours", language="decoder")):
        assert torch.allclose(scores(again), scores(model), atol=1e-5)


# --- parts on a base

def write_adapter(folder: Path, base: Path, names=("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"), **settings):
    torch.manual_seed(3)
    weights = load_file(base / "model.safetensors")
    tensors = {}
    for name in names:
        rows, columns = weights[f"{name}.weight"].shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, columns)
        tensors[f"base_model.model.{name}.lora_B.weight"] = 0.1 * torch.randn(rows, 2)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    projector = {f"base_model.model.model.mm_projector.{name}": 2 * value for name, value in make_projector().items()}
    save_file(projector, folder / "non_lora_trainables.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8, "peft_type": "LORA", **settings}))
    (folder / "config.json").write_text((base / "config.json").read_text())
    return tensors


@pytest.mark.parametrize("settings, scale", [({}, 4.0), ({"use_rslora": True}, 8 / 2**0.5)])
def test_adapter_with_its_base(tmp_path, settings, scale):
    text = make_text("llama")
    base = write(tmp_path / "base", text)
    tensors = write_adapter(tmp_path / "adapter", base, **settings)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        a, b = (tensors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        text.get_parameter(f"{name}.weight").data += scale * b @ a
    doubled = {name: 2 * value for name, value in make_projector().items()}
    assert torch.allclose(scores(load_llava(tmp_path / "adapter", base=base)), by_hand(text, doubled), atol=1e-5)


def test_adapter_on_a_plain_language_model(tmp_path):
    text = make_text("llama")
    base = write(tmp_path / "unused", text)
    text.save_pretrained(tmp_path / "vicuna")
    write_adapter(tmp_path / "adapter", base)
    found = load_llava(tmp_path / "adapter", base=tmp_path / "vicuna")
    assert torch.allclose(scores(found), scores(load_llava(tmp_path / "adapter", base=base)), atol=1e-6)


def test_adapter_is_what_peft_computes(tmp_path):
    peft = pytest.importorskip("peft")
    text = make_text("llama")
    base = write(tmp_path / "base", text)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(text, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "config.json").write_text((base / "config.json").read_text())
    expected = by_hand(adapted)
    assert torch.allclose(scores(load_llava(tmp_path / "adapter", base=base)), expected, atol=1e-5)


@pytest.mark.parametrize("settings, message", [
    ({"use_dora": True}, "use_dora"), ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"), ({"modules_to_save": ["lm_head"]}, "modules_to_save")])
def test_adapters_of_other_kinds_are_refused(tmp_path, settings, message):
    base = write(tmp_path / "base", make_text("llama"))
    write_adapter(tmp_path / "adapter", base, **settings)
    with pytest.raises(WeightsError, match=message):
        load_llava(tmp_path / "adapter", base=base)


def test_adapter_for_another_base(tmp_path):
    base = write(tmp_path / "base", make_text("llama"))
    write_adapter(tmp_path / "adapter", base)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file(tensors | {key: torch.zeros(20, 2)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match=r"q_proj.weight: found A \[2, 16\] and B \[20, 2\], expected a product of shape \[16, 16\]"):
        load_llava(tmp_path / "adapter", base=base)
    with pytest.raises(WeightsError, match="base="):
        load_llava(tmp_path / "adapter")


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector."])
def test_projector_on_its_base(tmp_path, prefix):
    text = make_text("llama")
    folder = write(tmp_path / "model", text)
    text.save_pretrained(tmp_path / "vicuna")
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / "config.json").write_text((folder / "config.json").read_text())
    torch.save({prefix + name: value for name, value in make_projector().items()}, stage / "mm_projector.bin")
    with pytest.raises(WeightsError, match="mllm convert"):
        load_llava(stage, base=tmp_path / "vicuna")
    convert_folder(stage)
    with pytest.raises(WeightsError, match="a projector alone"):
        load_llava(stage)
    assert torch.allclose(scores(load_llava(stage, base=tmp_path / "vicuna")), by_hand(text), atol=1e-5)


def test_pickled_shards_are_refused_and_converted(tmp_path):
    text = make_text("llama")
    folder = write(tmp_path / "model", text)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, keys in parts.items():
        torch.save({key: tensors[key] for key in keys}, folder / file)
    torch.save(make_projector(), folder / "mm_projector.bin")   # published whole models carry their stage-1 projector along
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="is a pickle.*mllm convert"):
        load_llava(folder)
    convert_folder(folder)
    assert torch.allclose(scores(load_llava(folder)), by_hand(text), atol=1e-5)


def test_pickle_that_would_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it-ran",))
    torch.save({"model.mm_projector.weight": Trap()}, tmp_path / "mm_projector.bin")
    with pytest.raises(Exception, match="more than tensors"):
        convert_folder(tmp_path)
    assert not (tmp_path / "it-ran").exists()


# --- transformers' own form

def make_llava(**settings):
    torch.manual_seed(4)
    config = LlavaConfig(text_config=make_text("llama").config, vision_config=make_vision().config, image_token_index=39, **settings)
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("language", ["decoder", "transformers"])
def test_form_of_transformers(tmp_path, language):
    theirs = make_llava()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(input_ids=torch.where(INDEX >= 0, 39, IDS), pixel_values=PIXELS).logits
    assert torch.allclose(scores(load_llava(tmp_path, language=language)), expected, atol=1e-5)


@pytest.mark.parametrize("rename", [
    lambda key: key.replace("vision_tower.", "vision_tower.vision_model.", 1),                          # transformers 4.36 on
    lambda key: "lm_head.weight" if "lm_head" in key else "model." + key.replace("language_model.model.", "language_model.")])
def test_older_and_newer_spellings(tmp_path, rename):
    theirs = make_llava()
    theirs.save_pretrained(tmp_path)
    expected = scores(load_llava(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({rename(key): value for key, value in tensors.items()}, tmp_path / "model.safetensors")
    assert torch.equal(scores(load_llava(tmp_path)), expected)


def test_other_kinds_of_transformers_llava_are_refused(tmp_path):
    make_llava().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for field, value in (("projector_hidden_act", "relu"), ("vision_feature_layer", [-2, -1])):
        (tmp_path / "config.json").write_text(json.dumps(settings | {field: value}))
        with pytest.raises(WeightsError, match=field):
            load_llava(tmp_path)


# --- folders that do not fit

@pytest.mark.parametrize("change, expected", [
    ({"mm_projector_type": "linear"}, "missing: model.mm_projector.weight"),
    ({"intermediate_size": 32}, r"mlp.up_proj.weight: found \[24, 16\], expected \[32, 16\]"),
    ({"num_hidden_layers": 3}, "missing: model.layers.2"),
    ({"num_hidden_layers": 1}, "left over: model.layers.1"),
    ({"vocab_size": 4000}, r"model.embed_tokens.weight: found \[40, 16\], expected \[4000, 16\]"),
    ({"mm_patch_merge_type": "spatial_unpad"}, "missing: model.image_newline"),
    ({"model_type": "gpt"}, "model_type: found 'gpt'")])
def test_configuration_that_does_not_fit(tmp_path, change, expected):
    folder = write(tmp_path / "model", make_text("llama"))
    settings = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(settings))
    for language in ("decoder", "transformers"):
        with pytest.raises(ValueError, match=expected):
            load_llava(folder, language=language)


@pytest.mark.parametrize("change, field", [
    ({"vocab_size": "x"}, "vocab_size"), ({"vocab_size": -1}, "vocab_size"), ({"hidden_size": []}, "hidden_size"), ({"rms_norm_eps": "x"}, "rms_norm_eps"),
    ({"image_aspect_ratio": 3}, "image_aspect_ratio"), *(({"image_aspect_ratio": "anyres", "image_grid_pinpoints": value}, "image_grid_pinpoints: found") for value in (5, "abc", [[1]], [[336, "x"]], "["*9999)),
    ({"s2": True, "s2_scales": [[]]}, "s2_scales: found"), ({"mm_vision_select_layer": "x"}, "select_layer"), ({"mm_vision_select_layer": 99}, "select_layer"), ({"mm_vision_tower": []}, "mm_vision_tower"),
    ({"mm_projector_type": None}, "mm_projector_type"), ({"model_type": []}, "model_type"), ({"tie_word_embeddings": "x"}, "tie_word_embeddings")])
@pytest.mark.parametrize("language", ["decoder", "transformers"])
def test_settings_of_the_wrong_kind_name_the_file(tmp_path, change, field, language):
    folder = write(tmp_path / "llava", make_text("llama"), tower="mm_vision_tower" not in change)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(WeightsError, match=field) as caught:
        load_llava(folder, language=language)
    assert str(caught.value).startswith(f"{file}") and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("part", ["language", "contrastive", "lvm", "vqgan"])
def test_parts_alone_are_no_multimodal_model(part):
    with pytest.raises(WeightsError, match=r"config.json: found a \w+ without a vision tower"):
        load_llava(samples_path("mini", part))


def test_files_that_are_no_pickles_are_named(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"no pickle")
    torch.save([torch.ones(2)], tmp_path / "b.bin")
    (tmp_path / "c.bin").write_bytes(b"")
    for name in "abc":
        with pytest.raises(WeightsError, match=f"{name}.bin: ") as caught:
            convert_pickle(tmp_path / f"{name}.bin")
        assert len(str(caught.value).splitlines()) == 1


def test_tower_of_another_geometry(tmp_path):
    folder = write(tmp_path / "model", make_text("llama"))
    settings = json.loads((tmp_path / "eye" / "config.json").read_text()) | {"num_hidden_layers": 4}
    (tmp_path / "eye" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match="vision tower.*missing"):
        load_llava(folder)


# --- the processor

def test_processor_fits_the_model(tmp_path):
    model = load_llava(write(tmp_path / "model", make_text("llama")))
    processor = processor_for(model, tokenizer=None)
    assert processor.rows_per_view == 4 and processor.template == "v1" and processor.max_length == 2048
    assert processor.preprocess[0].aspect == "pad" and processor.preprocess[0].size == 8
    class_token = replace(model.config.towers[0], select_feature="cls_patch")
    assert class_token.tokens == 5


@pytest.mark.parametrize("name, wrap", [("v1", ("", "")), ("v1_mmtag", ("<Image>", "</Image>"))])
def test_pictures_between_marks_where_the_file_says_so(tmp_path, name, wrap):
    from mllm_nb.data.records import Sample
    from mllm_nb.language.chat import IMAGE, TEMPLATES, Turn
    from mllm_nb.language.tokenizer import SentencePieceTokenizer
    from PIL import Image
    model = load_llava(write(tmp_path / "model", make_text("llama")))
    model.config = replace(model.config, mm_use_im_start_end=True, template=name)
    file = MANIFESTS.parent / "tokenizers/cambrian_llava/tokenizer.model"
    plain = SentencePieceTokenizer(file)
    with pytest.raises(ValueError, match="<im_start>, <im_end>"):
        processor_for(model, plain)
    tokenizer = SentencePieceTokenizer(file, extra_special_tokens=("<im_start>", "<im_end>"))
    sample = Sample("one", (Image.new("RGB", (9, 9)),), (Turn("human", f"What is it?\n{IMAGE}"),))
    found = processor_for(model, tokenizer)(sample, answer_pending=True)
    system = TEMPLATES[name].system
    before, after = f"{system} USER: {wrap[0]}<im_start>", f"<im_end>{wrap[1]}\nWhat is it? ASSISTANT:"
    pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after)]
    assert found.input_ids.tolist() == [1, *pieces[0], *[-200] * 4, *pieces[1]]   # as `tokenizer_image_token` joins them


def test_our_folder_is_in_the_published_form(tmp_path):
    text = make_text("llama")
    load_llava(write(tmp_path / "model", text)).save_pretrained(tmp_path / "ours")
    settings = json.loads((tmp_path / "ours" / "config.json").read_text())
    del settings["mllm_nb"]   # what a reader of the published form does not know
    (tmp_path / "ours" / "config.json").write_text(json.dumps(settings))
    assert torch.allclose(scores(load_llava(tmp_path / "ours", vision_tower=tmp_path / "eye")), by_hand(text), atol=1e-5)


def test_published_scales_are_read(tmp_path):
    "`s2` as LLaVA's training writes it: views of the largest scale, three times the channels, the connector's inputs with them."
    torch.manual_seed(3)
    text, wide = make_text("llama"), {"0.weight": 0.3 * torch.randn(16, 36)}
    folder = write(tmp_path / "m", text, extra={f"model.mm_projector.{name}": value for name, value in wide.items()}, s2=True, s2_scales="16,8,24")
    model = load_llava(folder)
    tower = model.towers[0]
    assert tower.config.s2_scales == (8, 16, 24) and tower.width == 36 and model.config.towers[0].preprocess.side == 24
    view = torch.randn(1, 3, 24, 24)
    logits = model(IDS, (view,), INDEX, logits=True).logits
    projector = make_projector() | wide
    visual = torch.nn.functional.gelu(tower(view).tokens[0] @ projector["0.weight"].T + projector["0.bias"]) @ projector["2.weight"].T + projector["2.bias"]
    words = text.get_input_embeddings()(IDS)
    words[:, 1:5] = visual
    torch.testing.assert_close(logits, text(inputs_embeds=words).logits, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert (written["s2"], written["s2_scales"], written["mm_hidden_size"]) == (True, "8,16,24", 36)
    torch.testing.assert_close(MLLM.from_pretrained(tmp_path / "again")(IDS, (view,), INDEX, logits=True).logits, logits)
    assert MLLM.from_pretrained(tmp_path / "again").config.towers == model.config.towers


@pytest.mark.parametrize("scales, reason", [("8,x", "found '8,x'"), (7, "found 7"), ("8,20", "multiples"), ("", "found ''"), (None, "found None")])
def test_scales_that_cannot_be_are_named(tmp_path, scales, reason):
    folder = write(tmp_path / "m", make_text("llama"), s2=True, s2_scales=scales)
    with pytest.raises(WeightsError, match=f"s2_scales.*{reason}"):
        load_llava(folder)


def test_who_stops_listening_stops_the_speaker():
    import threading
    from types import SimpleNamespace
    from mllm_nb.papers.llava import answer_pieces
    said = []
    def speak(*_, streamer, max_new_tokens, **__):
        for token in range(max_new_tokens): said.append(token); streamer(0, token); threading.Event().wait(.01)
    tokenizer = SimpleNamespace(decode=lambda ids: "x" * len(ids), eos_token_id=None, encode=lambda text, **_: [0])
    batch = SimpleNamespace(input_ids=None, pixels=(), image_index=None, segments=None)
    pieces = answer_pieces(SimpleNamespace(generate=speak), SimpleNamespace(template="plain", tokenizer=tokenizer), batch, None, 1000)
    next(pieces)
    before = threading.active_count()
    pieces.close()
    assert len(said) < 100 and threading.active_count() < before
