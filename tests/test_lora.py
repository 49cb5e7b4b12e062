"LoRA equals PEFT; QLoRA through bitsandbytes is saved, loaded, merged and says the same; wrong folders are refused."
import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mllm_nb import command
from mllm_nb.data.batches import Batches, BatchSettings, collate
from mllm_nb.data.world import World
from mllm_nb.language.chat import stop_ids
from mllm_nb.language.decoder import TransformersDecoder
from mllm_nb.mllm import MLLM, WeightsError
from mllm_nb.papers import cambrian
from mllm_nb.papers.llava import export_transformers, load_llava
from mllm_nb.training import lora, loop
from mllm_nb.training.lora import (
    LoRALinear, LoRASettings, adapted_layers, adapter_tensors, add_adapters, find_targets, full_weight, linear_names,
    load_adapter, lora_stage, merge_adapters, merged, nf4_levels, nf4_linear, quantization_of, quantize, save_adapter)
from mllm_nb.training.loop import TrainingConfig, train
from mllm_nb.training.miniatures import assemble_miniature
from mllm_nb.training.recipes import find_recipe, miniature, training_config

peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")

SMALL = LoRASettings(rank=4, alpha=8, dropout=0.0)
STAGE = replace(miniature(lora_stage(find_recipe("llava-v1.5-7b").stage("finetune"))), global_batch=2)


def relative(found, expected) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# --- one layer

@pytest.mark.parametrize("seed, sizes, rank, alpha, dropout, bias, dtype", [
    (0, (12, 20), 3, 6.0, 0.0, True, torch.float32), (1, (64, 8), 8, 1.0, 0.3, False, torch.float32),
    (2, (7, 7), 1, 16.0, 0.1, True, torch.float64), (3, (32, 48), 16, 32.0, 0.0, False, torch.bfloat16)])
def test_a_layer_is_pefts(seed, sizes, rank, alpha, dropout, bias, dtype):
    "Outputs, gradients (of input, A and B) and merged weight; with dropout the same numbers are dropped."
    torch.manual_seed(seed)
    base = nn.Linear(*sizes, bias=bias)
    ours = LoRALinear(base, rank, alpha, dropout)
    holder = nn.Sequential(nn.Linear(*sizes, bias=bias))
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=["0"]), holder)[0]
    nn.init.normal_(ours.lora_B.weight)
    theirs.base_layer.load_state_dict(base.state_dict())
    theirs.lora_A.default.load_state_dict(ours.lora_A.state_dict())
    theirs.lora_B.default.load_state_dict(ours.lora_B.state_dict())
    results = []
    for layer, a, b in ((ours, ours.lora_A, ours.lora_B), (theirs, theirs.lora_A.default, theirs.lora_B.default)):
        layer.to(dtype)
        x = torch.randn(3, 5, sizes[0], generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
        torch.manual_seed(9)
        output = layer(x)
        output.square().sum().backward()
        results.append([output.detach(), x.grad, a.weight.grad, b.weight.grad])
    tight = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert all(relative(one, other) < tight for one, other in zip(*results))
    assert all(parameter.grad is None for parameter in ours.base_layer.parameters())
    found = merged(ours.base_layer.weight, ours.lora_A.weight, ours.lora_B.weight, alpha / rank)
    theirs.merge()
    assert found.dtype == dtype and relative(found.float(), theirs.base_layer.weight.float()) < tight


@pytest.mark.parametrize("dtype, dropout, bias, autocast, tight", [
    (torch.float32, 0.0, True, False, 1e-6), (torch.float64, 0.3, False, False, 1e-6), (torch.float32, 0.1, True, True, 1e-2),
    (torch.bfloat16, 0.0, False, True, 1e-2)])
def test_the_quick_way_is_pefts(dtype, dropout, bias, autocast, tight, monkeypatch):
    "With the same mask the same outputs and gradients; a copy computes with its own weights."
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(40, 56, bias=bias)).to(dtype)
    peft.inject_adapter_in_model(peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["0"], init_lora_weights=False), holder)
    quick = copy.deepcopy(holder)
    quick[0].__class__ = lora.quick_kind(type(quick[0]))
    assert isinstance(quick[0], peft.tuners.lora.Linear)
    monkeypatch.setattr(lora, "keep_mask", lambda x, p: torch.empty(x.shape).bernoulli_(1 - p).bool())
    results, given = [], torch.randn(2, 5, 40).to(torch.float32 if autocast else dtype)
    for one in (holder, quick, copy.deepcopy(quick)):
        x = given.clone().requires_grad_()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = one.train()(x)
        output.float().square().sum().backward()
        results.append([output.detach(), x.grad, *(part.default.weight.grad for part in (one[0].lora_A, one[0].lora_B))])
    for found in results[1:]:
        assert all(relative(a.float(), b.float()) < tight and a.dtype == b.dtype for a, b in zip(found, results[0]))
    with torch.no_grad():
        assert relative(quick.eval()(given.to(dtype)), holder.eval()(given.to(dtype))) < 1e-2
    heard = []
    handle = quick[0].base_layer.register_forward_hook(lambda module, inputs, output: heard.append(1))
    quick(given.to(dtype))
    assert heard == [1]   # who listens to the layer beneath is heard
    handle.remove()
    quick[0].merge()
    assert torch.equal(quick(given.to(dtype)), quick[0].base_layer(given.to(dtype)))   # PEFT's own switches still work


def test_masks_drop_what_they_should():
    torch.manual_seed(0)
    mask = lora.keep_mask(torch.empty(701, 1001), 0.05)
    share = (~mask).float()
    assert mask.shape == (701, 1001) and abs(share.mean() - 0.05) < 1e-3
    assert share.mean(dim=0).max() < 0.09 and share.mean(dim=1).max() < 0.09   # everywhere the same
    assert abs((share[:, 1:] * share[:, :-1]).mean() - 0.0025) < 3e-4   # neighbours do not know of each other
    assert lora.keep_mask(torch.empty(50, 3), 0.0).all()


def test_a_new_layer_is_silent_and_starts_as_pefts():
    torch.manual_seed(0)
    base, x = nn.Linear(400, 30), torch.randn(4, 400)
    layer = LoRALinear(base, 8, 16)
    assert torch.equal(layer(x), base(x))
    bound = 1 / 400 ** 0.5   # kaiming uniform with a = sqrt(5)
    assert 0.95 * bound < layer.lora_A.weight.abs().max() <= bound


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"dropout": -0.1}, {"quantization": "fp4"}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoRASettings(**wrong)


# --- which layers

TINY = {"bos_token_id": 1, "eos_token_id": 2, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": 32}


@pytest.mark.parametrize("kind, sizes, expected", [
    ("llama", TINY, "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
    ("mistral", TINY, "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
    ("phi3", TINY | {"pad_token_id": 0}, "down_proj gate_up_proj o_proj qkv_proj"),
    ("mpt", {"d_model": 16, "n_heads": 2, "n_layers": 2, "vocab_size": 32}, "Wqkv down_proj out_proj up_proj")])
def test_targets_of_language_models(kind, sizes, expected):
    language = TransformersDecoder(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)))
    assert find_targets(language) == tuple(expected.split())
    assert all("lm_head" not in name for name in linear_names(language))


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="no linear layers"):
        find_targets(nn.Embedding(3, 4))


def test_stages_become_stages_with_adapters():
    stage = lora_stage(find_recipe("llava-v1.5-7b").stage("finetune"))
    published = find_recipe("llava-v1.5-7b-lora").stage("finetune")
    assert lora_stage(published) is published and LoRASettings.of_stage(published) == LoRASettings()
    assert (stage.trains, stage.learning_rate, stage.learning_rates, stage.lora) == (
        published.trains, published.learning_rate, published.learning_rates, published.lora)
    sva = lora_stage(find_recipe("cambrian-8b").stage("finetune"))
    assert set(sva.trains) == {"aggregator", "connector", "adapters"} and dict(sva.learning_rates)["aggregator"] == 2e-5
    with pytest.raises(ValueError, match="pretrain.*expected the language model"):
        lora_stage(find_recipe("llava-v1.5-7b").stage("pretrain"))
    with pytest.raises(ValueError, match="no LoRA settings"):
        LoRASettings.of_stage(find_recipe("llava-v1.5-7b").stage("finetune"))


# --- a whole model

@pytest.fixture
def model_and_batches():
    torch.manual_seed(0)
    model, processor = assemble_miniature()
    batches = Batches(World(seed=3, length=60, view="conversation"), processor, BatchSettings(192, 2))
    return model, processor, batches


def settings(**changes) -> TrainingConfig:
    return training_config(STAGE, precision="fp32", progress=False, **{"max_steps": 3} | changes)


@torch.no_grad()
def states(model: MLLM, batch) -> torch.Tensor:
    "Hidden states of the real tokens (a padding row attends to nothing that means anything)."
    hidden = model.eval()(**batch.model_inputs()).hidden
    return hidden[batch.segments > 0]


@torch.no_grad()
def answers(model: MLLM, processor, count: int = 2) -> list[list[int]]:
    world, model = World(seed=8, length=count, view="conversation"), model.eval()
    said = []
    for index in range(count):
        sample = world[index]
        example = processor(replace(sample, turns=sample.turns[:1]), answer_pending=True)
        batch = collate([[example]], len(example), side="left")
        said += model.generate(batch.input_ids, batch.pixels, batch.image_index, batch.segments, max_new_tokens=6,
                               stop_ids=stop_ids(processor.template, processor.tokenizer))
    return said


def test_only_adapters_and_connector_learn(model_and_batches, tmp_path):
    model, _, batches = model_and_batches
    batch = next(iter(batches))
    expected = states(model, batch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    add_adapters(model, SMALL)
    assert torch.equal(states(model, batch), expected)   # silent at first
    adapters = {name: value.clone() for name, value in adapter_tensors(model).items()}
    history = train(model, batches, settings(save=False), tmp_path)
    assert history.rows[-1]["learning_rates"].keys() == {"connector.*|image_newline", "*lora_A*|*lora_B*"}
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all(name.startswith("connector.") for name in changed)
    found = adapter_tensors(model)
    assert all(not torch.equal(value, found[name]) for name, value in adapters.items())
    assert len(found) == 2 * len(linear_names(assemble_miniature()[0].language))
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_adapters_are_put_in_once_and_where_they_fit(model_and_batches):
    model, _, _ = model_and_batches
    with pytest.raises(ValueError, match=r"LoRASettings.targets: found \['query'\], expected some of down_proj"):
        add_adapters(model, replace(SMALL, targets=("query", "q_proj")))
    add_adapters(model, replace(SMALL, targets=("q_proj", "v_proj")))
    assert {name.rpartition(".")[2] for name in adapted_layers(model.language)} == {"q_proj", "v_proj"}
    assert not adapted_layers(model.towers) and not adapted_layers(model.connector)
    with pytest.raises(ValueError, match="adapters in the model already"):
        add_adapters(model, SMALL)


def noisy(model: MLLM, seed: int = 5) -> MLLM:
    "Adapters that say something."
    random = torch.Generator().manual_seed(seed)
    for name, value in adapter_tensors(model).items():
        if "lora_B" in name:
            value.copy_(0.05 * torch.randn(value.shape, generator=random))
    return model


@pytest.mark.parametrize("changes", [{}, {"quantization": "nf4"}, {"targets": ("q_proj",)}])
def test_a_model_with_adapters_is_not_written_as_a_whole_one(changes, model_and_batches, tmp_path):
    "Its names would mean nothing to a reader; the message says what to do, and doing it works."
    model, _, batches = model_and_batches
    noisy(add_adapters(model, replace(SMALL, **changes)))
    found = len(adapted_layers(model.language))
    for write in (lambda: model.save_pretrained(tmp_path / "out"), lambda: export_transformers(model, tmp_path / "out")):
        with pytest.raises(WeightsError, match=rf"found {found * (2 if 'quantization' in changes else 1)} layers with adapters.*merge_adapters.*save_adapter"):
            write()
    assert not (tmp_path / "out").exists()
    batch = next(iter(batches))
    expected = states(model, batch)
    merge_adapters(model).save_pretrained(tmp_path / "out")
    assert relative(states(MLLM.from_pretrained(tmp_path / "out"), batch), expected) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_says_the_same(model_and_batches, dtype):
    model, _, batches = model_and_batches
    model.language.to(dtype)
    noisy(add_adapters(model, SMALL))
    batch = next(iter(batches))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = states(model, batch)
        merge_adapters(model)
        assert relative(states(model, batch), expected) < (3e-2 if dtype == torch.bfloat16 else 1e-5)
    assert not adapted_layers(model.language) and {value.dtype for value in model.language.parameters()} == {dtype}


# --- four and eight bits

def test_levels_are_bitsandbytes():
    theirs = bitsandbytes.functional.create_normal_map()
    values = torch.cat([theirs[theirs < 0], torch.zeros(1), theirs[theirs > 0]])
    assert torch.allclose(nf4_levels(), values, atol=1e-6)


def test_quantized_weights_are_near_and_the_head_is_exact(model_and_batches):
    model, _, _ = model_and_batches
    exact = {name: value.clone() for name, value in model.language.state_dict().items()}
    for kind, low, high in (("nf4", 0.05, 0.105), ("int8", 1e-3, 2e-2)):
        language = assemble_miniature()[0].language
        quantize(language, kind)
        for name in linear_names(language):
            layer = language.get_submodule(name)
            assert quantization_of(layer) == kind
            assert low < relative(full_weight(layer), exact[f"{name}.weight"]) < high
        assert torch.equal(language.model.embed_tokens.weight, exact["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match="expected one of"):
        quantize(language, "fp4")


@pytest.mark.parametrize("kind, tight", [("nf4", 1e-4), ("int8", 3e-2)])
def test_qlora_is_saved_loaded_and_merged_with_the_same_answers(kind, tight, model_and_batches, tmp_path):
    "Trained through bitsandbytes; then four ways back: unmerged, merged in memory, merged from files, by either decoder."
    model, processor, batches = model_and_batches
    model.save_pretrained(tmp_path / "base", processor.tokenizer)
    add_adapters(model, replace(SMALL, quantization=kind))
    history = train(model, batches, settings(max_steps=5, learning_rate=3e-3, save=False), tmp_path / "run")
    assert history.losses[-1] < history.losses[0]
    noisy(model)
    batch = next(iter(batches))
    expected, said = states(model, batch), answers(model, processor)   # evaluated before anything is saved or merged
    save_adapter(model, tmp_path / "adapter", tmp_path / "base", processor.tokenizer)
    again = load_adapter(MLLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(states(again, batch), expected) and answers(again, processor) == said
    for found in (merge_adapters(model), load_llava(tmp_path / "adapter"),
                  load_llava(tmp_path / "adapter", language="decoder")):
        assert relative(states(found, batch), expected) < tight
        assert answers(found, processor) == said
    plain = load_llava(tmp_path / "base")
    assert answers(plain, processor) != said   # the adapter matters


@pytest.mark.parametrize("inputs, blocks, low, high", [(128, 64, 0.08, 0.1), (160, 32, 0.08, 0.1), (48, None, 0, 0)])
def test_rows_that_end_inside_a_block(inputs, blocks, low, high):
    "bitsandbytes 0.50 scales them wrongly on a CPU; ours takes smaller blocks, or leaves the layer exact."
    torch.manual_seed(0)
    linear = nn.Linear(inputs, 96, bias=False)
    layer, x = nf4_linear(linear), torch.randn(4, inputs)
    assert low <= relative(full_weight(layer), linear.weight) <= high
    assert quantization_of(layer) == ("nf4" if blocks else None)
    assert not blocks or layer.weight.quant_state.blocksize == blocks
    assert relative(layer(x), linear(x)) < 0.15


def test_merging_after_an_evaluation_in_four_bits():
    """The known silent corruption: on CPUs with avx512_bf16, bitsandbytes reorders the weights of its own layers when
    it evaluates, and whoever merges afterwards reads noise. Ours must not, whoever made the layers."""
    torch.manual_seed(0)
    linear, x = nn.Linear(128, 64, bias=False), torch.randn(3, 128)
    outcomes = {}
    for way in ("ours", "theirs"):
        layer = nf4_linear(linear)
        if way == "theirs":
            layer.support_avx512bf16_for_cpu = bitsandbytes.functional.has_avx512bf16()
        holder = nn.Sequential(layer)
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False), holder)
        exact = full_weight(holder[0].base_layer).clone()
        with torch.no_grad():
            said = holder.eval()(x)
        stored = holder[0].base_layer.weight
        packed = getattr(stored.quant_state, "packing_format_for_cpu", False)
        naive = bitsandbytes.functional.dequantize_4bit(stored.data, stored.quant_state).reshape(64, 128)
        a, b, scale = lora.pair_of(holder[0])
        whole = merged(full_weight(holder[0].base_layer), a, b, scale).detach()
        outcomes[way] = (packed, relative(naive, exact), relative(x @ whole.T, said))
    assert not outcomes["ours"][0] and outcomes["ours"][1] == 0 and outcomes["ours"][2] < 1e-5
    packed, noise, error = outcomes["theirs"]
    assert error < 2e-2   # what is left is bf16: the fast path rounds
    if packed:
        assert noise > 1   # the trap is still there, and `full_weight` is still needed


def test_pefts_own_merge_after_an_evaluation_is_safe_with_our_layers(model_and_batches):
    "Somebody may merge with PEFT's method; our layers have not been reordered, so that only requantizing is lost."
    model, _, batches = model_and_batches
    noisy(add_adapters(model, replace(SMALL, quantization="nf4")))
    batch = next(iter(batches))
    expected = states(model, batch)
    for layer in adapted_layers(model.language).values():
        with pytest.warns(UserWarning):
            layer.merge()
    assert relative(states(model, batch), expected) < 0.5


# --- a run is resumed

@pytest.mark.parametrize("quantization, optimizer", [(None, "adamw"), ("nf4", "adamw_8bit")])
def test_a_run_with_adapters_is_resumed_exactly(quantization, optimizer, tmp_path):
    def run(folder, stop=None):
        torch.manual_seed(0)
        model, processor = assemble_miniature()
        add_adapters(model, LoRASettings(32, 64, 0.1, quantization=quantization))
        batches = Batches(World(seed=3, length=40, view="conversation"), processor, BatchSettings(160, 2))

        def hook(run, row):
            if run.step == stop:
                raise RuntimeError("killed")
            with torch.no_grad():   # an evaluation inside a run must not disturb it
                model.eval()(torch.tensor([[1, 30, 31, 32]]))
        config = settings(max_steps=4, save_every=2, optimizer=optimizer)
        return train(model, batches, config, folder, on_step=hook).losses, adapter_tensors(model)
    losses, whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "cut", stop=3)
    again, resumed = run(tmp_path / "cut")
    assert again == losses and all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_moments_in_eight_bits():
    torch.manual_seed(0)
    weight, small = nn.Parameter(torch.zeros(80, 64)), nn.Parameter(torch.zeros(5))
    optimizer, target = loop.adamw_8bit()([weight, small], lr=1e-2), torch.randn(80, 64)
    for _ in range(100):
        ((weight - target).square().mean() + (small - 1).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert relative(weight, target) < 0.5 and relative(small, torch.ones(5)) < 0.5
    exact = nn.Parameter(torch.zeros(80, 64))
    reference = torch.optim.AdamW([exact], lr=1e-2)
    for _ in range(100):
        (exact - target).square().mean().backward()
        reference.step()
        reference.zero_grad()
    assert relative(weight.detach(), exact.detach()) < 0.05
    state = optimizer.state[weight]
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8 and optimizer.state[small]["state1"].dtype == torch.float32


# --- the folder

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "A base, and an adapter with noise on it."
    root = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    model, processor = assemble_miniature()
    model.save_pretrained(root / "base", processor.tokenizer)
    noisy(add_adapters(model, SMALL))
    save_adapter(model, root / "adapter", root / "base", processor.tokenizer)
    batches = Batches(World(seed=3, length=10, view="conversation"), processor, BatchSettings(192, 2))
    batch = next(iter(batches))
    return root, batch, states(model, batch)


def copied(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders[0] / "adapter", tmp_path / "adapter"))


def test_the_folder_loads_by_itself(folders):
    root, batch, expected = folders
    assert not (root / "adapter" / "model.safetensors").exists()
    for language in ("decoder", "transformers"):
        found = load_llava(root / "adapter", language=language)
        assert torch.allclose(states(found, batch), expected, atol=1e-4) and found.config.template == "miniature"


def test_a_folder_without_what_was_trained_beside_is_refused(folders, tmp_path):
    folder = copied(folders, tmp_path)
    (folder / "non_lora_trainables.safetensors").unlink()
    with pytest.raises(WeightsError, match="adapter: found no non_lora_trainables.safetensors"):
        load_llava(folder)


@pytest.mark.parametrize("name", [5, [], {"a": 1}])
def test_a_base_that_is_no_text_is_named(name, folders, tmp_path):
    folder = copied(folders, tmp_path)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
    with pytest.raises(WeightsError, match="base_model_name_or_path: found|a base that it does not name"):
        load_llava(folder)


def test_peft_reads_the_folder(folders):
    "The language model alone, adapted by PEFT's own loader, gives what ours gives."
    root, _, _ = folders
    ids = torch.tensor([[1, 30, 31, 32]])
    base = load_llava(root / "base", language="transformers").language.lm
    theirs = peft.PeftModel.from_pretrained(base, root / "adapter").eval()
    ours = load_llava(root / "adapter", language="transformers").language.lm
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, ours(ids).logits, atol=1e-4)


def test_another_base_is_refused(folders, tmp_path):
    root, _, _ = folders
    other, processor = assemble_miniature()
    with torch.no_grad():
        other.language.model.layers[0].self_attn.q_proj.weight.mul_(1.01)
    other.save_pretrained(tmp_path / "other", processor.tokenizer)
    with pytest.raises(WeightsError, match="beside other weights"):
        load_llava(root / "adapter", base=tmp_path / "other")
    half = load_llava(root / "base")
    half.to(torch.float64).save_pretrained(tmp_path / "double", processor.tokenizer)
    load_llava(root / "adapter", base=tmp_path / "double")   # the same weights, stored otherwise


def test_a_base_that_is_gone_is_named(folders, tmp_path):
    folder = copied(folders, tmp_path)
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": "nobody/nothing-at-all"}))
    with pytest.raises(WeightsError, match="nobody/nothing-at-all.*base="):
        load_llava(folder)
    with pytest.raises(WeightsError, match="holds an adapter itself.*mllm merge"):
        load_llava(folder, base=folders[0] / "adapter")


def rewrite(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def spoil(file: Path) -> None:
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, file)


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "is a pickle"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:200]), "cannot be read"),
    (lambda f: (f / "adapter_config.json").write_text("[]"), "expected an object"),
    (lambda f: (f / "adapter_config.json").write_text(json.dumps({"r": 0, "lora_alpha": 1, "base_model_name_or_path": ""})), "adapter"),
    (lambda f: rewrite(f / "adapter_config.json", r=8), "of rank 8"),
    (lambda f: rewrite(f / "adapter_config.json", lora_alpha=float("nan")), "lora_alpha: found nan"),
    (lambda f: rewrite(f / "adapter_config.json", peft_type="LOHA"), "peft_type: found LOHA"),
    (lambda f: rewrite(f / "mllm_nb_adapter.json", quantization="fp4"), "quantization: found 'fp4'"),
    (lambda f: rewrite(f / "mllm_nb_adapter.json", dtype="load"), "dtype: found 'load'"),
    (lambda f: rewrite(f / "mllm_nb_adapter.json", quantization="nf4", quantized=["model.nothing"]), "found model.nothing"),
    (lambda f: spoil(f / "adapter_model.safetensors"), "not finite"),
    (lambda f: save_file({"something.else": torch.zeros(1)}, f / "adapter_model.safetensors"), "expected only lora_A and lora_B"),
])
def test_damaged_folders_are_named(damage, message, folders, tmp_path):
    folder = copied(folders, tmp_path)
    damage(folder)
    with pytest.raises(WeightsError, match=message):
        load_llava(folder)


def test_adapter_of_another_size(folders, tmp_path):
    folder = copied(folders, tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {name: torch.zeros(3, 4)}, folder / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match="expected a product of shape"):
        load_llava(folder)
    with pytest.raises(WeightsError, match=r"lora_B.weight: found \(3, 4\), expected"):
        load_adapter(load_llava(folders[0] / "base"), folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no adapter_model.safetensors"):
        load_adapter(load_llava(folders[0] / "base"), folder)


def test_saving_needs_adapters_of_one_size(folders, tmp_path):
    model = load_llava(folders[0] / "base")
    with pytest.raises(ValueError, match="adapters of 0 sizes"):
        save_adapter(model, tmp_path / "none", folders[0] / "base")


def test_on_a_language_model_alone_with_its_tower_elsewhere(tmp_path):
    "As LLaVA trains: the base is a plain language model, the tower lies in its own folder, the connector in the adapter's."
    torch.manual_seed(1)
    model, processor = assemble_miniature()
    config = LlamaConfig(**{name: value for name, value in model.config.to_dict().items() if name in LlamaConfig().to_dict()})
    text = LlamaForCausalLM(config).eval()
    text.save_pretrained(tmp_path / "vicuna")
    model.towers[0].save_pretrained(tmp_path / "eye")
    tower = replace(model.config.towers[0], name=str(tmp_path / "eye"))
    model.towers[0].config = tower
    language = dict(config.to_dict(), model_type="llama")
    own = MLLM(replace(model.config, language=language, towers=(tower,)), towers=list(model.towers),
               connector=model.connector, language=TransformersDecoder(text)).eval()
    noisy(add_adapters(own, SMALL))
    batch = next(iter(Batches(World(seed=3, length=10, view="conversation"), processor, BatchSettings(192, 2))))
    expected = states(own, batch)
    save_adapter(own, tmp_path / "adapter", tmp_path / "vicuna", processor.tokenizer)
    assert torch.allclose(states(load_llava(tmp_path / "adapter"), batch), expected, atol=1e-4)
    shutil.move(tmp_path / "eye", tmp_path / "eye2")
    with pytest.raises(WeightsError, match="vision_tower="):
        load_llava(tmp_path / "adapter")
    found = load_llava(tmp_path / "adapter", vision_tower=tmp_path / "eye2")
    assert torch.allclose(states(found, batch), expected, atol=1e-4)


def test_samplers_inside_the_language_model_are_trained_in_full(tmp_path):
    "Cambrian in miniature: aggregator and samplers learn beside the adapters, and all of it comes back."
    model, processor = cambrian.assemble_miniature(queries=16, samplers=1)
    model.save_pretrained(tmp_path / "base", processor.tokenizer)
    add_adapters(model, SMALL)
    stage = replace(miniature(lora_stage(find_recipe("cambrian-8b").stage("finetune"))), global_batch=2)
    before = {name: value.clone() for name, value in model.state_dict().items() if "sampler" in name or "vision_query" in name}
    batches = Batches(World(seed=3, length=30, view="conversation"), processor, BatchSettings(192, 2))
    config = training_config(stage, precision="fp32", progress=False, max_steps=3, save=False)
    train(model, batches, config, tmp_path / "run")
    changed = [name for name, value in before.items() if not torch.equal(value, model.state_dict()[name])]
    assert {name.split(".")[0] for name in changed} == {"connector", "vision_sampler_layers"}
    batch = next(iter(batches))
    expected = states(model, batch)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base", processor.tokenizer)
    assert torch.allclose(states(load_llava(tmp_path / "adapter"), batch), expected, atol=1e-4)


# --- the command

def write_records(folder: Path, count: int = 4) -> Path:
    world, lines = World(seed=5, length=count, view="conversation"), []
    for index in range(count):
        sample = world[index]
        sample.images[0].save(folder / f"{index}.png")
        turns = [{"from": turn.role, "value": turn.text} for turn in sample.turns]
        lines.append(json.dumps({"id": str(index), "image": f"{index}.png", "conversations": turns}))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "records.jsonl"


def test_train_merge_export_and_chat(folders, tmp_path, capsys):
    from transformers import LlavaForConditionalGeneration
    records = write_records(tmp_path)
    common = ["train", "--model", str(folders[0] / "base"), "--data", str(records), "--images", str(tmp_path),
              "--steps", "2", "--batch", "2", "--per-device", "2"]
    run = str(tmp_path / "run")
    assert command.main([*common, "--out", run, "--rank", "4", "--quantize", "nf4", "--optimizer", "adamw_8bit"]) == 0
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"] == 8
    assert command.main(["merge", str(adapter), "--out", str(tmp_path / "whole")]) == 0
    assert command.main(["export", str(tmp_path / "whole"), "--out", str(tmp_path / "hf")]) == 0
    assert LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").config.image_token_id >= 512
    capsys.readouterr()
    said = []
    for folder in (adapter, tmp_path / "whole", tmp_path / "hf"):
        chat = ["chat", "--model", str(folder), "--image", str(tmp_path / "0.png"), "--question", "what is there?"]
        assert command.main([*chat, "--max-new-tokens", "6"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]
    assert command.main([*common[:2], str(adapter), *common[3:], "--out", run + "2", "--lora"]) == 2
    assert "make a whole model of it first: mllm merge" in capsys.readouterr().err


def test_kept_features_give_the_same_run(folders, tmp_path, monkeypatch):
    from mllm_nb.training.loop import read_metrics
    from mllm_nb.vision import towers
    records, look, looks, losses = write_records(tmp_path), towers.look, [], []
    monkeypatch.setattr(towers, "look", lambda tower, pixels: looks.append(len(pixels)) or look(tower, pixels))
    for options in ([], ["--keep-features", str(tmp_path / "features")]):   # four updates of two records: two epochs
        run = tmp_path / f"run{len(options)}"
        assert command.main(["train", "--model", str(folders[0] / "base"), "--data", str(records), "--images", str(tmp_path), "--out",
                             str(run), "--steps", "4", "--batch", "2", "--per-device", "2", "--rank", "4", *options]) == 0
        losses += [[row["loss"] for row in read_metrics(run / "metrics.jsonl")]]
        looks.append("end")
    assert sum(looks[:looks.index("end")]) == 8 and sum(looks[looks.index("end") + 1:-1]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=2e-3) and len(losses[0]) == 4


@pytest.mark.parametrize("options, message", [
    (["--recipe", "nothing"], "--recipe: found nothing, expected one of"), (["--stage", "middle"], "expected one of pretrain, finetune"),
    (["--stage", "pretrain", "--lora"], "expected the language model among them")])
def test_wrong_options_are_one_line(options, message, folders, tmp_path, capsys):
    records = write_records(tmp_path, 1)
    arguments = ["train", "--model", str(folders[0] / "base"), "--data", str(records), "--out", str(tmp_path / "run"), *options]
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--rank", "-3"], ["--quantize", "fp4"], ["--optimizer", "sgd"]])
def test_options_that_cannot_be(options, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["train", "--model", "m", "--data", "d", "--out", "o", *options])
    assert stop.value.code == 2 and options[0] in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, model_and_batches):
    import sys
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"mllm_nb\[quant\]"):
        quantize(model_and_batches[0].language, "nf4")
