"A LLaVA written for transformers: the same scores, the same greedy words, prompts and pixels; and back, bit for bit."
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mllm_nb.connectors.mlp import ProjectorConfig
from mllm_nb.connectors.sva import SVAConfig
from mllm_nb.data.batches import collate
from mllm_nb.data.records import Sample
from mllm_nb.data.world import World
from mllm_nb.images import Preprocess
from mllm_nb.language.chat import Turn, render_chat, stop_ids
from mllm_nb.language.decoder import DecoderConfig
from mllm_nb.mllm import MLLM, MLLMConfig, WeightsError
from mllm_nb.papers.llava import chat_template, export_transformers, load_llava
from mllm_nb.samples import photo
from mllm_nb.training.miniatures import assemble_miniature
from mllm_nb.vision.towers import TowerConfig
from mllm_nb.vision.vit import ViTConfig

CLIP = ViTConfig(image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
                 hidden_act="quick_gelu", layer_norm_eps=1e-5, pre_norm=True, patch_bias=False, norm_tokens=False)
SIGLIP = replace(CLIP, class_token=False, pre_norm=False, patch_bias=True, norm_tokens=True, hidden_act="gelu_pytorch_tanh",
                 layer_norm_eps=1e-6)
LLAMA = DecoderConfig(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=256)
SQUARE = Preprocess(size=16, aspect="square")


def make(vit=CLIP, language=LLAMA, connector=None, preprocess=SQUARE, model_type="llava_llama", towers=1, **tower) -> MLLM:
    torch.manual_seed(0)
    configs = tuple(TowerConfig(f"tower {number}", vit, preprocess, **tower) for number in range(towers))
    model = MLLM(MLLMConfig(language, configs, connector or ProjectorConfig(), model_type=model_type)).eval()
    with torch.no_grad():
        for value in model.parameters():   # larger than at the start, so that answers differ from step to step
            value.add_(0.2 * torch.randn(value.shape))
    return model


def inputs(model: MLLM):
    tokens = model.config.towers[0].tokens
    ids = torch.tensor([[1, *[0] * tokens, 40, 41, 42]])
    index = torch.tensor([[-1, *range(tokens), -1, -1, -1]])
    return ids, index, torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def agree(model: MLLM, folder) -> LlavaForConditionalGeneration:
    "Scores of every position, and twelve greedy words."
    theirs = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    ids, index, pixels = inputs(model)
    marked = torch.where(index >= 0, theirs.config.image_token_id, ids)
    with torch.no_grad():
        ours = model(ids, [pixels], index, logits=True).logits
        scores = theirs(input_ids=marked, pixel_values=pixels).logits
        assert torch.allclose(scores[..., :ours.shape[-1]], ours, atol=1e-4 * ours.abs().max())
        assert torch.equal(scores.argmax(-1), ours.argmax(-1))   # no added word wins
        said = theirs.generate(input_ids=marked, pixel_values=pixels, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert said[0, ids.shape[1]:].tolist() == model.generate(ids, [pixels], index, max_new_tokens=12)[0]
    return theirs


CASES = {
    "llama": {}, "class token": {"select_feature": "cls_patch"}, "last layer": {"select_layer": -1}, "siglip": {"vit": SIGLIP},
    "tied": {"language": replace(LLAMA, tie_word_embeddings=True)},
    "mistral, a window": {"language": replace(LLAMA, sliding_window=8), "model_type": "llava_mistral"},
    "rope": {"language": replace(LLAMA, rope_theta=5e5, head_dim=16)},
    "through transformers": {"language": {"model_type": "llama", "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48,
                                          "num_hidden_layers": 2, "num_attention_heads": 4}},
}


@pytest.mark.parametrize("case", CASES)
def test_same_scores_same_words_and_back(case, tmp_path):
    model = make(**CASES[case])
    agree(model, export_transformers(model, tmp_path))
    for language in ("decoder", "transformers"):
        again = load_llava(tmp_path, language=language)
        assert again.config.towers[0].tokens == model.config.towers[0].tokens
        ids, index, pixels = inputs(model)
        with torch.no_grad():
            expected, found = (one(ids, [pixels], index, logits=True).logits for one in (model, again))
        assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-4 * expected.abs().max())
        if type(again.language) is type(model.language):
            ours = again.state_dict()
            assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())


def test_half_precision_and_shards(tmp_path):
    model = make().to(torch.float16)
    export_transformers(model, tmp_path, shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    assert {value.dtype for value in load_llava(tmp_path).parameters()} == {torch.float16}
    agree(model.float(), tmp_path)


def test_names_are_those_of_published_folders(tmp_path):
    "vLLM, SGLang and llama.cpp look for them."
    export_transformers(make(), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    assert {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight", "multi_modal_projector.linear_1.weight",
            "multi_modal_projector.linear_2.bias", "language_model.model.layers.1.mlp.down_proj.weight",
            "vision_tower.vision_model.embeddings.class_embedding",
            "vision_tower.vision_model.encoder.layers.2.self_attn.q_proj.weight"} <= names


@pytest.mark.parametrize("settings, message", [
    ({"towers": 2}, "towers: found 2"), ({"connector": ProjectorConfig("linear")}, "mm_projector_type: found linear"),
    ({"connector": SVAConfig((16,), 32, 16, query_num_list=(16,), connector_only=True)}, "mm_projector_type"),
    ({"token_count": 4}, "token_count: found 4"), ({"vit": replace(CLIP, layer_scale=1.0)}, "expected a CLIP or SigLIP"),
    ({"preprocess": replace(SQUARE, aspect="anyres", pinpoints=((16, 32),))}, "image_aspect_ratio: found anyres"),
    ({"language": replace(LLAMA, norm_offset=1.0)}, "language"),
    ({"language": {"model_type": "mpt", "vocab_size": 90, "d_model": 32, "n_heads": 4, "n_layers": 1}, "model_type": "llava_mpt"}, "language")])
def test_what_the_architecture_cannot_say_is_refused(settings, message, tmp_path):
    with pytest.raises(WeightsError, match=message):
        export_transformers(make(**settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["v1", "miniature", "mpt", "v0", "llama_2", "chatml_direct"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_templates_in_jinja(name, system):
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    try:
        jinja = chat_template(name)
    except (KeyError, ValueError):
        pytest.skip(f"no template {name}")
    if jinja is None:
        pytest.skip("more than plain turns")
    turns = [Turn("human", "<image>\nHow many \"cats\"?"), Turn("gpt", "Two."), Turn("human", "Sure?")]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many \"cats\"?"}]},
                {"role": "assistant", "content": "Two."}, {"role": "user", "content": "Sure?"}]
    if system:
        turns, messages = [Turn("system", system), *turns], [{"role": "system", "content": system}, *messages]
    render = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(jinja).render
    assert render(messages=messages, add_generation_prompt=True) == render_chat(turns, name, answer_pending=True)
    told = [*messages, {"role": "assistant", "content": "Yes."}]
    from mllm_nb.language.chat import find_template
    assert render(messages=told, add_generation_prompt=False) == (
        render_chat([*turns, Turn("gpt", "Yes.")], name).removesuffix(find_template(name).end or "\0"))


def test_the_whole_folder_answers_as_ours_does(tmp_path):
    "Processor, tokenizer, prompt and pixels: what transformers makes of a picture and a question is what we make of it."
    model, processor = assemble_miniature()
    model.save_pretrained(tmp_path / "ours", processor.tokenizer)
    export_transformers(model.eval(), tmp_path / "theirs", tmp_path / "ours")
    theirs, their_processor = (kind.from_pretrained(tmp_path / "theirs") for kind in (LlavaForConditionalGeneration, AutoProcessor))
    pictures = [World(seed=3, length=4, view="conversation")[0].images[0], photo("coffee")]   # a square one, a wide one
    for picture in pictures:
        example = processor(Sample("one", (picture,), (Turn("human", "<image>\nwhat is there?"),)), answer_pending=True)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is there?"}]}]
        text = their_processor.apply_chat_template(messages, add_generation_prompt=True)
        made = their_processor(images=picture, text=text, return_tensors="pt")
        image = made["input_ids"][0] == theirs.config.image_token_id
        assert image.sum() == 64 and torch.equal(made["input_ids"][0][~image], example.input_ids[example.image_index < 0])
        assert (made["pixel_values"][0] - example.pixels[0][0]).abs().mean() < 0.02   # resampled by another program
        batch = collate([[example]], len(example), side="left")
        ours = model.generate(batch.input_ids, batch.pixels, batch.image_index, batch.segments, max_new_tokens=10,
                              stop_ids=stop_ids(processor.template, processor.tokenizer))[0]
        said = theirs.generate(input_ids=made["input_ids"], attention_mask=made["attention_mask"], pixel_values=batch.pixels[0],
                               max_new_tokens=10, do_sample=False)[0, made["input_ids"].shape[1]:].tolist()
        end = model.config.to_dict().get("eos_token_id", 2)
        said = said[:said.index(end)] if end in said else said
        assert said == [token for token in ours if token != end]
    again = load_llava(tmp_path / "theirs", language="decoder")
    assert again.config.template == "miniature"
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
