"DeepSpeed's ZeRO: its configurations become plans everywhere; where it is installed, the loop's curve and checkpoints."
import importlib.util
import json
import math
import os
from pathlib import Path

import pytest
import torch
from test_parallel import Slope, curve, same, two
from test_sharded_checkpoints import close, plan_for
from test_sharded_checkpoints import run as reading

from mllm_nb.training.loop import LossError, TrainingConfig, train
from mllm_nb.training.parallel import Load, Plan, PlanError, Sizes, in_processes, memory_of, team_of
from mllm_nb.training.zero import EXAMPLE, deepspeed_config, plan_of, without_auto, zero_bytes

pytestmark = [pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"), pytest.mark.xdist_group("parallel")]
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None,
                                     reason="DeepSpeed is not installed: pip install 'mllm_nb[zero]'")


# --- configurations become plans, with or without DeepSpeed

def test_a_configuration_becomes_a_plan_and_is_kept_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    (tmp_path / "zero3.json").write_text(json.dumps(EXAMPLE))
    plan = Plan.load(tmp_path / "zero3.json", 128, 4)
    assert (plan.sharding, plan.world_size, plan.micro_batch, plan.accumulation) == ("zero3", 8, 4, 4)
    assert plan.deepspeed["zero_optimization"]["overlap_comm"] is True and "auto" not in json.dumps(plan.deepspeed)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    given = deepspeed_config(plan, TrainingConfig(clip_norm=1.0))
    assert given["train_batch_size"] == 128 == given["train_micro_batch_size_per_gpu"] * given["gradient_accumulation_steps"] * 8
    assert given["gradient_clipping"] == 1.0 and given["zero_optimization"] == plan.deepspeed["zero_optimization"]


def test_numbers_that_are_given_are_kept(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    stated = EXAMPLE | {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4,
                        "bf16": {"enabled": True}}
    plan = plan_of(stated, "zero3.json")
    assert (plan.global_batch, plan.micro_batch, plan.accumulation, plan.precision) == (64, 8, 4, "bf16")
    offloaded = plan_of(EXAMPLE | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "a.json", 8)
    assert offloaded.offload and offloaded.sharding == "zero2"


@pytest.mark.parametrize("changes, message", [
    ({"zero_optimization": {"stage": 0}}, r"zero3.json, zero_optimization.stage: found 0, expected 1, 2 or 3"),
    ({"zero_optimization": None}, "zero_optimization.stage: found None"),
    ({"optimizer": {"type": "Adam", "params": {"lr": 1e-4}}}, "zero3.json, optimizer: found {'lr': 0.0001}, expected none"),
    ({"fp16": {"enabled": True}}, "fp16.enabled: found true"),
    ({"train_batch_size": 96}, "train_batch_size: found 96, expected 128"),
    ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps: found 3, expected 4: a batch of 128 is 2 processes x 4"),
    ({"train_micro_batch_size_per_gpu": 7}, "train_micro_batch_size_per_gpu: found 7, expected 4")])
def test_configurations_that_cannot_be_are_refused_by_field(changes, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PlanError, match=message):
        plan_of(EXAMPLE | changes, "zero3.json", 128, 16)


@pytest.mark.parametrize("changes, message", [
    ({"zero_optimization": {"stage": 3, "offload_param": 5}}, "zero_optimization.offload_param: found '5', expected an object"),
    ({"zero_optimization": 5}, "zero_optimization: found"), ({"bf16": 5}, "bf16: found"), ({"fp16": [1]}, "fp16: found"),
    ({"bf16": {"enabled": "x"}}, "bf16.enabled: found 'x', expected true or false"), ({"optimizer": 5}, "optimizer: found"),
    ({"scheduler": {"params": 3}}, "scheduler.params: found"), ({"train_batch_size": "x"}, "train_batch_size: found"),
    *(({"train_micro_batch_size_per_gpu": value}, "train_micro_batch_size_per_gpu: found .* expected a whole number from 1")
      for value in ("x", 0, -1, 2.5, None)), ({"gradient_clipping": -1}, "gradient_clipping: found '-1', expected a number from 0")])
def test_fields_of_the_wrong_kind_are_named(changes, message):
    with pytest.raises(PlanError, match=f"zero3.json, {message}"):
        plan_of(EXAMPLE | changes, "zero3.json", 128, 16)


def test_sections_may_be_null():
    nothing = {"optimizer": None, "scheduler": {"params": None}, "bf16": None, "zero_optimization": {"stage": 2, "offload_param": None}}
    assert plan_of(EXAMPLE | nothing, "zero2.json", 16, 4).sharding == "zero2"


def test_processes_that_do_not_divide_the_batch_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(PlanError, match=r"zero3.json: a global batch of 128 cannot be shared by 3 devices; try \[1, 2, 4\]"):
        plan_of(EXAMPLE, "zero3.json", 128)
    with pytest.raises(PlanError, match="train_batch_size: found 'auto', expected a number"):
        plan_of(EXAMPLE, "zero3.json")


def test_another_limit_than_the_recipes_and_other_plans_are_refused():
    plan = Plan(4, 2, 1, 2, "zero1", deepspeed={"zero_optimization": {"stage": 1}, "gradient_clipping": 0.5})
    with pytest.raises(PlanError, match="gradient_clipping: found 0.5, expected the recipe's 1.0"):
        deepspeed_config(plan, TrainingConfig(clip_norm=1.0))
    with pytest.raises(PlanError, match="Plan.deepspeed"):
        Plan(4, 2, 1, 2, "fsdp", deepspeed={})
    with pytest.raises(PlanError, match="shards of fp16"):
        Plan(4, 2, 1, 2, "zero3", precision="fp16")


def test_auto_is_left_to_the_run():
    assert without_auto({"a": "auto", "b": {"c": "auto"}, "d": {}, "e": [1], "f": {"g": 0}}) == {"d": {}, "e": [1], "f": {"g": 0}}


def test_stages_and_the_planner_count_alike():
    "16-bit training of everything: what the table says a device keeps is the paper's formula."
    sizes = Sizes(2, 64, 64, 128, 100, 4, 10 ** 6, 10 ** 5, 10 ** 5, 10 ** 6, 10 ** 5, 10 ** 6, 10 ** 6)
    for stage in (1, 2):
        found = memory_of(sizes, Plan(8, 1, 1, 8, f"zero{stage}", precision="bf16"), Load(1, 8))
        kept = zero_bytes(stage, 8)
        assert found.weights == kept["weight"] * sizes.parameters
        assert found.gradients == pytest.approx(kept["gradient"] * sizes.parameters, abs=8)
        assert found.optimizer == pytest.approx((kept["master copy"] + kept["two means"]) * sizes.parameters, abs=8)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
    with pytest.raises(ImportError, match=r"sharding zero3 needs DeepSpeed: pip install 'mllm_nb\[zero\]'"):
        team_of(Plan(4, 2, 1, 2, "zero3"))


# --- with DeepSpeed

@needs_deepspeed
@pytest.mark.parametrize("sharding, kind", [("zero3", "llava"), ("zero3", "cambrian"), ("zero2", "llava")])
def test_two_processes_give_the_curve_of_one(sharding, kind):
    expected, found = curve(Plan(4, 4), kind), in_processes(curve, 2, two(sharding), kind, timeout=600)[0]
    print(sharding, kind, json.dumps({"one process": expected[0], "ZeRO-" + sharding[-1]: found[0]}))
    same(found, expected)


def on_two(plan: Plan, folder: Path, *arguments) -> list[float]:
    return in_processes(lambda: reading(plan, folder, *arguments), 2, timeout=600)[0]


@needs_deepspeed
@pytest.mark.parametrize("sharding, accumulation", [("zero1", 2), ("zero2", 1), ("zero3", 2)])
def test_saved_by_zero_continued_by_others_and_back(sharding, accumulation, tmp_path):
    "Two processes with ZeRO save; one goes on; and the other way round; the curve is that of one process throughout."
    plan = Plan(8, 4 // accumulation, accumulation, 2, sharding)
    whole = reading(plan_for(1), tmp_path / "whole")
    assert close(on_two(plan, tmp_path / "all"), whole, 1e-5)
    assert len(on_two(plan, tmp_path / "a", 4)) == 4 and close(reading(plan_for(1), tmp_path / "a"), whole, 1e-5)
    assert len(reading(plan_for(1), tmp_path / "b", 4)) == 4 and close(on_two(plan, tmp_path / "b"), whole, 1e-5)
    assert len(on_two(plan, tmp_path / "c", 4)) == 4 and close(on_two(plan_for(2), tmp_path / "c"), whole, 1e-5)


class TwoParts(torch.nn.Module):
    "Some batches use both parts, some only the first."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(5, 7), torch.nn.Linear(5, 7)

    def forward(self, values, both):
        return (self.first(values).tanh() + (self.second(values) if both else 0)).square().mean()


def parts_used(plan: Plan, folder: Path) -> list[float]:
    team = team_of(plan)
    values = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1))
    rows = [one.chunk(team.size)[team.rank] for one in values]
    batches = [{"values": one, "both": number in (0, 3, 4)} for number, one in enumerate(rows)]
    config = plan.config(TrainingConfig(1e-2, max_steps=6, schedule="constant", progress=False, save=False))
    return train(TwoParts(), batches, config, folder, plan=plan.device_plan(), team=team).losses


@needs_deepspeed
@pytest.mark.parametrize("sharding", ["zero1", "zero2", "zero3"])
def test_a_part_that_an_update_does_not_use_has_gradient_zero(sharding, tmp_path):
    "And not that of the update before: its momentum goes on as on one device."
    expected = parts_used(Plan(4, 4), tmp_path / "one")
    found = in_processes(parts_used, 2, Plan(4, 2, 1, 2, sharding), tmp_path / "two", timeout=300)[0]
    assert close(found, expected, 1e-5), (found, expected)


def poisoned(plan: Plan) -> str:
    team, model = team_of(plan), Slope()
    values = torch.ones(3, 2, 4)
    values[2, 0, 0] = math.nan if team.rank == 1 else 1.0
    batches = [{"values": one, "ids": [f"sample-{team.rank}-{number}"]} for number, one in enumerate(values)]
    config = plan.config(TrainingConfig(5e-4, max_steps=3, progress=False, save=False))
    try:
        train(model, batches, config, os.environ["RUN"], plan=plan.device_plan(), team=team)
    except LossError as error:
        return f"{error} {bool(torch.isfinite(model.weight.full_tensor()).all())}"


@needs_deepspeed
def test_a_loss_that_is_no_number_stops_all_and_names_the_records(tmp_path, monkeypatch):
    monkeypatch.setenv("RUN", str(tmp_path))
    for told in in_processes(poisoned, 2, Plan(2, 1, 1, 2, "zero3"), timeout=300):
        assert told == ("step 2: the loss is nan on process 1: records sample-1-2; "
                        "the weights are still those of step 2 True")


@needs_deepspeed
def test_the_command_takes_a_configuration_and_writes_a_whole_model(tmp_path):
    from test_plan import mllm, options
    from mllm_nb.mllm import MLLM
    folder = make_records(tmp_path)
    (tmp_path / "zero3.json").write_text(json.dumps(EXAMPLE))
    Plan(4, 4).save(tmp_path / "one.json")
    assert mllm(*options(folder, tmp_path / "one", str(tmp_path / "one.json"))) == 0
    assert in_processes(mllm, 2, *options(folder, tmp_path / "two", str(tmp_path / "zero3.json")), timeout=600) == [0, 0]
    losses = [[json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
              for name in ("one", "two")]
    assert close(losses[1], losses[0], 1e-5), losses
    one, two_ = (MLLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two_[name], value, atol=1e-4, rtol=1e-3)
    assert Plan.load(tmp_path / "two/plan.json").sharding == "zero3"


def make_records(folder: Path) -> Path:
    "A model of the miniature's kind and a dozen records with pictures."
    from mllm_nb.data.world import World
    from mllm_nb.training.miniatures import assemble_miniature
    model, processor = assemble_miniature()
    model.save_pretrained(folder / "model", processor.tokenizer)
    world, lines = World(seed=5, length=12, view="conversation"), []
    for number in range(12):
        sample = world[number]
        turns = [{"from": turn.role, "value": turn.text} for turn in sample.turns[:2]]
        record = {"id": str(number), "conversations": turns}
        sample.open_images()[0].save(folder / f"{number}.png")
        record["image"] = f"{number}.png"
        lines.append(json.dumps(record))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    return folder
