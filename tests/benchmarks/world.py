"""How many pictures with questions does the miniature world draw in a second? `python tests/benchmarks/world.py [SAMPLES]`

One core, by the clock and by CPU seconds (a busy machine spoils those less), for every view of the world.
"""
import sys
import time

from mllm_nb.data.world import World


def rate(view: str, samples: int) -> tuple[float, float]:
    "Samples per second on the clock, and per second of CPU."
    world = World(length=samples, view=view)
    clock, cpu = time.perf_counter(), time.process_time()
    for index in range(samples):
        world[index]
    return samples / (time.perf_counter() - clock), samples / (time.process_time() - cpu)


if __name__ == "__main__":
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    print(f"{samples:,} samples\n{'view':14}{'a second':>10}{'a CPU second':>14}")
    for view in ("conversation", "caption", "text"):
        clock, cpu = rate(view, samples)
        print(f"{view:14}{clock:10,.0f}{cpu:14,.0f}")
