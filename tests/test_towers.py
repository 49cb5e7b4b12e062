"Towers: the originals' features, grids and layouts; folders; frozen means frozen."
import json
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from mllm_nb.images import Preprocess, anyres_grid, unpad_box
from mllm_nb.vision.towers import (Features, Tower, TowerConfig, image_layout, interpolate_grid, interpolate_tokens,
                                   masks_at_once, merge_stages, padding_mask, read_safetensors)
from mllm_nb.vision.vit import ViT, ViTConfig, load_transformers_state
from safetensors.torch import load_file, save_file

PARITY = ROOT / "tests" / "golden" / "parity"
SMALL = ViTConfig(image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32)
CONFIG = TowerConfig("small", SMALL, Preprocess(size=16))


def golden(name: str) -> tuple[dict, dict]:
    return load_file(PARITY / f"{name}.safetensors"), json.loads((PARITY / f"{name}.json").read_text())["config"]


def golden_tower(name: str, **changes) -> tuple[Tower, dict, dict]:
    tensors, config = golden(name)
    vit = ViT(ViTConfig.from_transformers({"model_type": "clip_vision_model", **config["clip_config"]}))
    load_transformers_state(vit, tensors, prefix="weights.model.vision_tower.vision_tower.vision_model.")
    use = config["hf_config"]
    settings = TowerConfig("clip", vit.config, Preprocess(size=vit.config.image_size), use["mm_vision_select_layer"], use["mm_vision_select_feature"])
    return Tower(replace(settings, **changes), vit), tensors, config


def tower(seed: int = 0, **changes) -> Tower:
    torch.manual_seed(seed)
    return Tower(replace(CONFIG, **changes))


@pytest.mark.parametrize("rows, columns", [(24, 24), (27, 27), (96, 96), (5, 9)])
def test_masks_are_boxes_to_the_last_rounding(rows, columns):
    "In the second line the formula hits a whole number only if it is computed in the original's order."
    sizes = [(640, 480), (3, 2000), (2000, 3), (7, 7), (299, 300), (5 * 40, 9 * 40),
             (535, 856), (332, 498), (668, 1002), (738, 1107), (255, 544), (493, 544)]
    expected = torch.zeros(len(sizes), rows, columns, dtype=torch.bool)
    for view, (top, bottom, left, right) in zip(expected, (unpad_box(size, rows, columns) for size in sizes)):
        view[top:bottom, left:right] = True
    grid = torch.zeros(len(sizes), rows, columns, 1)
    for found in (padding_mask(grid, sizes), padding_mask(grid, torch.tensor(sizes)), masks_at_once(torch.tensor(sizes), rows, columns)):
        assert torch.equal(found, expected)


# what the originals compute

@pytest.mark.parametrize("name", ["llava15_llama_mlp2x", "llava15_llama_mixed_textonly_multiimage_leftpad", "llava15_mistral_mlp2x", "llava15_truncation"])
def test_llava_s_features(name):
    model, tensors, _ = golden_tower(name)
    torch.testing.assert_close(model(tensors["in.pixel_values"]).tokens, tensors["out.vision_features"], atol=1e-5, rtol=1e-5)


def test_anyres_layout_gives_the_original_s_embeddings():
    model, tensors, config = golden_tower("llava_anyres_spatial_unpad")
    start = 0
    for number, size in enumerate(config["image_sizes"]):
        views = tensors[f"in.pixel_values.{number}"]
        torch.testing.assert_close(model(views).tokens, tensors["out.vision_features"][start:start + len(views)], atol=1e-5, rtol=1e-5)
        table = torch.cat([tensors["out.image_features"][start:start + len(views)].flatten(0, 1), tensors["weights.model.image_newline"].expand(2, -1)])
        tiles = anyres_grid(size, config["hf_config"]["image_grid_pinpoints"], 16)
        assert 1 + tiles[0] * tiles[1] == len(views) == config["tiles"][number]
        layout = image_layout("spatial_unpad", size, (4, 4), tiles)
        first = int((tensors["in.input_ids"][number] == -200).nonzero())
        assert torch.equal(table[layout], tensors["out.inputs_embeds"][number, first:first + len(layout)])
        start += len(views)


def test_grids_are_resampled_as_cambrian_does():
    tensors, config = golden("tower_interpolation")
    for number, count in enumerate(config["token_targets"]):
        torch.testing.assert_close(interpolate_tokens(tensors[f"in.tokens.{number}"], count), tensors[f"out.tokens.{number}"], atol=1e-6, rtol=1e-6)
    side = round(config["convnext_target"] ** 0.5)
    merged = merge_stages([tensors[f"in.stage.{number}"] for number in range(4)], side)
    torch.testing.assert_close(merged.flatten(1, 2), tensors["out.convnext_multistage"], atol=1e-6, rtol=1e-6)


def test_resampling_details():
    grid = torch.randn(1, 3, 3, 2)
    assert interpolate_grid(grid, 3) is grid
    assert interpolate_grid(grid.bfloat16(), 5).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="10 tokens"):
        interpolate_tokens(torch.randn(1, 10, 2), 4)


# towers

@pytest.mark.parametrize("feature, count, tokens", [("patch", None, 16), ("cls_patch", None, 17), ("patch", 4, 4), ("cls_patch", 25, 26)])
def test_tokens_and_settings_agree(feature, count, tokens):
    model = tower(select_feature=feature, token_count=count)
    features = model(torch.randn(2, 3, 16, 16))
    assert features.tokens.shape == (2, tokens, 24) and model.config.tokens == tokens
    assert features.grid.shape == (2, model.config.grid, model.config.grid, 24) and features.mask.shape == features.grid.shape[:3]
    assert (features.prefix is None) == (feature == "patch")


def test_layers_are_selected_as_hidden_states():
    pixels, reference = torch.randn(1, 3, 16, 16), tower().vit
    states = reference(pixels, return_layers=True)
    for layer, expected in ((-2, states[-2]), (-1, states[-1]), (1, states[1]), (None, reference.post_norm(states[-1]))):
        torch.testing.assert_close(tower(select_layer=layer)(pixels).grid.flatten(1, 2), expected[:, 1:])


def test_positions_follow_the_size_of_the_images():
    model = tower(preprocess=Preprocess(size=24))
    assert model.vit.positions.shape == (37, 24) and model.config.vit.image_size == 24
    assert model(torch.randn(1, 3, 24, 24)).grid.shape == (1, 6, 6, 24)
    rounded = tower(preprocess=Preprocess(size=18))  # 18 pixels also have 4 whole patches
    assert torch.equal(rounded.vit.positions, tower().vit.positions) and rounded(torch.randn(1, 3, 18, 18)).tokens.shape[1] == 16
    with pytest.raises(ValueError, match="16 x 16"):
        tower()(torch.randn(1, 3, 24, 24))


def test_padding_is_masked():
    features = tower()(torch.randn(2, 3, 16, 16), image_sizes=[(40, 20), (20, 40)])
    assert features.mask[0].all(1).tolist() == [False, True, True, False] == features.mask[1].all(0).tolist()
    with pytest.raises(ValueError, match="1 image sizes for 2 views"):
        padding_mask(features.grid, [(1, 1)])
    assert padding_mask(features.grid[:1], [(1600, 100)]).sum() == 0  # thinner than a cell, as the original


def test_frozen_means_frozen():
    model = torch.nn.ModuleList([tower()]).train()[0]
    assert not model.training and not model.vit.training and not any(p.requires_grad for p in model.parameters())
    assert not model(torch.randn(1, 3, 16, 16)).tokens.requires_grad
    pixels = torch.randn(1, 3, 16, 16, requires_grad=True)
    model(pixels).tokens.sum().backward()  # the picture itself may ask
    assert pixels.grad.abs().sum() > 0
    model.unfreeze()
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not model.freeze().training


def test_features_join_prefix_and_grid():
    features = Features(torch.arange(4.0).reshape(1, 2, 2, 1), torch.ones(1, 2, 2, dtype=torch.bool), torch.full((1, 1, 1), -1.0))
    assert features.tokens.flatten().tolist() == [-1, 0, 1, 2, 3]


# folders

def test_saved_towers_come_back(tmp_path):
    model, pixels = tower(select_feature="cls_patch", preprocess=Preprocess(size=24, aspect="anyres", pinpoints=((24, 48),))), torch.randn(1, 3, 24, 24)
    model.save_pretrained(tmp_path)
    again = Tower.from_pretrained(tmp_path)
    assert again.config == model.config and torch.equal(again(pixels).tokens, model(pixels).tokens)
    assert Tower.from_pretrained(tmp_path, select_layer=-1).config.select_layer == -1


@pytest.mark.parametrize("family, layer", [("clip", -2), ("siglip", None), ("dinov2", None)])
def test_published_folders_load(family, layer, tmp_path):
    from test_vit import original
    model = original(family).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}))
    pixels = torch.randn(1, 3, 28, 28)
    expected = model(pixels, output_hidden_states=True)
    expected = expected.last_hidden_state if layer is None else expected.hidden_states[layer]
    torch.testing.assert_close(Tower.from_pretrained(tmp_path).vit.hidden_state(pixels, layer), expected, atol=1e-5, rtol=1e-5)
    features = Tower.from_pretrained(tmp_path, select_feature="cls_patch")(pixels)
    torch.testing.assert_close(features.tokens, expected, atol=1e-5, rtol=1e-5)
    assert Tower.from_pretrained(tmp_path).config.select_layer == layer


def test_sharded_weights_load(tmp_path):
    model = tower()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    parts = {"a.safetensors": dict(list(state.items())[::2]), "b.safetensors": dict(list(state.items())[1::2])}
    for name, part in parts.items():
        save_file(part, tmp_path / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Tower.from_pretrained(tmp_path).config == model.config


def spoil(folder, kind: str) -> None:
    weights = folder / "model.safetensors"
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "no JSON":
        (folder / "config.json").write_text("{")
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:200])
    elif kind == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif kind == "geometry":
        settings = json.loads((folder / "config.json").read_text())
        settings["vit"]["num_hidden_layers"] = 4
        (folder / "config.json").write_text(json.dumps(settings))
    elif kind == "left over":
        save_file(load_file(weights) | {"surplus": torch.zeros(1)}, weights)


@pytest.mark.parametrize("kind, reason", [("no config", "config.json: no such file"), ("no JSON", "config.json: not JSON"), ("truncated", "model.safetensors: damaged"),
                                          ("pickle", "pytorch_model.bin is a pickle"), ("geometry", "layers.3"), ("left over", "surplus")])
def test_bad_folders_are_named(kind, reason, tmp_path):
    tower().save_pretrained(tmp_path)
    spoil(tmp_path, kind)
    with pytest.raises(ValueError) as caught:
        Tower.from_pretrained(tmp_path)
    assert reason in str(caught.value) and str(tmp_path) in str(caught.value)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="select_feature is 'cls'"):
        TowerConfig(select_feature="cls")
    with pytest.raises(ValueError, match="10 tokens"):
        TowerConfig(token_count=10)


# layouts

def test_layouts_by_hand():
    assert image_layout("flat", (40, 20), (2, 2), (2, 1)) == list(range(12))
    assert image_layout("flat", (40, 20), (2, 2), (2, 1), extra=1) == list(range(15))
    assert image_layout("spatial", (40, 20), (2, 2), (2, 1)) == [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11]
    assert image_layout("spatial_unpad", (40, 20), (2, 2), (2, 1)) == [0, 1, 2, 3, 4, 5, 8, 9, -2, 6, 7, 10, 11, -2]
    assert image_layout("spatial_unpad", (40, 40), (2, 2), None) == [0, 1, 2, 3, -2]
    assert image_layout("spatial", (40, 40), (2, 2), None) == [0, 1, 2, 3]
    assert image_layout("unpad", (40, 20), (4, 4)) == [4, 5, 6, 7, -2, 8, 9, 10, 11, -2]
    assert image_layout("unpad", (20, 40), (4, 4)) == [1, 2, -2, 5, 6, -2, 9, 10, -2, 13, 14, -2]


def merged_by_tensors(features: torch.Tensor, newline: torch.Tensor, size: tuple[int, int], tiles: tuple[int, int], unpad: bool) -> torch.Tensor:
    "The original's way on features [views, cells, channels]: move axes, crop, append."
    side = round(features.shape[1] ** 0.5)
    grid = features[1:].reshape(tiles[1], tiles[0], side, side, -1).permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)
    if unpad:
        height, width = grid.shape[:2]
        if size[0] / size[1] > width / height:
            cut = (height - int(size[1] * (width / size[0]))) // 2
            grid = grid[cut:height - cut]
        else:
            cut = (width - int(size[0] * (height / size[1]))) // 2
            grid = grid[:, cut:width - cut]
        grid = torch.cat([grid, newline.expand(len(grid), 1, -1)], dim=1)
    return torch.cat([features[0], grid.flatten(0, 1)])


@pytest.mark.parametrize("kind", ["spatial", "spatial_unpad"])
@pytest.mark.parametrize("size", [(30, 20), (100, 40), (41, 97), (640, 480), (7, 300), (1, 1)])
@pytest.mark.parametrize("tiles", [(1, 1), (2, 2), (3, 1), (1, 3), (4, 2)])
def test_layouts_give_what_moving_tensors_gives(kind, size, tiles):
    features, newline = torch.randn(1 + tiles[0] * tiles[1], 9, 2), torch.randn(2)
    table = torch.cat([features.flatten(0, 1), newline.expand(2, -1)])
    layout = image_layout(kind, size, (3, 3), tiles)
    assert torch.equal(table[layout], merged_by_tensors(features, newline, size, tiles, kind == "spatial_unpad"))


def test_layouts_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="class token"):
        image_layout("spatial", (10, 10), (2, 2), (2, 1), extra=1)
    with pytest.raises(ValueError, match="'flat', 'spatial'"):
        image_layout("columns", (10, 10), (2, 2))


@pytest.mark.parametrize("content, reason", [
    ({"weight_map": {"a": "../other/model.safetensors"}}, "expected a .safetensors file beside the index"),
    ({"weight_map": {"a": "/other/model.safetensors"}}, "expected a .safetensors file beside the index"),
    ({"weight_map": {"a": "config.json"}}, "expected a .safetensors file beside the index"),
    ({"weight_map": {"a": "x" * 5000 + ".safetensors"}}, "expected a .safetensors file beside the index"),
    ({"weight_map": [1]}, "expected a file's name"), ({"weight_map": {"a": 5}}, "expected a file's name"),
    ({}, "found None"), ([], "found a JSON list"), ("[" * 100_000, "not JSON")])
def test_an_index_lists_files_beside_it_and_nothing_else(tmp_path, content, reason):
    from mllm_nb.mllm import WeightsError, weight_files
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.safetensors").write_bytes(b"")
    folder = tmp_path / "model"
    folder.mkdir()
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        read_safetensors(folder)
    assert "model.safetensors.index.json" in str(caught.value) and len(str(caught.value)) < 600
    with pytest.raises(WeightsError, match="model.safetensors.index.json"):
        weight_files(folder)


@pytest.mark.parametrize("field, value", [("vit", None), ("vit", "x"), ("preprocess", []), ("token_count", "x"), ("model_type", [])])
def test_settings_of_the_wrong_kind_name_their_file(tmp_path, field, value):
    tower = Tower(TowerConfig(vit=ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8), preprocess=Preprocess(size=8)))
    tower.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, field: value}))
    with pytest.raises(ValueError, match="config.json: "):
        Tower.from_pretrained(tmp_path)


# several scales (S²)

def as_the_wrapper_does(model, pixels: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    "What LLaVA's CLIPVisionTowerS2 computes with the s2wrapper package, read step by step: transformers' CLIP, slices, block means."
    side, found = sizes[0], []
    for size in sizes:
        scaled, count = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic"), size // side
        rows = []
        for i in range(count):
            tiles = [scaled[:, :, i * side:(i + 1) * side, j * side:(j + 1) * side] for j in range(count)]
            states = [model(tile, output_hidden_states=True).hidden_states[-2][:, 1:] for tile in tiles]
            cells = round(states[0].shape[1] ** .5)
            rows.append(torch.cat([state.reshape(len(pixels), cells, cells, -1) for state in states], dim=2))
        whole = torch.cat(rows, dim=1)
        blocks = [[whole[:, i * count:(i + 1) * count, j * count:(j + 1) * count].mean((1, 2)) for j in range(cells)] for i in range(cells)]
        found.append(torch.stack([torch.stack(row, dim=1) for row in blocks], dim=1).flatten(1, 2))
    return torch.cat(found, dim=-1)


@pytest.mark.parametrize("scales", [(28, 56), (28, 56, 84), (28, 28), (28,)])
def test_scales_give_what_the_wrapper_gives(scales, tmp_path):
    from test_vit import original
    model = original("clip").eval()
    model.save_pretrained(tmp_path)
    ours = Tower.from_pretrained(tmp_path, preprocess=Preprocess(size=scales[-1]), s2_scales=scales)
    pixels = torch.randn(2, 3, scales[-1], scales[-1])
    features = ours(pixels, image_sizes=[(40, 20), (20, 40)])
    with torch.no_grad():
        torch.testing.assert_close(features.tokens, as_the_wrapper_does(model, pixels, list(scales)), atol=1e-5, rtol=1e-5)
    assert ours.width == ours.config.width == len(scales) * model.config.hidden_size == features.grid.shape[-1]
    assert ours.config.tokens == features.tokens.shape[1] and features.mask.shape == features.grid.shape[:3] and not features.mask.all()
    ours.save_pretrained(tmp_path / "own")
    assert Tower.from_pretrained(tmp_path / "own").config == ours.config


@pytest.mark.parametrize("changes, reason", [
    ({"s2_scales": (16, 40)}, "multiples"), ({"s2_scales": (32, 16)}, "rising"), ({"s2_scales": (16, 32)}, "found 16 pixels"), ({"s2_scales": (16, 0)}, "multiples"),
    ({"s2_scales": (16.0,)}, "whole numbers"), ({"s2_scales": (8, 16), "select_feature": "cls_patch"}, "without its class token")])
def test_scales_that_cannot_be_are_refused(changes, reason):
    with pytest.raises(ValueError, match="s2_scales.*" + reason):
        replace(CONFIG, **changes)


# folders that say too little

@pytest.mark.parametrize("family, mean, aspect", [("clip", 0.48145466, "square"), ("siglip", 0.5, "stretch"), ("dinov2", 0.485, "square")])
def test_a_folder_without_preprocessing_is_prepared_as_its_family(family, mean, aspect, tmp_path):
    from mllm_nb.papers.llava import tower_config_of
    from test_vit import original
    model = original(family)
    model.save_pretrained(tmp_path)
    for found in (Tower.from_pretrained(tmp_path).config.preprocess, tower_config_of(tmp_path, None).preprocess):
        assert (found.mean[0], found.aspect, found.size) == (mean, aspect, model.config.image_size)


def timm_names(vit: ViT) -> dict[str, torch.Tensor]:
    "A SigLIP as open_clip stores it: timm's names, one matrix for query, key and value; a pooling head and the text side."
    state = {"visual.trunk.attn_pool.latent": torch.ones(1), "logit_scale": torch.ones(1), "text.token_embedding.weight": torch.ones(2, 2)}
    for name, value in vit.state_dict().items():
        if ".attention.key" in name or ".attention.value" in name:
            continue
        if ".attention.query" in name:
            value = torch.cat([vit.state_dict()[name.replace("query", part)] for part in ("query", "key", "value")])
            name = name.replace("attention.query", "attn.qkv")
        for ours, timm in (("patch_embedding.projection", "patch_embed.proj"), ("positions", "pos_embed"), ("layers.", "blocks."),
                           ("attention.output", "attn.proj"), ("post_norm", "norm")):
            name = name.replace(ours, timm)
        state["visual.trunk." + name] = value[None] if name == "pos_embed" else value
    return state


def test_a_siglip_of_open_clip_loads(tmp_path, monkeypatch):
    from mllm_nb.vision import towers
    small = dict(patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, class_token=False)
    monkeypatch.setitem(towers._TIMM_VITS, "vit_tiny_siglip", small)
    vit = ViT(ViTConfig(image_size=18, **small))
    vision = {"model_cfg": {"vision_cfg": {"image_size": 18, "timm_model_name": "vit_tiny_siglip_18"}},
              "preprocess_cfg": {"mean": [.5] * 3, "std": [.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(vision))
    save_file(timm_names(vit), tmp_path / "open_clip_model.safetensors")
    found, pixels = Tower.from_pretrained(tmp_path), torch.randn(1, 3, 18, 18)
    torch.testing.assert_close(found(pixels).tokens, vit(pixels))      # all layers, and the last norm
    assert found.config.preprocess == Preprocess(size=18, mean=(.5,) * 3, std=(.5,) * 3, aspect="stretch")
    save_file(timm_names(ViT(ViTConfig(image_size=18, **small | {"num_hidden_layers": 1}))), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="missing"):
        Tower.from_pretrained(tmp_path)


def test_a_trunk_that_cambrian_trained_goes_before_the_folder_s(tmp_path, monkeypatch):
    from mllm_nb.vision import towers
    small = dict(patch_size=14, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, class_token=False)
    monkeypatch.setitem(towers._TIMM_VITS, "vit_tiny_siglip", small)
    vision = {"model_cfg": {"vision_cfg": {"image_size": 384, "timm_model_name": "vit_tiny_siglip_384"}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(vision))
    shelf, trained = (ViT(ViTConfig(image_size=384, **small)) for _ in range(2))
    save_file(timm_names(shelf), tmp_path / "open_clip_model.safetensors")
    state = {name.removeprefix("visual.trunk."): value for name, value in timm_names(trained).items() if name.startswith("visual.")}
    for weights, expected in ((None, shelf), (state, trained)):
        found = towers.cambrian_tower("siglip/CLIP-ViT-SO400M-14-384", tmp_path, state=weights)
        assert all(torch.equal(value, expected.state_dict()[name]) for name, value in found.vit.state_dict().items())
    with pytest.raises(ValueError, match="missing"):
        towers.cambrian_tower("siglip/CLIP-ViT-SO400M-14-384", tmp_path, state={"blocks.0.norm1.weight": torch.ones(24)})


def test_the_so400m_has_its_published_geometry(tmp_path):
    from mllm_nb.vision.towers import folder_config
    vision = {"model_cfg": {"vision_cfg": {"image_size": 384, "timm_model_name": "vit_so400m_patch14_siglip_384"}}, "preprocess_cfg": {"resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(vision))
    vit = folder_config(tmp_path).vit
    assert (vit.hidden_size, vit.num_hidden_layers, vit.intermediate_size, vit.grid, vit.hidden_act) == (1152, 27, int(1152 * 3.7362), 27, "gelu")


# Cambrian's four

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
READ = {   # from the original's encoders and the preprocessing files that they fetch: size, mean, deviation; mean of the padding
    "siglip/CLIP-ViT-SO400M-14-384": (384, (.5,) * 3, (.5,) * 3, CLIP_MEAN), "openai/clip-vit-large-patch14-336": (336, CLIP_MEAN, CLIP_STD, CLIP_MEAN),
    "facebook/dinov2-giant-res378": (378, *IMAGENET, IMAGENET[0]), "clip-convnext-XXL-multi-stage": (1024, CLIP_MEAN, CLIP_STD, CLIP_MEAN)}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("shape", [(50, 31), (17, 40), (30, 30), (500, 3)])
def test_cambrian_s_pictures_are_prepared_as_by_its_process_images(name, shape):
    import numpy as np
    from mllm_nb.images import preprocess
    from mllm_nb.vision.towers import CAMBRIAN_TOWERS
    from PIL import Image
    size, mean, deviation, padding = READ[name]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), np.uint8))
    square = Image.new("RGB", (max(shape),) * 2, tuple(int(x * 255) for x in padding))
    square.paste(picture, ((max(shape) - shape[0]) // 2, (max(shape) - shape[1]) // 2))
    values = np.asarray(square.resize((size, size)), np.float64) / 255
    expected = torch.tensor(((values - mean) / deviation).transpose(2, 0, 1), dtype=torch.float32)
    torch.testing.assert_close(preprocess(picture, CAMBRIAN_TOWERS[name][0])[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name, family, layer", [("siglip/CLIP-ViT-SO400M-14-384", "siglip", None), ("openai/clip-vit-large-patch14-336", "clip", -2),
                                                 ("facebook/dinov2-giant-res378", "dinov2", None)])
def test_cambrian_s_towers_from_folders_without_preprocessing(name, family, layer, tmp_path):
    from mllm_nb.vision.towers import CAMBRIAN_TOWERS, cambrian_tower
    from test_vit import original
    original(family).save_pretrained(tmp_path)
    model = cambrian_tower(name, tmp_path, token_count=16)
    prepare, own = CAMBRIAN_TOWERS[name]
    assert model.config.preprocess == prepare and model.config.name == name and model.config.select_layer == layer
    assert all(getattr(model.config.vit, field) == value for field, value in own.items())
    features = model(torch.randn(1, 3, prepare.size, prepare.size), image_sizes=[(40, 20)])
    assert features.grid.shape[1:3] == (4, 4) and features.mask.sum() == 8 and features.prefix is None
    with pytest.raises(ValueError, match="dinov2-giant-res378"):
        cambrian_tower("facebook/dinov2-giant", tmp_path)
