"Frames written with a memory: the same words as without, whatever is shown, drawn and kept in between."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import decided_decoder
from mllm_nb.drawing.frames import FrameWriter, known_part, rows_like
from mllm_nb.drawing.visual_sentences import writing_windows
from mllm_nb.language.decoder import Decoder
from mllm_nb.language.generate import PackedDecoder, Sampling, generate

CODES, WORDS = 20, 6


def small(**changes) -> Decoder:
    return decided_decoder(**{"vocab_size": 24, "hidden_size": 64, "intermediate_size": 96} | changes)


def film(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, CODES, (frames, WORDS), generator=torch.Generator().manual_seed(seed))


def anew(decoder: Decoder, frames: torch.Tensor, count: int, row: int, begin: int | None = None) -> list[list[int]]:
    "As the published script does it: the whole prompt for every call."
    frames = frames.tolist()
    for context, new in writing_windows(len(frames), count, row):
        prompt = [token for frame in frames[len(frames) - context:] for token in frame]
        prompt = prompt if begin is None else [begin, *prompt]
        tokens = generate(decoder, torch.tensor([prompt]), max_new_tokens=new * WORDS, sampling=Sampling(below=CODES), pack=False)[0]
        frames += [tokens[at:at + WORDS] for at in range(0, len(tokens), WORDS)]
    return frames


@pytest.mark.parametrize("begin", [None, 21])
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("shown", [1, 3, 7])
def test_frame_by_frame_and_all_at_once_are_the_words_of_no_memory(shown, pack, begin):
    decoder, frames = small(), film(shown)
    expected = anew(decoder, frames, 5, 4, begin)
    one_by_one = FrameWriter(decoder, CODES, WORDS, row=4, begin=begin, pack=pack)
    one_by_one.show(frames)
    for _ in range(5):
        one_by_one.write()
    assert one_by_one.frames == expected
    at_once = FrameWriter(decoder, CODES, WORDS, row=4, begin=begin, pack=pack)
    at_once.show(frames)
    assert at_once.write(5)[0].tolist() == expected[shown:]


@given(st.lists(st.sampled_from(["show", "write", "sample", "several", "forget"]), max_size=7))
@settings(max_examples=15)
def test_whatever_happened_before_the_next_frame_is_that_of_its_window(actions):
    decoder = small()
    writer = FrameWriter(decoder, CODES, WORDS, row=4)
    writer.show(film(1))
    for number, action in enumerate(actions):
        if action == "show":
            writer.show(film(1, number))
        elif action == "write":
            writer.write()
        elif action == "sample":
            writer.write(sampling=Sampling(1.0, seed=number))
        elif action == "several":
            found = writer.write(candidates=3, sampling=Sampling(1.0, seed=number), keep=2)
            assert found[2, 0].tolist() == writer.frames[-1]
        else:
            writer.frames.pop() if len(writer.frames) > 1 else None
    before = [list(frame) for frame in writer.frames]
    assert writer.write()[0].tolist() == anew(decoder, torch.tensor(before), 1, 4)[len(before):]


def test_only_new_words_are_read():
    writer = FrameWriter(small(), CODES, WORDS, row=4)
    writer.show(film(2))
    counts = []
    for _ in range(4):
        before = writer.read_words
        writer.write()
        counts.append(writer.read_words - before)
    assert counts == [12, 1, 18, 18]        # all; the last word; the window has moved: three frames each


def test_candidates_are_those_of_separate_rows():
    decoder = small()
    writer = FrameWriter(decoder, CODES, WORDS, row=4)
    writer.show(film(3))
    found = writer.write(candidates=4)
    assert found.shape == (4, 1, WORDS) and (found == found[:1]).all()      # greedy: all alike
    writer = FrameWriter(decoder, CODES, WORDS, row=4)
    writer.show(film(3))
    drawn = writer.write(candidates=4, sampling=Sampling(2.0, seed=1))
    assert len({tuple(row) for row in drawn[:, 0].tolist()}) > 1
    prompt = film(3).flatten()[None].expand(4, -1)
    rows = generate(decoder, prompt, max_new_tokens=WORDS, sampling=Sampling(2.0, seed=1, below=CODES))
    assert drawn[:, 0].tolist() == rows


def test_ids_beyond_the_codebook_are_never_written():
    decoder = small()
    with torch.no_grad():
        decoder.lm_head.weight[CODES:] = 100 * decoder.lm_head.weight[:4].abs()
    for candidates in (1, 2):
        writer = FrameWriter(decoder, CODES, WORDS, row=4)
        writer.show(film(1))
        assert writer.write(3, candidates, Sampling(1.0, seed=0)).max() < CODES


def test_changed_weights_are_noticed():
    decoder = small()
    writer = FrameWriter(decoder, CODES, WORDS)
    writer.show(film(1))
    writer.write()
    with torch.no_grad():
        decoder.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="weights have changed"):
        writer.write()


def test_bad_input():
    writer = FrameWriter(small(), CODES, WORDS)
    with pytest.raises(ValueError, match="found no frame"):
        writer.write()
    with pytest.raises(ValueError, match=r"found shape \(2, 5\), expected \(frames, 6\)"):
        writer.show(torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="found ids 0 to 20, expected 0 to 19"):
        writer.show(torch.tensor([[0, 1, 2, 3, 4, 20]]))
    writer.show(film(1))
    with pytest.raises(ValueError, match="keep: found 2, expected 0 to 1"):
        writer.write(candidates=2, keep=2)
    assert FrameWriter(small(), CODES, WORDS, begin=21).write().shape == (1, 1, WORDS)   # from nothing


def test_known_part():
    assert known_part([], [1, 2]) == 0 and known_part([1, 2, 3], [1, 2, 3]) == 2 and known_part([1, 2], [1, 2, 3]) == 2


# ---- the cache of `generate` ----

@pytest.mark.parametrize("pack", [True, False])
def test_generation_goes_on_from_a_cache(pack):
    decoder, prompt = small(), film(3).flatten()[None]
    whole = generate(decoder, prompt, max_new_tokens=9, pack=pack)[0]
    cache = decoder.new_cache(1, 40)
    first = generate(decoder, prompt, max_new_tokens=4, pack=pack, cache=cache)[0]
    assert cache.filled == 18 + 3                        # all but the last new token
    rest = generate(decoder, torch.tensor([[first[-1]]]), max_new_tokens=5, pack=pack, cache=cache)[0]
    assert first + rest == whole
    wide = rows_like(cache, 3, 60)
    assert wide.layers[0].keys.shape[0] == 3 and wide.filled == cache.filled
    assert torch.equal(wide.layers[1].values[2, :, :cache.filled], cache.layers[1].values[0, :, :cache.filled])


def test_a_cache_that_is_too_small_and_padding_are_refused():
    decoder = small()
    with pytest.raises(ValueError, match="cache: found 5 places, expected at most its length of 4"):
        generate(decoder, film(1)[:, :5], max_new_tokens=2, cache=decoder.new_cache(1, 4))
    with pytest.raises(ValueError, match="expected rows without padding"):
        generate(decoder, film(1), mask=torch.tensor([[False] + [True] * 5]), max_new_tokens=2, cache=decoder.new_cache(1, 9))


def test_scores_of_some_words_alone_are_the_same():
    decoder = small(vocab_size=150)
    packed, one, other = PackedDecoder(decoder), decoder.new_cache(1, 4), decoder.new_cache(1, 4)
    with torch.inference_mode():
        assert torch.equal(packed.step(3, one, 100), packed.step(3, other)[:100])
