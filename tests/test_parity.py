"The parity runner: golden cases, other shapes of the same components, and files that must not pass."
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from mllm_nb import parity
from mllm_nb.parity import Check, Golden, judge, read_index, run_case, run_parity

GOLDEN = Path(__file__).parent / "golden"
CASES = {case["id"]: case for case in read_index(GOLDEN)}
OURS = [case["id"] for case in CASES.values() if case["system"] in ("llava", "cambrian", "lvm")]


@pytest.mark.parametrize("name", OURS)
def test_golden(name):
    result = run_case(GOLDEN, CASES[name])
    assert result.status == "passed", result.line()


def test_exit_status_and_lines():
    lines = []
    assert run_parity(GOLDEN, "llava", "manifest", lines.append) == 0
    assert lines[-1] == "2 passed, 0 failed, 0 unsupported" and lines[0].startswith("SkunkworksAI__BakLLaVA-1 ")
    assert "passed" in lines[0] and "tolerance" in lines[0]
    assert run_parity(GOLDEN, "no-such-system", out=lines.append) == 1 and lines[-1].startswith("0 passed")
    assert run_parity(GOLDEN, "lvm", "sentences", lines.append) in (0, 1)


def test_unknown_component_is_unsupported(tmp_path):
    case = {"id": "x", "system": "llava", "kind": "parity", "component": "no.such", "files": []}
    assert run_case(tmp_path, case).status == "unsupported"


# --- files that must fail, each with its reason, and no crash

@pytest.fixture
def copied(tmp_path):
    for suffix in ("json", "safetensors"):
        shutil.copy(GOLDEN / "parity" / f"llava15_llama_mlp2x.{suffix}", tmp_path)
    for path in tmp_path.iterdir():
        path.chmod(0o644)
    files = ["llava15_llama_mlp2x.json", "llava15_llama_mlp2x.safetensors"]
    (tmp_path / "index.json").write_text(json.dumps({"format": 1, "cases": [CASES["llava15_llama_mlp2x"] | {"files": files}]}))
    return tmp_path


def change(folder: Path, spoil) -> None:
    file = folder / "llava15_llama_mlp2x.safetensors"
    tensors = load_file(file)
    spoil(tensors)
    save_file(tensors, file)


def outcome(folder: Path) -> parity.Result:
    return run_case(folder, read_index(folder)[0])


def test_copied_case_passes(copied):
    assert outcome(copied).status == "passed"


@pytest.mark.parametrize("name, amount, where", [
    ("out.logits", 1e-3, (0, 5, 3)), ("out.hidden.2", 1e-3, (1, 2, 0)), ("out.loss", 1e-3, (0,)), ("out.vision_features", 1e-3, (0, 0, 0)),
    ("grad.weights.lm_head.weight", 1e-3, (4, 4)), ("weights.model.mm_projector.2.bias", 1e-2, (3,)),
    ("out.logits", float("nan"), (0, 5, 3)), ("out.labels", 1, (0, 20)), ("in.input_ids", 1, (0, 2))])
def test_any_changed_number_is_found(copied, name, amount, where):
    change(copied, lambda tensors: tensors[name].__setitem__(where, tensors[name][where] + amount))
    result = outcome(copied)
    assert result.status == "failed" and ("differ" in result.reason)


@pytest.mark.parametrize("spoil, reason", [
    (lambda folder: (folder / "llava15_llama_mlp2x.safetensors").write_bytes(b"\0" * 64), "llava15_llama_mlp2x.safetensors: damaged"),
    (lambda folder: (folder / "llava15_llama_mlp2x.safetensors").unlink(), "FileNotFoundError"),
    (lambda folder: (folder / "llava15_llama_mlp2x.json").write_text("{"), "llava15_llama_mlp2x.json: not JSON"),
    (lambda folder: (folder / "llava15_llama_mlp2x.json").write_text("[" * 100_000), "llava15_llama_mlp2x.json: not JSON"),
    (lambda folder: (folder / "llava15_llama_mlp2x.json").write_text("[]"), "found a JSON list, expected an object"),
    (lambda folder: ((folder / "llava15_llama_mlp2x.safetensors").unlink(), os.mkfifo(folder / "llava15_llama_mlp2x.safetensors")), "no plain file"),
    (lambda folder: change(folder, lambda tensors: tensors.pop("in.input_ids")), "in.input_ids"),
    (lambda folder: change(folder, lambda tensors: tensors.pop("weights.model.norm.weight")), "do not fit"),
    (lambda folder: change(folder, lambda tensors: tensors.update({"out.surprise": torch.zeros(1)})), "not compared: out.surprise"),
    (lambda folder: change(folder, lambda tensors: tensors.update({"grad.weights.nothing": torch.zeros(1)})), "grad.weights.nothing"),
    (lambda folder: change(folder, lambda tensors: tensors.update({"out.logits": torch.zeros(2, 3)})), "out.logits")])
def test_damaged_case_fails_with_its_reason(copied, spoil, reason):
    spoil(copied)
    result = outcome(copied)
    assert result.status == "failed" and reason in result.reason, result.reason
    assert run_parity(copied, out=lambda line: None) == 1


def test_missing_target_fails(copied):
    change(copied, lambda tensors: tensors.pop("out.image_features"))
    assert outcome(copied).status == "failed"


def test_case_that_compares_nothing_fails(tmp_path):
    assert judge("empty", Golden(tmp_path, [])).status == "failed"


@pytest.mark.parametrize("change_case, status, reason", [
    ({"files": ["../x.json"]}, "failed", "outside of"), ({"files": [str(GOLDEN / "index.json")]}, "failed", "outside of"),
    ({"component": ["model"]}, "unsupported", "model"), ({"system": [1]}, "unsupported", "[1]"), ({"kind": {}}, "unsupported", "{}"),
    ({"files": None}, "failed", "NoneType"), ({"id": "another name"}, "passed", "")])
def test_strange_cases_never_raise(copied, change_case, status, reason):
    result = run_case(copied, read_index(copied)[0] | change_case)
    assert result.status == status and reason in result.reason


@pytest.mark.parametrize("content", ["[" * 100_000, "", "[]", '{"format": 1}', '{"cases": 3}'])
def test_bad_index(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    lines = []
    assert run_parity(tmp_path, out=lines.append) in (1, 2) and lines


def test_checks():
    assert Check("a", 1e-6, 1e-5).passed and not Check("a", 2e-5, 1e-5).passed
    assert not Check("a", float("nan"), 1e-5).passed and Check("a", float("nan"), 1e-5).strain == float("inf")
    assert Check("a", 0.0, 0).passed and not Check("a", 1.0, 0).passed


# --- other shapes of the same components: the original put together from transformers' parts

VARIANTS = {
    "deep projector, early layer": dict(llm="llama", projector="mlp3x_gelu", layer=-3, side="right", feature="patch"),
    "linear, class token, left": dict(llm="llama", projector="linear", layer=-2, side="left", feature="cls_patch"),
    "short window, left, one layer up": dict(llm="mistral", projector="mlp2x_gelu", layer=-1, side="left", feature="patch"),
}


def first_ignored(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    "Labels: every real token but the first of each row."
    return torch.where(mask & (mask.cumsum(dim=1) > 1), ids, -100)


def projector_of(kind: str) -> torch.nn.Module:
    torch.manual_seed(7)
    if kind == "linear":
        return torch.nn.Linear(12, 16)
    layers = [torch.nn.Linear(12, 16)]
    for _ in range(int(kind[3]) - 1):
        layers += [torch.nn.GELU(), torch.nn.Linear(16, 16)]
    return torch.nn.Sequential(*layers)


def make_case(folder: Path, llm: str, projector: str, layer: int, side: str, feature: str) -> None:
    "A golden case computed by transformers, sequence by sequence, in LLaVA's way: cut, join, pad."
    torch.manual_seed(3)
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
    if llm == "mistral":
        sizes |= {"num_key_value_heads": 2, "sliding_window": 5, "head_dim": 4}
    config = (MistralConfig if llm == "mistral" else LlamaConfig)(**sizes, attn_implementation="eager")
    text = (MistralForCausalLM if llm == "mistral" else LlamaForCausalLM)(config).eval()
    clip = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    vision, module = CLIPVisionModel(CLIPVisionConfig(**clip)).eval(), projector_of(projector)
    pixels = torch.randn(3, 3, 8, 8)
    samples = [[1, -200, 5, 6, 7], [8, 9, 2], [1, 4, -200, 3, 2, 11]]   # the second uses an image up and shows none
    hidden = vision(pixels, output_hidden_states=True).hidden_states[layer]
    features = (hidden[:, 1:] if feature == "patch" else hidden).detach()
    image = module(features)
    joined, labels = [], []
    for number, ids in enumerate(samples):
        pieces = [image[number] if token == -200 else text.get_input_embeddings().weight[token][None] for token in ids]
        joined.append(torch.cat(pieces))
        wide = [label for token in ids for label in ([-100] * len(image[0]) if token == -200 else [token])]
        labels.append([-100, *wide[1:]])   # nothing predicts the first token
    width = max(map(len, joined))
    embeds, targets, valid = torch.zeros(3, width, 16), torch.full((3, width), -100), torch.zeros(3, width, dtype=torch.bool)
    for row, (pieces, label) in enumerate(zip(joined, labels)):
        place = slice(width - len(pieces), width) if side == "left" else slice(0, len(pieces))
        embeds[row, place], targets[row, place], valid[row, place] = pieces, torch.tensor(label), True
    embeds.retain_grad()
    output = text(inputs_embeds=embeds, attention_mask=valid.long(), labels=targets, output_hidden_states=True)
    output.loss.backward()
    length = max(map(len, samples))
    ids = torch.tensor([[0] * (length - len(s)) + s if side == "left" else s + [0] * (length - len(s)) for s in samples])
    mask = torch.tensor([[False] * (length - len(s)) + [True] * len(s) if side == "left" else [True] * len(s) + [False] * (length - len(s)) for s in samples])
    tensors = {f"weights.{name}": value for name, value in text.state_dict().items()}
    tensors |= {f"weights.model.mm_projector.{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"weights.model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}": value
                for name, value in vision.state_dict().items()}
    tensors |= {"in.pixel_values": pixels, "in.input_ids": ids, "in.attention_mask": mask, "in.labels": first_ignored(ids, mask),
                "out.vision_features": features, "out.image_features": image, "out.inputs_embeds": embeds, "out.labels": targets,
                "out.attention_mask": valid, "out.logits": output.logits, "out.loss": output.loss[None],
                "grad.weights.lm_head.weight": text.lm_head.weight.grad,
                "grad.weights.model.embed_tokens.weight": text.get_input_embeddings().weight.grad}
    tensors |= {f"out.hidden.{i}": value for i, value in enumerate(output.hidden_states)}
    tensors |= {f"grad.weights.model.mm_projector.{name}": value.grad for name, value in module.named_parameters()}
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, folder / "case.safetensors")
    settings = config.to_dict() | {"mm_projector_type": projector, "mm_vision_select_layer": layer, "mm_vision_select_feature": feature,
                                   "mm_patch_merge_type": "flat", "tokenizer_padding_side": side, "tokenizer_model_max_length": 64,
                                   "image_aspect_ratio": "pad", "attn_implementation": "eager"}
    content = {"config": {"kind": "llava_full", "llm": llm, "hf_config": settings, "clip_config": clip, "image_sizes": None}}
    (folder / "case.json").write_text(json.dumps(content, default=str))


@pytest.mark.parametrize("name", VARIANTS)
def test_other_shapes(tmp_path, name):
    make_case(tmp_path, **VARIANTS[name])
    result = run_case(tmp_path, {"id": name, "system": "llava", "kind": "parity", "component": "model", "files": ["case.json", "case.safetensors"]})
    assert result.status == "passed", result.line()


# --- rows of a case that the files of the book do not have

def test_cambrian_s_pictures_are_used_up_in_order():
    from types import SimpleNamespace
    from mllm_nb.parity_cambrian import cambrian_rows
    model = SimpleNamespace(config=SimpleNamespace(connector=SimpleNamespace(image_token_len=4)))
    samples = [([5, -200, 6, -200], [-100] * 4), ([7], [7]), ([-200, 8], [-100, 8])]
    two, text, last = cambrian_rows(model, samples, [(1, 1), (4, 2), (1, 1), (2, 4)])
    assert two[2] == [-1, 0, 1, -2, 2, 3, -2, -1, 4, 5, -2, 6, 7, -2]     # a floor keeps the row in the middle whole
    assert text[2] == [-1] and last[2] == [12, 13, -2, 14, 15, -2, -1]    # the sample of words used up picture 2


@pytest.mark.parametrize("spoil", [0.0, 1.0])
def test_gradients_of_fused_projections_are_joined(spoil):
    from mllm_nb.mllm import MLLM, MLLMConfig
    from mllm_nb.language.decoder import DecoderConfig
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="zero-element"):    # no towers: a projector of nothing
        model = MLLM(MLLMConfig(DecoderConfig(12, 8, 8, 1, 2), model_type="cambrian_phi3"))
    ids = torch.tensor([[1, 2, 3, 4]])
    inputs = dict(input_ids=ids, pixels=[], image_index=torch.full((1, 4), -1), labels=ids)
    model(**inputs).loss.backward()
    layer = model.language.model.layers[0]
    parts = {"self_attn.qkv_proj": [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj],
             "mlp.gate_up_proj": [layer.mlp.gate_proj, layer.mlp.up_proj]}
    golden = Golden(GOLDEN, [])
    golden.tensors = {f"grad.weights.model.layers.0.{name}.weight": torch.cat([one.weight.grad for one in own]).clone()
                      for name, own in parts.items()}
    golden.tensors["grad.weights.model.layers.0.mlp.gate_up_proj.weight"][-1, -1] += spoil
    model.zero_grad()
    parity.compare_gradients(golden, model, model(**inputs).loss)
    assert [check.passed for check in golden.checks] == [True, not spoil] and not golden.forgotten


def test_aligned_modalities_are_drawn_anew_in_every_epoch():
    from mllm_nb.parity_lvm import multi_dataset_orders
    names = [[f"{kind}{number}" for kind in "xyz"] for number in range(5)]
    draws = [[3, 0, 2, 1], [2, 0, 1], [0, 1, 2], [1, 2, 3, 0], [1, 0, 2], [2, 1, 0]]   # of 5 examples 4 fill two rows
    settings = {"dataset_order": names, "permutations": draws, "flags": {"n_shots": 2, "shuffle_tasks": True}}
    found = multi_dataset_orders(settings)
    assert found == [["z3", "x3", "y3", "z0", "x0", "y0"], ["x2", "y2", "z2", "x1", "y1", "z1"],
                     ["y1", "x1", "z1", "y2", "x2", "z2"], ["z3", "y3", "x3", "z0", "y0", "x0"]]
    still = settings | {"permutations": [draws[0], draws[3]], "flags": {"n_shots": 2, "shuffle_tasks": False}}
    assert multi_dataset_orders(still)[2] == ["x1", "y1", "z1", "x2", "y2", "z2"]
