"""One more frame of a film at LVM-100M geometry behind fifteen others, batch 1, greedy, against `transformers`.

    python tests/benchmarks/frames.py [--threads 1 2] [--frames 15] [--rounds 1]

`transformers` does what LVM's released script does for every frame: the fifteen frames before as a new prompt, 256 new
words, ids behind the codebook suppressed. Ours has been shown the first fourteen and the fifteenth as they came, as in
a film that goes on. Also told: ours from nothing (everything read in this call), and four candidates in one batch.
Contenders take turns; seconds on the clock and of CPU; the words must be the same.
"""
import argparse
import time

import torch
from decoding import GEOMETRY, models
from transformers.utils import logging

from mllm_nb.drawing.frames import FrameWriter
from mllm_nb.language.generate import Sampling

CODES, WORDS = 8192, 256


def timed(work) -> tuple[float, float, object]:
    clock, used = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - clock, time.process_time() - used, result


def their_frame(theirs, frames: torch.Tensor) -> list[int]:
    prompt = frames.flatten()[None]
    with torch.inference_mode():
        output = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=WORDS, do_sample=False,
                                 suppress_tokens=list(range(CODES, GEOMETRY["vocab_size"])), pad_token_id=CODES,
                                 eos_token_id=None)
    return output[0, prompt.shape[1]:].tolist()


def grown(ours, frames: torch.Tensor) -> FrameWriter:
    "A writer that has written the last frame itself, so that all of it but the last word is known."
    writer = FrameWriter(ours, CODES, WORDS)
    writer.show(frames[:-1])
    writer.write()
    return writer


def written(writer: FrameWriter, known: int, **how) -> list[int]:
    "The next frame, where the first `known` frames are known to the writer; it is taken back afterwards."
    writer.held = writer.held[:known * WORDS]
    found = writer.write(**how)[0, 0].tolist()
    writer.frames.pop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--frames", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    logging.set_verbosity_error()
    theirs, ours = models()
    start = torch.randint(0, CODES, (options.frames, WORDS), generator=torch.Generator().manual_seed(0))
    for threads in options.threads:
        torch.set_num_threads(threads)
        best: dict[str, tuple[float, float]] = {}
        for _ in range(options.rounds):
            writer = grown(ours, start)
            film, read = torch.tensor(writer.frames), options.frames
            runs = {"transformers, as the original": lambda: their_frame(theirs, film),
                    "ours, the film goes on": lambda: written(writer, read),
                    "ours, the last frame came from outside": lambda: written(writer, read - 1),
                    "ours, everything read anew": lambda: written(writer, 0)}
            words = {}
            for name, run in runs.items():
                clock, used, words[name] = timed(run)
                best[name] = tuple(map(min, best.get(name, (9e9, 9e9)), (clock, used)))
            different = [name for name, found in words.items() if found != words["transformers, as the original"]]
            print("same words" if not different else f"OTHER WORDS: {different}", flush=True)
        four = {"candidates": 4, "sampling": Sampling(1.0, seed=0)}
        best["ours, four candidates"] = timed(lambda: written(writer, read, **four))[:2]
        print(f"{threads} thread(s){'':29}{'seconds':>9}{'ratio':>7}{'CPU s':>9}{'ratio':>7}")
        first = best["transformers, as the original"]
        for name, (clock, used) in best.items():
            print(f"{name:40}{clock:9.2f}{first[0] / clock:7.2f}{used:9.2f}{first[1] / used:7.2f}", flush=True)


if __name__ == "__main__":
    main()
