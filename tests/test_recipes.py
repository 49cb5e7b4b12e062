"Recipes: the published figures, and how a stage becomes a run on other machines."
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from mllm_nb.language.chat import TEMPLATES
from mllm_nb.training import loop
from mllm_nb.training.recipes import (
    PARTS,
    RECIPES,
    find_recipe,
    miniature,
    recipe_table,
    split_batch,
    square_root_rule,
    training_config,
)

STAGES = [(recipe, stage) for recipe in RECIPES.values() for stage in recipe.stages]


@pytest.mark.parametrize("name, stage, batch, rate, epochs, tokens, template", [
    ("llava-v1-13b", "pretrain", 128, 2e-3, 1, 2048, "plain"),
    ("llava-v1-13b", "finetune", 128, 2e-5, 3, 2048, "v1"),
    ("llava-lightning-7b", "pretrain", 128, 2e-3, 1, 2048, "plain"),
    ("llava-lightning-7b", "finetune", 128, 2e-5, 1, 2048, "v1"),
    ("llava-lightning-mpt-7b", "finetune", 128, 2e-5, 1, 2048, "mpt"),
    ("llava-v1.5-7b", "pretrain", 256, 1e-3, 1, 2048, "plain"),
    ("llava-v1.5-7b", "finetune", 128, 2e-5, 1, 2048, "v1"),
    ("llava-v1.5-13b-lora", "finetune", 128, 2e-4, 1, 2048, "v1"),
    ("llava-scienceqa-13b", "finetune", 128, 2e-5, 12, 2048, "v1"),
    ("bakllava-1", "pretrain", 256, 1e-3, 1, 8000, "plain"),
    ("bakllava-1", "finetune", 128, 2e-5, 1, 8000, "v1"),
])
def test_published_figures(name, stage, batch, rate, epochs, tokens, template):
    found = find_recipe(name).stage(stage)
    assert (found.global_batch, found.learning_rate, found.epochs, found.context_length, found.template) == (
        batch, rate, epochs, tokens, template)
    assert (found.schedule, found.warmup_ratio, found.weight_decay) == ("cosine", 0.03, 0)
    assert found.per_device_batch * found.devices == batch


@pytest.mark.parametrize("size, batch, rate, template", [
    ("8b", 512, 4e-5, "cambrian/llama_3"), ("13b", 512, 4e-5, "v1"), ("34b", 1024, 2e-5, "cambrian/chatml_direct")])
def test_cambrians_figures(size, batch, rate, template):
    align, tune = find_recipe(f"cambrian-{size}").stages
    assert (align.global_batch, align.learning_rate, align.warmup_ratio, align.examples) == (batch, 1e-3, 0.06, 2_500_000)
    assert (tune.global_batch, tune.learning_rate, tune.warmup_ratio, tune.examples) == (batch, rate, 0.03, 7_000_000)
    assert align.template == tune.template == template and template in TEMPLATES
    assert align.per_device_batch * align.devices == tune.per_device_batch * tune.devices == batch
    assert align.source.endswith(f"pretrain_cambrian_{size}.sh") and tune.source.endswith(f"finetune_cambrian_{size}.sh")


def test_cambrians_aggregator_learns_at_its_own_rate():
    from mllm_nb.papers.cambrian import assemble_miniature
    model = assemble_miniature(queries=16, samplers=1)[0]
    align, tune = find_recipe("cambrian-8b").stages
    with loop.prepared(model, training_config(align).groups):
        groups = loop.parameter_groups(model, training_config(align))
        rates = {name: group["peak"] for group in groups for name in group["names"]}
    slow = {name for name, rate in rates.items() if rate == 1e-4}
    assert slow == {name for name in rates if "vision_query" in name or "vision_sampler" in name}
    assert {name for name in rates if "mm_projector" in name} == {name for name, rate in rates.items() if rate == 1e-3}
    with loop.prepared(model, training_config(tune).groups):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if not name.startswith("towers.")}


def test_every_recipe_aligns_first_and_names_its_source():
    for recipe in RECIPES.values():
        first, second = recipe.stages
        assert set(first.trains) <= {"connector", "aggregator"} and {"connector", "language_model"} & set(second.trains)
        assert "connector" in first.trains and "connector" in second.trains
        assert recipe.paper.startswith("https://arxiv.org/abs/") and all(stage.source for stage in recipe.stages)
        json.dumps(asdict(recipe))


def test_unknown_names_list_the_known_ones():
    with pytest.raises(KeyError, match="no recipe 'llava'; known are llava-v1-13b, "):
        find_recipe("llava")
    with pytest.raises(KeyError, match="recipe bakllava-1 has no stage 'tune'; it has pretrain, finetune"):
        find_recipe("bakllava-1").stage("tune")


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("fits", [1, 3, 16, 1000])
def test_the_global_batch_stays_on_any_machine(devices, fits):
    for _, stage in STAGES:
        config = training_config(stage, devices, fits)
        assert config.micro_batch <= fits
        assert config.micro_batch * config.world_size * loop.accumulation(config) == stage.global_batch
        loop.check_config(config)


def test_devices_that_do_not_divide_the_batch_are_refused():
    assert split_batch(128, 8, 16) == (16, 1) and split_batch(128, 1, 6) == (4, 32)
    with pytest.raises(ValueError, match=r"128 cannot be shared by 6 devices; try \[2, 4, 8\]"):
        split_batch(128, 6, 16)


def test_square_root_rule_gives_cambrians_rates():
    assert square_root_rule(2e-5, 128, 512) == pytest.approx(4e-5)   # LLaVA-1.5 to Cambrian-1 8B, stage 2
    assert square_root_rule(1e-3, 256, 64) == pytest.approx(5e-4)


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList([nn.Linear(2, 2)])
        self.connector = nn.Linear(2, 2)
        self.language = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        self.language[0].lora_A = nn.Linear(2, 1)
        self.language[0].lora_B = nn.Linear(1, 2)
        self.vision_sampler_layers = nn.ModuleList([nn.Linear(2, 2)])

    def forward(self, batch):
        inner = self.language[0]
        hidden = self.vision_sampler_layers[0](self.connector(self.towers[0](batch)))
        return self.language[1](inner(hidden) + inner.lora_B(inner.lora_A(hidden))).square().mean()


@pytest.mark.parametrize("recipe, stage", STAGES, ids=lambda value: value.name)
def test_a_stage_trains_its_parts_and_nothing_else(recipe, stage, tmp_path):
    torch.manual_seed(0)
    model, batches = Parts(), [torch.randn(4, 2) for _ in range(4)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = training_config(miniature(stage), device="cpu", precision="fp32", progress=False, epochs=1)
    config = replace(config, global_batch=1, micro_batch=1, max_steps=3)
    loop.train(model, batches, config, tmp_path)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    wanted = [loop.ParameterGroup(PARTS[part]) for part in stage.trains]
    trained = {name for name in before if any(group.matches(name) for group in wanted)}
    assert moved <= trained and {name.split(".")[0] for name in moved} == {name.split(".")[0] for name in trained}
    assert not any(name.startswith("towers") for name in moved)


def test_the_lora_stage_has_two_rates():
    stage = find_recipe("llava-v1.5-7b-lora").stage("finetune")
    rates = {name: group["peak"] for group in parameter_groups(stage) for name in group["names"]}
    assert rates["connector.weight"] == 2e-5 and rates["language.0.lora_A.weight"] == 2e-4
    assert "language.0.weight" not in rates


def parameter_groups(stage):
    model, config = Parts(), training_config(stage)
    with loop.prepared(model, config.groups):
        return loop.parameter_groups(model, config)


def test_miniatures_keep_what_makes_the_stage():
    for _, stage in STAGES:
        small = miniature(stage)
        assert (small.trains, small.template, small.schedule, small.warmup_ratio) == (
            stage.trains, stage.template, stage.schedule, stage.warmup_ratio)
        assert small.learning_rate <= 2e-3 and small.steps <= 1000 and small.devices == 1


def test_the_table_has_a_line_for_every_stage():
    lines = recipe_table().splitlines()
    assert len(lines) == 2 + len(STAGES)
    last = [line for line in lines if "bakllava-1" in line][-1]
    assert "8000" in last and "5,196" in last
    assert math.ceil(665_000 / 128) == 5196
