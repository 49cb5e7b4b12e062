"""How much do the two rewrites of the aggregator save? `python tests/benchmarks/sva.py [ROUNDS]`.

One layer at Cambrian-1 8B's geometry: 576 queries, windows of 1, 1, 1 and 4 x 4 tokens, width 1024, fp32, one thread.
Both ways take turns in one process; CPU time is printed beside the clock, so that a busy machine does not decide.
Peak memory is measured in a fresh process for each way, above what weights and features take: the tensors that are held
at once, and the whole process (glibc keeps much of what was freed in small pieces).
"""
import gc
import itertools
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mllm_nb.connectors.sva import VisionSampler, Window

CELLS, SIDES, WIDTH = 576, (1, 1, 1, 4), 1024


def parts(seed: int = 0):
    "A layer, queries, context, and windows cut from whole grids as in the connector."
    torch.manual_seed(seed)
    sampler = VisionSampler(WIDTH, WIDTH, SIDES, WIDTH, 1)
    side = int(CELLS ** .5)
    grids = [torch.randn(1, side * window, side * window, WIDTH, requires_grad=True) for window in SIDES]
    queries = torch.randn(1, CELLS, WIDTH, requires_grad=True)
    return sampler, queries, torch.randn(1, 1, WIDTH, requires_grad=True), grids


def run(path: str, backward: bool, sampler, queries, context, grids) -> torch.Tensor:
    "One pass; features are cut into windows inside, as for every picture."
    for layer in sampler.layers:
        layer.path = path
    side = int(CELLS ** .5)
    with torch.set_grad_enabled(backward):
        windows = [Window(grid, torch.ones(1, CELLS, window ** 2, dtype=torch.bool), side)
                   for grid, window in zip(grids, SIDES)]
        found = sampler(queries, context, windows)
    if backward:
        for leaf in (*sampler.parameters(), queries, context, *grids):
            leaf.grad = None
        found.square().sum().backward()
    return found.detach()


def peak(path: str, backward: bool) -> None:
    "Child process: print how many MB of tensors a pass holds at most, then how many MB the whole process grows by."
    given = parts()
    torch.ones(8, 8) @ torch.ones(8, 8)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run(path, backward, *given)
    events = sorted((event.start_ns(), event.nbytes()) for event in watched.profiler.kineto_results.events()
                    if event.name() == "[memory]")
    print(max(itertools.accumulate(count for _, count in events)) / 2 ** 20)
    for leaf in (*given[0].parameters(), *given[1:3], *given[3]):
        leaf.grad = None
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")   # Linux: forget the peak so far
    before = status("VmRSS")
    run(path, backward, *given)
    print(status("VmHWM") - before)


def status(field: str) -> float:
    "MB of this process, from Linux's own books."
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def timed(path: str, backward: bool, given) -> tuple[float, float]:
    clock, cpu = time.perf_counter(), time.process_time()
    run(path, backward, *given)
    return time.perf_counter() - clock, time.process_time() - cpu


def middle(values) -> float:
    return sorted(values)[len(values) // 2]


def main(rounds: int = 7) -> None:
    torch.set_num_threads(1)
    given = parts()
    apart = (run("plain", False, *given) - run("fast", False, *given)).abs().max().item()
    print(f"largest difference of the outputs: {apart:.1e}")
    print(f"{'':22}{'plain':>10}{'fast':>10}{'ratio':>8}{'ratio of CPU time':>20}")
    for backward, name in ((False, "forward"), (True, "forward and backward")):
        for path in ("plain", "fast"):
            run(path, backward, *given)
        took = [[timed(path, backward, given) for path in ("plain", "fast")] for _ in range(rounds)]
        plain, fast = (middle([one[way][0] for one in took]) for way in (0, 1))
        cpu = middle([one[0][1] / one[1][1] for one in took])
        print(f"{name:22}{plain * 1e3:8.0f}ms{fast * 1e3:8.0f}ms{plain / fast:8.2f}{cpu:20.2f}")
    if not Path("/proc/self/clear_refs").exists():
        return print("memory: measured on Linux alone")
    for backward, name in ((False, "forward"), (True, "both")):
        needed = [subprocess.run([sys.executable, __file__, "peak", path, str(int(backward))], check=True, text=True,
                                 capture_output=True).stdout.split() for path in ("plain", "fast")]
        for kind, plain, fast in zip(("tensors", "process"), *([float(one) for one in way[-2:]] for way in needed)):
            print(f"{f'MB of {kind}, {name}':22}{plain:8.0f}MB{fast:8.0f}MB{plain / max(fast, 1):8.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        torch.set_num_threads(1)
        peak(sys.argv[2], sys.argv[3] == "1")
    else:
        main(*map(int, sys.argv[1:]))
