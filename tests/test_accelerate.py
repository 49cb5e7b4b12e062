"The model as it is in other people's loops: accelerate's `prepare`, transformers' `Trainer`, from one process and two."
import os

import pytest
import torch


from mllm_nb.data.batches import Batches, BatchSettings
from mllm_nb.data.world import World
from mllm_nb.training.loop import ParameterGroup, TrainingConfig, train
from mllm_nb.training.miniatures import assemble_miniature
from mllm_nb.training.parallel import in_processes

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.xdist_group("parallel")
GROUPS = (ParameterGroup("connector.*|language.*", frozen=False), ParameterGroup("*", frozen=True))


def model_and_batches(rows: int = 2, rank: int = 0, size: int = 1, steps: int = 3):
    torch.manual_seed(0)
    model, processor = assemble_miniature()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("towers."))
    world = World(seed=3, length=24, view="conversation")
    batches = Batches(world, processor, BatchSettings(192, rows, packing=False, rank=rank, world_size=size))
    return model, [batch for batch, _ in zip(batches, range(steps))]


def ours(tmp_path, rows: int = 2) -> list[float]:
    "The library's own loop."
    model, batches = model_and_batches(rows)
    config = TrainingConfig(5e-4, GROUPS, 3, schedule="constant", clip_norm=None, precision="fp32", device="cpu",
                            progress=False, save=False)
    return train(model, batches, config, tmp_path).losses


def with_accelerate(rows: int = 2) -> list[float]:
    "The loop that accelerate's manual shows, in as many processes as there are."
    accelerate.state.AcceleratorState._reset_state(True)   # forked from a process that had one
    unused = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)   # a batch may hold no picture
    state = accelerate.Accelerator(cpu=True, kwargs_handlers=[unused])
    model, batches = model_and_batches(rows, state.process_index, state.num_processes)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4, weight_decay=0)
    model, optimizer = state.prepare(model, optimizer)
    losses = []
    for batch in batches:
        output = model(**batch.model_inputs())
        tokens = state.gather(torch.tensor([output.tokens])).float()
        # every process weighs its mean by its tokens; accelerate averages over processes
        state.backward(output.loss * output.tokens / tokens.mean())
        optimizer.step()
        optimizer.zero_grad()
        both = state.gather((output.loss.detach() * output.tokens).reshape(1)).sum() / tokens.sum()
        losses.append(both.item())
    inner = state.unwrap_model(model)
    assert type(inner).__name__ == "MLLM" and all(p.grad is None for p in inner.towers.parameters())
    return losses


def test_accelerate_prepares_the_model_as_it_is(tmp_path):
    assert with_accelerate() == pytest.approx(ours(tmp_path), abs=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_accelerate_on_two_processes(tmp_path):
    for found in in_processes(with_accelerate, 2, 1, timeout=60):
        assert found == pytest.approx(ours(tmp_path, 2), abs=1e-5)


def test_transformers_trainer_takes_the_model_as_it_is(tmp_path):
    "Its loop, its optimizer, its checkpoints; batches come as they are."
    from transformers import Trainer, TrainingArguments
    model, batches = model_and_batches()

    class Rows(torch.utils.data.Dataset):
        def __len__(self): return len(batches)
        def __getitem__(self, number): return batches[number]

    arguments = TrainingArguments(tmp_path / "theirs", max_steps=3, learning_rate=5e-4, lr_scheduler_type="constant",
                                  per_device_train_batch_size=1, max_grad_norm=0.0, logging_steps=1, report_to=[],
                                  use_cpu=True, disable_tqdm=True, save_steps=2, remove_unused_columns=False,
                                  label_names=["labels"], dataloader_pin_memory=False)
    trainer = Trainer(model, arguments, train_dataset=Rows(), data_collator=lambda rows: rows[0].model_inputs())
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(Rows(), 1, collate_fn=trainer.data_collator)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses == pytest.approx(ours(tmp_path / "ours"), abs=2e-4)   # the Trainer rounds what it logs to 4 digits
    assert (tmp_path / "theirs/checkpoint-2").is_dir()
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert any(name.startswith("connector.") for name in changed) and not any(name.startswith("towers.") for name in changed)


