"Checkpoints: whole or not at all, found broken when they are, and refused where they do not belong."
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mllm_nb.training import checkpoints
from mllm_nb.training.checkpoints import CheckpointError, load_checkpoint, save_checkpoint

TENSORS = {"model": {"weight": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)},
           "optimizer": {"exp_avg:weight": torch.zeros(2, 3), "step:weight": torch.tensor(3.0)}}
STATE = {"order": {"epoch": 1, "position": 4}, "word": "Grüße"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read(tmp_path):
    path = save_checkpoint(tmp_path, 42, TENSORS, STATE, score=0.5)
    assert path.name == "step-00000042" and names(tmp_path) == ["step-00000042"]
    found = load_checkpoint(tmp_path)
    assert (found.step, found.score, found.state) == (42, 0.5, STATE)
    for part, tensors in TENSORS.items():
        for name, value in found.tensors(part).items():
            assert torch.equal(value, tensors[name]) and value.dtype == tensors[name].dtype
    assert load_checkpoint(tmp_path / "nothing") is None


def test_only_safetensors_and_json_are_written(tmp_path):
    path = save_checkpoint(tmp_path, 1, TENSORS, STATE)
    assert names(path) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert "pickle" not in Path(checkpoints.__file__).read_text()


def test_views_of_one_tensor_and_transposed_tensors_can_be_saved(tmp_path):
    square = torch.arange(4.0).reshape(2, 2)
    save_checkpoint(tmp_path, 1, {"model": {"across": square.T, "row": square[1]}}, {})
    tensors = load_checkpoint(tmp_path).tensors("model")
    assert torch.equal(tensors["across"], square.T) and torch.equal(tensors["row"], square[1])


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def rot(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage, message", [
    (lambda path: tear(path / "model.safetensors"), r"model.safetensors has \d+ bytes, expected \d+"),
    (lambda path: rot(path / "optimizer.safetensors"), "optimizer.safetensors has the right length and the wrong checksum"),
    (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    (lambda path: (path / "manifest.json").write_text('{"format'), "manifest.json is missing or unreadable"),
    (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is missing or unreadable"),
])
def test_a_broken_checkpoint_is_passed_over_and_said_so(damage, message, tmp_path):
    save_checkpoint(tmp_path, 1, TENSORS, STATE)
    damage(save_checkpoint(tmp_path, 2, TENSORS, STATE))
    said = []
    assert load_checkpoint(tmp_path, said.append).step == 1
    assert len(said) == 1 and said[0].startswith("step-00000002 is broken")
    with pytest.raises(CheckpointError, match=message):
        checkpoints.open_checkpoint(tmp_path / "step-00000002")


def test_nothing_whole_left_is_an_error_and_not_a_fresh_start(tmp_path):
    tear(save_checkpoint(tmp_path, 1, TENSORS, STATE) / "state.json")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints is whole"):
        load_checkpoint(tmp_path, log=lambda line: None)


def test_a_newer_format_is_refused_and_not_passed_over(tmp_path):
    save_checkpoint(tmp_path, 1, TENSORS, STATE)
    path = save_checkpoint(tmp_path, 2, TENSORS, STATE) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99 was written by a newer mllm_nb, expected at most 2"):
        load_checkpoint(tmp_path)


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, score in enumerate([0.1, 0.9, 0.3, 0.2, 0.4], start=1):
        save_checkpoint(tmp_path, step, TENSORS, STATE, keep=2, score=score)
    assert [name[-1] for name in names(tmp_path)] == ["2", "4", "5"]
    save_checkpoint(tmp_path, 6, TENSORS, STATE, keep=1)
    assert [name[-1] for name in names(tmp_path)] == ["2", "6"]


def test_a_step_that_is_reached_again_replaces_its_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, TENSORS, {"try": 1})
    save_checkpoint(tmp_path, 1, TENSORS, {"try": 2})
    assert load_checkpoint(tmp_path).state == {"try": 2}


def test_what_a_killed_save_left_is_ignored_and_cleared_away(tmp_path):
    save_checkpoint(tmp_path, 1, TENSORS, STATE)
    (tmp_path / ".step-00000002.writing").mkdir()
    (tmp_path / ".step-00000002.writing/model.safetensors").write_bytes(b"half")
    assert load_checkpoint(tmp_path).step == 1
    save_checkpoint(tmp_path, 3, TENSORS, STATE)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("fails", ["save_file", "write_json", "sync_folder"])
def test_a_failed_save_leaves_the_last_good_one(fails, tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, TENSORS, STATE)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, fails, full)
    with pytest.raises(CheckpointError, match="step-00000002: could not be written .*No space left.*earlier checkpoints are untouched"):
        save_checkpoint(tmp_path, 2, TENSORS, STATE)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_really_full_disk(tmp_path):
    "A limit on file size stops the writer as a full disk does."
    import resource
    save_checkpoint(tmp_path, 1, TENSORS, STATE)
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save_checkpoint(tmp_path, 2, {"model": {"large": torch.zeros(100_000)}}, STATE)
        except CheckpointError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert names(tmp_path) == ["step-00000001"]


# --- models, optimizers, random numbers

def tied_model() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "norm": nn.BatchNorm1d(4), "head": nn.Linear(4, 5, bias=False)})
    model.head.weight = model.embed.weight
    model.norm.requires_grad_(False)
    return model


def test_model_tensors_are_what_training_changes():
    found = checkpoints.model_tensors(tied_model())
    assert set(found) == {"embed.weight", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


def test_names_and_shapes_must_fit():
    model = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match="bias: in the model, not in the checkpoint; scale: in the checkpoint, not in the model"):
        checkpoints.restore_model(model, {"weight": torch.zeros(2, 3), "scale": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"weight is \(2, 4\), the model has \(2, 3\)"):
        checkpoints.restore_model(model, {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)})


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad])
def test_an_optimizer_goes_on_where_it_was(kind, tmp_path):
    def steps(model, optimizer, count):
        for _ in range(count):
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer, fresh = kind(model.parameters(), lr=0.1), kind(other.parameters(), lr=0.1)
    steps(model, optimizer, 3)
    save_checkpoint(tmp_path, 3, {"model": checkpoints.model_tensors(model),
                                  "optimizer": checkpoints.optimizer_tensors(optimizer, model)}, {})
    found = load_checkpoint(tmp_path)
    checkpoints.restore_model(other, found.tensors("model"))
    checkpoints.restore_optimizer(fresh, other, found.tensors("optimizer"))
    steps(model, optimizer, 3)
    steps(other, fresh, 3)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)


def test_random_numbers_go_on_where_they_were():
    def draw():
        return torch.rand(3).tolist(), np.random.randn(3).tolist(), [random.gauss(0, 1) for _ in range(3)]

    np.random.randn(1), random.gauss(0, 1)   # both keep a second number for later
    tensors, numbers = checkpoints.random_state()
    numbers = json.loads(json.dumps(numbers))
    first, _ = draw(), draw()
    checkpoints.restore_random_state(tensors, numbers)
    assert draw() == first


def test_frozen_weights_are_recognised():
    model = tied_model()
    saved = checkpoints.frozen_prints(model)
    assert set(saved) == {"norm.weight", "norm.bias"}
    checkpoints.check_frozen(model, saved, "here")
    with torch.no_grad():
        model.norm.weight[3] += 1e-6
    with pytest.raises(CheckpointError, match="here was trained beside other frozen weights: norm.weight"):
        checkpoints.check_frozen(model, saved, "here")
    model.norm.weight.requires_grad_(True)
    with pytest.raises(CheckpointError, match="norm.weight: in the checkpoint, not in the model"):
        checkpoints.check_frozen(model, saved, "here")


def test_differences_name_fields():
    saved = {"rate": 1, "groups": [{"pattern": "a"}], "inner": {"x": 1, "y": 2}, "keep": 1}
    now = {"rate": 1, "groups": [{"pattern": "b"}], "inner": {"x": 1, "y": 3}, "keep": 2, "new": 0}
    lines = checkpoints.differences(saved, now, free=("keep",))
    assert lines == ["groups: checkpoint [{'pattern': 'a'}], now [{'pattern': 'b'}]", "inner.y: checkpoint 2, now 3",
                     "new: checkpoint '(not there)', now 0"]
