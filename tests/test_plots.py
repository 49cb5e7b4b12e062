"Pictures: every function takes what the book hands it and returns a figure, without warnings and without leftovers."
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from mllm_nb import plots


@pytest.fixture(autouse=True)
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    import matplotlib.pyplot as pyplot
    assert not pyplot.get_fignums(), "a figure was left open"


@pytest.mark.parametrize(("picture", "shape"), [
    (Image.new("RGB", (5, 4)), (4, 5, 3)), (Image.new("L", (5, 4)), (4, 5)), (Image.new("RGBA", (5, 4)), (4, 5, 4)),
    (np.zeros((4, 5), np.uint8), (4, 5)), (torch.zeros(3, 4, 5), (4, 5, 3)), (torch.zeros(1, 4, 5), (4, 5)),
    (torch.zeros(3, 4, 5, dtype=torch.bfloat16, requires_grad=True), (4, 5, 3)), (np.zeros((4, 5, 1)), (4, 5)),
    (torch.zeros(3, 3, 3), (3, 3, 3)),
])
def test_what_can_be_drawn(picture, shape):
    pixels = plots.array_of(picture)
    assert pixels.shape == shape and pixels.min() >= 0 and pixels.max() <= 1


def test_values_are_kept_or_stretched():
    assert plots.array_of(np.array([[0, 51, 255]], np.uint8)).tolist() == [[0, 0.2, 1]]
    assert plots.array_of(np.array([[0.25, 0.5]])).tolist() == [[0.25, 0.5]]
    assert plots.array_of(torch.tensor([[-2.0, 2.0]])).tolist() == [[0, 1]]


IMAGE = Image.linear_gradient("L").resize((64, 48)).convert("RGB")


@pytest.mark.parametrize("draw", [
    lambda: plots.show_images([IMAGE] * 5, list("abcd"), columns=3, title="t"),
    lambda: plots.show_images([torch.rand(3, 8, 8)]),
    lambda: plots.show_patch_grid(IMAGE, 16, [1], numbers=True),
    lambda: plots.show_patches(IMAGE, 16, [0, 5]),
    lambda: plots.show_patches(IMAGE, 16, rows=np.zeros((12, 7))),
    lambda: plots.show_matrix(torch.eye(3), ["a", "b", "c"], ["a", "b", "c"], highlight=[(0, 1)], colorbar=True),
    lambda: plots.show_matrix(np.random.default_rng(0).normal(size=(30, 40))),
    lambda: plots.show_mask(torch.ones(4, 4, dtype=torch.bool).tril(), list("abcd"), ["image"] * 2 + ["answer", "padding"]),
    lambda: plots.show_mask(np.ones((200, 200))),
    lambda: plots.show_strip(list("abc"), ["image", "answer", "something else"], per_row=2),
    lambda: plots.show_flow([("a", "1"), ("b", "2")], "t", marked=[0]),
    lambda: plots.show_map({"a": (0, 1, plots.SKY), "b": (1, 0, plots.RED)}, [("a", "b")]),
    lambda: plots.show_lines([1, 2], {"a": [1, 2]}, bands={"a": ([0, 1], [2, 3])}, logx=True, logy=True, mark=1.5),
    lambda: plots.accuracy_bars({"m": {"a": 0.5, "b": (0.4, 0.3, 0.5)}}, {"a": 0.1}, {"a": 0.2}),
    lambda: plots.show_heat([IMAGE, IMAGE], [torch.rand(3, 4), np.zeros((3, 4))], shared=True),
])
def test_every_picture_is_a_closed_figure(draw, tmp_path):
    figure = draw()
    figure.savefig(tmp_path / "x.png")
    assert 0 < (tmp_path / "x.png").stat().st_size < 400_000


def test_learning_curves_read_files_and_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n\n{"step": 2, "loss": 1.0, "accuracy": 0.5}\n')
    assert plots.read_metrics(path) == plots.read_metrics(plots.read_metrics(path))
    figure = plots.learning_curves({"file": path, "records": [{"step": 1, "loss": 3.0}]}, ("loss", "accuracy"))
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["loss", "accuracy"]


def test_the_readers_own_style_is_left_alone():
    import matplotlib
    before = dict(matplotlib.rcParams)
    plots.show_lines([1, 2], {"a": [1, 2]})
    assert dict(matplotlib.rcParams) == before


def test_patch_rows_are_the_patches():
    pixels = np.arange(24.0).reshape(4, 6) / 24
    rows = plots.patch_rows(pixels, 2)
    assert rows.shape == (6, 4) and np.allclose(rows[4], [pixels[2, 2], pixels[2, 3], pixels[3, 2], pixels[3, 3]])
