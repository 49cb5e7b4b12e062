"""How much padding is left? `python tests/benchmarks/packing.py [SAMPLES]` packs LLaVA-like lengths and prints the waste.

The mixture follows the composition of LLaVA-1.5's 665K fine-tuning set (its paper, table 7): counts per source are published,
token lengths are modelled by a clipped log-normal for the words of each source (our estimate), plus 576 tokens for the image.
"""
import sys
import time

import numpy as np

from mllm_nb.data.batches import BatchSettings, Sizes, pack, plan_epoch

# source: (samples in thousands, image tokens, median of the words' tokens, spread of its logarithm)
MIXTURE = {
    "conversation": (58, 576, 330, 0.35), "detail": (23, 576, 170, 0.25), "complex": (77, 576, 280, 0.25),
    "vqa": (83 + 72 + 9, 576, 190, 0.50), "ocr vqa": (80, 576, 170, 0.25), "a-okvqa": (66, 576, 110, 0.30),
    "captions": (22, 576, 80, 0.15), "regions": (48 + 86, 576, 300, 0.45), "text only": (40, 0, 1100, 0.75),
}


def llava_like(samples: int, seed: int = 0, image_tokens: int = 576, longest: int = 2048) -> tuple[np.ndarray, np.ndarray]:
    "Lengths and views of so many samples of the mixture, in random order."
    random = np.random.default_rng(seed)
    weights = np.array([source[0] for source in MIXTURE.values()], float)
    chosen = random.choice(len(weights), samples, p=weights / weights.sum())
    _, image, median, spread = np.array(list(MIXTURE.values()), float).T[:, chosen]
    words = np.exp(np.log(median) + spread * random.standard_normal(samples))
    lengths = np.where(image > 0, image_tokens, 0) + np.clip(words, 40, None)
    return np.minimum(lengths, longest).astype(np.int64), (image > 0).astype(np.int64)


def padding(lengths: np.ndarray, rows: int, capacity: int) -> float:
    return 1 - lengths.sum() / (rows * capacity)


def least_rows(lengths: np.ndarray, capacity: int) -> float:
    """No packing needs fewer rows than this: the largest of a family of dual feasible functions (Fekete and Schepers 2001).

    k = 2 says: of samples over a third of a row, two fill it, however small the rest that they leave."""
    bounds = [lengths.sum() / capacity]
    for k in range(1, 60):
        parts = (k + 1) * lengths
        bounds.append(np.where(parts % capacity == 0, lengths / capacity, parts // capacity / k).sum())
    return max(bounds)


def unpacked(lengths: np.ndarray, batch: int, seed: int = 0) -> float:
    "LLaVA's collator: a random batch, padded to its longest sample."
    order = np.random.default_rng(seed).permutation(len(lengths))
    width = sum(lengths[order[i:i + batch]].max() * len(order[i:i + batch]) for i in range(0, len(order), batch))
    return 1 - lengths.sum() / width


def main(samples: int = 60_000) -> None:
    lengths, views = llava_like(samples)
    print(f"{samples} samples, {lengths.mean():.0f} tokens on average, {100 * (views == 0).mean():.0f} % text only")
    print(f"{'every sample padded to 2048':44}{100 * padding(lengths, samples, 2048):6.1f} % padding")
    print(f"{'batches of 16 padded to their longest':44}{100 * unpacked(lengths, 16):6.1f} % padding")
    for capacity in (2048, 4096, 8192):
        start = time.perf_counter()
        rows = pack(lengths.tolist(), capacity)
        took = time.perf_counter() - start
        least = max(0.0, 100 * padding(lengths, least_rows(lengths, capacity), capacity))
        print(f"{f'packed into rows of {capacity}':44}{100 * padding(lengths, len(rows), capacity):6.1f} % padding "
              f"({least:.1f} % at least, whatever the algorithm), {took:.2f} s")
    for capacity, grouped in ((4096, False), (4096, True), (8192, True)):
        settings = BatchSettings(length=capacity, rows=4, group_by_modality=grouped)
        plan = plan_epoch(Sizes(lengths, views, {}), settings)
        used = sum(lengths[i] for step in plan for row in step.rows for i in row)
        name = f"plan of an epoch, 4 rows of {capacity}" + (", by modality" if grouped else "")
        print(f"{name:44}{100 * (1 - used / (len(plan) * 4 * capacity)):6.1f} % padding")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
