"Checkpoints of many processes: whole or not at all, continued by another number of processes, killed, on a full disk."
import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mllm_nb.language.decoder import Decoder, DecoderConfig
from mllm_nb.training import checkpoints, loop
from mllm_nb.training.checkpoints import CheckpointError, checkpoint_folders, load_checkpoint, open_checkpoint
from mllm_nb.training.loop import TrainingConfig, train
from mllm_nb.training.parallel import Plan, in_processes, team_of

pytestmark = [pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"), pytest.mark.xdist_group("parallel")]
CONFIG = TrainingConfig(1e-3, max_steps=8, warmup_steps=2, save_every=2, progress=False)


class Reader(nn.Module):
    "A small language model, called like an MLLM."
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.language = Decoder(DecoderConfig(32, 16, 24, 2, 4, 2, head_dim=4))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, ids):
        self.seen += 1
        scores = self.language(self.dropout(self.language.embed(ids)))
        return nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def shares(rank: int, size: int, accumulation: int) -> list:
    "This process's micro-batches of steps of 8 rows each."
    steps = torch.randint(0, 32, (12, 8, 10), generator=torch.Generator().manual_seed(3))
    return [part for step in steps for part in step.chunk(size)[rank].chunk(accumulation)]


def run(plan: Plan, folder: Path, stop: int = 8, dropout: float = 0.0, on_step=None, **changes) -> list[float]:
    "Train up to step `stop`; the losses that are written down."
    team = team_of(plan)
    config = plan.config(replace(CONFIG, **changes))

    def leave(run, row):
        if on_step:
            on_step(run, row)
        if run.step == stop < config.max_steps:
            os.kill(os.getpid(), signal.SIGTERM)
    try:
        train(Reader(dropout), shares(team.rank, team.size, plan.accumulation), config, folder,
              plan=plan.device_plan(), team=team, on_step=leave)
    except KeyboardInterrupt:
        pass
    return [row["loss"] for row in loop.read_metrics(folder / "metrics.jsonl")]


def plan_for(world: int, sharding: str = "fsdp") -> Plan:
    if world == 1:
        return Plan(8, 8)
    return Plan(8, 8, 1, world, "tp") if sharding == "tp" else Plan(8, 8 // world, 1, world, sharding)


def on(world: int, folder: Path, *arguments, sharding: str = "fsdp", **changes) -> list[float]:
    plan = plan_for(world, sharding)
    call = lambda: run(plan, folder, *arguments, **changes)  # noqa: E731
    return call() if world == 1 else in_processes(call, world)[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[float]:
    return on(1, tmp_path_factory.mktemp("whole"))


def close(found: list[float], expected: list[float], tolerance: float = 1e-6) -> bool:
    return len(found) == len(expected) and max(abs(a - b) for a, b in zip(found, expected)) < tolerance


@pytest.mark.parametrize("first, then", [
    ((2, "fsdp"), (1, "none")), ((2, "fsdp"), (4, "fsdp")), ((2, "tp"), (1, "none")), ((2, "fsdp"), (2, "tp")),
    ((1, "none"), (2, "fsdp")), ((2, "ddp"), (4, "ddp"))])
def test_saved_by_some_continued_by_others(first, then, whole, tmp_path):
    assert len(on(first[0], tmp_path, 4, sharding=first[1])) == 4
    assert open_checkpoint(tmp_path / "checkpoints/step-00000004").step == 4
    assert close(on(then[0], tmp_path, sharding=then[1]), whole)


def test_the_same_number_of_processes_continues_bit_for_bit(tmp_path):
    "With dropout: every process throws its own dice, and they are saved."
    expected = on(2, tmp_path / "whole", dropout=0.2)
    on(2, tmp_path / "cut", 4, dropout=0.2)
    assert on(2, tmp_path / "cut", dropout=0.2) == expected


def test_another_accumulation_finds_its_place_in_the_data(whole, tmp_path):
    on(2, tmp_path, 4)
    plan = Plan(8, 1, 8)
    assert close(run(plan, tmp_path), whole)


def test_each_process_writes_its_part_as_safetensors(tmp_path):
    on(2, tmp_path, 4)
    folder = tmp_path / "checkpoints/step-00000004"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    shards = [f"{part}/shard-0000{rank}-model-00001-of-00001.safetensors" for part in ("model", "optimizer") for rank in (1, 2)]
    assert files == sorted([*shards, "manifest.json", "random.safetensors", "state.json"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == set(files) - {"manifest.json"} and manifest["format"] == checkpoints.FORMAT
    names = {name for name, _ in Reader().named_parameters()} | {"seen"}
    tensors = load_checkpoint(tmp_path / "checkpoints").tensors("model")
    assert set(tensors) == names and tensors["language.model.embed_tokens.weight"].shape == (32, 16)


def test_the_best_is_kept_beside_the_newest(tmp_path):
    scores = {2: 0.1, 4: 0.9, 6: 0.5, 8: 0.3}
    plan = plan_for(2)
    in_processes(lambda: run_scored(plan, tmp_path, scores), 2)
    assert [path.name for path in checkpoint_folders(tmp_path / "checkpoints")] == ["step-00000004", "step-00000008"]


def run_scored(plan: Plan, folder: Path, scores: dict) -> None:
    team = team_of(plan)
    train(Reader(), shares(team.rank, team.size, 1), plan.config(replace(CONFIG, keep=1, best_metric="good")), folder,
          plan=plan.device_plan(), team=team, on_step=lambda run, row: {"good": scores.get(run.step, 0.0)})


# --- killed

def killed(plan: Plan, folder: Path, step: int, syncs: int, background: bool) -> None:
    "Process 1 or 0 dies inside the save after `step`, when `syncs` of its files or folders are on the disk."
    left, victim = [syncs], step // 2 % 2

    def arm(run, row):
        if run.step == step and team_number() == victim:
            for name in ("sync_file", "sync_folder"):
                setattr(checkpoints, name, dying(getattr(checkpoints, name)))

    def dying(real):
        def sync(path):
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(path)
        return sync
    run(plan, folder, on_step=arm, background=background)


def team_number() -> int:
    return int(os.environ["RANK"])


@pytest.mark.parametrize("background", [False, True])
def test_killed_inside_saves_the_curve_stays_the_same(background, tmp_path):
    plan, draw = plan_for(2), random.Random(11)
    expected = on(2, tmp_path / "whole")
    for step in (2, 4, 4, 6):
        with pytest.raises(RuntimeError, match="died without a word|is gone|could not be written"):
            in_processes(killed, 2, plan, tmp_path / "cut", step, draw.randint(1, 2), background, timeout=60)
        for path in checkpoint_folders(tmp_path / "cut/checkpoints"):
            open_checkpoint(path)   # whatever has a name is whole
    assert on(2, tmp_path / "cut", background=background) == expected
    assert not list((tmp_path / "cut/checkpoints").glob(".*"))


# --- bad luck

def full_disk(plan: Plan, folder: Path, background: bool = False) -> str:
    "From step 4 on process 1 cannot write; what both are told."
    def fill_up(run, row):
        if run.step == 4:
            run.saver.wait()   # the second step's is written
        if run.step == 4 and run.team.number == 1:
            def no_room(path):
                raise OSError(28, "No space left on device")
            checkpoints.sync_folder = no_room
    try:
        run(plan, folder, on_step=fill_up, background=background)
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_keeps_the_last_good_one_and_tells_everybody(background, tmp_path, whole):
    for told in in_processes(full_disk, 2, plan_for(2), tmp_path, background):
        assert "step-00000004: could not be written (process 1: [Errno 28] No space left" in told
        assert "earlier checkpoints are untouched" in told
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert close(on(2, tmp_path), whole)   # room was made: it goes on


def test_beside_the_training_the_same_is_written(whole, tmp_path):
    assert close(on(2, tmp_path, background=True), whole)
    assert len(checkpoint_folders(tmp_path / "checkpoints")) == 2
    assert close(on(1, tmp_path / "one", background=True), whole)
    left, right = (load_checkpoint(folder / "checkpoints").tensors("model") for folder in (tmp_path, tmp_path / "one"))
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], atol=1e-6, rtol=1e-5)


def test_a_copy_is_written_not_what_training_goes_on_with(tmp_path):
    "The tensors change while they wait to be written."
    value, saver = torch.zeros(4), checkpoints.Saver(background=True)
    saver.pool.submit(__import__("time").sleep, 0.2)
    saver.save(tmp_path, 1, {"model": {"value": value}}, {}, 2, None)
    value += 1
    saver.wait()
    assert torch.equal(load_checkpoint(tmp_path).tensors("model")["value"], torch.zeros(4))


def test_a_checkpoint_cut_in_half_is_passed_over(whole, tmp_path, capsys):
    on(2, tmp_path, 6)
    shard = next((tmp_path / "checkpoints/step-00000006/model").iterdir())
    shard.write_bytes(shard.read_bytes()[:shard.stat().st_size // 2])
    assert close(on(1, tmp_path), whole)
    out = capsys.readouterr().out
    assert "step-00000006 is broken" in out and "going on after step 4 of 8" in out


@pytest.mark.parametrize("changes, message", [
    ({"learning_rate": 2e-3}, "was written with other settings: learning_rate: checkpoint 0.001, now 0.002"),
    ({"resume": False}, "holds checkpoints and TrainingConfig.resume is False")])
def test_a_checkpoint_of_another_recipe_is_refused_by_all(changes, message, tmp_path):
    on(2, tmp_path, 4)
    with pytest.raises(RuntimeError, match=message):
        on(2, tmp_path, **changes)


def test_another_global_batch_and_a_newer_version_are_refused(tmp_path):
    on(2, tmp_path, 4)
    with pytest.raises(CheckpointError, match="global_batch: checkpoint 8, now 16"):
        run(Plan(16, 8, 2), tmp_path)
    for path in checkpoint_folders(tmp_path / "checkpoints"):
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99 was written by a newer mllm_nb"):
        on(1, tmp_path)
    with pytest.raises(RuntimeError, match="format 99 was written by a newer mllm_nb"):
        on(2, tmp_path)
