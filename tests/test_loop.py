"The training loop: against optax's, Hugging Face's and a hand-written loop; frozen parts; bad batches; killed runs."
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mllm_nb.device import DevicePlan
from mllm_nb.training import loop
from mllm_nb.training.checkpoints import CheckpointError
from mllm_nb.training.loop import (
    DataError,
    LossError,
    ParameterGroup,
    Schedule,
    TrainingConfig,
    learning_rate_at,
    train,
)

GOLDEN = Path(__file__).parent / "golden/parity/lvm_optimizer.json"
FP32 = DevicePlan("cpu", torch.float32, "sdpa", False, "test")
QUIET = TrainingConfig(learning_rate=1e-2, max_steps=12, precision="fp32", device="cpu", progress=False)


class Words(nn.Module):
    "A language model of one layer: mean loss over the labels that are not -100, and their number."

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 11)

    def forward(self, words, labels):
        scores = self.head(self.dropout(self.norm(self.embed(words))))
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return SimpleNamespace(loss=loss, tokens=(labels != -100).sum(), metrics={})


def make_batches(count: int = 6, rows: int = 4, seed: int = 1) -> list[dict]:
    "Batches with very different numbers of supervised tokens."
    random = torch.Generator().manual_seed(seed)
    batches = []
    for number in range(count):
        words = torch.randint(0, 11, (rows, 7), generator=random)
        labels = (words * 3 + 1) % 11
        labels[torch.rand(rows, 7, generator=random) < 0.15 * (number % 6)] = -100
        batches.append({"words": words, "labels": labels, "ids": [f"sample-{number}-{row}" for row in range(rows)]})
    return batches


def weights(model: nn.Module) -> dict:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- oracles

def test_schedule_and_updates_are_optax():
    golden = json.loads(GOLDEN.read_text())
    hyper, defaults, every = golden["hyper"], golden["defaults"], golden["accumulate_gradient_steps"]
    config = TrainingConfig(
        learning_rate=hyper["lr"], schedule="optax_cosine", decay_steps=hyper["lr_decay_steps"],
        warmup_steps=hyper["lr_warmup_steps"], start_learning_rate=defaults["init_lr"], end_learning_rate=hyper["end_lr"],
        clip_norm=hyper["clip_gradient"], weight_decay=hyper["weight_decay"], decay="all",
        betas=(defaults["b1"], defaults["b2"]), epsilon=defaults["eps"], global_batch=every)
    schedule = loop.run_schedule(config, 1)
    for step, rate in golden["lr_at"]:
        assert learning_rate_at(step, schedule) == pytest.approx(rate, rel=1e-6)
    model = nn.ParameterDict({name: nn.Parameter(torch.tensor(value)) for name, value in golden["params0"].items()})
    optimizer = loop.build_optimizer(model, config)
    for number, step in enumerate(golden["steps"]):
        for name, parameter in model.items():
            gradient = torch.tensor(step["grad"][name]) / every
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        if (number + 1) % every == 0:
            rate = learning_rate_at(number // every, schedule)
            loop.set_learning_rate(optimizer, rate, config.learning_rate)
            loop.clip_gradients(list(model.values()), config.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in model.items():
            torch.testing.assert_close(parameter.detach(), torch.tensor(step["params_after"][name]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_schedule_is_hugging_faces(name):
    from transformers import get_scheduler
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    kind = "constant_with_warmup" if name == "constant" else name
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=4, num_training_steps=37)
    ours = Schedule(3e-4, 37, name, warmup_steps=4)
    for step in range(38):
        assert learning_rate_at(step, ours) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        theirs.step()


def test_warm_up_is_rounded_up_as_by_the_trainer():
    config = replace(QUIET, warmup_ratio=0.03, max_steps=5197)
    assert loop.run_schedule(config, 5197).warmup_steps == math.ceil(0.03 * 5197) == 156
    assert learning_rate_at(0, loop.run_schedule(config, 5197)) == 0


def test_undecayed_parameters_are_the_trainers():
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, Trainer
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    for model in (LlamaForCausalLM(LlamaConfig(vocab_size=20, attention_bias=True, **small)),
                  CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=14, **small))):
        decayed = Trainer.get_decay_parameter_names(None, model)
        assert {name for name, _ in model.named_parameters()} - loop.undecayed(model) == set(decayed)


def test_loop_equals_a_hand_written_one(tmp_path):
    batches, model, other = make_batches(), Words(), Words()
    history = train(model, batches, QUIET, tmp_path)
    optimizer = torch.optim.AdamW(other.parameters(), fused=True, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 10 * (0.5 * (1 + math.cos(math.pi * step / 12))))
    losses = []
    for step in range(12):
        batch = batches[step % len(batches)]
        output = other(batch["words"], batch["labels"])
        output.loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert history.losses == pytest.approx(losses, abs=1e-6)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-5, rtol=0)


# --- accumulation

def gradient(model: nn.Module, batches: list, step=loop.divide_by_tokens) -> torch.Tensor:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    facts, _ = loop.accumulate(model, batches, loop.batch_loss, lambda: torch.autocast("cpu", enabled=False), scaler)
    step(list(model.parameters()), facts)
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_accumulation_equals_one_large_batch():
    batches = make_batches()
    large = {name: torch.cat([batch[name] for batch in batches]) for name in ("words", "labels")}
    whole = gradient(Words().double(), [large])
    parts = gradient(Words().double(), batches)
    naive = gradient(Words().double(), batches, lambda parameters, facts: None)   # sum of means
    torch.testing.assert_close(parts, whole, atol=1e-14, rtol=1e-12)
    assert (naive / len(batches) - whole).abs().max() > 1e-3


def test_runs_with_and_without_accumulation_are_equal(tmp_path):
    batches = make_batches()
    pairs = [{name: torch.cat([left[name], right[name]]) for name in ("words", "labels")}
             for left, right in zip(batches[::2], batches[1::2])]
    once = train(Words(), pairs, QUIET, tmp_path / "once")
    twice = train(Words(), batches, replace(QUIET, global_batch=8, micro_batch=4), tmp_path / "twice")
    assert twice.losses == pytest.approx(once.losses, rel=1e-5)
    assert twice.column("tokens") == once.column("tokens")


class Connector(nn.Module):
    "Like a multimodal model in its first stage: the part that learns is used by some batches only."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.connector, self.language = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, values, image):
        values = torch.where(image[:, None], self.connector(values), values) if image.any() else values
        return SimpleNamespace(loss=self.language(values).square().mean(), tokens=len(values))


def text_and_images() -> list[dict]:
    random = torch.Generator().manual_seed(0)
    return [{"values": torch.randn(2, 3, generator=random), "image": torch.tensor([number % 2 == 1] * 2)} for number in range(6)]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_text_alone_counts_where_only_the_connector_learns(precision, tmp_path, capsys):
    batches = text_and_images()
    pairs = [{name: torch.cat([left[name], right[name]]) for name in left} for left, right in zip(batches[::2], batches[1::2])]
    config = replace(QUIET, groups=(ParameterGroup("language.*", frozen=True),), max_steps=6, precision=precision)
    alone = train(Connector(), batches, config, tmp_path / "alone")
    assert "step 0: the loss of a batch without ids depends on nothing that is trained" in capsys.readouterr().out
    assert alone.column("gradient_norm")[0] == 0
    once = train(Connector(), pairs, config, tmp_path / "once")
    twice = train(Connector(), batches, replace(config, global_batch=4, micro_batch=2), tmp_path / "twice")
    assert twice.losses == pytest.approx(once.losses, rel=1e-5 if precision == "fp32" else 1e-2)


def test_an_update_without_images_keeps_the_connectors_momentum(tmp_path):
    batches, model, seen = text_and_images(), Connector(), []
    train(model, batches[1:3], replace(QUIET, groups=(ParameterGroup("language.*", frozen=True),), max_steps=2), tmp_path,
          on_step=lambda run, row: seen.append(run.model.connector.weight.detach().clone()))
    assert not torch.equal(seen[0], seen[1])


def test_epochs_end_with_a_smaller_step(tmp_path):
    config = replace(QUIET, max_steps=None, epochs=3, global_batch=16, micro_batch=4)
    history = train(Words(), make_batches(5), config, tmp_path)
    assert history.steps == [1, 2, 3, 4]   # 15 micro-batches: 4 + 4 + 4 + 3
    assert history.column("tokens")[-1] < history.column("tokens")[0]


# --- clipping, groups, frozen parts

def test_clipping_scales_to_the_limit_and_leaves_small_gradients_alone():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert loop.clip_gradients(parameters, 10.0) == 5 and parameters[1].grad == 4
    assert loop.clip_gradients(parameters, 1.0) == 5
    assert parameters[0].grad[0] == pytest.approx(0.6) and parameters[1].grad == pytest.approx(0.8)
    parameters[0].grad.zero_(), parameters[1].grad.zero_()
    assert loop.clip_gradients(parameters, 1.0) == 0 and parameters[1].grad == 0


def test_first_matching_group_decides():
    config = replace(QUIET, weight_decay=0.1, groups=(
        ParameterGroup("head.bias", learning_rate=1.0), ParameterGroup("head.*|embed.*", multiplier=0.5, weight_decay=0.3)))
    groups = {tuple(group["names"]): group for group in loop.parameter_groups(Words(), config)}
    assert groups["head.bias",]["peak"] == 1.0 and groups["head.bias",]["weight_decay"] == 0
    assert groups["embed.weight", "head.weight"]["peak"] == 5e-3
    assert groups["embed.weight", "head.weight"]["weight_decay"] == 0.3
    assert groups["norm.weight", "norm.bias"]["weight_decay"] == 0
    everywhere = loop.parameter_groups(Words(), replace(config, decay="all"))
    assert {group["weight_decay"] for group in everywhere} == {0.1, 0.3}


class Frozen(nn.Module):
    "A tower with batch norm and dropout under a head."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, batch):
        self.seen = (self.tower.training, self.tower[2].training, self.dropout.training, self.head.training)
        return self.head(self.dropout(self.tower(batch))).square().mean()


def test_frozen_parts_stay_frozen_in_eval_mode_and_the_model_is_given_back_as_it_was(tmp_path):
    model, batches = Frozen().eval(), [torch.randn(8, 4) for _ in range(3)]
    before = weights(model.tower)
    train(model, batches, replace(QUIET, groups=(ParameterGroup("tower.*", frozen=True),)), tmp_path)
    assert model.seen == (False, False, True, True)
    assert same(before, weights(model.tower)), "running means moved too"
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_a_group_can_train_what_the_model_froze(tmp_path):
    model, batches = Frozen(), [torch.randn(8, 4) for _ in range(3)]
    model.tower.requires_grad_(False)
    before = weights(model.tower)
    train(model, batches, QUIET, tmp_path / "as it is")
    assert same(before, weights(model.tower))
    train(model, batches, replace(QUIET, groups=(ParameterGroup("tower.*", frozen=False),)), tmp_path / "thawed")
    assert not same(before, weights(model.tower)) and not model.tower[0].weight.requires_grad


def test_muon_takes_matrices_and_adamw_the_rest_and_both_resume(tmp_path):
    config = replace(QUIET, optimizer="muon", save_every=5, weight_decay=0.1)
    optimizer = loop.build_optimizer(Words(), config)
    names = [[name for group in part.param_groups for name in group["names"]] for part in optimizer.parts]
    assert names[0] == ["head.weight"] and set(names[1]) == {"embed.weight", "norm.weight", "norm.bias", "head.bias"}
    whole = train(Words(0.1), make_batches(), config, tmp_path / "whole")
    with pytest.raises(RuntimeError):
        train(Words(0.1), make_batches(), config, tmp_path / "killed", on_step=fail_at(8))
    again = train(Words(0.1), make_batches(), config, tmp_path / "killed")
    assert again.losses == whole.losses and again.losses[-1] < again.losses[0]
    with pytest.raises(ValueError, match="'muon' needs matrices and other parameters"):
        loop.build_optimizer(nn.Linear(2, 2, bias=False), config)


def test_bad_groups_are_named(tmp_path):
    with pytest.raises(ValueError, match="'tower.*' matches none of the 5 parameters"):
        train(Words(), make_batches(), replace(QUIET, groups=(ParameterGroup("tower.*"),)), tmp_path)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        train(Words(), make_batches(), replace(QUIET, groups=(ParameterGroup("*", frozen=True),)), tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"global_batch": 6, "micro_batch": 4}, "global_batch is 6, expected a multiple"),
    ({"schedule": "cosin"}, "schedule is 'cosin', expected one of cosine"),
    ({"max_steps": 0}, "max_steps is 0, expected at least 1"),
    ({"learning_rate": 0.0}, "learning_rate is 0.0, expected more than 0"),
    ({"precision": "fp8"}, "precision is 'fp8'"),
])
def test_bad_settings_are_named(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(Words(), make_batches(), replace(QUIET, **change), tmp_path)


# --- bad batches

def test_a_batch_without_supervised_tokens_names_its_records(tmp_path):
    batches, model = make_batches(3), Words()
    batches[2]["labels"][:] = -100
    with pytest.raises(DataError, match="step 2: no supervised token in records sample-2-0, sample-2-1"):
        train(model, batches, QUIET, tmp_path)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_same_in_the_middle_of_an_accumulation(tmp_path):
    batches = make_batches(4)
    batches[3]["labels"][:] = -100
    with pytest.raises(DataError, match="step 0: no supervised token in records sample-3-0"):
        train(Words(), batches, replace(QUIET, global_batch=16, micro_batch=4), tmp_path)


def test_a_loss_that_is_no_number_stops_before_the_weights_change(tmp_path):
    def poisoned(model, batch):
        output = model(batch["words"], batch["labels"])
        return output.loss * (float("nan") if batch["ids"][0] == "sample-2-0" else 1.0)

    model, seen = Words(), {}
    with pytest.raises(LossError, match="step 2: the loss is nan on records sample-2-0"):
        train(model, make_batches(), QUIET, tmp_path, loss_function=poisoned,
              on_step=lambda run, row: seen.update(weights(run.model)))
    assert same(seen, weights(model))


@pytest.mark.parametrize("background", [False, True])
def test_what_was_learned_before_a_bad_loss_is_kept_to_the_bit(tmp_path, background):
    "After the cause is mended the run goes on from the step before, with the same data and dice as if nothing had been."
    config, healthy, poison = replace(QUIET, save=True, save_every=0, background=background), Words(), [True]

    def loss(model, batch):
        output = model(batch["words"], batch["labels"]).loss * (1 + .1 * torch.rand(()))
        return output * (float("nan") if poison[0] and batch["ids"][0] == "sample-2-0" else 1.0)

    with pytest.raises(LossError, match="step 2: the loss is nan .* those of step 2, saved in .*checkpoints"):
        train(Words(), make_batches(), config, tmp_path / "run", loss_function=loss)
    poison[0], resumed = False, Words()
    history = train(resumed, make_batches(), config, tmp_path / "run", loss_function=loss)
    whole = train(healthy, make_batches(), config, tmp_path / "whole", loss_function=loss)
    assert history.losses == whole.losses and same(weights(healthy), weights(resumed))


def test_buffers_of_the_bad_update_are_taken_back_and_a_sound_checkpoint_stays(tmp_path):
    class Running(Words):
        "A model that keeps a mean of what it has seen, as batch norm does."
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, words, labels, poison: float = 1.0):
            if self.training:
                self.mean.mul_(.9).add_(words.float().mean() * poison)
            output = super().forward(words, labels)
            return SimpleNamespace(loss=output.loss * poison * (1 + .1 * self.mean), tokens=output.tokens, metrics={})

    poison, config = [float("nan")], replace(QUIET, save=True, save_every=1, keep=1, best_metric="-score")

    def loss(model, batch):
        return model(batch["words"], batch["labels"], poison[0] if batch["ids"][0] == "sample-3-0" else 1.0)

    with pytest.raises(LossError, match="step 3: the loss is nan"):
        train(Running(), make_batches(), replace(config, save_every=2), tmp_path / "run", loss_function=loss,
              on_step=lambda run, row: {"score": run.step} if run.step == 2 else None)
    assert sorted(path.name[-1] for path in tmp_path.glob("run/checkpoints/step-*")) == ["2", "3"]
    poison[0], resumed, whole = 1.0, Running(), Running()
    config = replace(config, save_every=2)
    for model, folder in ((resumed, "run"), (whole, "whole")):
        train(model, make_batches(), config, tmp_path / folder, loss_function=loss, on_step=lambda run, row: {"score": run.step})
    assert same(weights(whole), weights(resumed)) and resumed.mean.isfinite()


def test_broken_weights_are_not_kept(tmp_path):
    def breaks(run, row):
        if run.step == 2:
            run.parameters[0].data[:] = float("nan")

    with pytest.raises(LossError, match="those of step 2$"):
        train(Words(), make_batches(), replace(QUIET, save=True), tmp_path, on_step=breaks)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_gradient_that_is_no_number_stops_too(tmp_path):
    def cliff(model, batch):
        return (model.head.weight * 0).sum().sqrt()   # zero, with an infinite slope
    with pytest.raises(LossError, match="step 0: the gradient's norm is nan on records sample-0-0"):
        train(Words(), make_batches(), QUIET, tmp_path, loss_function=cliff)


def test_a_model_without_loss_and_empty_data_are_errors(tmp_path):
    with pytest.raises(DataError, match="no loss for records sample-0-0"):
        train(Words(), make_batches(), QUIET, tmp_path / "a", loss_function=lambda model, batch: SimpleNamespace(loss=None))
    with pytest.raises(DataError, match="batches are empty"):
        train(Words(), [], QUIET, tmp_path / "b")
    with pytest.raises(ValueError, match="max_steps is not set"):
        train(Words(), iter(make_batches()), replace(QUIET, max_steps=None), tmp_path / "c")


# --- models, precision, hooks

def test_a_transformers_model_trains_on_its_own_batches(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                         num_attention_heads=2))
    ids = torch.randint(0, 20, (2, 9))
    labels = ids.clone()
    labels[:, :4] = -100
    history = train(model, [{"input_ids": ids, "labels": labels}], replace(QUIET, max_steps=8), tmp_path)
    assert history.losses[-1] < history.losses[0] and history.column("tokens")[0] == 10


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_fp32(precision, tmp_path):
    config = replace(QUIET, max_steps=30)
    full = train(Words(), make_batches(), config, tmp_path / "fp32")
    half = train(Words(), make_batches(), replace(config, precision=precision), tmp_path / precision)
    # a scaler starts high and may skip the first steps
    assert half.losses[-1] == pytest.approx(full.losses[-1], rel=0.2) and half.losses[-1] < 0.8 * half.losses[0]


def test_hooks_join_the_log_and_may_evaluate(tmp_path):
    modes = []

    def evaluate(run, row):
        modes.append(run.model.training)
        run.model.eval()
        return {"score": run.step / 10}

    history = train(Words(0.1), make_batches(), replace(QUIET, log_every=4), tmp_path, on_step=evaluate)
    assert modes == [True] * 12 and history.column("score") == [0.4, 0.8, 1.2]
    assert {"step", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "seconds"} <= history.rows[0].keys()


def test_the_best_is_kept_beside_the_newest(tmp_path):
    scores = {2: 0.1, 4: 0.9, 6: 0.5, 8: 0.4, 10: 0.2, 12: 0.3}
    train(Words(), make_batches(), replace(QUIET, save_every=2, keep=2, best_metric="score"), tmp_path,
          on_step=lambda run, row: {"score": scores.get(run.step, 0)})
    assert sorted(path.name[-2:] for path in (tmp_path / "checkpoints").iterdir()) == ["04", "10", "12"]


# --- resume

def fail_at(step: int):
    def hook(run, row):
        if run.step == step:
            raise RuntimeError("the power went out")
    return hook


def test_metrics_have_no_doubles_and_no_torn_line_after_a_resume(tmp_path):
    batches, config = make_batches(), replace(QUIET, save_every=5)
    whole = train(Words(), batches, config, tmp_path / "whole")
    with pytest.raises(RuntimeError):
        train(Words(), batches, config, tmp_path / "torn", on_step=fail_at(8))
    metrics = tmp_path / "torn/metrics.jsonl"
    assert len(loop.read_metrics(metrics)) == 7
    metrics.write_text(metrics.read_text() + '{"step": 8, "lo')
    torn = train(Words(), batches, config, tmp_path / "torn")
    assert torn.steps == list(range(1, 13)) and torn.losses == whole.losses


def test_a_finished_run_is_not_trained_again(tmp_path):
    model = Words()
    first = train(model, make_batches(), QUIET, tmp_path)
    other = Words()
    again = train(other, make_batches(), QUIET, tmp_path)
    assert again.rows == first.rows and same(weights(model), weights(other))


def test_without_saving_nothing_is_written_but_the_curve(tmp_path):
    train(Words(), make_batches(), replace(QUIET, save=False, save_every=2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_settings_other_data_and_other_frozen_weights_are_refused(tmp_path):
    config = replace(QUIET, groups=(ParameterGroup("embed.*", frozen=True),))
    train(Words(), make_batches(), config, tmp_path)
    with pytest.raises(CheckpointError, match="learning_rate: checkpoint 0.01, now 0.02; max_steps: checkpoint 12, now 13"):
        train(Words(), make_batches(), replace(config, learning_rate=0.02, max_steps=13), tmp_path)
    with pytest.raises(DataError, match="found 5 batches, expected the 6"):
        train(Words(), make_batches(5), config, tmp_path)
    other = Words()
    with torch.no_grad():
        other.embed.weight += 1
    with pytest.raises(CheckpointError, match="other frozen weights: embed.weight"):
        train(other, make_batches(), config, tmp_path)
    with pytest.raises(CheckpointError, match="resume is False"):
        train(Words(), make_batches(), replace(config, resume=False), tmp_path)
    class Stream:
        def __iter__(self): return iter(make_batches())
    with pytest.raises(DataError, match="Stream cannot go on from batch 6"):
        train(Words(), Stream(), config, tmp_path)


def test_other_groups_are_told_apart_in_words(tmp_path):
    config = replace(QUIET, groups=(ParameterGroup("embed.*", frozen=True), ParameterGroup("head.*", learning_rate=1e-3)))
    train(Words(), make_batches(), config, tmp_path)
    with pytest.raises(CheckpointError, match=r"other settings: groups.embed.\*: checkpoint 'frozen', now '\(not there\)'; "
                                              r"groups.head.\*: checkpoint 'as the model has it, learning_rate 0.001', now 'frozen'"):
        train(Words(), make_batches(), replace(config, groups=(ParameterGroup("head.*", frozen=True),)), tmp_path)
    with pytest.raises(CheckpointError, match="other settings: groups"):   # the order alone
        train(Words(), make_batches(), replace(config, groups=config.groups[::-1]), tmp_path)


def test_a_torn_checkpoint_is_passed_over_and_the_curve_stays_the_same(tmp_path, capsys):
    config = replace(QUIET, save_every=4)
    whole = train(Words(), make_batches(), config, tmp_path)
    newest = tmp_path / "checkpoints/step-00000012/optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:200])
    again = train(Words(), make_batches(), config, tmp_path)
    assert again.losses == whole.losses
    said = capsys.readouterr().out
    assert "step-00000012 is broken (optimizer.safetensors has 200 bytes, expected" in said and "going on after step 8 of 12" in said


VICTIM = '''
import json, os, random, signal, sys, time, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
import torch._dynamo   # an optimizer's first step loads it: once here instead of in every child
from safetensors.torch import save_file
from test_loop import FP32, QUIET, Words, make_batches, replace, train, weights
from mllm_nb.training import checkpoints

CONFIG = replace(QUIET, max_steps=24, save_every=2, warmup_ratio=0.1, global_batch=8, micro_batch=4)
ROOT = Path(sys.argv[2])


class Shuffled:
    "Batches with an order of their own, drawn anew in every epoch."
    def __init__(self): self.all, self.epoch, self.next = make_batches(7), 0, 0
    def __iter__(self):
        order = torch.randperm(7, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        for index in order[self.next:]:
            self.next += 1
            yield self.all[index]
        self.epoch, self.next = self.epoch + 1, 0
    def state_dict(self): return {"epoch": self.epoch, "next": self.next}
    def load_state_dict(self, state): self.epoch, self.next = state["epoch"], state["next"]


def run(folder, kill_at=0, syncs=0):
    "Train; die at the border of a step, or inside the first save after it when `syncs` files are on the disk."
    left = [syncs]
    def die(run, row):
        if run.step == kill_at and not syncs: os.kill(os.getpid(), signal.SIGKILL)
        if run.step == kill_at:
            real = checkpoints.sync_file
            def sync(path):
                left[0] -= 1
                if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
                real(path)
            checkpoints.sync_file = sync
        return {"noise": random.random()}
    model = Words(0.2)
    train(model, Shuffled(), CONFIG, ROOT / folder, plan=FP32, on_step=die)
    save_file(weights(model), ROOT / (folder + ".safetensors"))


def child(kill_after=None, **settings):
    "Run in a process of its own; returns the signal that ended it."
    if (number := os.fork()) == 0:
        code = 1
        try: run(**settings); code = 0
        finally: os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(number, signal.SIGKILL)
    return os.waitpid(number, 0)[1]

assert child(folder="whole") == 0
draw = random.Random(7)
for number, step in enumerate(sorted(draw.sample(range(1, 23), 10))):
    assert child(folder="killed", kill_at=step, syncs=draw.randint(1, 5) if number % 2 else 0) == signal.SIGKILL, step
assert child(folder="killed") == 0
ends = [child(folder="hunted", kill_after=draw.uniform(0.05, 0.3)) for _ in range(3)] + [child(folder="hunted")]
assert ends[-1] == 0
print("killed from outside", sum(end == signal.SIGKILL for end in ends), "times")
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_give_the_uninterrupted_curve_bit_for_bit(tmp_path):
    "SIGKILL at ten random steps, half of them inside a save; and at three random moments from outside."
    script = tmp_path / "victim.py"
    script.write_text(VICTIM)
    subprocess.run([sys.executable, script, Path(__file__).parent, tmp_path], check=True, timeout=400,
                   env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    rows = {name: loop.read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed", "hunted")}
    for name in ("killed", "hunted"):
        assert [row["step"] for row in rows[name]] == list(range(1, 25))
        for field in ("loss", "gradient_norm", "learning_rate", "tokens", "noise"):
            assert [row[field] for row in rows[name]] == [row[field] for row in rows["whole"]], field
        assert same(load_file(tmp_path / f"{name}.safetensors"), load_file(tmp_path / "whole.safetensors"))


SLOW = '''
import sys, time
sys.path.insert(0, sys.argv[1])
from test_loop import QUIET, Words, make_batches, replace, train
train(Words(), make_batches(), replace(QUIET, max_steps=400), sys.argv[2], on_step=lambda run, row: time.sleep(0.02))
'''


def test_ctrl_c_stops_at_a_step_border_saves_and_resumes(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    process = subprocess.Popen([sys.executable, tmp_path / "slow.py", Path(__file__).parent, tmp_path / "run"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and len(loop.read_metrics(metrics)) < 5:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert "press Ctrl-C again to abort" in out
    assert "Interrupted: stopped after step" in errors and "the same call goes on from" in errors
    step = loop.read_metrics(metrics)[-1]["step"]
    assert (tmp_path / f"run/checkpoints/step-{step:08d}").is_dir()
    whole = train(Words(), make_batches(), replace(QUIET, max_steps=400), tmp_path / "whole")
    again = train(Words(), make_batches(), replace(QUIET, max_steps=400), tmp_path / "run")
    assert again.losses == whole.losses


# --- epochs of unequal length, rare rows

class Uneven:
    "Batches whose epochs differ in length, as packed ones do; with `steps` they can be counted beforehand."
    counts = (5, 3, 6)

    def __init__(self):
        self.epoch = self.batch = 0

    def __len__(self):
        return self.counts[self.epoch]

    def __iter__(self):
        for batch in make_batches(self.counts[self.epoch], seed=self.epoch)[self.batch:]:
            self.batch += 1
            yield batch
        self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self):
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state):
        self.epoch, self.batch = state["epoch"], state["batch"]


class Counted(Uneven):
    def steps(self, epochs: int) -> int:
        return sum(self.counts[:epochs])


@pytest.mark.parametrize("kind, planned", [(Counted, 14), (Uneven, 15)])
def test_epochs_of_unequal_length_are_read_to_their_end(kind, planned, tmp_path):
    "Counted beforehand, the schedule ends with the data; else the data decide all the same, also after a stop."
    config = replace(QUIET, max_steps=None, epochs=3, save_every=4, schedule="linear")
    whole = train(Words(), kind(), config, tmp_path / "whole")
    assert whole.steps == list(range(1, 15))
    assert whole.column("learning_rate")[-1] == pytest.approx(1e-2 / planned if kind is Counted else 1e-2 * 2 / planned)
    with pytest.raises(RuntimeError):
        train(Words(), kind(), config, tmp_path / "cut", on_step=fail_at(10))
    assert train(Words(), kind(), config, tmp_path / "cut").losses == whole.losses
    assert train(Words(), kind(), config, tmp_path / "cut").losses == whole.losses   # finished: nothing more


def test_more_data_than_counted_is_not_left_out(tmp_path):
    class Growing(Uneven):
        counts = (3, 6)
    history = train(Words(), Growing(), replace(QUIET, max_steps=None, epochs=2, log_every=4), tmp_path)
    assert history.steps == [4, 8, 9] and history.column("learning_rate")[-1] == 0


def test_packed_batches_end_with_their_schedule(tmp_path):
    from mllm_nb.data.batches import Batches, BatchSettings, Example
    torch.manual_seed(1)
    lengths = torch.randint(2, 12, (90,), generator=torch.Generator().manual_seed(4)).tolist()
    examples = [Example(str(i), str(i), *torch.randint(0, 11, (2, n)), torch.full((n,), -1), ()) for i, n in enumerate(lengths)]
    batches = Batches(examples, None, BatchSettings(12, 2, seed=3, window=10, remainder="drop"))
    counts = [len(batches.plan(epoch)) for epoch in range(4)]
    assert len(set(counts)) > 1, counts

    def loss(model, batch):
        return model(batch.input_ids, batch.labels)
    history = train(Words(), batches, replace(QUIET, max_steps=None, epochs=4, log_every=5, schedule="linear"), tmp_path,
                    loss_function=loss)
    assert history.steps[-1] == sum(counts) and history.column("learning_rate")[-1] == pytest.approx(1e-2 / sum(counts))


@pytest.mark.parametrize("every, expected", [(5, [5, 10, 12]), (4, [4, 8, 12]), (100, [12])])
def test_the_last_row_is_always_written(every, expected, tmp_path):
    assert train(Words(), make_batches(), replace(QUIET, log_every=every), tmp_path).steps == expected


# --- features of frozen towers, kept

def seeing(tmp_path, remember=None, epochs: int = 2, shift: float = 0.0):
    "Losses of a miniature that learns to connect, with some pictures more than once; and its memories."
    from mllm_nb.data.batches import Batches, BatchSettings
    from mllm_nb.data.world import World
    from mllm_nb.training.miniatures import assemble_miniature
    model, processor = assemble_miniature(seed=0)
    with torch.no_grad():
        next(model.towers.parameters()).add_(shift)
    world = World(seed=3, length=6, view="conversation")
    batches = Batches([world[number] for number in (0, 1, 2, 3, 1, 0)], processor, BatchSettings(192, 2, packing=False))
    memories = remember(model) if remember else []
    groups = (ParameterGroup("connector.*", frozen=False), ParameterGroup("*", frozen=True))
    config = replace(QUIET, groups=groups, max_steps=None, epochs=epochs, save=False)
    return train(model, batches, config, tmp_path).losses, memories, model


def test_a_frozen_tower_looks_once_and_the_curve_stays(tmp_path):
    expected, _, _ = seeing(tmp_path / "plain")
    losses, memories, model = seeing(tmp_path / "kept", loop.remember_features)
    assert losses == pytest.approx(expected, abs=1e-6) and len(losses) == 6
    assert [memory.looked for memory in memories] == [4]   # six samples, two epochs, four pictures
    none, memories, _ = seeing(tmp_path / "no room", lambda model: loop.remember_features(model, gigabytes=0))
    assert none == pytest.approx(expected, abs=1e-6) and memories[0].looked > 4
    names = set(model.state_dict())
    assert all(name.split(".")[2] == "vit" for name in names if name.startswith("towers."))


def test_a_folder_serves_later_runs_of_the_same_tower(tmp_path):
    def kept(model):
        return loop.remember_features(model, tmp_path / "features")
    first, memories, _ = seeing(tmp_path / "a", kept)
    again, later, _ = seeing(tmp_path / "b", kept)
    assert again == first and memories[0].looked == 4 and later[0].looked == 0
    _, other, _ = seeing(tmp_path / "c", kept, shift=0.01)
    assert other[0].looked == 4   # other weights see other things
    _, short, _ = seeing(tmp_path / "d", lambda model: loop.remember_features(model, tmp_path / "features", half=True))
    assert short[0].looked == 4   # and 16 bits are not handed to those who keep 32
    assert not list((tmp_path / "features").rglob(".*"))


def test_a_tower_that_learns_is_asked_every_time(tmp_path):
    from mllm_nb.training.miniatures import assemble_miniature
    model, _ = assemble_miniature(seed=0)
    memory, = loop.remember_features(model)
    view = torch.randn(2, 3, 128, 128)
    assert torch.equal(model.towers[0](view).grid, model.towers[0](view).grid) and memory.looked == 2
    model.towers[0].requires_grad_(True)
    model.towers[0](view)
    assert memory.looked == 2
    with pytest.raises(ValueError, match="tower 0 learns"):
        loop.remember_features(model)


def test_remembering_for_a_while_shares_keeps_sixteen_bits_and_takes_batches_without_pictures():
    from mllm_nb.training.miniatures import assemble_miniature
    first, second, memory = assemble_miniature(seed=0)[0], assemble_miniature(seed=1)[0], {}
    views = torch.randn(3, 3, 128, 128)
    plain = first.towers[0](views)
    with pytest.raises(RuntimeError, match="stop"), loop.remembering(first, half=True, shared=memory) as (kept,):
        seen, again = first.towers[0](views), first.towers[0](views[[2, 0, 2]])
        with loop.remembering(first):
            pass
        assert first.towers[0](views[:0]).grid.shape[0] == 0 and first.towers[0].forward is kept
        raise RuntimeError("stop")
    assert kept.looked == 3 and "forward" not in vars(first.towers[0])
    torch.testing.assert_close(seen.grid, plain.grid, atol=1e-2, rtol=1e-3)
    assert torch.equal(again.grid, seen.grid[[2, 0, 2]]) and seen.mask.dtype == torch.bool
    assert all(one["grid"].dtype == torch.float16 for one in next(iter(memory.values())).values())
    with loop.remembering(second, half=True, shared=memory) as (kept,), torch.autocast("cpu", torch.bfloat16):
        second.towers[0](views)   # another precision is another look
    assert kept.looked == 3
    with loop.remembering(second, half=True, shared=memory) as (kept,):
        assert torch.equal(second.towers[0](views).grid, seen.grid) and kept.looked == 0
