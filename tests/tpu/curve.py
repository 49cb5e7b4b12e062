"A few updates of the miniature LLaVA on XLA's CPU devices; prints losses and the number of compilations as JSON."
import json
import sys
import tempfile

import torch

from mllm_nb.data.batches import Batches, BatchSettings
from mllm_nb.data.world import World
from mllm_nb.training.loop import ParameterGroup, TrainingConfig, train
from mllm_nb.training.miniatures import assemble_miniature
from mllm_nb.training.parallel import Plan, team_of


def curve(plan: Plan, steps: int = 5, lengths: tuple = (192,)) -> dict:
    "Losses, and how many programs were compiled after each step."
    model, processor = assemble_miniature(seed=0)
    team = team_of(plan)
    groups = ParameterGroup("connector.*|language.*", frozen=False), ParameterGroup("*", frozen=True)
    config = plan.config(TrainingConfig(5e-4, groups, steps, warmup_steps=2, progress=False, save=False))
    world = World(seed=3, length=40, view="conversation")
    parts = [Batches(world, processor, BatchSettings(length, config.micro_batch, packing=False,
                                                     views_per_batch=config.micro_batch)) for length in lengths]
    batches = [batch for group in zip(*parts) for batch in group][:steps]
    compiled = []

    def count(run, row):
        if plan.device == "xla":
            import torch_xla.debug.metrics as metrics
            compiled.append((metrics.metric_data("CompileTime") or [0])[0])
    history = train(model, batches, config, tempfile.mkdtemp(), plan=plan.device_plan(), team=team, on_step=count)
    return {"losses": history.losses, "compiled": compiled}


if __name__ == "__main__":
    torch.set_num_threads(1)
    device, world, *lengths = sys.argv[1:]
    world = int(world)
    plan = Plan(4, 4 // world, 1, world, "fsdp" if world > 1 else "none", device)
    print(json.dumps(curve(plan, lengths=tuple(map(int, lengths)) or (192,))))
