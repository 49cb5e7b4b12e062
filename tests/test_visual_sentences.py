"Visual sentences: layouts, records, packing, shards that survive a kill, and the small LVM's parts."
import base64
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_nb.drawing.visual_sentences import (
    KINDS, Sentence, SentenceIds, Shards, arranged, frame_numbers, keep_mask, pack_records, read_record, record_tokens,
    rows_of_shots, sentences_of, whole_rows, write_record, write_shard, writing_windows)


def test_layouts():
    block = np.arange(24).reshape(2, 3, 4)
    assert arranged(block, "a b c", "a b c") == list(range(24))
    assert arranged(block, "a b c", "a c b")[:6] == [0, 4, 8, 1, 5, 9]
    with pytest.raises(ValueError, match="layout: found axes"):
        arranged(block, "a b c", "a b")
    assert len(sentences_of("annotated video", block)) == 2 and set(KINDS) >= {"category", "single image"}


def test_rows_and_frames():
    assert rows_of_shots(5, 2, [4, 0, 3, 1, 2]) == [[4, 0], [3, 1]]
    assert frame_numbers(20, 5, 8, 0) == [0, 4, 8, 12, 16]
    with pytest.raises(ValueError, match="clip: found 3 frames"):
        frame_numbers(3, 5, 1, 0)


@given(st.lists(st.integers(0, 8191), max_size=40))
@settings(max_examples=30)
def test_records_come_back(tokens):
    assert read_record(write_record(tokens)).tolist() == tokens


@pytest.mark.parametrize("line", ["", "{}", "[1]", '{"tokens": 5}', '{"tokens": "?"}', '{"tokens": "AAA="}', "{broken"])
def test_damaged_records_are_named(line):
    with pytest.raises(ValueError, match="file 3, line 7: found"):
        read_record(line, "file 3, line 7")


def test_a_record_of_no_whole_pictures():
    with pytest.raises(ValueError, match="found 5 tokens, expected a multiple of 4"):
        read_record(write_record(range(5)), image_tokens=4)


def test_fields():
    record = {"tokens": base64.b64encode(np.array([5, 6], "<i4").tobytes()).decode()}
    assert record_tokens(record, "[<|9|>],{tokens}") == ([9, 5, 6], [0.0, 1.0, 1.0])
    for fields in ("", "{no}", ",{tokens}", "plain"):
        with pytest.raises(ValueError, match="fields: found"):
            record_tokens(record, fields)


def test_packing_goes_round_and_ends_without_records():
    stream = pack_records([write_record([1, 2, 3]), "", "{broken"], "{tokens}", 1, 2)
    batches = [next(stream) for _ in range(4)]
    assert np.concatenate([batch.inputs.ravel() for batch in batches]).tolist() == [1, 2, 3, 1, 2, 3, 1, 2]
    with pytest.raises(ValueError, match="no readable line"):
        next(pack_records(["", "{broken"], "{tokens}", 1, 2))


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=14), min_size=1, max_size=30))
@settings(max_examples=30)
def test_whole_rows_lose_nothing(sentences):
    ids = SentenceIds.after(100)
    rows = list(whole_rows(sentences, 16, ids))
    back = [tokens[segments == n][1:-1].tolist() for tokens, segments in rows for n in range(1, segments.max() + 1)]
    assert back == sentences and all(len(tokens) == 16 for tokens, _ in rows)
    assert all((tokens[segments == 0] == ids.padding).all() for tokens, segments in rows)


def test_a_sentence_longer_than_a_row():
    with pytest.raises(ValueError, match="sentence 1: found 7 tokens"):
        list(whole_rows([[1], [2] * 5], 6, SentenceIds.after(9)))


def test_packing_many_tokens_stays_small():
    program = ("import resource, numpy as np\nfrom mllm_nb.drawing.visual_sentences import SentenceIds, whole_rows\n"
               "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
               "tokens = np.zeros(256, np.int64)\n"
               "rows = sum(1 for _ in whole_rows((tokens for _ in range(4000)), 4096, SentenceIds.after(8192)))\n"
               "print(rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)")
    rows, grown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert int(rows) == 267 and int(grown) < 100


def test_masks_are_holes_or_mosaics():
    for seed in range(8):
        keep = keep_mask(np.random.RandomState(seed))
        assert keep.shape == (256, 256) and keep.dtype == bool


def test_windows():
    assert writing_windows(1, 1) == [(1, 1)] and writing_windows(20, 2) == [(15, 1), (15, 1)]
    assert writing_windows(14, 0) == []


def shard(folder, fingerprint="a", name="shard-00000"):
    write_shard(folder / name, [Sentence(np.arange(4), "paired", 2, "one"), Sentence(np.arange(6), "paired", 2)], fingerprint)


def test_shards_are_read_and_checked(tmp_path):
    shard(tmp_path)
    shards = Shards(tmp_path)
    assert len(shards) == 2 and shards[1].tokens.tolist() == list(range(6)) and shards[0].name == "one"
    with pytest.raises(IndexError):
        shards[2]
    data = bytearray((tmp_path / "shard-00000.bin").read_bytes())
    data[3] ^= 1
    (tmp_path / "shard-00000.bin").write_bytes(data)
    with pytest.raises(ValueError, match="another checksum"):
        Shards(tmp_path)
    (tmp_path / "shard-00000.bin").write_bytes(data[:-2])
    with pytest.raises(ValueError, match="found 18 bytes, expected 20"):
        Shards(tmp_path)


def test_shards_of_two_tokenizers_are_refused(tmp_path):
    shard(tmp_path)
    shard(tmp_path, "b", "shard-00001")
    with pytest.raises(ValueError, match="shards of 2 tokenizers"):
        Shards(tmp_path)
    with pytest.raises(ValueError, match="found no shard"):
        Shards(tmp_path / "nothing")
    with pytest.raises(ValueError, match="expected 0 to 65535"):
        write_shard(tmp_path / "x", [Sentence(np.array([70000]), "paired", 1)], "a")


@pytest.mark.parametrize("change", [{"fingerprint": None}, {"sha256": 3}, {"notes": None}, {"sentences": 3}, {"sentences": ["x"]},
                                    {"sentences": [{"kind": "a", "tokens": -1, "image_tokens": 4, "name": "b"}]}])
def test_an_index_of_the_wrong_kind_names_file_and_field(change, tmp_path):
    write_shard(tmp_path / "a", [Sentence(np.arange(4), "x", 4, "n")], "vqgan-1")
    file = tmp_path / "a.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"{file}: found no index of a shard"): Shards(tmp_path)
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=f"{file}: found no index of a shard"): Shards(tmp_path)
