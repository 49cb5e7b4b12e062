"The ViT equals transformers' CLIP, SigLIP and DINOv2 on the same weights; loading is strict both ways."
import importlib
import json
import logging

import pytest
import torch
from conftest import ROOT
from mllm_nb.vision.vit import (ViT, ViTConfig, attend, attention_maps, load_transformers_state, pooled, published_name,
                                resize_positions, transformers_state)
from safetensors.torch import load_file

SIZES = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7)
FAMILIES = {
    "clip": ("clip", "CLIPVision", dict(intermediate_size=40)),
    "siglip": ("siglip", "SiglipVision", dict(intermediate_size=40)),
    "dinov2": ("dinov2", "Dinov2", dict(mlp_ratio=2, layerscale_value=0.5)),
    "dinov2 without biases": ("dinov2", "Dinov2", dict(qkv_bias=False)),
    "dinov2 gated": ("dinov2", "Dinov2", dict(use_swiglu_ffn=True)),
}


def original(family: str, **changes) -> torch.nn.Module:
    "A random transformers model of the family whose norms and scales are not at their first values."
    folder, name, options = FAMILIES[family]
    logging.disable(logging.WARNING)
    try:
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        configuration = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    finally:
        logging.disable(logging.NOTSET)
    torch.manual_seed(0)
    model = getattr(module, f"{name}Model")(getattr(configuration, f"{name}Config")(**SIZES | options | changes))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def ours_of(model: torch.nn.Module) -> ViT:
    return load_transformers_state(ViT(ViTConfig.from_transformers(model.config.to_dict())), model.state_dict())


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    model = original(request.param)
    return model, ours_of(model)


def pixels(views: int = 2, height: int = 28, width: int = 28) -> torch.Tensor:
    return torch.randn(views, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("path", ["sdpa", "plain"])
def test_outputs_are_the_original_s(pair, path):
    model, vit = pair
    vit.attention_path = path
    expected = model(pixels(), output_hidden_states=True)
    states = vit(pixels(), return_layers=True)
    assert len(states) == len(expected.hidden_states)
    for state, its in zip(states, expected.hidden_states):
        torch.testing.assert_close(state, its, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vit(pixels()), expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    if "Siglip" not in type(model).__name__:  # SigLIP pools by an attention of its own
        torch.testing.assert_close(pooled(vit, vit(pixels())), expected.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [None, -1, -2, 0, 1, -4])
def test_each_hidden_state_runs_alone(pair, layer):
    model, vit = pair
    expected = model(pixels(), output_hidden_states=True)
    expected = expected.last_hidden_state if layer is None else expected.hidden_states[layer]
    torch.testing.assert_close(vit.hidden_state(pixels(), layer), expected, atol=1e-5, rtol=1e-5)


def test_gradients_are_the_original_s(pair):
    model, vit = pair
    weight = torch.randn(vit(pixels()).shape, generator=torch.Generator().manual_seed(2))
    images = pixels().requires_grad_(), pixels().requires_grad_()
    model.zero_grad()
    vit.zero_grad()
    (model(images[0]).last_hidden_state * weight).sum().backward()
    (vit(images[1]) * weight).sum().backward()
    torch.testing.assert_close(images[1].grad, images[0].grad, atol=1e-4, rtol=1e-4)
    gradients = {key: value.grad if value.grad is not None else torch.zeros_like(value) for key, value in model.named_parameters()}
    expected = load_transformers_state(ViT(vit.config), gradients).state_dict()
    for name, parameter in vit.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-4, msg=lambda text: f"{name}: {text}")


def test_saved_folders_and_both_prefixes_load(pair, tmp_path):
    model, vit = pair
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for state in (saved, {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in saved.items()}):
        loaded = load_transformers_state(ViT(vit.config), state)
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in vit.state_dict().items())


def test_what_we_write_transformers_reads(pair, tmp_path):
    model, vit = pair
    model.save_pretrained(tmp_path)
    file, ours = load_file(tmp_path / "model.safetensors"), transformers_state(vit)
    file = {key.removeprefix("vision_model."): value for key, value in file.items()}
    assert all(torch.equal(file[key], value) for key, value in ours.items())
    assert {key.split(".")[0] for key in file.keys() - ours.keys()} <= {"head", "embeddings"}


def test_dinov2_takes_other_sizes():
    model = original("dinov2")
    vit = ours_of(model)
    for height, width in ((28, 42), (63, 30)):
        image = pixels(1, height, width)
        torch.testing.assert_close(vit(image), model(image).last_hidden_state, atol=1e-5, rtol=1e-5)
    resized, image = resize_positions(ours_of(model), 49), pixels(1, 49, 49)
    assert resized.config.image_size == 49 and resized.positions.shape == (50, 24)
    torch.testing.assert_close(resized(image), model(image).last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 35, 35), (1, 3, 28, 35), (1, 1, 28, 28), (3, 28, 28), (1, 3, 5, 5)])
def test_other_shapes_are_refused(shape):
    vit = ViT(ViTConfig(**SIZES, intermediate_size=40))
    with pytest.raises(ValueError, match="expected"):
        vit(torch.zeros(shape))
    with pytest.raises(ValueError, match="hidden state 4"):
        vit.hidden_state(torch.zeros(1, 3, 28, 28), 4)


# checkpoints that do not fit

@pytest.fixture(scope="module")
def clip():
    model = original("clip")
    return ViTConfig.from_transformers(model.config.to_dict()), model.state_dict()


def test_missing_and_left_over_keys_are_named(clip):
    config, state = clip
    prefix = next(key for key in state if key.endswith("class_embedding")).removesuffix("embeddings.class_embedding")
    broken = {key: value for key, value in state.items() if "layers.1.mlp.fc1.bias" not in key} | {f"{prefix}adapter.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"missing: encoder\.layers\.1\.mlp\.fc1\.bias.*left over: .*adapter\.weight"):
        load_transformers_state(ViT(config), broken)


def test_another_geometry_is_named(clip):
    config, state = clip
    with pytest.raises(ValueError, match=r"another geometry: .*position_embedding.*is \(17, 24\), expected \(50, 24\)"):
        load_transformers_state(ViT(ViTConfig(**{**config.to_dict(), "image_size": 49})), state)
    with pytest.raises(ValueError, match=r"left over: .*layers\.2\."):
        load_transformers_state(ViT(ViTConfig(**{**config.to_dict(), "num_hidden_layers": 2})), state)
    with pytest.raises(ValueError, match="missing"):
        load_transformers_state(ViT(config), {})


def test_a_whole_clip_loads_without_its_text_half(clip):
    config, state = clip
    whole = {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in state.items()}
    whole |= {"text_model.embeddings.token_embedding.weight": torch.zeros(3, 3), "logit_scale": torch.zeros(()),
              "visual_projection.weight": torch.zeros(3, 3), "text_projection.weight": torch.zeros(3, 3),
              "vision_model.embeddings.position_ids": torch.arange(17)}
    load_transformers_state(ViT(config), whole)
    with pytest.raises(ValueError, match="left over: other.weight"):
        load_transformers_state(ViT(config), whole | {"other.weight": torch.zeros(1)})
    inside = {f"model.tower.{key}": value for key, value in whole.items()} | {"lm_head.weight": torch.zeros(1)}
    load_transformers_state(ViT(config), inside, prefix="model.tower.vision_model.")


# settings

def test_settings_of_released_encoders():
    clip = ViTConfig.from_transformers({"model_type": "clip", "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14}})
    giant = ViTConfig.from_transformers({"model_type": "dinov2", "hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24,
                                         "image_size": 518, "patch_size": 14, "use_swiglu_ffn": True, "mlp_ratio": 4})
    siglip = ViTConfig.from_transformers({"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
                                          "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14})
    assert giant.intermediate_size == 4096 and giant.grid == 37 and siglip.grid == 27 and clip.hidden_act == "quick_gelu"
    with torch.device("meta"):
        counts = [sum(p.numel() for p in ViT(config).parameters()) for config in (clip, siglip, giant)]
    assert counts == [303_507_456, 412_987_248, 1_136_479_232]
    assert ViTConfig(**giant.to_dict()) == giant


@pytest.mark.parametrize("config, word", [({"model_type": "resnet"}, "resnet"), ({}, "None"), ({"model_type": "dinov2", "image_size": [224, 112]}, "not square"),
                                          ({"model_type": "dinov2", "hidden_act": "tanhx"}, "tanhx"), ({"model_type": "dinov2", "hidden_size": 100}, "multiple"),
                                          ({"model_type": []}, "expected one of"), ({"vision_config": 3}, "vision_config: found 3"),
                                          ({"model_type": "dinov2", "hidden_size": "x"}, "hidden_size"), ({"model_type": "dinov2", "mlp_ratio": "x"}, "mlp_ratio"),
                                          ({"model_type": "clip_vision_model", "image_size": "x"}, "image_size: found 'x'"),
                                          ({"model_type": "clip_vision_model", "patch_size": 0}, "patch_size: found 0"),
                                          ({"model_type": "clip_vision_model", "hidden_size": 12 * 10**9}, "widths of at most"),
                                          ({"model_type": "clip_vision_model", "layer_norm_eps": float("nan")}, "layer_norm_eps: found nan"),
                                          ({"model_type": "clip_vision_model", "patch_size": 32, "image_size": 16}, "a patch within")])
def test_wrong_settings_are_refused(config, word):
    with pytest.raises(ValueError, match=word):
        ViTConfig.from_transformers(config)


@pytest.mark.parametrize("name", ["liuhaotian__llava-v1.5-7b", "SkunkworksAI__BakLLaVA-1"])
def test_names_and_shapes_are_the_manifest_s(name):
    keys = json.loads((ROOT / "tests" / "golden" / "manifests" / f"{name}.json").read_text())["vision_tower_keys"]
    config = ViTConfig.from_transformers({"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
                                          "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14})
    with torch.device("meta"):
        shapes = {published_name(name, config): list(value.shape) for name, value in ViT(config).state_dict().items()}
    listed = {key.partition("vision_model.")[2]: list(shape) for key, shape in keys.items()}
    listed.pop("embeddings.position_ids", None)
    inner = {key for key in shapes if key.startswith("encoder.layers.") and key.split(".")[2] not in ("0", "23")}
    assert {key: shapes[key] for key in shapes.keys() - inner} == listed


# attention

def test_attention_paths_agree_and_unknown_ones_are_refused():
    torch.manual_seed(0)
    parts = torch.randn(3, 2, 4, 9, 8).unbind()
    torch.testing.assert_close(attend(*parts, "plain"), attend(*parts, "sdpa"), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="flash"):
        attend(*parts, "flash")


def test_attention_maps_are_shares():
    vit = ViT(ViTConfig(**SIZES, intermediate_size=40))
    maps = attention_maps(vit, pixels())
    assert len(maps) == 3 and maps[0].shape == (2, 4, 17, 17)
    torch.testing.assert_close(maps[1].sum(-1), torch.ones(2, 4, 17))


def test_without_positions_order_does_not_matter():
    from mllm_nb.vision.patches import patchify, unpatchify
    torch.manual_seed(0)
    vit, order = ViT(ViTConfig(**SIZES, intermediate_size=40)), torch.randperm(16)
    shuffled = unpatchify(patchify(pixels(), 7)[:, order], 7, 4, 4)
    assert (pooled(vit, vit(shuffled)) - pooled(vit, vit(pixels()))).abs().max() > 1e-3
    vit.positions.data.zero_()
    torch.testing.assert_close(vit(shuffled)[:, 1:], vit(pixels())[:, 1:][:, order], atol=1e-5, rtol=1e-5)


def test_a_number_of_layers_that_no_model_has_is_refused():
    with pytest.raises(ValueError, match="num_hidden_layers 1000000000; expected 0 to 10000"):
        ViTConfig(num_hidden_layers=10**9)
