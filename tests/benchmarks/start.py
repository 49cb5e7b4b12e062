"""How long do `import mllm_nb` and `mllm --help` take? `python tests/benchmarks/start.py [ROUNDS]`

Each in new processes, in turns with an empty Python; the best of the rounds counts.
"""
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "python, nothing": [sys.executable, "-c", ""],
    "import mllm_nb": [sys.executable, "-c", "import mllm_nb"],
    "mllm --help": [str(Path(sys.executable).with_name("mllm")), "--help"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    best = {name: min(seconds(command) for _ in range(rounds)) for name, command in COMMANDS.items()}
    for name, value in best.items():
        print(f"{name:18}{value:7.3f} s{value - best['python, nothing']:+9.3f} s")
