"""Chat: the text, ids and labels of the originals for every template, and labels that are right where theirs are not."""
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from mllm_nb.language.chat import (
    IGNORE, IMAGE, IMAGE_TOKEN_ID, TEMPLATES, Template, Turn, check_template, count_images, counted_labels, encode_chat,
    find_template, opening_ids, place_images_first, read_turns, render_chat, stop_ids, token_ids)
from mllm_nb.language.tokenizer import BPETokenizer, SentencePieceTokenizer

TESTS = Path(__file__).parent
TOKENIZERS, PROMPTS = TESTS / "golden" / "tokenizers", TESTS / "golden" / "prompts"
CHATML, PHI3 = ("<|im_start|>", "<|im_end|>"), ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


@cache
def tokenizer_of(name: str):
    "The tokenizers of the golden files by their names."
    folder = TOKENIZERS / "cambrian_llava"
    if name in ("llama", "llama_legacy", "chatml", "gemma", "llama_3", "mllama3"):
        folder = TOKENIZERS / "mini_gemini_eve"
        if name in ("llama_3", "mllama3"):
            return PreTrainedTokenizerFast(tokenizer_file=str(folder / "llama3.json"), bos_token=BEGIN, eos_token=END)
        return SentencePieceTokenizer(folder / ("gemma.model" if name == "gemma" else "llama.model"), legacy=name != "llama",
                                      add_bos=name != "chatml", extra_special_tokens=CHATML if name == "chatml" else ())
    if name.startswith("llama3"):
        tokenizer = Tokenizer.from_file(str(folder / "llama3_tokenizer.json"))
        if name.endswith("addbos"):
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[BEGIN, "$A"], special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END)
    extra = CHATML if "chatml" in name else PHI3 if "phi3" in name else ()
    return SentencePieceTokenizer(folder / "tokenizer.model", legacy="nolegacy" not in name, add_bos="nobos" not in name,
                                  extra_special_tokens=extra, rstrip=PHI3)


def runs(labels: list[int]) -> list[list[int]]:
    "[begin, end) of each stretch of supervised tokens."
    found = []
    for at, label in enumerate(labels):
        if label != IGNORE:
            if found and found[-1][1] == at:
                found[-1][1] = at + 1
            else:
                found.append([at, at + 1])
    return found


def taught(encoded, tokenizer) -> list[str]:
    return [tokenizer.decode(encoded.labels[begin:end]) for begin, end in runs(encoded.labels)]


def golden_cases() -> Iterator:
    "Every conversation of every prompts file, in one shape."
    for file in sorted(PROMPTS.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        project = content.get("framework") or content["project"]
        for case in content.get("cases") or content["samples"]:
            case = {"tokenizer": content.get("tokenizer"), "template": content.get("template"), "project": project, **case}
            name = case.get("case") or case["name"]
            yield pytest.param(case, id=f"{project}-{case['template']}-{case['tokenizer']}-{name}")


def prepared(case) -> tuple[tuple[Turn, ...], Template, object]:
    template = find_template(case["template"], case["project"].replace("mgm", "mini_gemini"))
    turns = read_turns(case["conversation"])
    if case["has_image"]:
        turns = place_images_first(turns, template, collapse=True)
    return turns, template, tokenizer_of(case["tokenizer"])


# ---- the originals

@pytest.mark.parametrize("case", list(golden_cases()))
def test_a_golden_conversation(case):
    turns, template, tokenizer = prepared(case)
    if "after_preprocess_multimodal" in case:
        assert [turn.text for turn in turns] == [turn["value"] for turn in case["after_preprocess_multimodal"]]
    if case["prompt"] is not None:
        # Cambrian's Llama-3 text always ends with the next header, which its training cuts off again
        assert case["prompt"] in (text := render_chat(turns, template), text + template.answer[0])
    encoded = encode_chat(turns, template, tokenizer)
    assert encoded.input_ids == case["input_ids"]
    answers = case.get("ideal_supervised") or [turn.text for turn in turns[turns[0].role == "gpt":] if turn.role == "gpt"]
    drifted = case["project"] == "llava" and template.stop == "<|im_end|>"  # two rounds: the first label is one place early
    if case["labels_are_target"] and not drifted:
        assert encoded.labels == case["labels"]
    for text, answer in zip(taught(encoded, tokenizer), answers, strict=True):
        assert text.replace(" ", "") == (answer + template.answer[2]).replace(" ", "")
    if "generation_ids" in case:
        question = turns[:-1]
        assert render_chat(question, template, answer_pending=True) == case["generation_prompt"]
        assert encode_chat(question, template, tokenizer, answer_pending=True).input_ids == case["generation_ids"]


@pytest.mark.parametrize("project", ["llava", "cambrian"])
def test_golden_prompts_for_generation(project):
    content = json.loads((PROMPTS / f"{project}_prompt_label_cases.json").read_text(encoding="utf-8"))
    one = [Turn("human", "<image>\nWhat is shown in the image?")]
    two = [Turn("human", "<image>\nFirst?"), Turn("gpt", "Answer one."), Turn("human", "Second?")]
    for case in content["generation_prompts"]:
        template, turns = find_template(case["template"], project), one if case["turns"] == 1 else two
        assert render_chat(turns, template, answer_pending=True) == case["prompt"], case["template"]
        encoded = encode_chat(turns, template, tokenizer_of(case["tokenizer"]), answer_pending=True)
        assert encoded.input_ids == case["input_ids"], (case["template"], case["tokenizer"])


@pytest.mark.parametrize("project, start", [("llava", 0), ("cambrian", 1)])
def test_the_originals_counting_is_understood(project, start):
    "`counted_labels` makes every mistake of the originals, in every row of ChatML."
    cases = [case.values[0] for case in golden_cases()]
    cases = [case for case in cases if case["project"] == project and case["template"] in ("mpt", "chatml_direct")]
    for case in cases:
        turns, template, tokenizer = prepared(case)
        assert counted_labels(turns, template, tokenizer, start, max_length=480) == case["labels"], case["case"]
    assert len(cases) >= 40


def test_random_conversations_have_the_originals_ids():
    """tests/data/random_chats.jsonl: random texts with quoted separators, special tokens, other scripts and white space,
    encoded by the projects' own training code (transformers 4.37.2; Gemma 4.38.2; at most 480 tokens of text)."""
    equal = 0
    for line in (TESTS / "data" / "random_chats.jsonl").read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        if "text" in case:
            assert tokenizer_of(case["tokenizer"]).encode(case["text"]) == case["input_ids"], case
            continue
        turns, template, tokenizer = prepared(case)
        encoded = encode_chat(turns, template, tokenizer)
        end = None if case["has_image"] else 480
        assert encoded.input_ids[:end] == case["input_ids"], case["conversation"]
        equal += runs(encoded.labels[:end]) == case["supervised"]
    assert equal == 41  # in the others the original masks everything or labels the wrong tokens


# ---- what must hold for any conversation

WORDS = ["cats", "3", " ", "\n", "é", "고", "ASSISTANT:", " [/INST] ", "###", "USER: ", "assistant\n", "🙂", "<imag", "'ll"]
TEXT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map("".join)
CHAT = st.lists(st.tuples(TEXT, st.integers(0, 2), TEXT), min_size=1, max_size=3)
NAMES = ["v1", "llava_v0", "llama_2", "mistral_instruct", "chatml_direct", "mistral_v2", "vicuna_cambrian", "mini_gemini/gemma"]


@cache
def byte_tokenizer(add_bos: bool) -> BPETokenizer:
    text = "".join(render_chat([Turn("human", "cats 3"), Turn("gpt", "é 고")], name) for name in NAMES) * 3
    marks = (*CHATML, "<start_of_turn>", "<end_of_turn>", "<eos>")
    return BPETokenizer.train([text], 600, marks, add_bos=add_bos)


@pytest.mark.parametrize("kind", ["bytes", "bytes, <s>", "sp_chatml_legacy", "sp_chatml_nolegacy", "sp_chatml_nobos_nolegacy"])
@given(chat=CHAT, name=st.sampled_from(NAMES))
@settings(max_examples=60, deadline=None)
def test_exactly_the_answers_are_taught(kind, chat, name):
    tokenizer = byte_tokenizer(kind != "bytes") if kind.startswith("bytes") else tokenizer_of(kind)
    template = TEMPLATES[name]
    assume(not check_template(template, tokenizer))
    assume("sp" in kind or name != "mistral_v2")  # nothing between `[/INST]` and the answer: bytes merge across
    # an answer that starts with a line end can share its first token with the line end before it
    turns = [turn for question, images, answer in chat
             for turn in (Turn("human", IMAGE * images + question), Turn("gpt", answer.lstrip() or "yes"))]
    encoded = encode_chat(turns, template, tokenizer)
    ids, labels = encoded.input_ids, encoded.labels
    assert len(ids) == len(labels) == len(encoded.roles)
    assert ids.count(IMAGE_TOKEN_ID) == count_images(turns)
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels))
    squeezed = ["".join(text.split()) for text in taught(encoded, tokenizer)]
    ends = ["".join((turn.text + template.answer[2]).split()) for turn in turns if turn.role == "gpt"]
    assert squeezed == ends
    text = render_chat(turns, template)
    opening = opening_ids(tokenizer)
    expected = list(opening)
    for index, chunk in enumerate(text.split(IMAGE)):
        expected += ([IMAGE_TOKEN_ID] if index else []) + token_ids(tokenizer, chunk)
    assert ids == expected


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_prompt_is_the_beginning_of_its_training_text(name):
    template, question = TEMPLATES[name], [Turn("human", "<image>\nHow many?")]
    prompt = render_chat(question, template, answer_pending=True)
    whole = render_chat([*question, Turn("gpt", "Two.")], template)
    if template.prompting is None or template.prompting.answer == template.answer:
        assert whole.startswith(prompt) and whole[len(prompt):] == template.answer[1] + "Two." + template.answer[2] + template.end
    else:  # version 0 was prompted without the line ends of its training
        assert prompt.endswith("Human: <image>\nHow many?###Assistant:") and "\n### Assistant: Two.\n###" in whole
    assert prompt.count(IMAGE) == whole.count(IMAGE) == 1


def test_the_first_token_comes_once():
    chat = [Turn("human", "<image><image> a <image>"), Turn("gpt", "b")]
    for add_bos in (True, False):
        encoded = encode_chat(chat, "v1", byte_tokenizer(add_bos))
        assert encoded.input_ids.count(1) == add_bos and (encoded.input_ids[0] == 1) == add_bos
        assert encoded.roles.count("image") == 3


def test_an_answer_may_hold_an_image():
    encoded = encode_chat([Turn("human", "Draw."), Turn("gpt", "Here: <image> done")], "v1", byte_tokenizer(False))
    at = encoded.input_ids.index(IMAGE_TOKEN_ID)
    assert encoded.labels[at] == IGNORE and encoded.labels[at - 1] != IGNORE != encoded.labels[at + 1]


def test_a_slow_tokenizer_without_spans():
    class Slow:
        is_fast, bos_token_id = False, 1

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1] * add_special_tokens + [ord(character) for character in text]}
    chat = [Turn("human", "<image>\nHow?"), Turn("gpt", "So.")]
    encoded = encode_chat(chat, "v1", Slow())
    assert "".join(map(chr, (label for label in encoded.labels if label != IGNORE))) == " So.</s>"
    assert encoded.input_ids.count(1) == 1


# ---- turns

def test_a_system_turn_replaces_the_text():
    chat = [Turn("system", "Be kind."), Turn("human", "Hi"), Turn("gpt", "Ho")]
    assert render_chat(chat, "v1") == "Be kind. USER: Hi ASSISTANT: Ho</s>"
    assert render_chat(chat, "llama_2") == "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Ho </s>"
    assert render_chat(chat, "mpt").startswith("<|im_start|>system\nBe kind.<|im_end|><|im_start|>user\nHi")


def test_an_answer_before_the_first_question():
    chat = [Turn("gpt", "Hello!"), Turn("human", "Hi"), Turn("gpt", "Ho")]
    assert "Hello!" not in render_chat(chat, "v1")
    encoded = encode_chat(chat, "llava_v0", byte_tokenizer(False))
    assert "Hello!" in render_chat(chat, "llava_v0") and taught(encoded, byte_tokenizer(False)) == [" Ho\n###"]


def test_a_question_without_answer_is_not_taught():
    chat = [Turn("human", "Hi"), Turn("gpt", "Ho"), Turn("human", "And?")]
    assert taught(encode_chat(chat, "v1", byte_tokenizer(True)), byte_tokenizer(True)) == [" Ho</s>"]


def test_captions_drop_the_question_and_keep_its_images():
    assert render_chat([Turn("human", "<image>Describe <image>"), Turn("gpt", "cats")], "plain") == "<image><image>cats\n"
    assert render_chat([Turn("human", "What?\n<image>")], "plain", answer_pending=True) == "<image>"


@pytest.mark.parametrize("turns, message", [
    ([], "found 0 turns and no question"),
    ([Turn("gpt", "a")], "no question"),
    ([Turn("human", "a"), Turn("human", "b")], "turn 1: role is 'human', expected 'gpt'"),
    ([Turn("system", "s"), Turn("human", "a"), Turn("gpt", "b"), Turn("gpt", "c")], "turn 3: role is 'gpt', expected 'human'"),
    ([Turn("human", "a"), Turn("gpt", "")], r"turn 1 \(gpt\): the text is empty"),
    ([Turn("human", "a"), Turn("system", "s")], "turn 1: role is 'system'"),
])
def test_turns_that_are_wrong(turns, message):
    with pytest.raises(ValueError, match=message):
        render_chat(turns, "v1")


def test_more_that_is_wrong():
    with pytest.raises(ValueError, match="unknown role 'user': expected one of system, human, gpt"):
        Turn("user", "a")
    with pytest.raises(ValueError, match="the text of a gpt turn is None"):
        Turn("gpt", None)
    with pytest.raises(ValueError, match="turn 1: field 'from': unknown role 'bot'"):
        read_turns([{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}])
    with pytest.raises(ValueError, match="turn 0: field 'value' is 3, expected a text"):
        read_turns([{"from": "human", "value": 3}])
    with pytest.raises(ValueError, match="the last turn is an answer"):
        render_chat([Turn("human", "a"), Turn("gpt", "b")], "v1", answer_pending=True)
    with pytest.raises(ValueError, match="found 4 turns, expected one question"):
        render_chat([Turn("human", "a"), Turn("gpt", "b")] * 2, "plain")
    with pytest.raises(ValueError, match="no template 'v9'; there are .*llava_v1"):
        find_template("v9")


# ---- helpers

def test_names_that_differ_between_systems():
    assert find_template("chatml_direct") != find_template("chatml_direct", "cambrian")
    assert find_template("llama_3", "cambrian") != find_template("llama_3", "mini_gemini")
    assert find_template("v1", "cambrian") == find_template("v1", "eve") == find_template("v1")
    with pytest.raises(ValueError):
        find_template("llama_3")


def test_images_move_to_the_front():
    chat = [Turn("human", "  What is <image> here? "), Turn("gpt", " as it is "), Turn("human", "<image>\n<image> both")]
    first, second, third = place_images_first(chat)
    assert (first.text, second.text, third.text) == ("<image>\nWhat is  here?", " as it is ", "<image>\n<image>\nboth")
    assert place_images_first(chat, collapse=True)[2].text == "<image>\nboth"
    assert place_images_first([Turn("human", "<image>")], "v1_mmtag")[0].text == "<Image><image></Image>"
    assert place_images_first(chat[1:2], "v1_mmtag")[0] is chat[1]
    assert place_images_first(place_images_first(chat)) == place_images_first(chat)


def test_which_tokens_a_tokenizer_lacks():
    assert check_template("chatml_direct", tokenizer_of("sp_chatml_legacy")) == []
    assert check_template("chatml_direct", tokenizer_of("sp_nolegacy")) == list(CHATML)
    assert check_template("cambrian/llama_3", tokenizer_of("llama3_addbos")) == []
    assert check_template("v1", tokenizer_of("llama3_nobos")) == ["</s>"]
    assert check_template("mini_gemini/gemma", tokenizer_of("gemma")) == []


def test_where_to_stop():
    assert stop_ids("v1", tokenizer_of("sp_legacy")) == [2]
    assert stop_ids("chatml_direct", tokenizer_of("sp_chatml_legacy")) == [2, 641]
    assert stop_ids("chatml_direct", tokenizer_of("sp_legacy")) == [2]
    assert stop_ids("llava_v0", byte_tokenizer(False)) == [2]


def test_marks_that_a_tokenizer_does_not_know_are_listed():
    class Words:                                                 # every unknown word is number 1
        unk_token_id = 1
        def __call__(self, text, **how): return {"input_ids": [2 if text == "<|user|>" else 1]}
    assert check_template("miniature", Words()) == ["<|assistant|>", "</s>"]
    Words.unk_token_id = None
    assert check_template("miniature", Words()) == ["<|assistant|>", "</s>"]
