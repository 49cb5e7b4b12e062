"ConvNeXt: transformers as the oracle, other publishers' names, as a tower, bad input."
import json

import pytest
import torch
from safetensors.torch import save_file

from mllm_nb.connectors.sva import SVAConfig
from mllm_nb.images import Preprocess
from mllm_nb.language.decoder import DecoderConfig
from mllm_nb.mllm import MLLM, MLLMConfig
from mllm_nb.vision.convnext import ConvNeXt, ConvNeXtConfig, convnext_name, load_convnext_state
from mllm_nb.vision.towers import Tower, TowerConfig, merge_stages
from mllm_nb.vision.vit import ViTConfig

SMALL = ConvNeXtConfig((1, 2, 1, 1), (8, 16, 24, 32), image_size=64, layer_scale=0.5)


def random_net(config: ConvNeXtConfig = SMALL, seed: int = 0) -> ConvNeXt:
    torch.manual_seed(seed)
    return ConvNeXt(config).requires_grad_(False).eval()


@pytest.mark.parametrize("side, scale, widths", [
    (64, 0.7, [8, 16, 24, 32]), (75, 0.0, [8, 16, 24, 32]), (32, 1e-6, [8, 16, 24, 32]), (40, 0.7, [8, 8, 16, 8])])
def test_every_stage_equals_transformers(side, scale, widths):
    from transformers import ConvNextConfig, ConvNextModel
    settings = dict(depths=[1, 2, 1, 1], hidden_sizes=widths, image_size=side, layer_scale_init_value=scale)
    torch.manual_seed(1)
    theirs = ConvNextModel(ConvNextConfig(**settings)).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    ours = random_net(ConvNeXtConfig.from_transformers({"model_type": "convnext", **settings}))
    load_convnext_state(ours, theirs.state_dict())
    pixels = torch.randn(2, 3, side, side)
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-4:]
    for mine, other in zip(ours(pixels), expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def renamed(net: ConvNeXt, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in net.state_dict().items()}


def test_names_of_every_publisher():
    net = random_net()
    open_clip = renamed(net, "visual.trunk.") | {
        "visual.trunk.head.norm.weight": torch.ones(32), "visual.head.mlp.fc1.weight": torch.ones(2, 2),
        "text.ln_final.weight": torch.ones(3), "logit_scale": torch.ones(())}
    mini_gemini = {f"model.vision_tower_aux.vision_{name}": tensor for name, tensor in net.state_dict().items()}
    for state in (open_clip, mini_gemini, net.state_dict()):
        other = load_convnext_state(random_net(seed=5), state)
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values()))
    assert convnext_name("convnext.layernorm.weight") is None and convnext_name("classifier.bias") is None


def test_weights_that_do_not_fit_are_named():
    state = random_net().state_dict()
    state["stages.9.blocks.0.gamma"] = state.pop("stages.0.blocks.0.gamma")
    state["stem.0.bias"] = torch.zeros(9)
    with pytest.raises(ValueError, match=r"3 weights.*left over stages.9.*missing stages.0.*stem.0.bias: found \(9,\)"):
        load_convnext_state(random_net(), state)


def test_tower_resamples_each_stage_once_and_masks_padding():
    net, pixels = random_net(), torch.randn(2, 3, 64, 64)
    tower = Tower(TowerConfig("c", SMALL, Preprocess(size=64), token_count=36), net)
    features = tower(pixels, [(64, 64), (64, 32)])
    torch.testing.assert_close(features.grid, merge_stages(net(pixels), 6))
    assert features.mask.sum((1, 2)).tolist() == [36, 24] and (tower.width, tower.config.tokens) == (80, 36)
    native = Tower(TowerConfig("c", SMALL, Preprocess(size=64)), net)
    assert native(pixels).grid.shape == (2, 16, 16, 80) and native.config.grid == 16


def test_last_stage_alone():
    config = ConvNeXtConfig((1, 1, 1, 1), (8, 16, 24, 32), image_size=96, multi_stage=False)
    tower = Tower(TowerConfig("c", config, Preprocess(size=64)), random_net(config))
    assert tower(torch.randn(1, 3, 64, 64)).grid.shape == (1, 2, 2, 32) and (tower.config.grid, tower.width) == (2, 32)


def test_tower_goes_to_disk_and_back(tmp_path):
    tower = Tower(TowerConfig("c", SMALL, Preprocess(size=64), token_count=36), random_net())
    tower.save_pretrained(tmp_path)
    again = Tower.from_pretrained(tmp_path)
    assert again.config == tower.config
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(pixels).grid, tower(pixels).grid)


def test_published_folders(tmp_path):
    vision = {"timm_model_name": "convnext_large", "image_size": 64}
    colors = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"vision_cfg": vision}, "preprocess_cfg": colors}))
    save_file({"visual.trunk.stem.0.bias": torch.zeros(3)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="weights do not fit"):
        Tower.from_pretrained(tmp_path)
    config = ConvNeXtConfig.from_transformers({"model_cfg": {"vision_cfg": {"timm_model_name": "convnext_xxlarge"}}})
    assert (config.hidden_size, config.depths, config.layer_norm_eps) == (5760, (3, 4, 30, 3), 1e-5)
    with pytest.raises(ValueError, match="found 'resnet50', expected one of"):
        ConvNeXtConfig.from_transformers({"model_cfg": {"vision_cfg": {"timm_model_name": "resnet50"}}})


def test_published_sizes():
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in ConvNeXt(ConvNeXtConfig()).parameters())
    assert count == 196_227_264 and ConvNeXtConfig().hidden_size == 2880   # timm's convnext_large without its head


@pytest.mark.parametrize("change, said", [({"depths": 3}, "depths: found 3"), ({"depths": ["x"]}, "depths"), ({"hidden_sizes": [8, "x"]}, "hidden_sizes"),
                                          ({"patch_size": 0}, "patch_size: found 0"), ({"layer_scale_init_value": "x"}, "layer_scale_init_value"),
                                          ({"image_size": 3.5}, "image_size: found 3.5"), ({"depths": [1]}, "as many depths as widths")])
def test_settings_of_the_wrong_kind_are_named(change, said):
    with pytest.raises(ValueError, match=said):
        ConvNeXtConfig.from_transformers({"model_type": "convnext", **change})


def test_views_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="found views of 40 x 16 pixels, expected at least 32 x 32"):
        random_net()(torch.zeros(1, 3, 16, 40))
    with pytest.raises(ValueError, match="as many"):
        ConvNeXtConfig((1, 1), (8,))


def test_a_model_with_two_kinds_of_towers_is_saved_and_loaded(tmp_path):
    vit = ViTConfig(64, 16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    torch.manual_seed(0)
    towers = [Tower(TowerConfig("v", vit, Preprocess(size=64))),
              Tower(TowerConfig("c", SMALL, Preprocess(size=64), token_count=64))]
    language = DecoderConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                             num_attention_heads=4)
    settings = SVAConfig((16, 64), 32, 16, query_num_list=(16,), connector_only=False, num_of_vision_sampler_layers=1,
                         start_of_vision_sampler_layers=0)
    model = MLLM(MLLMConfig(language, tuple(tower.config for tower in towers), settings, model_type="cambrian_llama",
                            mm_patch_merge_type="unpad"), towers=towers).eval()
    model.save_pretrained(tmp_path)
    again = MLLM.from_pretrained(tmp_path)
    ids, index = torch.randint(0, 60, (1, 20)), torch.tensor([[-1, *range(16), -2, -1, -1]])
    pixels = [torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64)]
    with torch.no_grad():
        torch.testing.assert_close(model(ids, pixels, index).hidden, again(ids, pixels, index).hidden, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    single = MLLM(MLLMConfig(language, (towers[1].config,)), towers=towers[1:]).eval()
    single.save_pretrained(tmp_path / "one")
    assert MLLM.from_pretrained(tmp_path / "one").config == single.config
