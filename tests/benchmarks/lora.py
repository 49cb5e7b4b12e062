"""A LoRA step of LLaVA-1.5 against transformers' LlavaForConditionalGeneration with PEFT and Trainer.

    OMP_NUM_THREADS=1 python tests/benchmarks/lora.py [--rounds 3] [--updates 4] [--vocabulary 4000] [--language decoder]

Geometry: Vicuna-7B and CLIP-L with every width, the vocabulary, rank and all lengths divided by 8 (8 layers; 64 image
tokens, rows of 256). Lengths follow LLaVA-1.5's fine-tuning mixture (see packing.py), half of a text's tokens are
answers. Both sides start from the same weights (ours are written by `export_transformers`), see the same samples, train
adapters (dropout 0.05) and the projector with AdamW, 16 samples a device as published, no accumulation.
Trainer pads each batch to its longest sample: batches at random, and in a second line grouped by length.
Sides take turns; real tokens (no padding) by the clock and by CPU time. Memory: the highest resident size of a fresh
process minus what it had before the model was made.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from packing import llava_like

from mllm_nb.data.batches import Batches, BatchSettings, Example
from mllm_nb.images import Preprocess
from mllm_nb.language.decoder import DecoderConfig
from mllm_nb.mllm import MLLM, MLLMConfig
from mllm_nb.papers.llava import export_transformers, load_llava
from mllm_nb.training.lora import LoRASettings, add_adapters
from mllm_nb.training.loop import train
from mllm_nb.training.recipes import find_recipe, training_config
from mllm_nb.vision.towers import TowerConfig
from mllm_nb.vision.vit import ViTConfig

GRID, ROW, BATCH, RANK = 8, 256, 16, 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDES = ("ours", "transformers", "transformers, grouped")


def build(folder: Path, vocabulary: int) -> None:
    "LLaVA-1.5 divided by 8, random weights, in transformers' form."
    torch.manual_seed(0)
    language = DecoderConfig(vocab_size=vocabulary, hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
                             num_attention_heads=8, num_key_value_heads=8, rms_norm_eps=1e-5)
    eye = ViTConfig(image_size=14 * GRID, patch_size=14, hidden_size=128, num_hidden_layers=6, num_attention_heads=4,
                    intermediate_size=512, hidden_act="quick_gelu", layer_norm_eps=1e-5, pre_norm=True,
                    patch_bias=False, norm_tokens=False)
    export_transformers(MLLM(MLLMConfig(language, (TowerConfig("eye", eye, Preprocess(size=14 * GRID)),))), folder)


def samples(count: int, vocabulary: int) -> list[Example]:
    "Random tokens and pixels in the lengths of the mixture, divided by 8."
    lengths, views = llava_like(count, seed=1)
    random, made = torch.Generator().manual_seed(1), []
    for number, (length, seen) in enumerate(zip(lengths.tolist(), views.tolist())):
        words, image = max(8, (length - 576 * seen) // 8), GRID * GRID * seen
        ids = torch.randint(5, vocabulary, (words,), generator=random)
        index = torch.cat([torch.full((1,), -1), torch.arange(image), torch.full((words - 1,), -1)])[:ROW]
        ids = torch.cat([ids[:1], torch.full((image,), -200), ids[1:]])[:ROW]
        labels = torch.where(torch.arange(len(ids)) < len(ids) - words // 2, -100, ids)
        pixels = torch.randn(seen, 3, 14 * GRID, 14 * GRID, generator=random)
        made.append(Example(str(number), str(number), ids, labels, index, (pixels,), image))
    return made


class Clock:
    "Wall and CPU seconds and real tokens after each update."
    def __init__(self):
        self.marks, self.tokens = [], 0

    def mark(self) -> None:
        self.marks.append((time.perf_counter(), time.process_time(), self.tokens))

    def rates(self, skip: int = 1) -> tuple[float, float]:
        "Tokens a second by the clock and by CPU time, without the first updates."
        first, last = self.marks[skip - 1], self.marks[-1]
        return tuple((last[2] - first[2]) / (last[i] - first[i]) for i in (0, 1))


def ours(folder: Path, examples: list[Example], updates: int, language: str, precision: str) -> Clock:
    "Packed rows with as many tokens as sixteen samples have, supervised positions only at the head."
    clock = Clock()
    model = load_llava(folder, language=language, dtype=DTYPES[precision])
    torch.manual_seed(0)
    add_adapters(model, LoRASettings(RANK, 2 * RANK, 0.05))
    rows = round(BATCH * sum(map(len, examples)) / len(examples) / ROW)
    batches = Batches(examples, None, BatchSettings(ROW, rows))

    class Counted:
        "The batches, counted when they are asked for."
        def __iter__(self):
            for batch in batches:
                clock.tokens += int((batch.segments > 0).sum())
                yield batch

        def __len__(self): return len(batches)
    stage = find_recipe("llava-v1.5-7b-lora").stage("finetune")
    config = training_config(stage, per_device_batch=rows, global_batch=rows, micro_batch=rows, max_steps=updates,
                             precision=precision, device="cpu", save=False, progress=False)
    with tempfile.TemporaryDirectory() as run:
        train(model, Counted(), config, run, on_step=lambda run, row: clock.mark())
    return clock


def collated(rows: list[dict], image: int, clock: Clock) -> dict[str, torch.Tensor]:
    "What a LLaVA collator does: pad on the right to the longest of the batch."
    longest = max(len(row["example"]) for row in rows)
    made = {name: torch.full((len(rows), longest), value) for name, value in
            (("input_ids", 0), ("labels", -100), ("attention_mask", 0))}
    for number, row in enumerate(rows):
        example = row["example"]
        made["input_ids"][number, :len(example)] = torch.where(example.image_index >= 0, image, example.input_ids)
        made["labels"][number, :len(example)] = example.labels
        made["attention_mask"][number, :len(example)] = 1
        clock.tokens += len(example)
    pixels = [row["example"].pixels[0] for row in rows if row["example"].views]
    return made | ({"pixel_values": torch.cat(pixels)} if pixels else {})


def theirs(folder: Path, examples: list[Example], updates: int, grouped: bool, precision: str) -> Clock:
    "LlavaForConditionalGeneration, PEFT on the language model, the projector in full, Trainer."
    import peft
    from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments
    clock = Clock()
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=DTYPES[precision])
    image = model.config.image_token_id
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=0.05, modules_to_save=["multi_modal_projector"],
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"))

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **rest): clock.mark()
    with tempfile.TemporaryDirectory() as run:
        arguments = TrainingArguments(
            output_dir=run, per_device_train_batch_size=BATCH, max_steps=updates, learning_rate=2e-4, use_cpu=True,
            bf16=precision == "bf16", report_to=[], logging_strategy="no", save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
            dataloader_pin_memory=False, lr_scheduler_type="cosine", warmup_steps=1, weight_decay=0.0,
            train_sampling_strategy="group_by_length" if grouped else "random")
        data = [{"example": example, "input_ids": example.input_ids} for example in examples]   # ids: for the grouping
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Watch()],
                          data_collator=lambda rows: collated(rows, image, clock))
        trainer.train()
    return clock


def run(side: str, folder: Path, options) -> Clock:
    examples = samples(options.samples, options.vocabulary)
    if side == "ours":
        return ours(folder, examples, options.updates + 1, options.language, options.precision)
    return theirs(folder, examples, options.updates + 1, side.endswith("grouped"), options.precision)


def status(field: str) -> float:
    "MB of this process, from Linux's own books."
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak(side: str, folder: Path, options) -> None:
    "Child process: MB at the highest point above what imports and data take."
    import peft  # noqa: F401
    import transformers
    assert transformers.Trainer and transformers.LlavaForConditionalGeneration   # imported by both: code is not counted
    samples(options.samples, options.vocabulary)
    torch.ones(8, 8) @ torch.ones(8, 8)
    Path("/proc/self/clear_refs").write_text("5")   # Linux: forget the peak so far
    before = status("VmRSS")
    run(side, folder, options)
    print(json.dumps({"peak": status("VmHWM") - before}))


def memory(side: str, folder: Path, options) -> float:
    # large blocks go back to the system at once, so that gaps in the heap do not count
    tidy = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, __file__, "--peak", side, "--folder", str(folder), "--updates", str(options.updates),
               "--vocabulary", str(options.vocabulary), "--language", options.language, "--samples", str(options.samples),
               "--precision", options.precision]
    done = subprocess.run(command, env=tidy, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])["peak"]


def middle(values) -> float:
    found = sorted(values)
    return found[len(found) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--language", choices=("decoder", "transformers"), default="decoder")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.peak:
        return peak(options.peak, Path(options.folder), options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, options.vocabulary)
        rates = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side in SIDES:
                rates[side].append(run(side, folder, options).rates())
        held = {side: memory(side, folder, options) for side in SIDES} if Path("/proc/self/clear_refs").exists() else {}
    print(f"{'':24}{'tokens/s':>10}{'by CPU time':>13}{'peak MB':>10}   ours: times the tokens, by CPU time, share of memory")
    for side in SIDES:
        wall, cpu = (middle(one[i] for one in rates[side]) for i in (0, 1))
        ratio = [middle(a[i] / b[i] for a, b in zip(rates["ours"], rates[side])) for i in (0, 1)]
        share = held.get("ours", 0) / held.get(side, 1)
        print(f"{side:24}{wall:10.0f}{cpu:13.0f}{held.get(side, 0):10.0f}   {ratio[0]:5.2f} {ratio[1]:5.2f} {share:5.2f}")


if __name__ == "__main__":
    main()
