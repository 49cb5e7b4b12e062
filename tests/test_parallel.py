"Many processes: the same curve with copies, shards and cut layers; plans that cannot be; processes that die."
import json
import math
import os
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mllm_nb.data.batches import Batches, BatchSettings
from mllm_nb.data.world import World
from mllm_nb.language.decoder import Decoder, DecoderConfig
from mllm_nb.training import parallel
from mllm_nb.training.checkpoints import load_checkpoint
from mllm_nb.training.loop import LossError, ParameterGroup, TrainingConfig, train
from mllm_nb.training.parallel import LostProcess, Plan, PlanError, in_processes, share_batch, team_of, tensor_plan

pytestmark = [pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"), pytest.mark.xdist_group("parallel")]
QUIET = TrainingConfig(5e-4, max_steps=3, warmup_steps=1, progress=False, save=False)
TUNE, ALIGN = "connector.*|language.*|vision_sampler*", "connector.*"


class Mixed(World):
    "Conversations; every `every`th sample is text alone (1: all of them)."
    every = 3

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index % self.every:
            return sample
        turns = (replace(turn, text=turn.text.replace("<image>", "").strip()) for turn in sample.turns)
        return replace(sample, images=(), turns=tuple(turns))


class TextOnly(Mixed):
    every = 1


def assemble(kind: str):
    torch.manual_seed(0)
    if kind == "llava":
        from mllm_nb.training.miniatures import assemble_miniature
    else:
        from mllm_nb.papers.cambrian import assemble_miniature
    return assemble_miniature()


def curve(plan: Plan, kind: str = "llava", trains: str = TUNE, world: type = Mixed, double: bool = False,
          **changes) -> tuple[list[float], list[float]]:
    "Losses and gradient norms of a few updates."
    model, processor = assemble(kind)
    team = team_of(plan)
    settings = BatchSettings(192, plan.micro_batch, rank=team.rank, world_size=team.size, accumulation=plan.accumulation)
    groups = (ParameterGroup(trains, frozen=False), ParameterGroup("*", frozen=True))
    config = plan.config(replace(QUIET, groups=groups, **changes))
    batches = Batches(world(seed=3, length=24, view="conversation"), processor, settings)
    history = train(model.double() if double else model, batches, config, tempfile.mkdtemp(),
                    plan=plan.device_plan(), team=team)
    return history.losses, history.column("gradient_norm")


def two(sharding: str, accumulation: int = 1, **changes) -> Plan:
    shares = 1 if sharding == "tp" else 2
    return Plan(4, 4 // shares // accumulation, accumulation, 2, sharding, **changes)


def same(found, expected, tolerance: float = 1e-5) -> None:
    for left, right in zip(found, expected):
        assert len(left) == len(right)
        assert max(abs(a - b) / max(1, abs(b)) for a, b in zip(left, right)) < tolerance, (left, right)


@pytest.fixture(scope="module")
def alone() -> dict:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)   # as in the processes of a team: sums over threads are rounded otherwise
    try:
        return {kind: curve(Plan(4, 4), kind) for kind in ("llava", "cambrian")}
    finally:
        torch.set_num_threads(threads)


# --- the same curve

@pytest.mark.parametrize("kind", ["llava", "cambrian"])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp", "tp"])
def test_two_processes_give_the_curve_of_one(kind, sharding, alone):
    "Every third sample is text alone, so that often one process has images and the other has none."
    first, second = in_processes(curve, 2, two(sharding), kind)
    same(first, alone[kind])
    assert second[0] == []   # one process writes


def test_accumulation_recomputation_and_one_process_agree(alone):
    same(curve(Plan(4, 1, 4, recompute=True)), alone["llava"])
    same(in_processes(curve, 2, two("ddp", accumulation=2))[0], alone["llava"])
    same(in_processes(curve, 2, two("fsdp", accumulation=2, recompute=True))[0], alone["llava"])


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_connector_alone_learns_from_updates_with_and_without_images(sharding):
    "Micro-batches of one row: some updates end with text, where nothing has a gradient; none may be lost or wait."
    for world in (Mixed, TextOnly):
        expected = curve(Plan(4, 4), trains=ALIGN, world=world)
        same(in_processes(curve, 2, two(sharding, accumulation=2), "llava", ALIGN, world)[0], expected)


def test_in_float64_the_difference_is_rounding_alone():
    "Without warm-up Adam makes large steps from tiny slopes: fp32 drifts apart, fp64 must not."
    expected = curve(Plan(4, 4), "cambrian", double=True, warmup_steps=0)
    found = in_processes(partial_curve, 2, two("ddp"))[0]
    same(found, expected, 1e-6)   # losses and norms are fp32 in either case


def partial_curve(plan: Plan):
    return curve(plan, "cambrian", double=True, warmup_steps=0)


def test_bf16_shards_follow_one_process():
    "Rounded to 8 bits of mantissa, so only roughly the same."
    same(in_processes(curve, 2, two("fsdp", precision="bf16"))[0][:1], curve(Plan(4, 4, precision="bf16"))[:1], 0.05)


# --- tensor parallelism

def test_attention_is_cut_where_heads_divide():
    def decoder(heads: int, kv_heads: int) -> Decoder:
        return Decoder(DecoderConfig(64, heads * 8, 64, 1, heads, kv_heads, head_dim=8))
    parts = {name.rpartition(".")[2] for name in tensor_plan(decoder(4, 2), 2)}
    assert parts == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in tensor_plan(decoder(4, 1), 2)} == {"gate_proj", "up_proj", "down_proj"}
    with pytest.raises(PlanError, match="on 3 devices: Decoder has no layer that can be cut"):
        tensor_plan(decoder(4, 2), 3)


class Reader(nn.Module):
    "A language model alone, called like an MLLM."
    def __init__(self, language: nn.Module):
        super().__init__()
        self.language = language

    def forward(self, ids):
        scores = self.language(self.language.embed(ids))
        return nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def published_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM
    from mllm_nb.language.decoder import TransformersDecoder
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)
    return Reader(TransformersDecoder(LlamaForCausalLM(config)))


def read(plan: Plan) -> list[float]:
    batches = list(torch.randint(0, 64, (4, 4, 12), generator=torch.Generator().manual_seed(2)))
    return train(published_llama(), batches, plan.config(QUIET), tempfile.mkdtemp(), plan=plan.device_plan(),
                 team=team_of(plan)).losses


def test_a_transformers_model_is_cut_by_its_own_plan():
    cut = tensor_plan(published_llama().language, 2)
    assert {name.rpartition(".")[2]: how for name, how in cut.items()} == {
        "q_proj": "columns", "k_proj": "columns", "v_proj": "columns", "o_proj": "rows",
        "gate_proj": "columns", "up_proj": "columns", "down_proj": "rows"}
    same([in_processes(read, 2, Plan(4, 4, 1, 2, "tp"))[0]], [read(Plan(4, 4))])


# --- what goes wrong

def test_a_batch_that_does_not_divide_is_refused_with_numbers_that_do():
    with pytest.raises(ValueError, match=r"global batch of 128 cannot be shared by 3 devices; try \[1, 2, 4\]"):
        share_batch(128, 3, 16, "ddp")
    with pytest.raises(ValueError, match="cannot be shared by 3 devices"):
        Plan(128, 16, 1, 3, "fsdp")
    with pytest.raises(PlanError, match="global_batch is 128, expected micro_batch x accumulation x shares = 16 x 2 x 8"):
        Plan(128, 16, 2, 8, "fsdp")


@pytest.mark.parametrize("fields, message", [
    ({"sharding": "zero"}, "Plan.sharding is 'zero', expected one of none, ddp, fsdp, tp"),
    ({"precision": "int8"}, "Plan.precision is 'int8'"),
    ({"micro_batch": 0}, "Plan.micro_batch is 0, expected a whole number of at least 1"),
    ({"world_size": 2}, "Plan.world_size is 2, expected 1 without sharding"),
    ({"offload": True}, "only fsdp can offload"), ({"offload": "yes"}, "Plan.offload is 'yes', expected true or false"),
    ({"recompute": None}, "Plan.recompute is None"), ({"timeout": True}, "Plan.timeout is True, expected a whole number"),
    ({"device": "x"}, "Plan.device is 'x', expected a kind of device"), ({"device": 5}, "Plan.device is 5"),
    ({"world_size": 2, "sharding": "tp", "precision": "fp16"}, "shards of fp16"),
    ({"world_size": 3, "sharding": "tp", "hosts": 2}, "Plan.hosts is 2, expected a divisor of world_size = 3"),
])
def test_plans_that_cannot_be_are_refused_by_field(fields, message):
    with pytest.raises(PlanError, match=message):
        Plan(**fields)


def test_plans_are_saved_and_read(tmp_path):
    plan = share_batch(128, 8, 16, "fsdp", precision="bf16", recompute=True)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    edited = json.loads((tmp_path / "plan.json").read_text())
    for text, message in [("{", "cannot be read as JSON"), ("[]", "found list, expected fields of a plan"),
                          (json.dumps(edited | {"zero": 3}), "found zero, expected fields of a plan"),
                          (json.dumps(edited | {"micro_batch": 5}), "plan.json: a global batch|plan.json: Plan.global_batch")]:
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(PlanError, match=message):
            Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("optimizer, sharding", [("muon", "fsdp"), ("adamw_8bit", "fsdp"), ("muon", "tp")])
def test_optimizers_that_need_whole_matrices_refuse_shards(optimizer, sharding):
    with pytest.raises(RuntimeError, match=f"optimizer is '{optimizer}', expected 'adamw': .* lie in parts on several"):
        in_processes(lambda: curve(two(sharding), optimizer=optimizer), 2)


def test_muon_works_on_whole_copies():
    expected = curve(Plan(4, 4), optimizer="muon")
    same(in_processes(lambda: curve(two("ddp"), optimizer="muon"), 2)[0], expected, 2e-3)   # Muon computes in bf16


def test_another_number_of_processes_than_planned_is_refused():
    with pytest.raises(RuntimeError, match="Plan.world_size is 4, this run has 2 processes: start it with torchrun"):
        in_processes(team_of, 2, Plan(4, 1, 1, 4, "ddp"))


class Slope(nn.Module):
    "The loss is the mean of what it is given, times a weight."
    def __init__(self, start: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((4, 4), start))

    def forward(self, values):
        return (values @ self.weight).mean()


def bad_batch(plan: Plan, folder: str) -> str:
    team = team_of(plan)
    values = torch.ones(3, 2, 4)
    if team.rank == 1:
        values[2, 0, 0] = math.nan
    batches = [{"values": one, "ids": [f"sample-{team.rank}-{number}"]} for number, one in enumerate(values)]
    model = Slope()
    try:
        train(model, batches, plan.config(replace(QUIET, warmup_steps=0, save=True)), folder, plan=plan.device_plan(), team=team)
    except LossError as error:
        weights = [float(parallel.own(value).detach().abs().sum()) for value in model.parameters()]
        return f"{error} {all(map(math.isfinite, weights))}"


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_loss_that_is_no_number_stops_all_names_the_records_and_keeps_the_rest(sharding, tmp_path):
    for told in in_processes(bad_batch, 2, Plan(2, 1, 1, 2, sharding), str(tmp_path)):
        assert told == ("step 2: the loss is nan on process 1: records sample-1-2; the weights are still those of "
                        f"step 2, saved in {tmp_path}/checkpoints True")
    assert load_checkpoint(tmp_path / "checkpoints").step == 2


def deserted(plan: Plan) -> str:
    team = team_of(plan)
    def leave(run, row):
        if run.step == 2 and team.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    try:
        train(Slope(), [torch.ones(2, 4)] * 8, plan.config(QUIET), tempfile.mkdtemp(), plan=plan.device_plan(),
              team=team, on_step=leave)
    except LostProcess as error:
        Path(os.environ["TOLD"]).write_text(str(error))


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_lost_process_is_noticed_at_once(sharding, tmp_path, monkeypatch):
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    with pytest.raises(RuntimeError, match="process 1 died without a word"):
        in_processes(deserted, 2, Plan(2, 1, 1, 2, sharding), timeout=60)
    told = (tmp_path / "told").read_text()
    assert told.startswith("step 2: another process of this run is gone") and "go on from the last checkpoint" in told


def different(plan: Plan) -> None:
    train(Slope(1.0 + int(os.environ["RANK"])), [torch.ones(2, 4)], plan.config(QUIET), tempfile.mkdtemp(),
          plan=plan.device_plan(), team=team_of(plan))


def test_processes_that_start_from_other_weights_are_refused():
    with pytest.raises(RuntimeError, match="starts from other weights than process 0: weight; build the model with the same"):
        in_processes(different, 2, Plan(2, 1, 1, 2, "ddp"))


def interrupted(plan: Plan, folder: Path) -> int:
    "Only process 1 gets the wish to stop; both stop after the same step."
    team, last = team_of(plan), []
    def stop(run, row):
        last.append(run.step)
        if run.step == 3 and team.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    try:
        train(Slope(), [torch.ones(2, 4)] * 8, plan.config(replace(QUIET, max_steps=8)), folder,
              plan=plan.device_plan(), team=team, on_step=stop)
    except KeyboardInterrupt:
        return last[-1]


def test_a_wish_to_stop_is_everybodys(tmp_path):
    assert in_processes(interrupted, 2, Plan(2, 1, 1, 2, "ddp"), tmp_path) == [3, 3]


def test_launching_without_accelerate_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install 'mllm_nb\[lora\]'"):
        parallel.launch(print, Plan())
