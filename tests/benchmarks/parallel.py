"""Two processes on two cores against one process with one thread: rows a second of the miniature LLaVA.

    OMP_NUM_THREADS=1 python tests/benchmarks/parallel.py [--rounds 3] [--steps 12] [--rows 16]

Each round runs one process, copies (DDP) and shards (FSDP), taking turns; the best of each counts. On a busy machine
only the ratio of the processor's time says something. Then how long a resumed run takes to its first update, against a
fresh one.
"""
import argparse
import tempfile
import time
from pathlib import Path

import torch

from mllm_nb.data.batches import Batches, BatchSettings
from mllm_nb.data.world import World
from mllm_nb.training.loop import ParameterGroup, TrainingConfig, train
from mllm_nb.training.miniatures import assemble_miniature
from mllm_nb.training.parallel import Plan, in_processes, team_of

GROUPS = ParameterGroup("connector.*|language.*", frozen=False), ParameterGroup("*", frozen=True)


def run(plan: Plan, steps: int, folder: str) -> tuple[tuple[float, float], float]:
    "((seconds, seconds of computing) of an update without the first two, seconds from the start to the first update)."
    torch.set_num_threads(1)
    model, processor = assemble_miniature(seed=0)
    team = team_of(plan)
    settings = BatchSettings(256, plan.micro_batch, rank=team.rank, world_size=team.size)
    batches = Batches(World(seed=3, length=steps * plan.global_batch * 2 + 64, view="conversation"), processor, settings)
    batches = [batch for batch, _ in zip(batches, range(steps))]
    config = plan.config(TrainingConfig(1e-3, GROUPS, steps, progress=False, save=False))
    times, busy, start = [], [], time.perf_counter()

    def after(run, row):
        times.append(time.perf_counter())
        busy.append(time.process_time())
    train(model, batches, config, folder, plan=plan.device_plan(), team=team, on_step=after)
    return tuple((log[-1] - log[1]) / (len(log) - 2) for log in (times, busy)), times[0] - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args()
    rows = options.rows
    plans = {"one process": Plan(rows, rows), "two, copies": Plan(rows, rows // 2, 1, 2, "ddp"),
             "two, shards": Plan(rows, rows // 2, 1, 2, "fsdp")}
    best, computing = (dict.fromkeys(plans, float("inf")) for _ in range(2))
    for _ in range(options.rounds):
        for name, plan in plans.items():
            found = [one for one, _ in in_processes(run, plan.world_size, plan, options.steps, tempfile.mkdtemp())]
            best[name] = min(best[name], max(seconds for seconds, _ in found))
            computing[name] = min(computing[name], max(busy for _, busy in found))
    for name, seconds in best.items():
        print(f"{name:14} {1000 * seconds:7.1f} ms an update, {rows / seconds:6.1f} rows/s, "
              f"{best['one process'] / seconds:.2f} times; computing alone "
              f"{computing['one process'] / computing[name]:.2f} times")
    folder = Path(tempfile.mkdtemp())
    plan = plans["two, shards"]
    _, fresh = in_processes(run, 2, plan, 3, folder / "a")[0]
    in_processes(first_two, 2, plan, folder / "b")
    _, again = in_processes(first_two, 2, plan, folder / "b")[0]
    print(f"from the start to the first update: fresh {fresh:.2f} s, resumed from shards {again:.2f} s")


def first_two(plan: Plan, folder: Path) -> tuple[float, float]:
    "Two updates with a checkpoint after the first; called again, it goes on from there."
    import os
    import signal
    fresh = not folder.exists()
    torch.set_num_threads(1)
    model, processor = assemble_miniature(seed=0)
    team = team_of(plan)
    settings = BatchSettings(256, plan.micro_batch, rank=team.rank, world_size=team.size)
    batches = Batches(World(seed=3, length=200, view="conversation"), processor, settings)
    config = plan.config(TrainingConfig(1e-3, GROUPS, 2, save_every=1, progress=False))
    times, start = [], time.perf_counter()

    def after(run, row):
        times.append(time.perf_counter())
        if fresh:
            os.kill(os.getpid(), signal.SIGTERM)
    try:
        train(model, batches, config, folder, plan=plan.device_plan(), team=team, on_step=after)
    except KeyboardInterrupt:
        pass
    return 0.0, times[0] - start


if __name__ == "__main__":
    main()
