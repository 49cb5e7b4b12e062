"The picture tokenizer: codes, shapes, errors, its teachers; and the metrics of pictures."
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mllm_nb.drawing.vqgan import (CodeCare, MaskGIT, MaskGITConfig, Quantizer, VQGAN, VQGANConfig, VQGANTeacher, cluster,
                                   colour_loss, interest,
                                   load_vqgan, missed_by, nearest_codes,
                                   save_vqgan)
from mllm_nb.evaluation.metrics import code_usage, perplexity, psnr, ssim
from mllm_nb.training.miniatures import load_tower

TINY = dict(resolution=16, hidden_channels=8, channel_mult=(1, 2), num_res_blocks=1, z_channels=4, num_embeddings=16,
            quantized_embed_dim=4, norm_groups=4)


def tiny(**changes) -> VQGAN:
    torch.manual_seed(0)
    model = VQGAN(VQGANConfig(**TINY | changes)).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


def test_nearest_is_nearest():
    torch.manual_seed(0)
    vectors, codes = torch.randn(50, 4), torch.randn(20, 4)
    assert torch.equal(nearest_codes(vectors, codes), torch.cdist(vectors, codes).argmin(1))


@pytest.mark.parametrize("changes", [{}, {"attn_resolutions": (8,)}, {"no_attn_mid_block": False},
                                     {"resample_with_conv": False}, {"num_res_blocks": 2, "attn_resolutions": (16, 8)}])
@torch.no_grad()
def test_there_and_back_at_any_size(changes):
    model = tiny(**changes)
    for height, width in ((16, 16), (8, 24), (8, 12), (2, 2)):    # 4 x 6: as many rows as a square would have, but no square
        codes = model.encode(torch.rand(2, 3, height, width))
        assert codes.shape == (2, height * width // 4) and codes.max() < 16
        assert model.decode(codes, rows=height // 2).shape == (2, 3, height, width)


@torch.no_grad()
def test_gradients_change_nothing_about_the_numbers():
    model, pixels = tiny(), torch.rand(1, 3, 16, 16)
    silent = model.latents(pixels)
    with torch.enable_grad():
        assert torch.equal(model.latents(pixels), silent)


def test_a_lone_attention_block_is_used_unless_told_otherwise():
    right, released = tiny(attn_resolutions=(16,)), tiny(attn_resolutions=(16,), single_attention=False)
    assert right.encoder.down[0].uses_attention and not released.encoder.down[0].uses_attention
    assert released.decoder.up[0].uses_attention            # two blocks there


def test_the_weight_of_commitment():
    latents = torch.randn(1, 4, 3, 3, requires_grad=True)
    for legacy, expected in ((False, 0.25), (True, 1.0)):
        torch.manual_seed(1)
        quantizer = Quantizer(8, 4, 0.25, legacy)
        gradient, = torch.autograd.grad(quantizer(latents).loss, latents)
        torch.manual_seed(1)
        whole, = torch.autograd.grad(Quantizer(8, 4, 1.0)(latents).loss, latents)
        assert torch.allclose(gradient, expected * whole, atol=1e-6)


def test_bad_input():
    model = tiny()
    with pytest.raises(ValueError, match="found 15 x 16 pixels, expected multiples of 2"):
        model.encode(torch.rand(1, 3, 16, 15))
    with pytest.raises(ValueError, match="codes: found 0 to 16, expected 0 to 15"):
        model.decode(torch.tensor([[0, 1, 2, 16]]))
    with pytest.raises(ValueError, match="found 5 of them, expected a square"):
        model.decode(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="-1 to 3"):
        model.decode(torch.tensor([[-1, 1, 2, 3]]))


def test_a_folder_gives_the_same_codes(tmp_path):
    model, pixels = tiny(), torch.rand(1, 3, 16, 16)
    save_vqgan(model, tmp_path)
    assert torch.equal(load_vqgan(tmp_path).encode(pixels), model.encode(pixels))
    state = load_file(tmp_path / "model.safetensors")
    save_file({name: value for name, value in state.items() if "conv_in" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="weights do not fit config.json.*conv_in"):
        load_vqgan(tmp_path)


@torch.no_grad()
def test_the_shipped_tokenizer_knows_its_world():
    from mllm_nb.papers.lvm import as_pixels
    from mllm_nb.data.world import make_picture
    model = load_vqgan()
    drawn = [make_picture(index, "held_out", 77, None)[0].draw() for index in range(60)]
    pixels = torch.stack([as_pixels(image) for image in drawn if image is not None])
    codes = model.encode(pixels)
    used, varied = code_usage(codes, model.config.num_embeddings)
    card = json.loads((json_folder() / "scores.json").read_text())
    assert psnr(pixels, model.decode(codes).clamp(0, 1)).mean() > card["psnr"] - 2
    assert used > .3 and varied > 30


def json_folder():
    from mllm_nb.samples import samples_path
    return samples_path("mini", "vqgan")


def test_the_teachers_teach_and_the_critic_keeps_to_itself():
    torch.manual_seed(0)
    teacher = VQGANTeacher(tiny().train(), load_tower("contrastive").vit, critic_from=0, critic_ramp=1)
    pixels = torch.rand(2, 3, 16, 16)
    judged = teacher(pixels)
    judged.loss.backward()
    assert judged.loss.isfinite() and all(p.grad is None for p in teacher.eyes.parameters())
    assert teacher.critic.layers[0].weight.grad.abs().sum() > 0
    assert teacher.model.encoder.conv_in.weight.grad.abs().sum() > 0


def test_dead_codes_are_revived():
    teacher = VQGANTeacher(tiny().train(), load_tower("contrastive").vit, critic_from=10)
    teacher.care.used.fill_(1 / 16)
    teacher.care.used[3] = 0
    before = teacher.model.quantize.embedding.weight.clone()
    assert teacher.revive(torch.rand(2, 3, 16, 16)) == 1
    changed = (teacher.model.quantize.embedding.weight != before).any(1).nonzero().flatten().tolist()
    assert changed == [3]


def test_clusters_find_what_is_there():
    torch.manual_seed(0)
    truth = 10 * torch.randn(6, 3)
    vectors = truth.repeat(50, 1) + .01 * torch.randn(300, 3)
    found = cluster(vectors, 6)
    assert torch.cdist(truth, found).amin(1).max() < .1      # every group has its centre, though most were drawn unluckily
    assert cluster(vectors[:4], 6).shape == (6, 3)           # fewer vectors than codes


def test_far_vectors_are_taken_first():
    torch.manual_seed(0)
    care, codebook = CodeCare(4), torch.zeros(4, 2)
    care.used[:3] = 1
    vectors = torch.cat([torch.zeros(63, 2), torch.full((1, 2), 9.0)])
    assert care.revive(codebook, vectors, far=True) == 1 and (codebook[3] - 9).abs().max() < .1
    assert (codebook[:3] == 0).all() and care.used[3] == 1 / 4


def test_the_codebook_begins_with_clusters_of_the_last_batches():
    torch.manual_seed(0)
    teacher = VQGANTeacher(tiny().train(), load_tower("contrastive").vit, critic_from=9, plain_until=2, clusters=True)
    pixels = torch.rand(2, 3, 16, 16)
    before = teacher.model.quantize.embedding.weight.clone()
    for _ in range(2):
        teacher(pixels)
    assert torch.equal(before, teacher.model.quantize.embedding.weight) and len(teacher.care.recent) == 2
    vectors = torch.cat(tuple(teacher.care.recent))
    teacher(pixels)
    after = teacher.model.quantize.embedding.weight
    assert not torch.equal(before, after) and missed_by(after, vectors).mean() < vectors.var(0).sum() / 2


def test_colour_counts_more_than_brightness():
    grey, weight = torch.full((1, 3, 8, 8), .5), torch.ones(1, 1, 8, 8)
    brighter, redder = grey + .1, grey + torch.tensor([.2, -.05, .15])[None, :, None, None]
    assert abs(colour_loss(brighter, grey, weight).item() - .1) < 1e-6
    assert colour_loss(redder, grey, weight) > 2 * colour_loss(brighter, grey, weight)
    noise = torch.tensor([.1, -.1]).repeat(8, 4)[None, None]
    assert colour_loss(grey + noise, grey, weight) < 1e-6     # what a block has in the mean counts, no detail


def test_interest_has_mean_one_and_prefers_things():
    pixels = torch.ones(1, 3, 16, 16)
    pixels[:, :, 4:6, 4:6] = 0
    weight = interest(pixels)
    assert abs(weight.mean().item() - 1) < 1e-5 and weight[0, 0, 4, 4] > 5 * weight[0, 0, 0, 0]


def test_metrics():
    picture = torch.rand(2, 3, 16, 16)
    assert psnr(picture, picture).isinf().all() and torch.allclose(ssim(picture, picture), torch.ones(2), atol=1e-5)
    assert abs(psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), .1)).item() - 20) < 1e-4
    with pytest.raises(ValueError, match="expected at least 11 x 11"):
        ssim(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="expected some on both sides"):
        perplexity(torch.zeros(1, 4, 9), torch.zeros(1, 4, dtype=torch.long), 4)
    assert abs(perplexity(torch.zeros(1, 4, 9), torch.zeros(1, 4, dtype=torch.long), 2).item() - 9) < 1e-4


# MaskGIT's class, layer by layer as open-muse runs it

def published_maskgit(state, config, start, names, legacy):
    "The convolutions of one half by their published names: `names` are levels in the order in which they run."
    def norm(x, name):
        return F.silu(F.group_norm(x, config.norm_groups, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6))

    def conv(x, name):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def blocks(x, name):
        for number in range(config.num_res_blocks):
            at = f"{name}.{number}"
            y = conv(norm(conv(norm(x, f"{at}.norm1"), f"{at}.conv1"), f"{at}.norm2"), f"{at}.conv2")
            x = y + (conv(y if legacy else x, f"{at}.nin_shortcut") if f"{at}.nin_shortcut.weight" in state else x)
        return x

    def run(x):
        side = start.split(".")[0]
        x = conv(x, f"{side}.conv_in")
        if side == "decoder":
            x = blocks(x, "decoder.mid")
        for level in names:
            x = blocks(x, f"{start}.{level}.block")
            if side == "encoder" and level != names[-1]:
                x = F.avg_pool2d(x, 2)
            if side == "decoder" and level != names[-1]:
                x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"{start}.{level}.upsample_conv")
        if side == "encoder":
            x = blocks(x, "encoder.mid")
        return conv(norm(x, f"{side}.norm_out"), f"{side}.conv_out")
    return run


@pytest.mark.parametrize("legacy", [True, False])
@torch.no_grad()
def test_maskgit_s_tokenizer_is_the_published_one(legacy, tmp_path):
    torch.manual_seed(0)
    settings = TINY | {"channel_mult": (1, 2, 1), "num_res_blocks": 2, "attn_resolutions": (16,)}
    model = MaskGIT(MaskGITConfig(**settings, legacy_shortcut=legacy)).eval()
    for weight in model.parameters():
        weight += 0.1 * torch.randn_like(weight)
    state, pixels = model.state_dict(), torch.rand(2, 3, 16, 24)
    assert state["encoder.down.1.block.0.nin_shortcut.weight"].shape == (16, 16 if legacy else 8, 1, 1)
    latents = published_maskgit(state, model.config, "encoder.down", (0, 1, 2), legacy)(pixels)
    torch.testing.assert_close(model.latents(pixels), latents)
    flat = latents.flatten(2).mT
    distances = torch.cdist(flat, state["quantize.embedding.weight"].expand(2, -1, -1)) ** 2
    codes = model.encode(pixels)
    assert torch.equal(codes, distances.argmin(-1))
    torch.testing.assert_close(model.soft_codes(pixels, 0.5), (-distances / 0.5).softmax(-1), atol=1e-5, rtol=1e-4)
    vectors = state["quantize.embedding.weight"][codes].mT.unflatten(2, latents.shape[2:])
    painted = published_maskgit(state, model.config, "decoder.up", (2, 1, 0), legacy)(vectors)
    torch.testing.assert_close(model.decode(codes, rows=4), painted)
    save_vqgan(model, tmp_path)
    again = load_vqgan(tmp_path)
    assert type(again) is MaskGIT and again.config == model.config and torch.equal(again.encode(pixels), codes)


def test_maskgit_needs_codes_as_wide_as_its_latents():
    with pytest.raises(ValueError, match="z_channels: found 4, expected 8"):
        MaskGITConfig(**TINY | {"quantized_embed_dim": 8})
