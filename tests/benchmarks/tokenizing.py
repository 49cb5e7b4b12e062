"""`mllm tokenize`: how much of the encoder's own speed it reaches, and whether kills leave a trace.

    python tests/benchmarks/tokenizing.py [--pictures 2000] [--kills 5] [--threads 1 2] [--side 64]
    python tests/benchmarks/tokenizing.py --real --pictures 32 --kills 0   # LVM's own tokenizer, random weights, 256 pixels

Draws pictures of the miniature world into files (every hundredth cut off), then in turn: the encoder alone on pixels
that lie in memory, and the whole way from files to shards. The share is the encoder's time divided by the whole time.
Then the command is killed at random moments and called again until it is done, and two `--shard` runs are merged; all
three folders must be the same, byte for byte.
"""
import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from mllm_nb.data.tokenize import Encoder, Manifest, Reading, find_items, names_of, tokenize, world_items
from mllm_nb.drawing.vqgan import VQGAN, fingerprint, load_vqgan
from PIL import Image


def draw(folder: Path, count: int) -> None:
    for number, item in enumerate(world_items(count, Reading(128))):
        (_, (pixels,)), = item.read()
        path = folder / f"{number:06d}.{'png' if number % 2 else 'jpg'}"
        Image.fromarray(pixels).save(path)
        if number % 100 == 99:
            path.write_bytes(path.read_bytes()[:200])


def race(source: Path, work: Path, model: VQGAN, side: int, rounds: int) -> None:
    items = find_items(source, Reading(side))
    encode, pixels = Encoder(model), [item.read()[0][1][0] for n, item in enumerate(items) if n % 100 != 99]
    plan = Manifest(fingerprint(model), len(items), names_of(items), side, (side // model.config.patch) ** 2)
    best = {"the encoder alone": (float("inf"),) * 2, "from files to shards": (float("inf"),) * 2}
    for number in range(rounds):
        for name in best:
            clock, used = time.perf_counter(), time.process_time()
            if name == "the encoder alone":
                for at in range(0, len(pixels), encode.batch):
                    encode(pixels[at:at + encode.batch])
            else:
                tokenize(items, encode, work / f"round{number}", plan)
            times = time.perf_counter() - clock, time.process_time() - used
            best[name] = tuple(map(min, best[name], times))
    alone, whole = best.values()
    for name, (clock, used) in best.items():
        print(f"  {name:22}{clock:8.2f} s{len(items) / clock:8.1f} pictures/s{used:8.2f} s of CPU")
    print(f"  the whole way reaches {alone[0] / whole[0]:.0%} of the encoder's speed", flush=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killing(source: Path, work: Path, kills: int, seed: int = 0) -> None:
    program = "import sys; from mllm_nb.command import main; sys.exit(main())"
    command, rng = [sys.executable, "-c", program, "tokenize"], random.Random(seed)

    def start(*arguments) -> subprocess.Popen:
        return subprocess.Popen([*command, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(source, "--out", work / "whole").wait() == 0
    shards, target = len(list((work / "whole").glob("shard*.json"))), work / "killed"
    for number in range(kills):
        process = start(source, "--out", target)
        enough = round(shards * (number + rng.uniform(.5, 1)) / (kills + 1))
        while len(list(target.glob("shard*.json"))) < enough and process.poll() is None:
            time.sleep(.005)
        time.sleep(rng.uniform(0, .3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"  kill {number + 1}: {len(list(target.glob('shard*.json')))} of {shards} shards are whole", flush=True)
    assert start(source, "--out", target).wait() == 0
    for part in ("1/2", "2/2"):
        assert start(source, "--out", work / f"part{part[0]}", "--shard", part).wait() == 0
    assert start("--merge", work / "part1", work / "part2", "--out", work / "merged").wait() == 0
    expected = contents(work / "whole")
    for name in ("killed", "merged"):
        print(f"  {name}: {'the same bytes' if contents(work / name) == expected else 'DIFFERENT'} "
              f"as the undisturbed run ({len(expected)} files)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--side", type=int, help="default: the tokenizer's own")
    parser.add_argument("--real", action="store_true", help="the published geometry instead of the miniature")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = VQGAN().eval() if options.real else load_vqgan()
    side = options.side or model.config.resolution
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "pictures"
        source.mkdir()
        draw(source, options.pictures)
        for threads in options.threads:
            torch.set_num_threads(threads)
            print(f"{options.pictures} pictures, {threads} thread(s)")
            race(source, Path(folder) / str(threads), model, side, options.rounds)
        if options.kills:
            print(f"{options.kills} kills")
            killing(source, Path(folder), options.kills)


if __name__ == "__main__":
    main()
