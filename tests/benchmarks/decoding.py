"""Greedy decoding at LVM-100M geometry against `transformers`, both in one run.

    python tests/benchmarks/decoding.py [--threads 1 2] [--rounds 3] [--new 64]

The contenders take turns, so that a busy machine slows all of them; the best time of each counts. Prints the ratio of
the whole `generate` call (prefill included, in seconds on the clock and in seconds of CPU, which a busy machine spoils
less) and what share of the measured memory bandwidth one step reaches when every fp32 weight and every cached key and
value is read once. The tokens must be the same; nothing is asserted about time.
"""
import argparse
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from mllm_nb.language.decoder import Decoder, DecoderConfig, load_transformers_state
from mllm_nb.language.generate import PackedDecoder, generate

GEOMETRY = dict(vocab_size=8292, hidden_size=640, intermediate_size=1664, num_hidden_layers=22, num_attention_heads=10)


def timed(work) -> tuple[float, float, object]:
    "Seconds on the clock, seconds of CPU, and what the work gives."
    clock, cpu = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - clock, time.process_time() - cpu, result


def bandwidth() -> float:
    "Bytes per second of reading 512 MB once: the largest of ten."
    memory = torch.zeros(128 * 1024 ** 2)
    return 4 * memory.numel() / min(timed(memory.sum)[0] for _ in range(10))


def models() -> tuple[LlamaForCausalLM, Decoder]:
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**GEOMETRY)).eval()
    ours = Decoder(DecoderConfig(**GEOMETRY)).eval()
    load_transformers_state(ours, theirs.state_dict())
    return theirs, ours


def contenders(theirs: LlamaForCausalLM, ours: Decoder, prompt: torch.Tensor) -> dict:
    "Name -> function of the number of new tokens that gives the tokens."
    packed = PackedDecoder(ours)
    settings = dict(do_sample=False, pad_token_id=0, eos_token_id=None)

    def transformers_generate(new: int) -> list[int]:
        with torch.inference_mode():
            output = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, **settings)
        return output[0, prompt.shape[1]:].tolist()

    return {
        "transformers": transformers_generate,
        "plain": lambda new: generate(ours, prompt, max_new_tokens=new, pack=False)[0],
        "packs on its own": lambda new: generate(ours, prompt, max_new_tokens=new)[0],
        "packed before": lambda new: generate(packed, prompt, max_new_tokens=new)[0],
    }


def race(runners: dict, new: int, rounds: int) -> dict[str, tuple[float, float, float]]:
    "Best seconds and CPU seconds of the whole call, and of one step (the call less a call for one token)."
    for run in runners.values():
        run(2)   # first calls pay for set-up
    whole, cpu, prefill = ({name: float("inf") for name in runners} for _ in range(3))
    for _ in range(rounds):
        tokens = {}
        for name, run in runners.items():
            prefill[name] = min(prefill[name], timed(lambda: run(1))[0])
            clock, used, tokens[name] = timed(lambda: run(new))
            whole[name], cpu[name] = min(whole[name], clock), min(cpu[name], used)
        different = [name for name in tokens if tokens[name] != tokens["transformers"]]
        if different:
            raise SystemExit(f"other tokens than transformers: {different}")
    return {name: (whole[name], cpu[name], (whole[name] - prefill[name]) / (new - 1)) for name in runners}


def report(threads: int, results: dict[str, tuple[float, float, float]], speed: float, step_bytes: int) -> None:
    print(f"\n{threads} thread(s): memory is read at {speed / 1e9:.1f} GB/s, "
          f"one step reads {step_bytes / 1e6:.0f} MB, so it takes at least {step_bytes / speed * 1e3:.1f} ms")
    print(f"{'':18}{'seconds':>9}{'ratio':>7}{'CPU s':>9}{'ratio':>7}{'ms/step':>9}{'of bandwidth':>14}")
    base = results["transformers"]
    for name, (whole, cpu, step) in results.items():
        print(f"{name:18}{whole:9.2f}{base[0] / whole:7.2f}{cpu:9.2f}{base[1] / cpu:7.2f}"
              f"{step * 1e3:9.1f}{step_bytes / step / speed:14.0%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    options = parser.parse_args()
    logging.set_verbosity_error()
    theirs, ours = models()
    prompt = torch.randint(0, 8192, (1, options.prompt))
    weights = sum(p.numel() for name, p in ours.named_parameters() if "embed_tokens" not in name)
    cached = 2 * GEOMETRY["num_hidden_layers"] * GEOMETRY["hidden_size"] * (options.prompt + options.new // 2)
    for threads in options.threads:
        torch.set_num_threads(threads)
        speed = bandwidth()
        results = race(contenders(theirs, ours, prompt), options.new, options.rounds)
        report(threads, results, max(speed, bandwidth()), 4 * (weights + cached))


if __name__ == "__main__":
    main()
