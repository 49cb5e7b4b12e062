"A compiled training step: compiled once, whatever the pictures' shapes, and equal to the plain one."
import random
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter

from mllm_nb.data.batches import Batches, BatchSettings
from mllm_nb.data.records import Sample
from mllm_nb.language.chat import Turn
from mllm_nb.papers import cambrian, llava

SHAPES = [(1, 2000), (2000, 1), (3, 7), (128, 128), (640, 120), (90, 300)]


def samples(count: int = 14) -> list[Sample]:
    "Pictures of all shapes, one or two in a sample, and words alone."
    rng, made = random.Random(0), []
    for number in range(count):
        sizes = [] if number % 4 == 3 else rng.sample(SHAPES, 1 + number % 2)
        images = tuple(Image.new("RGB", size, (10 * number, 99, 3)) for size in sizes)
        asked = Turn("human", "<image>\n" * len(images) + "what colour is " + "it " * (1 + number % 5))
        made.append(Sample(str(number), images, (asked, Turn("gpt", "green")), "made here"))
    return made


@pytest.mark.parametrize("system", ["llava", "cambrian"])
def test_an_epoch_of_all_shapes_compiles_once(system):
    model, processor = {"llava": llava, "cambrian": cambrian}[system].assemble_miniature()
    pad = tuple(replace(one, aspect="pad") for one in processor.preprocess)
    processor = replace(processor, preprocess=pad, layout="unpad" if system == "cambrian" else "flat")
    batches = Batches(samples(), processor, BatchSettings(256, 2, views_per_batch=6))
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda inputs: model(**inputs), backend=counter)
    frames = []
    for batch in batches:
        found, plain = compiled(batch.model_inputs()), model(**batch.model_inputs())
        assert int(found.tokens) == plain.tokens == batch.supervised
        torch.testing.assert_close(found.loss, plain.loss, atol=1e-5, rtol=1e-5)
        found.loss.backward()
        frames.append(counter.frame_count)
    torch._dynamo.reset()
    assert len(frames) >= 2 and len(set(frames)) == 1, f"compilations after each batch: {frames}"


def test_without_any_label_the_compiled_loss_is_a_zero_with_a_gradient():
    model, processor = llava.assemble_miniature()
    batch = next(iter(Batches(samples(8), processor, BatchSettings(256, 2, views_per_batch=6))))
    inputs = batch.model_inputs() | {"labels": torch.full_like(batch.labels, -100)}
    torch._dynamo.reset()
    found = torch.compile(lambda given: model(**given), backend="eager")(inputs)
    torch._dynamo.reset()
    found.loss.backward()
    assert found.loss.item() == 0 and int(found.tokens) == 0
