"`mllm tokenize`: sources, damage, resuming after kills, sharing, merging, refusing what does not belong together."
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mllm_nb import command
from mllm_nb.data import tokenize as subject
from mllm_nb.data.tokenize import (
    Encoder, Item, Manifest, Reading, check_shards, counted, find_items, in_background, merge_shards, names_of, parse_part,
    read_ahead, read_film, shard_of, tokenize, what_differs, without_path, world_items)
from mllm_nb.drawing.visual_sentences import Shards
from mllm_nb.drawing.vqgan import VQGAN, VQGANConfig, choose_precision, fingerprint, halved, load_vqgan, save_vqgan
from mllm_nb.images import ImageError

TINY = VQGANConfig(resolution=16, hidden_channels=8, channel_mult=(1, 2), num_res_blocks=1, z_channels=4, num_embeddings=16,
                   quantized_embed_dim=4, norm_groups=4)


def tiny(seed: int = 0) -> VQGAN:
    torch.manual_seed(seed)
    model = VQGAN(TINY).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


def paint(folder: Path, count: int, side: int = 24) -> Path:
    "Pictures of noise under numbered names, the seventh of ten cut off."
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.RandomState(number).randint(0, 256, (side, side, 3), np.uint8)
        path = folder / f"{number:05d}.png"
        Image.fromarray(pixels).save(path)
        if number % 10 == 7:
            path.write_bytes(path.read_bytes()[:300])
    return folder


def film(path: Path, frames: int = 40, codec: str = "mpeg4", side: int = 32) -> Path:
    "A film whose frames get brighter."
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            noise = np.random.RandomState(number).randint(0, 40, (side, side, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray((noise + 3 * number).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    save_vqgan(tiny(), tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def run(*arguments) -> int:
    return command.main(["tokenize", *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- sources ----

def test_a_folder_is_read_in_order_and_other_files_are_left_alone(tmp_path):
    paint(tmp_path / "b", 3)
    paint(tmp_path / "a", 2)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden").mkdir()
    paint(tmp_path / ".hidden", 1)
    assert [item.name for item in find_items(tmp_path, Reading(16))] == [
        "a/00000.png", "a/00001.png", "b/00000.png", "b/00001.png", "b/00002.png"]


def test_a_list_makes_a_sentence_of_each_line(tmp_path):
    paint(tmp_path, 4)
    (tmp_path / "list.txt").write_text("00000.png\t00001.png\n\n00002.png\nmissing.png\t00003.png\n")
    items = find_items(tmp_path / "list.txt", Reading(16))
    assert [item.name for item in items] == ["00000.png + 00001.png", "00002.png", "missing.png + 00003.png"]
    sentences, notes = shard_of(_found(items), Encoder(tiny()), "paired")
    assert [(one.kind, len(one.tokens), one.image_tokens) for one in sentences] == [("paired", 128, 64), ("single image", 64, 64)]
    assert len(notes) == 1 and "missing.png" in notes[0]


def _found(items):
    return [entry[1:] for entry in read_ahead(items, 2)]


def test_nothing_to_read_is_said(tmp_path, capsys):
    assert run(tmp_path, "--out", tmp_path / "out") == 2
    assert "found no picture and no film" in capsys.readouterr().err
    assert run(tmp_path / "nowhere", "--out", tmp_path / "out") == 2
    assert "nowhere: found nothing there" in capsys.readouterr().err


def test_pictures_of_any_proportions_are_brought_to_the_tokenizers_square(tmp_path):
    Image.new("L", (50, 7)).save(tmp_path / "wide.png")
    (_, (pixels,)), = find_items(tmp_path, Reading(16))[0].read()
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8


# ---- films ----

@pytest.mark.parametrize("reader", ["av", "cv2"])
def test_a_film_becomes_sentences(tmp_path, monkeypatch, reader):
    path = film(tmp_path / "film.mp4")
    pytest.importorskip(reader)
    monkeypatch.setattr(subject, "find_spec", lambda name: name == reader)
    sentences = list(read_film(path, 16, "film.mp4", frames=4, stride=3))
    assert [name for name, _ in sentences] == ["film.mp4 from frame 0", "film.mp4 from frame 12", "film.mp4 from frame 24"]
    brightness = [picture.mean() for _, pictures in sentences for picture in pictures]
    assert len(brightness) == 12 and all(4 < b - a < 14 for a, b in zip(brightness, brightness[1:]))   # three frames apart
    denser = list(read_film(path, 16, "film.mp4", frames=16, stride=8))
    assert len(denser) == 1 and denser[0][0] == "film.mp4 from frame 0"        # every second frame
    with pytest.raises(ImageError, match="film.mp4: clip: found 40 frames, expected at least 50"):
        list(read_film(path, 16, "film.mp4", frames=50, stride=1))


@pytest.mark.parametrize("name", ["film.mkv", "film.avi"])
def test_other_containers(tmp_path, name):
    assert len(list(read_film(film(tmp_path / name), 16, name, 4, 8))) == 1


@pytest.mark.parametrize("reader", ["av", "cv2"])
def test_damaged_films_are_listed(tmp_path, monkeypatch, reader):
    whole = film(tmp_path / "whole.mp4", 60).read_bytes()
    pytest.importorskip(reader)
    monkeypatch.setattr(subject, "find_spec", lambda name: name == reader)
    for name, data in {"cut.mp4": whole[:len(whole) * 2 // 3], "empty.mp4": b"", "text.mp4": b"no film at all" * 99}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "whole.mp4").unlink()
    sentences, notes = shard_of(_found(find_items(tmp_path, Reading(16, 4, 2))), Encoder(tiny()), "video")
    assert sorted(note.split(":")[0] for note in notes) == ["cut.mp4", "empty.mp4", "text.mp4"]
    assert all(one.name.startswith("cut.mp4") for one in sentences) and len(sentences) < 7


def test_without_a_reader_the_extra_is_named(tmp_path, monkeypatch, capsys, tokenizer):
    (tmp_path / "film.mp4").write_bytes(b"x")
    monkeypatch.setattr(subject, "find_spec", lambda name: None)
    assert run(tmp_path / "film.mp4", "--tokenizer", tokenizer, "--out", tmp_path / "out") == 2
    assert "pip install 'mllm_nb[video]'" in capsys.readouterr().err


# ---- the stream ----

def test_errors_stay_with_their_item_and_order_is_kept():
    def read(number):
        if number % 3 == 1:
            raise OSError(f"disk {number}")
        time.sleep(.001 * (number % 4))
        return [(f"{number}", [np.zeros((2, 2, 3), np.uint8)])]
    entries = list(read_ahead([Item(str(n), lambda n=n: read(n)) for n in range(40)], 4))
    assert [entry[0] for entry in entries] == list(range(40))
    assert [entry[1] for entry in entries if entry[1]] == [f"disk {n}" for n in range(1, 40, 3)]


def test_a_film_does_not_fill_the_memory():
    made = []

    def frames():
        for number in range(1000):
            made.append(number)
            yield f"{number}", [np.zeros((2, 2, 3), np.uint8)]
    stream = in_background(read_ahead([Item("film", frames)], 2), ahead=5)
    assert next(stream)[2] == "0"
    time.sleep(.2)
    assert len(made) < 10
    stream.close()


def test_an_error_of_the_background_is_raised_in_front():
    def broken():
        yield 1
        raise KeyError("x")
    stream = in_background(broken(), 2)
    assert next(stream) == 1
    with pytest.raises(KeyError):
        next(stream)
    before = threading.active_count()
    endless = in_background(iter(int, 1), 2)
    next(endless)
    endless.close()
    time.sleep(.5)
    assert threading.active_count() <= before


# ---- the whole command ----

def test_every_file_is_in_a_sentence_or_in_the_list(tmp_path, capsys, tokenizer):
    source = paint(tmp_path / "pictures", 30)
    assert run(source, "--tokenizer", tokenizer, "--out", tmp_path / "out", "--per-shard", 8) == 0
    text = capsys.readouterr().out
    assert text.count("refused: ") == 3 and text.count("00007.png") == 1 and str(source) not in text
    assert "4 shards, 27 sentences, 1728 tokens, 3 items refused" in text
    shards = Shards(tmp_path / "out")
    assert [shards[i].name for i in range(27)] == [f"{n:05d}.png" for n in range(30) if n % 10 != 7]
    model = load_vqgan(tokenizer)
    for i in (0, 8, 26):
        pixels = torch.from_numpy(np.array(Image.open(source / shards[i].name).resize((16, 16), Image.Resampling.BICUBIC)))
        direct = model.encode(pixels.movedim(-1, 0)[None] / 255)[0]
        assert (direct.numpy() == shards[i].tokens).mean() > .9
    assert shards.fingerprint == fingerprint(model)


def test_killed_again_and_again_and_shared_the_bytes_are_the_same(tmp_path, tokenizer):
    source = paint(tmp_path / "pictures", 120)
    slow = ("import sys, time\nfrom mllm_nb.data import tokenize as t\nencode = t.Encoder.__call__\n"
            "def slower(self, pictures):\n    time.sleep(.15)\n    return encode(self, pictures)\n"
            "t.Encoder.__call__ = slower\nfrom mllm_nb.command import main\nsys.exit(main(sys.argv[1:]))")
    arguments = ["tokenize", source, "--tokenizer", tokenizer, "--per-shard", "10", "--batch", "5", "--out"]
    assert command.main([*map(str, arguments), str(tmp_path / "whole")]) == 0
    kills, target = 0, tmp_path / "killed"
    while kills < 3:
        process = subprocess.Popen([sys.executable, "-c", slow, *map(str, arguments), target], stdout=subprocess.DEVNULL)
        done = len(list(target.glob("shard*.json")))
        end = time.monotonic() + 60
        while len(list(target.glob("shard*.json"))) < done + 2 and time.monotonic() < end:
            time.sleep(.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        assert done + 2 <= len(list(target.glob("shard*.json"))) < 12
    assert command.main([*map(str, arguments), str(target)]) == 0
    assert contents(target) == contents(tmp_path / "whole")
    for part in ("1/2", "2/2"):
        assert command.main([*map(str, arguments), str(tmp_path / part[0]), "--shard", part]) == 0
    assert len(contents(tmp_path / "1")) == len(contents(tmp_path / "2")) == 13
    assert run("--merge", tmp_path / "1", tmp_path / "2", "--out", tmp_path / "merged") == 0
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")


def plan(items, model: VQGAN, **changes) -> Manifest:
    return Manifest(**{"fingerprint": fingerprint(model), "items": len(items), "names": names_of(items), "side": 16,
                       "image_tokens": 64, "per_shard": 4} | changes)


def test_folders_of_something_else_are_refused(tmp_path, capsys, tokenizer):
    source = paint(tmp_path / "pictures", 5)
    assert run(source, "--tokenizer", tokenizer, "--out", tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    save_vqgan(tiny(1), tmp_path / "other")
    assert run(source, "--tokenizer", tmp_path / "other", "--out", tmp_path / "out") == 2
    assert "another tokenizer made them (fingerprint: found 'vqgan-16-" in capsys.readouterr().err
    paint(source / "more", 1)
    assert run(source, "--tokenizer", tokenizer, "--out", tmp_path / "out") == 2
    assert "items: found 5, expected 6" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    assert run(source, "--tokenizer", tmp_path / "other", "--out", tmp_path / "out2") == 0
    assert run("--merge", tmp_path / "out", tmp_path / "out2", "--out", tmp_path / "both") == 2
    assert "made of something else" in capsys.readouterr().err


def test_what_differs_is_said_in_words():
    first = Manifest("vqgan-1", 5, "a" * 64, 16, 64)
    assert what_differs(first, replace(first, names="b" * 64)) == ("other items (as many, 5, but of other names or in "
                                                                   "another order)")
    text = what_differs(first, replace(first, names="b" * 64, items=6, per_shard=3, side=32))
    assert text == ("other items (items: found 5, expected 6); side: found 16, expected 32; "
                    "per-shard: found 100, expected 3")


@pytest.mark.parametrize("problem, name, reason", [
    ("/a/b/c.png: is empty (0 bytes)", "b/c.png", "is empty (0 bytes)"), ("c.png: no file", "c.png", "no file"),
    ("/a/xc.png: no file", "c.png", "/a/xc.png: no file"), ("/a/one.png: no file", "one.png + two.png", "/a/one.png: no file")])
def test_a_refused_file_is_named_once(problem, name, reason):
    assert without_path(problem, name) == reason


def test_one_is_no_plural():
    assert [counted(number, "shard") for number in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]


def test_the_fingerprint_sees_every_weight_and_what_changes_words():
    model = tiny()
    first = fingerprint(model)
    assert first == fingerprint(tiny()) and len({first, fingerprint(tiny(1))}) == 2
    with torch.no_grad():
        model.encoder.conv_in.bias[0] += 1e-3
    assert fingerprint(model) != first


def test_missing_and_damaged_shards_are_named(tmp_path):
    model = tiny()
    items = find_items(paint(tmp_path / "pictures", 12), Reading(16))
    tokenize(items, Encoder(model), tmp_path / "half", plan(items, model), part=(0, 2))
    with pytest.raises(ValueError, match=r"1 of 3 shards are missing: \[1\]"):
        check_shards(tmp_path / "half")
    with pytest.raises(ValueError, match="missing"):
        merge_shards([tmp_path / "half"], tmp_path / "merged")
    tokenize(items, Encoder(model), tmp_path / "half", plan(items, model))
    assert check_shards(tmp_path / "half")[:3] == (3, 11, 11 * 64)
    data = bytearray((tmp_path / "half" / "shard-000001.bin").read_bytes())
    data[0] ^= 1
    (tmp_path / "half" / "shard-000001.bin").write_bytes(data)
    with pytest.raises(ValueError, match="shard-000001.bin: found another checksum"):
        check_shards(tmp_path / "half")


def test_half_a_shard_is_made_again_and_never_read(tmp_path):
    model = tiny()
    items = find_items(paint(tmp_path / "pictures", 12), Reading(16))
    tokenize(items, Encoder(model), tmp_path / "out", plan(items, model))
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / "shard-000000.json").unlink()                       # killed between the two files
    (tmp_path / "out" / "shard-000001.bin").write_bytes(whole["shard-000001.bin"][:40])   # a disk that lost its end
    with pytest.raises(ValueError, match="found 40 bytes"):
        Shards(tmp_path / "out")
    assert tokenize(items, Encoder(model), tmp_path / "out", plan(items, model)) == 2
    assert contents(tmp_path / "out") == whole


def test_an_index_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "shard-000000.json").write_text("{half")
    with pytest.raises(ValueError, match="shard-000000.json: found no index"):
        Shards(tmp_path)
    (tmp_path / "manifest.json").write_text('{"items": 3}')
    with pytest.raises(ValueError, match="manifest.json: found no manifest"):
        check_shards(tmp_path)


@pytest.mark.parametrize("name", ["per_shard", "batch", "frames", "stride", "side"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name.replace('_', '-')}: found 0, expected at least 1"):
        plan([], tiny(), **{name: 0})
    with pytest.raises(SystemExit):
        run("--world", 3, "--out", "nowhere", f"--{name.replace('_', '-')}", 0)


def test_single_frames_of_a_film(tmp_path):
    assert len(list(read_film(film(tmp_path / "film.mp4", 5), 16, "film", 1, 2))) == 3
    assert len(list(read_film(film(tmp_path / "one.mp4", 1), 16, "one", 1, 8))) == 1


def test_half_precision_on_request(tmp_path, capsys, tokenizer):
    source = paint(tmp_path / "pictures", 3)
    assert run(source, "--tokenizer", tokenizer, "--out", tmp_path / "out", "--precision", "bfloat16") == 0
    assert run(source, "--tokenizer", tokenizer, "--out", tmp_path / "out") == 2
    assert "precision: found 'bfloat16', expected 'float32'" in capsys.readouterr().err
    assert run(source, "--tokenizer", tokenizer, "--out", tmp_path / "out", "--precision", "auto") == 0   # as it began


def test_all_refused_is_no_crash(tmp_path, capsys, tokenizer):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    assert run(tmp_path / "bad.png", "--tokenizer", tokenizer, "--out", tmp_path / "out") == 0
    assert "0 sentences, 0 tokens, 1 item refused" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "1", "1/0", "3/2", "a/2", "-1/2", "1/2/3", "1.5/2"])
def test_bad_parts(text):
    with pytest.raises(ValueError, match="expected I/N"):
        parse_part(text)


def test_parts_count_from_zero_or_one():
    assert [parse_part(f"{i}/3") for i in range(4)] == [(0, 3), (1, 3), (2, 3), (0, 3)]


def test_the_world_with_the_shipped_tokenizer(tmp_path, capsys):
    assert run("--world", 12, "--out", tmp_path / "out", "--per-shard", 5) == 0
    assert "3 shards, 12 sentences, 768 tokens, 0 items refused" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["image_tokens"] == 64
    assert world_items(2, Reading(64))[1].name == "world train 0 1"


def test_half_precision_is_chosen_only_where_words_stay():
    model = load_vqgan()
    chosen, measured = choose_precision(model, rounds=1)
    assert measured[0].dtype == torch.float32 and measured[0].equal == 1
    assert chosen.dtype == torch.float32 or chosen.equal >= .99
    assert choose_precision(model, least_gain=0, least_equal=0, rounds=1)[0].gain == max(one.gain for one in choose_precision(
        model, least_gain=0, least_equal=0, rounds=1)[1]) or len(measured) > 1
    half = halved(model, torch.bfloat16)
    assert half.quantize.embedding.weight.dtype == torch.float32 and model.encoder.conv_in.weight.dtype == torch.float32
    pixels = torch.rand(2, 3, 64, 64)
    assert (half.encode(pixels) == model.encode(pixels)).float().mean() > .8
    assert (half.decode(model.encode(pixels)).float() - model.decode(model.encode(pixels))).abs().mean() < .03


def test_nothing_is_left_of_a_run_that_fails(tmp_path, monkeypatch):
    model = tiny()
    items = find_items(paint(tmp_path / "pictures", 12), Reading(16))

    def full(*arguments):
        raise OSError("no space left")
    monkeypatch.setattr(subject, "write_shard", full)
    with pytest.raises(OSError, match="no space left"):
        tokenize(items, Encoder(model), tmp_path / "out", plan(items, model))
    assert os.listdir(tmp_path / "out") == ["manifest.json"]


def test_manifests_of_the_wrong_kind_and_names_that_are_no_text(tmp_path):
    facts = {"fingerprint": "f", "items": 1, "names": "n", "side": 8, "image_tokens": 4}
    for change in ({"items": "x"}, {"items": -1}, {"side": None}, {"kind": 3}, {"precision": []}, None):
        (tmp_path / "manifest.json").write_text("[" * 100_000 if change is None else json.dumps(facts | change))
        with pytest.raises(ValueError, match="manifest.json: found no manifest"): subject.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(facts | {"items": 10**12}))
    with pytest.raises(ValueError, match="10000000000 of 10000000000 shards are missing"): subject.check_shards(tmp_path)   # at once
    assert subject.names_of([subject.Item("caf\udce9.png", list)]) != subject.names_of([subject.Item("cafe.png", list)])
