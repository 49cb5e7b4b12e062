"Images: what LLaVA's and Cambrian's own functions give, every kind of file, and one clear error for bad ones."
import io
import json
import random
import struct
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from mllm_nb.images import (CLIP_MEAN, CLIP_STD, ImageError, Preprocess, anyres_grid, best_resolution, center_crop, cut_tiles,
                            normalize, open_image, pad_to_square, preprocess, resize_and_pad, resize_shortest,
                            unpad_box, views)
from PIL import Image
from safetensors.torch import load_file

PARITY = ROOT / "tests" / "golden" / "parity"


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int) -> bytes:
    "A PNG whose header promises `width` x `height` pixels, and nothing else."
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
                                           for chunk in (header, data, b"IEND"))


# what the originals compute

@pytest.fixture(scope="module")
def golden():
    stem = PARITY / "llava_cambrian_image_preprocess"
    return load_file(stem.with_suffix(".safetensors")), json.loads(stem.with_suffix(".json").read_text())["config"]


@pytest.mark.parametrize("aspect, name", [("pad", "llava_pad"), ("square", "llava_default"), ("anyres", "llava_anyres")])
def test_llava_preprocessing_is_the_original_s(golden, aspect, name):
    tensors, config = golden
    first = config["processors"][0]
    settings = Preprocess(size=first["size"], mean=tuple(first["mean"]), std=tuple(first["std"]), aspect=aspect,
                          pinpoints=tuple(map(tuple, config["grid_pinpoints"])))
    for number in range(config["n_images"]):
        image = Image.fromarray(tensors[f"in.image.{number}"].numpy())
        expected = tensors[f"out.{name}.{number}"]
        torch.testing.assert_close(preprocess(image, settings), expected.flatten(0, -4), atol=1e-5, rtol=0)


def test_cambrian_preprocessing_is_the_original_s(golden):
    tensors, config = golden
    for number in range(config["n_images"]):
        image = Image.fromarray(tensors[f"in.image.{number}"].numpy())
        for k, one in enumerate(config["processors"]):
            settings = Preprocess(size=one["size"], mean=tuple(one["mean"]), std=tuple(one["std"]))
            torch.testing.assert_close(preprocess(image, settings)[0], tensors[f"out.cambrian.{number}.{k}"], atol=1e-5, rtol=0)


def test_padding_and_fitting_are_the_original_s(golden):
    tensors, config = golden
    for number in range(config["n_images"]):
        image = Image.fromarray(tensors[f"in.image.{number}"].numpy())
        color = tuple(int(value * 255) for value in config["processors"][0]["mean"])
        fitted = resize_and_pad(image, best_resolution(image.size, config["grid_pinpoints"]))
        assert np.array_equal(pad_to_square(image, color), tensors[f"out.expand2square.{number}"])
        assert np.array_equal(fitted, tensors[f"out.resize_and_pad.{number}"])


def test_best_resolution_and_unpad_box_are_the_original_s():
    cases = json.loads((PARITY / "llava_anyres_resolution_cases.json").read_text())
    for case in cases["cases"]:
        assert best_resolution(case["size"], cases["grid_pinpoints"]) == tuple(case["best"])
        assert anyres_grid(case["size"], cases["grid_pinpoints"], cases["patch"]) == tuple(case["grid"])
    for case in json.loads((PARITY / "unpad_window_cases.json").read_text())["cases"]:
        if case["op"] == "unpad_image":
            top, bottom, left, right = unpad_box(case["image_size"], case["grid"], case["grid"])
            assert [bottom - top, right - left] == case["out_hw"]
            assert case["top"] is None or (top, left) == (case["top"], case["left"])


def best_by_loop(size, pinpoints):
    "The choice written as a loop with two records, the way the original does it."
    best, most, least = None, 0, float("inf")
    for width, height in pinpoints:
        scale = min(width / size[0], height / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        waste = width * height - kept
        if kept > most or kept == most and waste < least:
            best, most, least = (width, height), kept, waste
    return best


def test_best_resolution_by_random_cases():
    dice = random.Random(0)
    for _ in range(500):
        size = dice.randint(1, 3000), dice.randint(1, 3000)
        pinpoints = [(dice.randint(1, 5) * 336, dice.randint(1, 5) * 336) for _ in range(dice.randint(1, 6))]
        assert best_by_loop(size, pinpoints) in (best_resolution(size, pinpoints), None)


# shapes and invariants

@pytest.mark.parametrize("aspect", ["pad", "square", "stretch", "anyres"])
@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (3, 200), (37, 21), (64, 64), (20_000, 2)])
def test_every_size_gives_square_views(aspect, size):
    settings = Preprocess(size=28, crop=24, aspect=aspect, pinpoints=((24, 48), (48, 24), (72, 24)))
    result = preprocess(Image.new("RGB", size, (10, 200, 30)), settings)
    columns, rows = settings.tiles(size) or (0, 0)
    assert result.shape == (1 + columns * rows, 3, 24, 24) and result.isfinite().all()


def test_extreme_images_need_little_memory():
    "Padded literally, 60,000 x 3 pixels would take 10 GB; cropped, 60,000 x 1 at 336 would take 20 GB."
    for size, aspect in (((60_000, 3), "pad"), ((60_000, 1), "square")):
        result = preprocess(Image.new("RGB", size, (255, 0, 0)), Preprocess(aspect=aspect))
        red = (1 - CLIP_MEAN[0]) / CLIP_STD[0]
        assert result.shape == (1, 3, 336, 336) and abs(float(result[0, 0, 168, 168]) - red) < (0.02 if aspect == "square" else 2)


def test_padding_is_almost_zero_and_in_the_middle():
    view = preprocess(Image.new("RGB", (30, 10), "white"), Preprocess(size=30))[0]
    assert view[:, :9].abs().max() < 0.02 and view[:, -9:].abs().max() < 0.02 and view[:, 12:18].min() > 1.5
    assert Preprocess(mean=(0.5,) * 3, pad_mean=CLIP_MEAN).pad_color == (122, 116, 104)


def test_tiles_lie_as_in_the_picture():
    image = Image.new("RGB", (4, 4))
    image.putpixel((2, 1), (255, 0, 0))
    tiles = cut_tiles(image, 2)
    assert [tile.getpixel((0, 1))[0] for tile in tiles] == [0, 255, 0, 0]
    assert cut_tiles(Image.new("RGB", (3, 2), "white"), 2)[1].getpixel((1, 0)) == (0, 0, 0)


def test_crop_and_resize_floor():
    assert resize_shortest(noise(31, 20), 14).size == (21, 14)
    assert resize_shortest(noise(20, 31), 14).size == (14, 21)
    assert center_crop(noise(21, 14), 14).getpixel((0, 0)) == noise(21, 14).getpixel((3, 0))


# settings

def test_settings_from_published_files(tmp_path):
    clip = {"crop_size": {"height": 336, "width": 336}, "do_center_crop": True, "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD), "resample": 3, "size": {"shortest_edge": 336}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(clip))
    assert Preprocess.from_json(tmp_path / "preprocessor_config.json", aspect="pad") == Preprocess()
    assert Preprocess.from_json({**clip, "size": 336, "crop_size": 336}).aspect == "square"
    siglip = Preprocess.from_json({"size": {"height": 384, "width": 384}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    assert (siglip.size, siglip.crop, siglip.aspect, siglip.mean) == (384, None, "stretch", (0.5,) * 3)
    dino = Preprocess.from_json({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}})
    assert (dino.size, dino.side, dino.aspect) == (256, 224, "square")
    assert replace(dino, aspect="anyres", pinpoints=((448, 224),)).tiles((100, 30)) == (2, 1)


@pytest.mark.parametrize("wrong, word", [({"aspect": "padd"}, "aspect"), ({"aspect": "anyres"}, "pinpoints"), ({"resample": "cubic"}, "resample"),
                                         ({"mean": ()}, "Preprocess.mean: found .., expected a list of 3 numbers"), ({"mean": (0, 0)}, "mean"),
                                         ({"mean": (float("nan"),) * 3}, "mean: found .nan, nan, nan."), ({"std": (1, 0, 1)}, "std: found .1, 0, 1., expected more"),
                                         ({"size": 0}, "size: found 0"), ({"size": 10**9}, "expected 1 to 16384 pixels"), ({"rescale": "x"}, "rescale"),
                                         ({"aspect": "anyres", "pinpoints": ((0, 8),)}, "pinpoints")])
def test_wrong_settings_are_refused(wrong, word):
    with pytest.raises(ValueError, match=word):
        Preprocess(**wrong)


@pytest.mark.parametrize("config, field", [
    ({"size": "x"}, "size"), ({"size": {}}, "size"), ({"size": {"shortest_edge": True}}, "size"), ({"crop_size": [224]}, "crop_size"),
    ({"resample": 9}, "resample"), ({"resample": []}, "resample"), ({"image_mean": 0.5}, "image_mean"), ({"image_std": [0, 0, 0]}, "std"),
    ({"rescale_factor": None}, "rescale"), ({"do_resize": False}, "do_resize"), ([], "a JSON list"), ("{", "Expecting")])
def test_published_files_of_the_wrong_kind_are_named_with_the_field(config, field, tmp_path):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(ValueError, match=field) as caught:
        Preprocess.from_json(file)
    assert str(caught.value).startswith(f"{file}: ")


# opening

@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "TIFF", "PPM", "JPEG", "WEBP"])
def test_formats_open_whatever_the_name(format, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(Image.new("RGB", (9, 5), (200, 30, 60)), format))
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (9, 5))
    assert np.abs(np.asarray(image)[2, 4].astype(int) - (200, 30, 60)).max() < 12


def test_orientation():
    upright = noise(6, 4)
    for code, turned in ((3, upright.rotate(180)), (6, upright.transpose(Image.Transpose.ROTATE_90)),
                         (8, upright.transpose(Image.Transpose.ROTATE_270)), (2, upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT))):
        exif = Image.Exif()
        exif[0x0112] = code
        assert np.array_equal(open_image(encoded(turned, "PNG", exif=exif)), upright), code
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(encoded(upright, "JPEG", exif=b"Exif\0\0II*\0garbage")).size == (6, 4)


def test_transparency_is_laid_on_white():
    assert open_image(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 128)), "PNG")).getpixel((0, 0)) == (255, 127, 127)
    assert open_image(encoded(Image.new("LA", (2, 2), (0, 255)), "PNG")).getpixel((0, 0)) == (0, 0, 0)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    data = encoded(palette, "PNG", transparency=0)
    assert [open_image(data).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]


def test_deep_images_are_scaled():
    deep = Image.fromarray(np.array([[0, 257, 32768, 65535]], dtype=np.uint16))
    for format in ("PNG", "TIFF"):
        assert np.asarray(open_image(encoded(deep, format)))[0, :, 0].tolist() == [0, 1, 128, 255]
    light = Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32))
    assert np.asarray(open_image(encoded(light, "TIFF")))[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(ImageError, match="-5 to 1"):
        open_image(encoded(Image.fromarray(np.array([[-5, 1]], dtype=np.float32)), "TIFF"))
    with pytest.raises(ImageError, match="70000"):
        open_image(encoded(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "TIFF"))


def test_cmyk_and_animations():
    assert open_image(encoded(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "JPEG")).getpixel((1, 1)) == (255, 255, 255)
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    for format in ("GIF", "PNG", "TIFF"):
        assert open_image(encoded(frames[0], format, save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (255, 0, 0)


def test_a_picture_in_memory_stays_as_it_is():
    given = noise(5, 5).convert("RGBA")
    result = open_image(given)
    assert result.mode == "RGB" and given.mode == "RGBA" and result is not given


# refusing

JPEG = encoded(noise(60, 40), "JPEG")
BAD = {
    "empty": (b"", "is empty"), "zeros": (bytes(99), "zero bytes"), "page": (b"<!DOCTYPE html><html>404", "an HTML page"),
    "pdf": (b"%PDF-1.4 ...", "a PDF"), "pointer": (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
    "text": (b"no picture at all", "text that starts"), "video": (b"\0\0\0\x18ftypmp42....", "'mp42'"),
    "truncated": (JPEG[:1000], "truncated"), "head only": (JPEG[:3], "damaged JPEG"),
    "png cut": (encoded(noise(60, 40), "PNG")[:3000], "truncated"), "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
    "random": (bytes(np.random.default_rng(3).integers(128, 256, 200, dtype=np.uint8)), "unknown data"),
    "huge": (png(20_000, 20_000), "max_pixels"), "large": (png(9_200, 9_200), "9200 x 9200 = 84640000 pixels, more than max_pixels = 80000000"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_give_one_error_that_names_the_file(kind, tmp_path):
    data, reason = BAD[kind]
    path = tmp_path / f"{kind}.jpg"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError) as caught:
            open_image(path)
    assert str(path) in str(caught.value) and reason in str(caught.value)
    with pytest.raises(ImageError, match=f"<{len(data)} bytes>"):
        open_image(data)


def test_cut_anywhere_it_opens_or_raises_image_error():
    for format in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        data = encoded(noise(40, 30), format)
        for cut in range(0, len(data), max(1, len(data) // 25)):
            try:
                assert open_image(data[:cut]).mode == "RGB"
            except ImageError:
                pass


def test_huge_images_are_refused_before_decoding(monkeypatch):
    from PIL import ImageFile
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for data in (png(20_000, 20_000), png(9_200, 9_200)):
        with pytest.raises(ImageError):
            open_image(data)
    with pytest.raises(ImageError, match="max_pixels = 99"):
        open_image(png(10, 10), max_pixels=99)


@pytest.mark.parametrize("source, reason", [("no/such.png", "no such file"), ("", "empty path"), (".", "cannot be read"), ("a\0b.png", "cannot be read"),
                                            (7, "cannot open a int"), (None, "NoneType"), ("https://example.org/cat.png", "allow_url=True")])
def test_bad_sources(source, reason):
    with pytest.raises(ImageError, match=reason):
        open_image(source)


def test_what_is_no_file_is_refused_without_reading(tmp_path):
    import os
    os.mkfifo(tmp_path / "pipe.png")   # reading it would wait for ever
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(2**40)           # a terabyte of nothing
    for name, reason in (("pipe.png", "device or pipe"), ("sparse.png", "1099511627776 bytes, expected at most"), (".", "a folder")):
        with pytest.raises(ImageError, match=reason):
            open_image(tmp_path / name)
    with pytest.raises(ImageError, match="device or pipe"):
        open_image("/dev/zero")


def test_preprocessing_takes_any_mode_and_refuses_emptiness():
    grey = noise(9, 5).convert("L")
    assert torch.equal(preprocess(grey, Preprocess(size=16)), preprocess(grey.convert("RGB"), Preprocess(size=16)))
    for size in ((0, 5), (5, 0)):
        with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} pixels, expected at least one"):
            preprocess(Image.new("RGB", size), Preprocess(size=16, aspect="square"))


def test_urls_only_where_asked(monkeypatch):
    class Reply(io.BytesIO):
        pass
    monkeypatch.setattr("urllib.request.urlopen", lambda request, timeout: Reply(encoded(noise(3, 2), "PNG")))
    assert open_image("https://example.org/cat.png", allow_url=True).size == (3, 2)

    def refuse(request, timeout):
        raise OSError("no route")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(ImageError, match="https://example.org/cat.png: download failed"):
        open_image("https://example.org/cat.png", allow_url=True)
    with pytest.raises(ImageError, match="download failed"):
        open_image("http://[broken", allow_url=True)


def test_views_are_what_preprocess_stacks():
    settings = Preprocess(size=16, aspect="anyres", pinpoints=((32, 16),))
    assert [view.size for view in views(noise(40, 20), settings)] == [(16, 16)] * 3


def test_every_byte_is_normalised_as_clip_does_step_by_step():
    "The table of 256 values a channel gives bit for bit what the arithmetic on the picture gives."
    pixels = np.arange(256 * 3, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8)
    settings = Preprocess(mean=(0.4, 0.5, 0.1), std=(0.2, 0.3, 0.25))
    values = (pixels * settings.rescale).astype(np.float32)
    expected = ((values - np.float32(settings.mean)) / np.float32(settings.std)).transpose(2, 0, 1)
    assert np.array_equal(normalize(Image.fromarray(pixels), settings).numpy(), expected)
