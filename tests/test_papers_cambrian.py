"Cambrian-1: what looking costs, against the released checkpoints' shapes; the miniature, and its claims' bookkeeping."
import json
from dataclasses import replace
from math import prod
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from mllm_nb.data.batches import collate
from mllm_nb.data.world import World
from mllm_nb.mllm import MLLM
from mllm_nb.papers import cambrian
from mllm_nb.papers.cambrian import (
    ARMS, CAMBRIAN_ALIGN, CAMBRIAN_TUNE, CLAIM_STEPS, CLAIMS, ENCODERS, assemble_miniature, differences,
    encoder_products, looking_cost, run_claims, token_budget, with_room)
from mllm_nb.papers.llava import manifest_shapes
from mllm_nb.samples import samples_path
from mllm_nb.training.miniatures import Trained, pictures_per_row

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


@pytest.fixture(scope="module")
def small():
    return assemble_miniature(("contrastive",), queries=16, samplers=1)


def test_fewer_visual_tokens_get_shorter_rows_not_more_pictures(small):
    few = small[1]
    many = replace(few, grid=(8, 8))
    for lesson in (CAMBRIAN_ALIGN, CAMBRIAN_TUNE):
        short = with_room(lesson, few)
        assert short.length < with_room(lesson, many).length == lesson.length
        held = [pictures_per_row(replace(processor, template=lesson.template), one)
                for processor, one in ((many, lesson), (few, short))]
        assert held[1] == pytest.approx(held[0], rel=.08)   # few samples have no picture


def test_samplers_begin_silent(small):
    model, processor = small
    example = next(one for one in (processor(World("held_out").conversation(i)) for i in range(9)) if one.pixels)
    inputs = collate([[example]], len(example)).model_inputs()
    with torch.no_grad():
        loud = model(**inputs).hidden
        silent = replace(model.config.connector, connector_only=True)
        alone = MLLM(replace(model.config, connector=silent), towers=list(model.towers), connector=model.connector,
                     language=model.language)(**inputs).hidden
    torch.testing.assert_close(loud, alone)


def test_claims_keep_finished_runs(tmp_path, monkeypatch):
    "A run that breaks off in the middle leaves the finished arms, and only the others are trained afterwards."
    trained, answers = [], [True, False, True, True]
    monkeypatch.setattr(cambrian, "right_answers", lambda model, questions, **how: answers)
    monkeypatch.setattr(cambrian.HeldOut, "make", lambda processor, questions: None)

    def train(folder, seed, *, fails=False, memory, **settings):
        if fails and "broken" not in trained:
            trained.append("broken")
            raise KeyboardInterrupt
        trained.append((folder.parent.name, seed, settings["align_steps"]))
        return Trained(SimpleNamespace(towers=[]), None, {}, 1.0, 16)

    monkeypatch.setattr(cambrian, "train_miniature", train)
    arms = {"first": {}, "second": {"fails": True}}
    with pytest.raises(KeyboardInterrupt):
        run_claims(tmp_path, (0, 1), 4, arms)
    kept = json.loads((tmp_path / "cambrian_claims.json").read_text())
    assert list(kept) == ["first"] and kept["first"]["0"] == {"accuracy": .75, "right": "1011"}
    results = run_claims(tmp_path, (0, 1), 4, arms)
    steps = CLAIM_STEPS["align_steps"]
    assert trained == [("first", 0, steps), "broken", ("second", 0, steps), ("first", 1, steps), ("second", 1, steps)]
    assert {name: sorted(runs) for name, runs in results.items()} == {"first": ["0", "1"], "second": ["0", "1"]}
    assert run_claims(tmp_path, (0, 1), 4, arms) == results and len(trained) == 5


def test_differences_are_paired_by_seed_and_question():
    results = {"other": {"0": {"right": "0011"}, "1": {"right": "0001"}},
               "better": {"0": {"right": "0111"}, "1": {"right": "1001"}, "2": {"right": "1111"}}}
    assert differences(results, "better", "other") == [.25, .25]
    assert differences(results, "better", "other", [True, False, False, True]) == [0, .5]


def test_stored_claims_are_whole():
    stored = json.loads(samples_path("results", "cambrian_claims.json").read_text())
    assert set(ARMS) <= set(stored) and {arm for pair in CLAIMS.values() for arm in pair} <= set(ARMS)
    for arm in ARMS:
        assert sorted(stored[arm]) == ["0", "1", "2"]
        assert all(run["accuracy"] == pytest.approx(run["right"].count("1") / len(run["right"])) and
                   len(run["right"]) == 500 for run in stored[arm].values())


def test_a_released_folder_with_its_four_encoders_folders(tmp_path):
    "Tiny weights under the published names, encoders in transformers' form and without preprocessing: a picture goes through all of it."
    import torch
    from PIL import Image
    from safetensors.torch import load_file, save_file
    from test_vit import original
    from transformers import ConvNextConfig, ConvNextModel

    from mllm_nb.images import preprocess
    from mllm_nb.mllm import WeightsError
    from mllm_nb.papers.cambrian import PUBLISHED, load_cambrian
    stem = ROOT / "tests" / "golden" / "parity" / "cambrian_llama_sva_inllm"
    names, folders = PUBLISHED["cambrian-8b"]["mm_vision_tower_aux_list"], [tmp_path / f"tower{k}" for k in range(4)]
    settings = json.loads(stem.with_suffix(".json").read_text())["config"]["hf_config"]
    save_file({name.removeprefix("weights."): value for name, value in load_file(stem.with_suffix(".safetensors")).items() if name.startswith("weights.")},
              tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": "cambrian_llama", "mm_vision_tower_aux_list": names}))
    for family, width, folder in zip(("siglip", "clip", "dinov2"), (12, 8, 10), folders):
        original(family, hidden_size=width, num_attention_heads=2, patch_size=14, image_size=42).save_pretrained(folder)
    ConvNextModel(ConvNextConfig(hidden_sizes=[4, 4, 4, 8], depths=[1, 1, 1, 1])).save_pretrained(folders[3])
    (folders[3] / "preprocessor_config.json").unlink(missing_ok=True)
    model = load_cambrian(tmp_path, folders, language="decoder")
    assert [tower.width for tower in model.towers] == [12, 8, 10, 20] and [tower.config.grid for tower in model.towers] == [4, 4, 4, 8]
    picture = Image.new("RGB", (40, 20), "teal")
    pixels = [preprocess(picture, tower.config.preprocess) for tower in model.towers]
    assert [views.shape[-1] for views in pixels] == [384, 336, 378, 1024]
    ids, index = torch.tensor([[1, *[0] * 10, 7, 2]]), torch.tensor([[-1, *range(4, 8), -2, *range(8, 12), -2, -1, -1]])
    with torch.no_grad():
        seen = model(ids, pixels, index, image_sizes=torch.tensor([[40, 20]]), logits=True).logits
        for k in range(4):
            dark = [views * 0 if k == j else views for j, views in enumerate(pixels)]
            other = model(ids, dark, index, image_sizes=torch.tensor([[40, 20]]), logits=True).logits
            assert seen.isfinite().all() and not torch.allclose(seen, other)
    with pytest.raises(WeightsError, match="3 towers"):
        load_cambrian(tmp_path, folders[:3])
    # an encoder that was trained further lies in the checkpoint itself, and goes before its folder
    inside = {f"model.vision_tower_aux_list.2.vision_tower.{name}": value + 1
              for name, value in load_file(folders[2] / "model.safetensors").items()}
    save_file(load_file(tmp_path / "model.safetensors") | inside, tmp_path / "model.safetensors")
    before, after = (one.towers for one in (model, load_cambrian(tmp_path, folders, language="decoder")))
    assert torch.equal(after[2].vit.class_token, before[2].vit.class_token + 1)
    assert all(torch.equal(after[k].vit.positions, before[k].vit.positions) for k in (0, 1))
