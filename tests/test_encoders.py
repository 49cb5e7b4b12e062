"Encoders that are taught without captions or by every cell: what the lessons show, and what the shipped convolution reads."
import random

import pytest
import torch

from mllm_nb.data.world import PAPERS, Chart, Objects, Sign, Thing
from mllm_nb.training.encoders import DetailBatches, DetailTeacher, convnext_config, covered_cells, detail_batch
from mllm_nb.training.miniatures import BLANK, load_tower
from mllm_nb.vision.convnext import ConvNeXt


def test_cells_are_named_by_the_smallest_region_that_covers_them():
    sign = Sign(("cat",), "red", PAPERS[0], (20,), (40,))        # letters of 15 x 21 pixels, 18 apart
    cells = covered_cells(sign)
    row = {cell % 16: name for cell, name in cells.items() if cell // 16 == 6}
    assert row == {2: "letter c", 3: "letter c", 4: "word cat", 5: "letter a", 6: "letter a", 7: "letter t",
                   8: "letter t"}
    assert {cell // 16 for cell in cells} == {5, 6, 7}            # middles at 44, 52 and 60 pixels


@pytest.mark.parametrize("grid", [8, 16, 32])
def test_a_bar_covers_as_many_cells_as_its_value(grid):
    low, high = (covered_cells(Chart((("red", value), ("blue", 8)), PAPERS[0]), grid) for value in (2, 6))
    count = [sum(name.startswith("red") for name in cells.values()) for cells in (low, high)]
    assert 2 * count[0] < count[1] and max(*low, *high) < grid ** 2


def test_a_small_thing_is_found_where_it_stands():
    thing = Thing("large", "red", "circle", 1, 2)
    cells = covered_cells(Objects((thing,), PAPERS[0]))
    left, top, right, bottom = thing.box()
    assert set(cells.values()) == {"large red circle"}
    assert all(left <= cell % 16 * 8 + 4 < right and top <= cell // 16 * 8 + 4 < bottom for cell in cells)


def test_batches_are_reproducible_and_go_on():
    batches, again = iter(DetailBatches(3, 13)), detail_batch(3, 3)
    next(batches)
    second = next(batches)
    assert second.phrases == again.phrases and torch.equal(second.pixels, again.pixels)
    assert second.cells.max() < 256 and second.phrases.count(BLANK) == 3 * 8 and len(second.cells) <= 3 * 36


def test_the_lesson_pulls_cells_to_their_names():
    torch.manual_seed(0)
    teacher, batch = DetailTeacher(ConvNeXt(convnext_config())), detail_batch(0, 2)
    optimizer = torch.optim.AdamW(teacher.parameters(), 3e-3)
    losses = []
    for _ in range(6):
        out = teacher(batch)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < .8 * losses[0] and int(out.tokens) == len(batch.phrases)
    assert not teacher.words.requires_grad and all(p.grad is not None for p in teacher.vit.parameters())


def test_the_shipped_convolution_tells_names_apart():
    "Held-out pictures: cells of one name are nearer to each other than to others."
    tower = load_tower("convnext")
    assert sum(parameter.numel() for parameter in tower.parameters()) <= 500_000 and tower.config.grid == 16
    batch = detail_batch(0, 24, "held_out")
    with torch.no_grad():
        cells = tower(batch.pixels).grid.flatten(1, 2)[batch.owner, batch.cells]
    cells = torch.nn.functional.normalize(cells - cells.mean(0), dim=1)
    near = cells @ cells.T
    near[batch.owner[:, None] == batch.owner] = -1               # neighbours of the same picture do not count
    names = random.Random(0).sample(range(len(cells)), 300)
    shared = [i for i in names if any(batch.phrases[i] == name and batch.owner[i] != owner
                                      for name, owner in zip(batch.phrases, batch.owner))]
    right = [batch.phrases[i] == batch.phrases[near[i].argmax()] for i in shared]
    assert sum(right) / len(right) > .8
