"Patches: cutting and joining, the convolution as a matrix, positions and their interpolation."
import pytest
import torch
from mllm_nb.vision.patches import (PatchEmbedding, interpolate_positions, learned_positions, patchify, sincos_positions,
                                    unpatchify)
from torch.nn import functional as F


@pytest.mark.parametrize("patch, rows, columns", [(1, 3, 4), (2, 2, 3), (7, 1, 5)])
def test_patchify_is_unfold_and_can_be_undone(patch, rows, columns):
    images = torch.randn(2, 3, rows * patch, columns * patch)
    patches = patchify(images, patch)
    assert patches.shape == (2, rows * columns, 3 * patch * patch)
    assert torch.equal(patches, F.unfold(images, patch, stride=patch).mT)
    assert torch.equal(unpatchify(patches, patch, rows, columns), images)


def test_what_does_not_fill_a_patch_is_left_out():
    images = torch.randn(1, 3, 17, 23)
    assert torch.equal(patchify(images, 5), patchify(images[..., :15, :20], 5))
    embedding = PatchEmbedding(3, 8, 5)
    torch.testing.assert_close(embedding(images), embedding(images[..., :15, :20]))


@pytest.mark.parametrize("bias", [True, False])
def test_the_embedding_is_one_matrix(bias):
    torch.manual_seed(0)
    embedding, images = PatchEmbedding(3, 8, 4, bias), torch.randn(2, 3, 12, 8)
    matrix = embedding.projection.weight.flatten(1).T
    expected = patchify(images, 4) @ matrix + (embedding.projection.bias if bias else 0)
    torch.testing.assert_close(embedding(images), expected, atol=1e-5, rtol=1e-5)


def test_sincos_positions():
    table = sincos_positions(5, 7, 64)
    assert table.shape == (35, 64) and torch.allclose(table.square().sum(1), torch.tensor(32.0))
    products = table @ table.T
    assert torch.allclose(products[0, 8], products[10, 18])  # one row down, one column right
    assert (products.argmax(1) == torch.arange(35)).all()
    with pytest.raises(ValueError, match="30"):
        sincos_positions(2, 2, 30)


def test_interpolation_keeps_what_it_must():
    torch.manual_seed(0)
    positions = learned_positions(1 + 16, 8)
    assert interpolate_positions(positions, 4, 4, extra=1) is positions
    larger = interpolate_positions(positions, 6, 9, extra=1)
    assert larger.shape == (1 + 54, 8) and torch.equal(larger[0], positions[0])
    flat = torch.full((9, 2), 3.0)
    torch.testing.assert_close(interpolate_positions(flat, 5, 4), torch.full((20, 2), 3.0))
    with pytest.raises(ValueError, match="17 positions"):
        interpolate_positions(positions, 6, 6)


@pytest.mark.parametrize("rows, columns", [(27, 27), (5, 3), (40, 41)])
def test_interpolation_is_dinov2_s_with_and_without_offset(rows, columns):
    "transformers 4.37 passes (rows + 0.1) / side as the scale, transformers 5 the size itself."
    torch.manual_seed(0)
    positions = torch.randn(37 * 37, 4)
    grid = positions.reshape(1, 37, 37, 4).permute(0, 3, 1, 2)
    options = {"mode": "bicubic", "align_corners": False}
    now = F.interpolate(grid, size=(rows, columns), **options)
    then = F.interpolate(grid, scale_factor=((rows + 0.1) / 37, (columns + 0.1) / 37), **options)
    for offset, expected in ((0.0, now), (0.1, then)):
        ours = interpolate_positions(positions, rows, columns, offset=offset)
        torch.testing.assert_close(ours, expected.permute(0, 2, 3, 1).reshape(-1, 4))


def test_interpolation_runs_in_fp32_and_keeps_the_type():
    torch.manual_seed(0)
    positions = torch.randn(16, 4).bfloat16()
    result = interpolate_positions(positions, 6, 6)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, interpolate_positions(positions.float(), 6, 6).bfloat16())
