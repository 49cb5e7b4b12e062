"""What does the loop cost beside the model? The same updates by hand and by `train`, taking turns, best of each.

    OMP_NUM_THREADS=1 python tests/benchmarks/training_loop.py [--rounds 5] [--steps 60]

By hand: forward, backward, clipping, AdamW and one look at the loss. By `train`: the same with token counts, checks,
schedule, metrics file and hooks, without progress bar. Then the time of one checkpoint and of a resume.
"""
import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mllm_nb.language.decoder import Decoder, DecoderConfig
from mllm_nb.training.loop import TrainingConfig, train

GEOMETRY = dict(vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.decoder = Decoder(DecoderConfig(**GEOMETRY))

    def forward(self, ids):
        scores = self.decoder(self.decoder.embed(ids))
        return nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def by_hand(batches: list[dict], steps: int) -> float:
    model = Model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    start = time.perf_counter()
    for step in range(steps):
        loss = model(batches[step % len(batches)]["ids"])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return time.perf_counter() - start


def by_train(batches: list[dict], config: TrainingConfig, folder: Path) -> float:
    model = Model()
    start = time.perf_counter()
    train(model, batches, config, folder, loss_function=lambda model, batch: model(batch["ids"]))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    batches = [{"ids": torch.randint(0, 512, (16, 64))} for _ in range(8)]
    config = TrainingConfig(max_steps=options.steps, device="cpu", precision="fp32", progress=False, save=False)
    with tempfile.TemporaryDirectory() as name:
        folder, times = Path(name), {"hand": [], "train": []}
        for number in range(options.rounds):
            times["hand"].append(by_hand(batches, options.steps))
            times["train"].append(by_train(batches, config, folder / str(number)))
        hand, loop = min(times["hand"]), min(times["train"])
        print(f"by hand {1000 * hand / options.steps:.2f} ms an update, by train {1000 * loop / options.steps:.2f} ms: "
              f"{loop / hand:.3f} times")
        one, weights = replace(config, max_steps=1), sum(parameter.numel() for parameter in Model().parameters())
        names = [f"saved {number}" for number in range(options.rounds)]
        without = min(by_train(batches, one, folder / f"not {name}") for name in names)
        saved = min(by_train(batches, replace(one, save=True), folder / name) for name in names)
        again = min(by_train(batches, replace(one, save=True), folder / name) for name in names)
        print(f"{weights / 1e6:.1f}M weights with AdamW: one checkpoint {saved - without:.2f} s, resuming from it {again:.2f} s")


if __name__ == "__main__":
    main()
