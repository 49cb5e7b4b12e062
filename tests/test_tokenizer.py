"""Tokenizers: the same merges, ids and files as `tokenizers`, the same ids as SentencePiece, and clear errors."""
import json
import re
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from mllm_nb.language import tokenizer as module
from mllm_nb.language.tokenizer import (
    PATTERNS, BPETokenizer, SentencePieceTokenizer, byte_alphabet, merge_word, open_tokenizer, piece_spans, split_words,
    token_spans, train_merges)

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "tokenizers"
PROSE = (ROOT / "LICENSE").read_text(encoding="utf-8") + "고양이가 있습니다 café ☺ 12345 3.14\r\n\t x  y\n\n" * 5
SPECIALS = ("<pad>", "<s>", "</s>", "<image>", "</s><s>")
PIECES = ["<s>", "</s>", "<image>", "<pad>", "</s", " the", "work", "'ll", "'S", "\n", "\r\n", "  ", "\t", "123456", "é", "고", "🙂", "▁"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=12).map("".join)


def library_tokenizer(pattern, size, specials=SPECIALS):
    "`tokenizers` trained on the same text."
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    theirs.train_from_iterator([PROSE], trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return theirs


@pytest.fixture(scope="module")
def trained():
    return BPETokenizer.train([PROSE], 900, SPECIALS[3:])


@pytest.fixture(scope="module")
def reader(trained, tmp_path_factory):
    "Our file, read by `tokenizers`."
    return Tokenizer.from_file(str(trained.save(tmp_path_factory.mktemp("tokenizer")) / "tokenizer.json"))


# ---- training

@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_finds_the_merges_of_the_library(pattern):
    ours, theirs = BPETokenizer.train([PROSE], 800, SPECIALS[3:], pattern=pattern), library_tokenizer(pattern, 800)
    assert ours.vocab == theirs.get_vocab()
    assert [list(pair) for pair in ours.merges] == [list(pair) for pair in json.loads(theirs.to_str())["model"]["merges"]]


def test_training_is_the_plain_algorithm():
    "Counting everything again after each merge gives the same list."
    order = {byte: index for index, byte in enumerate(byte_alphabet())}
    words = {b"aaab": 3, b"aaaa": 5, b"abab": 2, b"cabc": 4, b"x": 9}
    tokens, expected = {tuple(order[byte] for byte in word): n for word, n in words.items()}, []
    for merged in range(256, 266):
        counts = {}
        for word, n in tokens.items():
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + n
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        expected.append(best)
        tokens = {tuple(module.merge_pair(word, best, merged)): n for word, n in tokens.items()}
    assert train_merges(words, 10) == expected and len(expected) > 4


def test_training_stops_when_no_pair_repeats():
    tokenizer = BPETokenizer.train(["abcdefgh"], 5000)
    assert len(tokenizer) == 259 and tokenizer.merges == []


def test_training_needs_room_for_the_bytes():
    with pytest.raises(ValueError, match="vocab_size is 200, expected at least 259"):
        BPETokenizer.train(["a"], 200)


# ---- encoding

@given(TEXTS)
@example("")
@example(" \n\t \u2028 \x85 ")
@settings(max_examples=150, deadline=None)
def test_ids_offsets_and_text_are_those_of_the_library(trained, reader, text):
    theirs, ours = reader.encode(text), trained(text, return_offsets_mapping=True)
    assert ours["input_ids"] == theirs.ids == trained.encode(text)
    assert ours["offset_mapping"] == theirs.offsets
    assert trained.decode(theirs.ids) == text
    assert all(0 <= index < len(trained) for index in theirs.ids)


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_words_join_to_the_text(text):
    for pattern in PATTERNS:
        assert "".join(split_words(text, pattern)) == text


@pytest.mark.parametrize("pattern", PATTERNS)
def test_words_are_those_of_the_library_for_every_character(pattern):
    "Every character that Unicode 3.2 has, in three positions (the library's tables do not know the newest ones)."
    split, old = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated"), unicodedata.ucd_3_2_0
    characters = [c for c in map(chr, range(0x30000)) if old.category(c) not in ("Cs", "Cn", "Co")]
    assert len(characters) > 90_000
    differing = []
    for start in range(0, len(characters), 200):
        text = "".join(f"a{c}a {c}1" for c in characters[start:start + 200])
        if [word for word, _ in split.pre_tokenize_str(text)] != split_words(text, pattern):
            differing += [c for c in characters[start:start + 200] if [
                word for word, _ in split.pre_tokenize_str(f"a{c}a {c}1")] != split_words(f"a{c}a {c}1", pattern)]
    assert differing == []


def test_special_tokens_are_never_split_and_the_longest_wins(trained):
    assert trained.encode("</s><s>") == [trained.vocab["</s><s>"]]
    assert trained.encode("a</s><s") == [trained.vocab["a"], 2, *trained.encode("<s")]
    plain = trained.encode("hi</s>", split_special_tokens=True)
    assert 2 not in plain and trained.decode(plain) == "hi</s>"


def test_special_ids_and_their_names(trained):
    assert [trained.vocab[token] for token in SPECIALS] == [0, 1, 2, 3, 4]
    assert (trained.pad_token_id, trained.bos_token_id, trained.eos_token_id) == (0, 1, 2)
    assert trained.decode([1, 0, *trained.encode("hi"), 2], skip_special_tokens=True) == "hi"


def test_halves_of_a_character():
    tokenizer = BPETokenizer.train([""], 259)
    ids = tokenizer.encode("é")
    assert tokenizer.decode(ids[:1]) == "\ufffd" and tokenizer.decode_bytes(ids[:1]) == b"\xc3"
    assert token_spans("é", [1, 1]) == [(0, 1), (0, 1)] and merge_word("é", {}) == ["Ã", "©"]


def test_a_first_token_on_request(tmp_path):
    tokenizer = BPETokenizer.train([PROSE], 400, add_bos=True)
    ids = tokenizer.encode("the work")
    assert ids[0] == 1 and tokenizer.encode("the work", add_special_tokens=False) == ids[1:]
    assert tokenizer("the", return_offsets_mapping=True)["offset_mapping"][0] == (0, 0)
    assert Tokenizer.from_file(str(tokenizer.save(tmp_path) / "tokenizer.json")).encode("the work").ids == ids
    assert BPETokenizer.load(tmp_path).encode("the work") == ids


def test_the_words_remembered_are_bounded(trained):
    trained._words.clear()
    trained._words.update((str(n), [0]) for n in range(100_000))
    assert trained.encode("work")[0] > 2 and len(trained._words) < 10


def test_ids_outside_the_vocabulary(trained):
    with pytest.raises(ValueError, match="token id 90000 is not in the vocabulary of 900"):
        trained.decode([5, 90_000])


# ---- files

def test_transformers_opens_the_folder(trained, tmp_path):
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(trained.save(tmp_path))
    assert theirs(PROSE)["input_ids"] == trained.encode(PROSE)
    assert theirs.decode(trained.encode("café </s> 고")) == "café </s> 고"
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    assert len(theirs) == len(trained)


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\S+|\s+"])
def test_what_is_saved_is_loaded(pattern, tmp_path):
    tokenizer = BPETokenizer.train([PROSE], 500, ["<image>"], pattern=pattern)
    loaded = BPETokenizer.load(tokenizer.save(tmp_path / "deep" / "folder"))
    for name in ("vocab", "merges", "pattern", "special_tokens", "add_bos"):
        assert getattr(loaded, name) == getattr(tokenizer, name), name


def test_a_folder_without_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        BPETokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer.model or tokenizer.json"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("content, found", [({"model": {"type": "WordPiece"}}, "WordPiece"), ({}, r"\[None\]"),
                                            ({"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Metaspace"}}, "BPE")])
def test_a_file_of_another_kind(content, found, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"tokenizer.json: model and pre_tokenizer are .*{found}"):
        BPETokenizer.load(tmp_path)


def test_a_vocabulary_without_the_special_tokens(trained):
    with pytest.raises(ValueError, match="lacks .*<image>"):
        BPETokenizer({t: i for t, i in trained.vocab.items() if t != "<image>"}, [], special_tokens=SPECIALS)


# ---- SentencePiece

MODELS = {"llava": GOLDEN / "cambrian_llava" / "tokenizer.model", "gemma": GOLDEN / "mini_gemini_eve" / "gemma.model"}
SP_TEXTS = st.lists(st.sampled_from(PIECES + ["▁", " ", "cats", "<0x0A>"]) | st.text(max_size=6), max_size=8).map("".join)


@pytest.fixture(scope="module")
def tokenizers():
    return {(legacy, extra): SentencePieceTokenizer(MODELS["llava"], legacy=legacy, extra_special_tokens=extra)
            for legacy in (True, False) for extra in ((), ("<|im_start|>", "<|im_end|>"))}


@given(SP_TEXTS.filter(lambda text: "<s>" not in text and "</s>" not in text and "<unk>" not in text))
@settings(max_examples=100, deadline=None)
def test_plain_text_has_the_ids_of_sentencepiece(text):
    for file in MODELS.values():
        reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
        tokenizer = SentencePieceTokenizer(file)
        if not any(token in text for token in tokenizer.special_tokens):
            assert tokenizer.encode(text) == [tokenizer.bos_token_id, *reference.encode(text)]


@given(SP_TEXTS)
@settings(max_examples=100, deadline=None)
def test_spans_lie_in_order_and_text_comes_back(tokenizers, text):
    if "\u2581" in text: return   # SentencePiece writes a space that way and cannot give it back
    for (legacy, _), tokenizer in tokenizers.items():
        opening = re.match("(?:" + "|".join(map(re.escape, tokenizer.special_tokens)) + ")+ ", text)
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        begins = [begin for begin, _ in found["offset_mapping"]]
        assert begins == sorted(begins) and all(0 <= b <= e <= len(text) for b, e in found["offset_mapping"])
        if not legacy:
            if not opening:   # behind <s> at the very beginning a space counts as the tokenizer's own
                assert tokenizer.decode(found["input_ids"]) == text
            covered = {at for begin, end in found["offset_mapping"] for at in range(begin, end)}
            assert covered == set(range(len(text)))


def test_the_space_after_a_special_token(tokenizers):
    old, new = tokenizers[True, ()], tokenizers[False, ()]
    name = old.model.id_to_piece
    assert [name(index) for index in old.encode("hi</s>x")][-3:] == ["</s>", "▁", "x"]
    assert [name(index) for index in new.encode("hi</s>x")][-2:] == ["</s>", "x"]
    assert old("hi</s>x", return_offsets_mapping=True)["offset_mapping"][-3:] == [(2, 6), (6, 6), (6, 7)]
    assert new.encode("</s>a") == [1, 2, new.model.piece_to_id("a")]         # no space on its own in front of </s>


def test_special_tokens_that_swallow_white_space():
    marks = ("<|user|>", "<|end|>")
    tokenizer = SentencePieceTokenizer(MODELS["llava"], extra_special_tokens=marks, rstrip=marks[:1])
    assert tokenizer.encode("<|user|> \n a") == tokenizer.encode("<|user|>a")
    assert tokenizer.encode("<|end|> a") != tokenizer.encode("<|end|>a")
    found = tokenizer("<|user|>\n\na", add_special_tokens=False, return_offsets_mapping=True)
    assert found["offset_mapping"][0] == (0, 8) and found["offset_mapping"][-1] == (10, 11)
    assert len(tokenizer) == 642 and tokenizer.special_tokens["<|end|>"] == 641


def test_known_tokens_keep_their_ids_and_given_ids_are_kept():
    tokenizer = SentencePieceTokenizer(MODELS["llava"], extra_special_tokens={"<|im_end|>": 700, "</s>": 2})
    assert tokenizer.encode("a<|im_end|>")[-1] == 700 and len(tokenizer) == 701
    gemma = SentencePieceTokenizer(MODELS["gemma"], extra_special_tokens=["<start_of_turn>"])
    assert gemma.special_tokens["<start_of_turn>"] == gemma.model.piece_to_id("<start_of_turn>")
    assert (gemma.pad_token_id, gemma.eos_token_id, gemma.bos_token_id) == (0, 1, 2)


def test_a_published_folder(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(MODELS["llava"].read_bytes())
    assert open_tokenizer(tmp_path).legacy and open_tokenizer(tmp_path).add_bos            # the slow tokenizer's defaults
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "legacy": False, "add_bos_token": False, "added_tokens_decoder": {
            "640": {"content": "<|end|>", "rstrip": True}, "2": {"content": "</s>", "rstrip": False}}}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": 640, "<|x|>": 645}))
    tokenizer = open_tokenizer(tmp_path)
    assert isinstance(tokenizer, SentencePieceTokenizer) and not tokenizer.legacy and not tokenizer.add_bos
    assert tokenizer.encode("<|end|>\n<|x|>") == [640, 645]


def test_which_tokenizer_a_folder_has(trained, tmp_path):
    assert isinstance(open_tokenizer(trained.save(tmp_path / "ours")), BPETokenizer)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    library_tokenizer("gpt2", 300).save(str(theirs / "tokenizer.json"))
    (theirs / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert type(open_tokenizer(theirs)).__module__.startswith("transformers")


def test_broken_models_and_a_missing_package(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model at all")
    with pytest.raises(ValueError, match="tokenizer.model: not a SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "tokenizer.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match="pip install sentencepiece"):
        SentencePieceTokenizer(MODELS["llava"])


def test_a_model_that_rewrites_its_text():
    with pytest.raises(ValueError, match="rewrites its text"):
        piece_spans("ﬁ", ["▁f", "i", "x"], prefix=1)


@pytest.mark.parametrize("name, content", [("tokenizer.json", "{"), ("tokenizer.json", "[]"), ("tokenizer.json", '{"model": 3}'), ("tokenizer.model", "x"),
                                           ("tokenizer_config.json", "[]"), ("tokenizer.json", "[" * 100_000)])
def test_files_that_are_no_tokenizers_are_named(name, content, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}: ") as caught:
        open_tokenizer(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
