"""Records: the byte index, reading one by one, and finding everything that is wrong before training."""
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mllm_nb.data.records import (
    RecordError, Records, Sample, check_records, image_path, index_array, index_lines, open_any, upright_size, write_records)
from mllm_nb.images import ImageError
from mllm_nb.language.chat import Turn
from mllm_nb.samples import samples_path


def record(number=0, **changes):
    base = {"id": f"r{number}", "conversations": [{"from": "human", "value": f"question {number}"}, {"from": "gpt", "value": "answer"}]}
    return {**base, **changes}


def with_image(name, number=0, tags="<image>\n", **changes):
    turns = [{"from": "human", "value": f"{tags}what is it?"}, {"from": "gpt", "value": "a picture"}]
    return record(number, image=name, conversations=turns, **changes)


def write(path, records, lines=True):
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records), encoding="utf-8")
    return path


def found(records, **options):
    "{record number: [fields]} of a report's errors."
    fields = {}
    for problem in check_records(records, **options).errors: fields.setdefault(problem.record, []).append(problem.field)
    return fields


# ---- the index

def nasty(random_, depth=0):
    kind = random_.random()
    if kind < .35: return random_.choice(["a", '"', "\\", '\\"', "[", "]}", "{,", "é\n", ",", "\U0001F600", " "]) * random_.randint(0, 3)
    if kind < .5: return random_.choice([None, True, 1.5, -3, 1e30])
    if depth > 8: return 0
    if kind < .75: return [nasty(random_, depth + 1) for _ in range(random_.randint(0, 4))]
    return {str(nasty(random_, 9)): nasty(random_, depth + 1) for _ in range(random_.randint(0, 4))}


@pytest.mark.parametrize("seed", range(6))
def test_array_index_finds_what_json_finds(seed):
    random_ = random.Random(seed)
    for _ in range(150):
        values = [nasty(random_) for _ in range(random_.randint(0, 6))]
        data = json.dumps(values, indent=random_.choice([None, 0, 2]), ensure_ascii=random_.random() < .5).encode() + b" \n"
        spans, problem = index_array(data)
        assert [json.loads(data[start:end]) for start, end, _ in spans] == values and not problem


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_line_index(chunk):
    data = b'{"a": 1}\r\n\n   \n{"a": 2}\n{"a": "\\n"}'
    spans = index_lines(data, chunk=chunk)
    assert [json.loads(data[start:end]) for start, end, _ in spans] == [{"a": 1}, {"a": 2}, {"a": "\n"}]
    assert spans[:, 2].tolist() == [1, 4, 5]


def test_a_damaged_array_ends_and_says_so():
    random_ = random.Random(0)
    data = json.dumps([record(i) for i in range(20)]).encode()
    assert "cut off" in index_array(data[:-1])[1] and len(index_array(data[:-1])[0]) == 20
    assert "after the end" in index_array(data + b" {}")[1]
    for _ in range(300):
        at = random_.randrange(1, len(data))
        spans, _ = index_array(data[:at] + bytes([random_.choice(b'"{}[],\\x')]) + data[at + 1:])
        assert len(spans) <= 200


def test_a_lost_quote_costs_one_record_of_an_indented_array(tmp_path):
    text = json.dumps([record(i) for i in range(6)], indent=1).replace('"question 2"', '"question 2')
    (tmp_path / "a.json").write_text(text)
    assert found(Records(tmp_path / "a.json")) == {2: ["JSON"]}


@pytest.mark.parametrize("lines", [True, False])
def test_records_of_both_formats(tmp_path, lines):
    path = write(tmp_path / "data.json", [record(i) for i in range(50)], lines)
    records = Records(path)
    assert len(records) == 50 and records[-1] == records[49]
    assert records[7] == Sample("r7", (), (Turn("human", "question 7"), Turn("gpt", "answer")), records.where(7))
    assert [sample.id for sample in records] == [f"r{i}" for i in range(50)]
    with pytest.raises(IndexError, match="has 50 records"): records[50]


def test_reading_one_record_reads_only_its_bytes(tmp_path, monkeypatch):
    records = Records(write(tmp_path / "data.jsonl", [record(i) for i in range(1000)]))
    read = []
    monkeypatch.setattr("mllm_nb.data.records.parse_record", lambda raw: (read.append(len(raw)), (json.loads(raw), []))[1])
    records[900]
    assert sum(read) < 150 < records.path.stat().st_size / 100


def test_index_is_kept_beside_the_file_and_renewed(tmp_path):
    path = write(tmp_path / "data.json", [record(i) for i in range(5)], lines=False)
    assert len(Records(path)) == 5 and os.listdir(tmp_path) == ["data.json"]       # small files are scanned each time
    assert len(Records(path, cache=True)) == 5 and (tmp_path / "data.json.index.npy").exists()
    assert np.array_equal(Records(path, cache=True).spans, Records(path).spans)
    write(path, [record(i) for i in range(7)], lines=False)
    assert len(Records(path, cache=True)) == 7
    (tmp_path / "data.json.index.npy").write_bytes(b"damaged")
    assert Records(path, cache=True)[6].id == "r6"


def test_several_processes_read_one_file(tmp_path):
    path = write(tmp_path / "data.json", [record(i) for i in range(200)], lines=False)
    code = ("import sys; from mllm_nb.data.records import Records; r = Records(sys.argv[1], cache=True); k = int(sys.argv[2]);"
            "print(all(r[i].id == f'r{i}' for i in range(k, 200, 2)))")
    readers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(k)], stdout=subprocess.PIPE, text=True) for k in (0, 1)]
    assert [reader.communicate()[0].strip() for reader in readers] == ["True", "True"]


# ---- files as a whole

@pytest.mark.parametrize("content, message", [
    (b"", "empty"), (b"  \n ", "white space"), ("[{}]".encode("utf-16"), "UTF-16"), (b"[" + json.dumps(record()).encode(), "cut off")])
def test_file_problems_are_reported(tmp_path, content, message):
    (tmp_path / "data.json").write_bytes(content)
    report = check_records(Records(tmp_path / "data.json"))
    assert message in report.errors[0].found and not report.ok and report.errors[0].record is None


def test_byte_order_mark_and_missing_file(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(record()).encode())
    assert Records(tmp_path / "data.jsonl")[0].id == "r0"
    with pytest.raises(RecordError, match="nothing.json: no such file"): Records(tmp_path / "nothing.json")


# ---- records

def turn(role, text): return {"from": role, "value": text}


@pytest.mark.parametrize("bad, field", [
    ({"conversations": None}, "conversations"), ({"conversations": []}, "conversations"), ({"conversations": "hello"}, "conversations"),
    ({"conversations": [turn("robot", "hi"), turn("gpt", "yes")]}, "conversations[0].from"),
    ({"conversations": [turn(None, "hi"), turn("gpt", "yes")]}, "conversations[0].from"),
    ({"conversations": [turn(["human"], "hi"), turn("gpt", "yes")]}, "conversations[0].from"),
    ({"conversations": [{"from": "human"}, turn("gpt", "yes")]}, "conversations[0].value"),
    ({"conversations": [turn("human", 3), turn("gpt", "yes")]}, "conversations[0].value"),
    ({"conversations": ["hi", turn("gpt", "yes")]}, "conversations[0]"),
    ({"conversations": [turn("human", "hi"), turn("human", "hi"), turn("gpt", "yes")]}, "conversations[1].from"),
    ({"conversations": [turn("human", "hi"), turn("system", "be kind"), turn("gpt", "yes")]}, "conversations[1].from"),
    ({"conversations": [turn("human", "hi"), turn("gpt", " \n")]}, "conversations[1].value"),
    ({"conversations": [turn("human", ""), turn("gpt", "yes")]}, "conversations[0].value"),
    ({"image": "\ud800.png"}, "image"),
    ({"conversations": [turn("human", "hi"), turn("gpt", "\ud800")]}, "conversations[1].value"),
    ({"conversations": [turn("human", "hi"), turn("gpt", "<image>")]}, "conversations[1].value"),
    ({"conversations": [turn("human", "hi")]}, "conversations"),
    ({"id": ["a"]}, "id"), ({"image": 7}, "image"), ({"image": ["a.png", ""]}, "image"), ({"image": {"path": "a.png"}}, "image"),
    ({"image": "a.png"}, "image"),
])
def test_every_kind_of_bad_record_is_named(tmp_path, bad, field):
    records = Records(write(tmp_path / "data.jsonl", [record(0), record(1, **bad), record(2)]))
    report = check_records(records, images="none")
    assert field in [problem.field for problem in report.errors] and report.skip == (1,)
    assert "data.jsonl record 1, line 2" in str(report.errors[0]) and "found" in str(report.errors[0]) and "expected" in str(report.errors[0])
    assert records[0].id == "r0" and records[2].id == "r2"
    with pytest.raises(RecordError, match="data.jsonl record 1, line 2"): records[1]


@pytest.mark.parametrize("line, field", [
    (b'{"id": 1, "conversations": ', "JSON"), (b"[]", "JSON"), (b"17", "JSON"), (b'{"id": "\xff"}', "encoding"),
    (b'{"a": 1} {"b": 2}', "JSON"), (b'{"id": 1, "id": 2}', "JSON"), (b"[" * 100_000, "JSON")])
def test_lines_that_are_no_record(tmp_path, line, field):
    good = json.dumps(record()).encode()
    (tmp_path / "data.jsonl").write_bytes(good + b"\n" + line + b"\n" + good)
    assert found(Records(tmp_path / "data.jsonl")) == {1: [field]}


@pytest.mark.parametrize("image", ["", "none", "None", None, float("nan"), []])
def test_text_only_in_all_its_spellings(tmp_path, image):
    assert Records(write(tmp_path / "data.jsonl", [record(image=image)]))[0].images == ()


def test_published_roles_and_leading_answer(tmp_path):
    chat = [turn("system", "be kind"), turn("user", "hi"), turn("assistant", "yes")]
    records = Records(write(tmp_path / "data.jsonl", [record(conversations=chat), record(1, conversations=[turn("gpt", "so"), *chat[1:]])]))
    assert [t.role for t in records[0].turns] == ["system", "human", "gpt"] and records[1].turns[0].role == "gpt"
    report = check_records(records)
    assert report.ok and [p.record for p in report.warnings] == [1]


@pytest.mark.parametrize("names, tags, fine", [
    ("a.png", "<image>", True), ("a.png", "", False), ("a.png", "<image><image>", False), (["a.png", "a.png"], "<image> <image>", True),
    (["a.png", "a.png"], "<image>", False), (None, "<image>", False)])
def test_tags_and_images_must_agree(tmp_path, names, tags, fine):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    report = check_records(Records(write(tmp_path / "data.jsonl", [with_image(names, tags=tags)])))
    assert report.ok == fine


def test_ids_missing_or_twice_are_warnings(tmp_path):
    nameless = record(); del nameless["id"]
    report = check_records(Records(write(tmp_path / "data.jsonl", [record(0), record(0), nameless])))
    assert report.ok and [(p.record, p.field) for p in report.warnings] == [(1, "id"), (2, "id")]
    assert "record 0 again" in report.warnings[0].found


# ---- images

def test_images_never_leave_their_folder(tmp_path):
    folder, outside = tmp_path / "images", tmp_path / "secret.png"
    folder.mkdir(); Image.new("RGB", (4, 4)).save(outside); Image.new("RGB", (4, 4)).save(folder / "in.png")
    (tmp_path / "images2").mkdir(); Image.new("RGB", (4, 4)).save(tmp_path / "images2/x.png")
    os.symlink(outside, folder / "link.png")
    names = ["../secret.png", str(outside), "a/../../secret.png", "../images2/x.png", "link.png", "http://host/x.png", "a\0b"]
    records = Records(write(tmp_path / "data.jsonl", [with_image(name, i) for i, name in enumerate(names)]), folder)
    assert found(records) == {i: ["image"] for i in range(len(names))}
    for i in range(len(names)):
        with pytest.raises(RecordError, match="image"): records[i]
    assert image_path("sub/../in.png", folder) == (folder / "in.png").resolve()
    assert Records(records.path, folder, follow_links=True)[4].open_images()[0].size == (4, 4)


def test_missing_and_broken_images_are_listed(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    for name in ("whole.png", "whole.jpg", "whole.gif", "whole.webp"): picture.save(tmp_path / name)
    for name in ("png", "jpg", "gif", "webp"):
        data = (tmp_path / f"whole.{name}").read_bytes()
        (tmp_path / f"cut.{name}").write_bytes(data[:len(data) * 2 // 3])
    (tmp_path / "empty.png").write_bytes(b""); (tmp_path / "page.png").write_text("<html>"); (tmp_path / "folder").mkdir()
    good = ["whole.png", "whole.jpg", "whole.gif", "whole.webp"]
    bad = ["cut.png", "cut.jpg", "cut.gif", "cut.webp", "empty.png", "page.png", "folder", "nowhere.png", "x" * 5000]
    records = Records(write(tmp_path / "data.jsonl", [with_image(name, i) for i, name in enumerate(good + bad)]))
    report = check_records(records)
    assert report.skip == tuple(range(4, 13)) == check_records(records, images="decode").skip
    assert check_records(records, images="exists").skip == (10, 11, 12) and check_records(records, images="none").ok
    for problem, name in zip(report.errors, bad): assert name[:40] in problem.found
    assert "too long" in str(report.errors[-1]) and len(str(report.errors[-1])) < 500
    with pytest.raises(RecordError, match=r"data.jsonl record 11, line 12, id 'r11', image: .*nowhere.png"): records[11].open_images()
    with pytest.raises(ValueError, match="images='deep'"): check_records(records, images="deep")


def test_nothing_is_opened_before_it_is_asked_for(tmp_path):
    sample = Records(write(tmp_path / "data.jsonl", [with_image("nowhere.png")]))[0]
    assert [path.name for path in sample.images] == ["nowhere.png"]


@pytest.mark.parametrize("form", ["path", "bytes", "pillow", "array"])
def test_images_in_all_forms(tmp_path, form):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8))
    picture.save(tmp_path / "a.png")
    source = {"path": tmp_path / "a.png", "bytes": (tmp_path / "a.png").read_bytes(), "pillow": picture, "array": np.asarray(picture)}[form]
    assert open_any(source).tobytes() == picture.tobytes() and upright_size(source) == (9, 6)


def test_upright_size_turns_photographs(tmp_path):
    exif = Image.Exif(); exif[0x0112] = 6
    Image.new("RGB", (9, 6)).save(tmp_path / "a.jpg", exif=exif)
    assert upright_size(tmp_path / "a.jpg") == open_any(tmp_path / "a.jpg").size == (6, 9)
    for odd in (0, 9, 255):                                       # no orientation that there is
        exif[0x0112] = odd
        Image.new("RGB", (9, 6)).save(tmp_path / "a.jpg", exif=exif)
        assert upright_size(tmp_path / "a.jpg") == open_any(tmp_path / "a.jpg").size == (9, 6)
    Image.new("RGB", (9, 6)).save(tmp_path / "b.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0a\0\0\0\0\0\0\0")
    assert upright_size(tmp_path / "b.jpg") == (9, 6)             # a text where a number is expected


def test_sizes_of_what_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("pipe.png", "text.png", "missing.png", "."):
        with pytest.raises(ImageError, match=name): upright_size(tmp_path / name)
    with pytest.raises(ImageError, match="<3 bytes>"): upright_size(b"abc")


def test_a_folder_that_is_none_is_said(tmp_path):
    write(tmp_path / "data.jsonl", [with_image("a.png")])
    assert "which is no folder" in check_records(Records(tmp_path / "data.jsonl", tmp_path / "nowhere")).errors[0].expected
    with pytest.raises(RecordError, match="no file, expected records"): Records(tmp_path)


# ---- report and writing

def test_report_as_text_and_json(tmp_path):
    report = check_records(Records(write(tmp_path / "data.jsonl", [record(i, image=3) for i in range(30)] + [record(30)])))
    assert len(report.lines(limit=5)) == 1 + 5 + 1 and "and 25 more errors of image" in report.lines(5)[-1]
    assert len(report.lines(limit=None)) == 31
    stored = json.loads(report.json())
    assert stored["skip"] == list(range(30)) and stored["problems"][0]["field"] == "image"


def test_what_is_written_reads_back(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8))
    turns = (Turn("human", "<image> and <image>\nwhich?"), Turn("gpt", "the “first”"))
    picture.save(tmp_path / "own.png")
    samples = [Sample("a/../b", (picture, tmp_path / "own.png"), turns), Sample("t", (), (Turn("human", "hi"), Turn("gpt", "yes")))]
    assert write_records(samples, tmp_path / "out.jsonl") == 2
    records = Records(tmp_path / "out.jsonl")
    assert check_records(records, images="decode").ok
    assert [s.turns for s in records] == [s.turns for s in samples] and [s.id for s in records] == ["a/../b", "t"]
    assert all(image.tobytes() == picture.tobytes() for image in records[0].open_images())
    with pytest.raises(RecordError, match="outside.png"): write_records([Sample("x", ("/outside.png",), turns)], tmp_path / "out2.jsonl")


def test_the_photographs_of_the_book_are_good_records():
    assert check_records(Records(samples_path("photos.jsonl")), images="decode").lines() == [
        f"{samples_path('photos.jsonl')}: 13 records, 0 bad, 0 warnings"]
