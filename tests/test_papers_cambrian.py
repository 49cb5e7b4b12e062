"Cambrian-1: what looking costs, against the released checkpoints' shapes and the published figures of the encoders."
import json
from math import prod

import pytest
from conftest import ROOT

from mllm_nb.papers.cambrian import ENCODERS, encoder_products, looking_cost, token_budget
from mllm_nb.papers.llava import manifest_shapes

SIZES = {"cambrian-8b": "nyu-visionx__cambrian-8b", "cambrian-phi3-3b": "nyu-visionx__cambrian-phi3-3b",
         "cambrian-13b": "nyu-visionx__cambrian-13b"}


@pytest.mark.parametrize("size, name", SIZES.items())
def test_the_budget_counts_what_the_checkpoint_holds(size, name):
    manifest = json.loads((ROOT / "tests" / "golden" / "manifests" / f"{name}.json").read_text())
    shapes = manifest_shapes(manifest["keys"], manifest["num_layers"], "model.layers.0.")
    language = ("model.layers.", "model.embed_tokens.", "lm_head.", "model.norm.")
    held = {key: prod(shape) for key, shape in shapes.items() if "vision_tower_aux_list" not in key}
    budget = token_budget(size)
    assert budget["parameters: language model"] == sum(n for key, n in held.items() if key.startswith(language))
    looking = sum(n for key, n in held.items() if not key.startswith(language) and key != "model.image_newline")
    assert budget["parameters: connector, samplers"] == looking


def test_encoders_take_what_their_authors_say():
    "Billion multiply-adds as published by open_clip and DINOv2, scaled to the size of the picture (XXL: 198 at 256)."
    convnext = encoder_products(ENCODERS["clip-convnext-XXL-multi-stage"]) / 1e9
    assert convnext == pytest.approx(16 * 198, rel=.01)
    assert encoder_products(ENCODERS["openai/clip-vit-large-patch14-336"]) / 1e9 == pytest.approx(191 * 23 / 24, rel=.01)


def test_less_looking_costs_less_and_misfits_are_refused():
    whole, fewer = token_budget(), token_budget(encoders=2, queries=144, samplers=0)
    assert all(fewer[name] <= whole[name] for name in whole)
    assert fewer["places in the sentence"] == 156
    with pytest.raises(ValueError, match="do not divide"):
        token_budget(queries=256)
    alone = looking_cost("cambrian-8b", list(ENCODERS)[:2], 144, 0)[0]
    assert alone == fewer["parameters: connector, samplers"]
