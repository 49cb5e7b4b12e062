"""Batches: expansion against the original, packing against its plain form and the loss, order and resuming exactly."""
import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mllm_nb.vision.towers import NEWLINE, TEXT
from mllm_nb.data.batches import (
    Batches, BatchSettings, Example, Processor, RoomTree, Sizes, TooLong, UnsupervisedError, collate,
    expand_images, measure, pack, pack_plain, plan_epoch)
from mllm_nb.data.records import RecordError, Records, Sample, write_records
from mllm_nb.images import Preprocess
from mllm_nb.language.chat import IGNORE, IMAGE_TOKEN_ID, TEMPLATES, Turn, encode_chat
from mllm_nb.language.tokenizer import BPETokenizer

GOLDEN = "tests/golden/parity/"
TOKENIZER = BPETokenizer.train(["what is it? a picture of a cat and a dog.", "USER: ASSISTANT: yes no"] * 4, 300,
                               special_tokens=("<pad>", "<s>", "</s>"))
SMALL = Preprocess(size=8, aspect="stretch")
TEMPLATE = replace(TEMPLATES["v1"], system="")                    # the system text alone would be longer than these samples
PROCESSOR = Processor(TOKENIZER, TEMPLATE, (SMALL,), grid=(2, 2))


def picture(seed=0, size=(12, 9)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8))


def sample(number=0, images=1, rounds=1, words=3):
    tags = "<image>\n" * images
    turns = [Turn(role, text) for k in range(rounds)
             for role, text in (("human", (tags if k == 0 else "") + f"what is it? {number}" + " cat" * words), ("gpt", f"a dog {k}"))]
    return Sample(f"s{number}", tuple(picture(number * 10 + k) for k in range(images)), tuple(turns), "made up")


def samples(count=40, seed=0):
    random_ = random.Random(seed)
    return [sample(i, images=random_.choice([0, 1, 1, 2]), rounds=random_.randint(1, 3), words=random_.randint(0, 9)) for i in range(count)]


# ---- expansion

def original_rows(name, sides):
    "expand_images on the original's input: rows of (ids, labels, index), and what the original made of the same rows."
    golden = load_file(f"{GOLDEN}{name}.safetensors")
    features = golden["out.image_features"]
    images, tokens = features.shape[:2]
    rows, image = [], 0
    for ids, labels, mask in zip(golden["in.input_ids"], golden["in.labels"], golden["in.attention_mask"]):
        ids, labels = ids[mask].tolist(), labels[mask].tolist()
        count = ids.count(IMAGE_TOKEN_ID)
        rows.append(expand_images(ids, labels, [range(tokens)] * count, [tokens] * count, first_row=image * tokens))
        image += max(count, 1)                                   # the original uses up an image for a text-only sample
    return golden, rows


@pytest.mark.parametrize("name, cut, side", [
    ("llava15_llama_mlp2x", None, "right"), ("llava15_truncation", 20, "right"),
    ("llava15_llama_mixed_textonly_multiimage_leftpad", None, "left")])
def test_expansion_is_the_originals(name, cut, side):
    golden, rows = original_rows(name, side)
    weights = golden["weights.model.embed_tokens.weight"]
    table = golden["out.image_features"].flatten(0, 1)
    examples = [Example(str(i), str(i), *(torch.tensor(values[:cut]) for values in row), ()) for i, row in enumerate(rows)]
    length = golden["out.labels"].shape[1]
    batch = collate([[example] for example in examples], length, side=side)
    embeds = torch.where((batch.image_index >= 0)[..., None], table[batch.image_index.clamp(min=0)], weights[batch.input_ids.clamp(min=0)])
    valid = golden["out.attention_mask"]
    assert torch.equal(batch.segments > 0, valid)
    assert torch.equal(batch.labels, golden["out.labels"])
    assert torch.equal(embeds[valid], golden["out.inputs_embeds"][valid])


def test_expansion_by_hand():
    out = expand_images([1, -200, 5, -200, 6], [-100, -100, 5, -100, 6], [[0, 1, NEWLINE], [3]], rows=[2, 4], first_row=10)
    assert out.input_ids == [1, -200, -200, -200, 5, -200, 6]
    assert out.labels == [-100, -100, -100, -100, 5, -100, 6]
    assert out.image_index == [TEXT, 10, 11, NEWLINE, TEXT, 15, TEXT]
    with pytest.raises(ValueError, match="found 1 image tokens for 2 images"): expand_images([-200], [-100], [[0], [0]], [1, 1])


# ---- the processor

@pytest.mark.parametrize("images", [0, 1, 3])
def test_example_of_a_sample(images):
    example = PROCESSOR(sample(images=images))
    encoded = encode_chat(sample(images=images).turns, TEMPLATE, TOKENIZER)
    assert example.views == images and example.rows == 4 * images and example.pixels[0].shape == (images, 3, 8, 8)
    places = example.image_index[example.image_index >= 0].tolist()
    assert places == list(range(4 * images)) and (example.input_ids == IMAGE_TOKEN_ID).sum() == 4 * images
    assert [i for i in example.input_ids.tolist() if i >= 0] == [i for i in encoded.input_ids if i >= 0]
    assert [label for label in example.labels.tolist() if label != IGNORE] == [label for label in encoded.labels if label != IGNORE]
    assert PROCESSOR.measure(sample(images=images)) == (len(example), images)


def test_several_towers_and_tiles():
    tiled = Preprocess(size=8, aspect="anyres", pinpoints=((16, 8), (8, 16)))
    processor = Processor(TOKENIZER, TEMPLATE, (tiled, replace(tiled, size=16, pinpoints=((32, 16), (16, 32)))), grid=(2, 2), layout="spatial_unpad")
    one = Sample("a", (picture(0, (30, 10)),), sample().turns)
    example = processor(one)
    assert [tuple(pixels.shape) for pixels in example.pixels] == [(3, 3, 8, 8), (3, 3, 16, 16)] and example.rows == 12
    assert NEWLINE in example.image_index.tolist() and processor.measure(one) == (len(example), 3)
    with pytest.raises(ValueError, match="with and without 'anyres'"): replace(processor, preprocess=(tiled, SMALL))


def test_class_token_comes_first():
    example = replace(PROCESSOR, prefix=1)(sample())
    assert example.rows == 5 and (example.image_index >= 0).sum() == 5


@pytest.mark.parametrize("bad, message", [
    (Sample("x", (), (Turn("human", "<image>"), Turn("gpt", "a")), "f.json record 3"), "f.json record 3, id 'x', image: found 1 <image> tags for 0"),
    (Sample("x", (picture(),), (Turn("human", "hi"), Turn("gpt", "a"))), "found 0 <image> tags for 1")])
def test_tags_must_match(bad, message):
    for use in (PROCESSOR, PROCESSOR.measure):
        with pytest.raises(RecordError, match=message): use(bad)


def test_a_conversation_that_no_template_can_write_names_its_sample():
    asked = sample(images=0)
    for turns, template in (((Turn("human", ""), Turn("gpt", "a dog")), TEMPLATE), (asked.turns * 2, TEMPLATES["plain"])):
        with pytest.raises(RecordError, match="made up, id 's0', conversations: .*(empty|found 4 turns)"):
            replace(PROCESSOR, template=template)(replace(asked, turns=turns))


def test_a_tokenizer_without_the_template_s_marks_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer: found no token of its own for <\|im_start\|>, <\|im_end\|>"):
        replace(PROCESSOR, template="chatml_direct")
    with pytest.raises(ValueError, match="no template 'nothing'"):
        replace(PROCESSOR, template="nothing")


def test_images_need_a_tower():
    with pytest.raises(RecordError, match="no tower"): Processor(TOKENIZER, TEMPLATE)(sample())
    assert len(Processor(TOKENIZER, TEMPLATE)(sample(images=0))) > 0


# ---- samples that are too long

def test_truncation_drops_whole_turns_and_never_cuts_an_image():
    long = sample(images=2, rounds=6)
    whole = PROCESSOR(long)
    for limit in range(len(PROCESSOR(replace(long, turns=long.turns[:2]))), len(whole) + 1):
        example = replace(PROCESSOR, max_length=limit)(long)
        assert len(example) <= limit and example.dropped_turns % 2 == 0
        assert (example.image_index >= 0).sum() == example.rows == 8
        assert torch.equal(example.input_ids, PROCESSOR(replace(long, turns=long.turns[:12 - example.dropped_turns])).input_ids)
    assert example.dropped_turns == 0


def test_images_of_dropped_turns_go_too():
    turns = sample(images=1).turns
    two = Sample("x", (picture(), picture(1)), turns + turns)
    example = replace(PROCESSOR, max_length=len(PROCESSOR(two)) - 1)(two)
    assert example.views == 1 and example.rows == 4 and example.dropped_turns == 2


def test_a_lost_answer_is_reported_by_name():
    for policy in ("truncate", "skip", "error"):
        with pytest.raises(TooLong, match="made up, id 's7'.*expected at most 10"): replace(PROCESSOR, max_length=10, too_long=policy)(sample(7))
    turns = (Turn("gpt", "so"), *sample(images=0).turns)          # a leading answer is not an answer
    limit = len(PROCESSOR(Sample("x", (), turns))) - 1
    with pytest.raises(TooLong): replace(PROCESSOR, max_length=limit)(Sample("x", (), turns))
    with pytest.raises(TooLong): replace(PROCESSOR, max_length=10)(replace(sample(words=9), turns=sample(words=9).turns[:1]), answer_pending=True)
    with pytest.raises(ValueError, match="too_long='guess'"): replace(PROCESSOR, too_long="guess")


def test_cut_is_what_llava_does():
    whole = PROCESSOR(sample(images=2))
    example = replace(PROCESSOR, max_length=9, too_long="cut")(sample(images=2))
    assert torch.equal(example.input_ids, whole.input_ids[:9]) and len(example.labels) == 9 and example.views == 2


def test_left_out_samples_are_listed(tmp_path):
    write_records([sample(0), sample(1, words=200), sample(2)], tmp_path / "a.jsonl")
    records, processor = Records(tmp_path / "a.jsonl"), replace(PROCESSOR, max_length=100)
    sizes = measure(records, processor, skip=[2])
    assert sizes.lengths[1] == sizes.lengths[2] == 0 < sizes.lengths[0]
    assert "a.jsonl record 1, line 2, id 's1', length" in sizes.left_out[1] and "a.jsonl record 2, line 3: skipped" in sizes.left_out[2]
    with pytest.raises(TooLong, match="record 1"): measure(records, replace(processor, too_long="error"))
    sizes.save(tmp_path / "sizes.json")
    stored = Sizes.load(tmp_path / "sizes.json")
    assert np.array_equal(stored.lengths, sizes.lengths) and np.array_equal(stored.views, sizes.views) and stored.left_out == sizes.left_out


# ---- packing

@pytest.mark.parametrize("seed", range(5))
def test_packing_is_first_fit_decreasing(seed):
    random_ = np.random.default_rng(seed)
    for _ in range(60):
        lengths = random_.integers(0, 50, random_.integers(0, 60)).tolist()
        assert pack(lengths, 50) == pack_plain(lengths, 50)


@pytest.mark.parametrize("seed", range(5))
def test_packing_with_a_limit_of_views(seed):
    random_ = np.random.default_rng(seed)
    lengths, views = random_.integers(1, 50, 300).tolist(), random_.integers(0, 4, 300).tolist()
    rows = pack(lengths, 100, views, 3)
    assert sorted(itertools.chain(*rows)) == list(range(300))
    assert all(sum(lengths[i] for i in row) <= 100 and sum(views[i] for i in row) <= 3 for row in rows)
    assert pack(lengths, 100, views, 10_000) == pack(lengths, 100)
    bins = []                                                    # the plain form, with both limits
    for i in sorted(range(300), key=lambda i: -lengths[i]):
        fits = [b for b in bins if sum(lengths[j] for j in b) + lengths[i] <= 100 and sum(views[j] for j in b) + views[i] <= 3]
        (fits[0] if fits else bins.append([]) or bins[-1]).append(i)
    assert rows == bins


def test_what_fits_no_row_is_refused():
    with pytest.raises(ValueError, match="sample 1: found 11 tokens, expected at most the row's 10"): pack([3, 11], 10)
    with pytest.raises(ValueError, match="sample 0: found 3 views"): pack([3], 10, [3], 2)
    assert pack([], 10) == []


def test_room_tree_against_a_scan():
    random_ = random.Random(0)
    rooms = [random_.randint(0, 9) for _ in range(37)] + [99]
    tree = RoomTree(38, 0)
    for row, room in enumerate(rooms): tree.set(row, room)
    for _ in range(500):
        row = random_.randrange(37); rooms[row] = random_.randint(-1, 9); tree.set(row, rooms[row])
        need, start = random_.randint(0, 10), random_.randrange(38)
        assert tree.first(need, start) == next(r for r in range(start, 38) if rooms[r] >= need)


def test_little_padding_on_llava_like_lengths():
    import importlib.util
    spec = importlib.util.spec_from_file_location("packing", "tests/benchmarks/packing.py")
    packing = importlib.util.module_from_spec(spec); spec.loader.exec_module(packing)
    lengths, views = packing.llava_like(20_000)
    plan = plan_epoch(Sizes(lengths, views, {}), BatchSettings(length=4096, rows=4))
    used = sum(lengths[i] for step in plan for row in step.rows for i in row)
    assert 1 - used / (len(plan) * 4 * 4096) < 0.05


# ---- batches

def test_a_batch_is_its_samples_end_to_end():
    examples = [PROCESSOR(s) for s in samples(5)]
    batch = collate([examples[:2], examples[2:], []], 200, views=12, pad_id=0)
    assert batch.input_ids.shape == batch.labels.shape == batch.image_index.shape == (3, 200)
    assert batch.pixels[0].shape == (12, 3, 8, 8) and batch.ids == (("s0", "s1"), ("s2", "s3", "s4"), ())
    first_view = 0
    for row, members in enumerate([examples[:2], examples[2:]]):
        for segment, example in enumerate(members, 1):
            here = batch.segments[row] == segment
            index = batch.image_index[row][here]
            assert torch.equal(batch.input_ids[row][here], example.input_ids) and torch.equal(batch.labels[row][here], example.labels)
            assert batch.positions[row][here].tolist() == list(range(len(example)))
            views = batch.pixels[0][first_view:first_view + example.views]
            assert torch.equal(views, example.pixels[0]) and torch.equal(index[index >= 0], torch.arange(example.rows) + 4 * first_view)
            first_view += example.views
    padding = batch.segments == 0
    assert (batch.labels[padding] == IGNORE).all() and (batch.image_index[padding] == TEXT).all() and (batch.positions[padding] == 0).all()
    assert not batch.pixels[0][first_view:].any()


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_written_token_by_token(side):
    "With rows of padding alone, an example of no token, and tables of different sizes."
    chance = random.Random(5)
    def made(length):
        rows = chance.randint(0, 9)
        index = [chance.randrange(-2, rows) for _ in range(length)]
        values = [chance.randrange(3, 99) for _ in range(length)]
        return Example("i", "n", torch.tensor(values).long(), torch.tensor(values).long() + 1, torch.tensor(index).long(), (), rows)
    rows = [[made(chance.randint(1, 6)) for _ in range(count)] for count in (3, 0, 1, 4)] + [[made(4), made(0)], [made(2)]]
    batch = collate(rows, 30, pad_id=2, side=side)
    first = 0
    for r, row in enumerate(rows):
        places = []                                             # input_ids, labels, image_index, segments, positions
        for number, example in enumerate(row, 1):
            for at, (token, label, index) in enumerate(zip(*(v.tolist() for v in (example.input_ids, example.labels, example.image_index)))):
                places.append((token, label if at else IGNORE, index + first if index >= 0 else index, number, at))
            first += example.rows
        padding = [(2, IGNORE, TEXT, 0, 0)] * (30 - len(places))
        expected = places + padding if side == "right" else padding + places
        assert list(zip(*(values[r].tolist() for values in list(batch.model_inputs().values())[:5]))) == expected


def test_the_first_token_of_a_segment_is_never_a_target():
    example = Example("a", "a", torch.tensor([4, 5]), torch.tensor([4, 5]), torch.full((2,), TEXT), ())
    assert collate([[example, example]], 5).labels.tolist() == [[IGNORE, 5, IGNORE, 5, IGNORE]]


def test_collate_refuses_what_does_not_fit():
    example = PROCESSOR(sample())
    with pytest.raises(ValueError, match="row 0: found .* tokens, expected at most 10: made up, id 's0'"): collate([[example]], 10)
    with pytest.raises(ValueError, match="found 2 views in the batch, expected at most 1"): collate([[example, example]], 300, views=1)


def test_text_alone_brings_no_pixels():
    batch = collate([[PROCESSOR(sample(images=0))]], 100)
    assert batch.pixels[0].shape == (0, 3, 8, 8) and batch.model_inputs()["pixels"] == ()
    assert collate([[PROCESSOR(sample(images=0))]], 100, views=2).model_inputs()["pixels"][0].shape == (2, 3, 8, 8)


def test_batches_move_as_a_whole():
    batch = collate([[PROCESSOR(sample())]], 100).to("cpu", torch.bfloat16)
    assert batch.pixels[0].dtype == torch.bfloat16 and batch.input_ids.dtype == torch.long
    assert batch.to("meta").segments.device.type == "meta"


def test_a_batch_without_supervision_names_its_records():
    mute = replace(PROCESSOR, max_length=8, too_long="cut")
    with pytest.raises(UnsupervisedError, match="made up, id 's3'"): collate([[mute(sample(3))]], 8).require_supervised()
    with pytest.raises(UnsupervisedError, match="made up, id 's0'.*made up, id 's1'"):
        list(Batches([sample(0), sample(1)], mute, BatchSettings(length=8, rows=2, shuffle=False)))


# ---- the same loss

def packed_loss(decoder, batch, segments=True):
    from mllm_nb.language.decoder import attention_mask
    where = batch.segments if segments else (batch.segments > 0).long()
    positions = batch.positions if segments else torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
    logits = decoder(decoder.embed(batch.input_ids.clamp(min=0)), attention_mask(where), positions)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


def test_packed_and_alone_give_the_same_loss_and_gradient():
    from mllm_nb.language.decoder import Decoder, DecoderConfig
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4))
    examples = [PROCESSOR(s) for s in samples(9)]
    rows = [[examples[i] for i in row] for row in pack([len(e) for e in examples], 250)]
    losses, gradients = [], []
    for loss in (packed_loss(decoder, collate(rows, 250)), sum(packed_loss(decoder, collate([[e]], len(e))) for e in examples)):
        decoder.zero_grad(); loss.backward()
        losses.append(loss.detach()); gradients.append(torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None]))
    assert len(rows) < len(examples)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)
    assert (packed_loss(decoder, collate(rows, 250), segments=False) - losses[0]).abs() > 1e-3


def test_packed_and_alone_agree_through_the_whole_model():
    from mllm_nb.language.decoder import DecoderConfig
    from mllm_nb.mllm import MLLM, MLLMConfig
    from mllm_nb.vision.towers import TowerConfig
    from mllm_nb.vision.vit import ViTConfig
    torch.manual_seed(0)
    eye = ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    reader = DecoderConfig(vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = MLLM(MLLMConfig(reader, (TowerConfig("tiny", eye, SMALL),))).eval()
    examples = [PROCESSOR(s) for s in samples(9)]
    rows = [[examples[i] for i in row] for row in pack([len(e) for e in examples], 130)]
    batch = collate(rows, 130, views=16)
    packed = model(**batch.model_inputs(), logits=True).logits
    places = {e.id: packed[r][batch.segments[r] == k] for r, row in enumerate(rows) for k, e in enumerate(row, 1)}
    for example in examples:
        alone = model(**collate([[example]], len(example)).model_inputs(), logits=True).logits[0]
        torch.testing.assert_close(places[example.id], alone, rtol=0, atol=2e-5)
    assert len(rows) < 9 and model(**batch.model_inputs()).loss.isfinite()


# ---- order

def sizes(count=500, seed=0):
    random_ = np.random.default_rng(seed)
    views = (random_.random(count) < .7).astype(np.int64)
    return Sizes(random_.integers(20, 300, count) + 100 * views, views, {})


def seen(plan): return [i for step in plan for row in step.rows for i in row]


def test_every_sample_once_and_only_the_last_batch_filled_up():
    plan = plan_epoch(sizes(), BatchSettings(length=512, rows=4, shuffle=False))
    assert {len(step.rows) for step in plan} == {4} and set(seen(plan)) == set(range(500))
    repeated = len(seen(plan)) - 500
    assert 0 <= repeated <= sum(len(row) for row in plan[-1].rows)
    dropped = plan_epoch(sizes(), BatchSettings(length=512, rows=4, remainder="drop"))
    assert len(set(seen(dropped))) == len(seen(dropped)) and len(dropped) == len(plan) - (repeated > 0)


def test_order_depends_on_seed_and_epoch_alone():
    settings = BatchSettings(length=512, rows=4)
    assert plan_epoch(sizes(), settings, 3) == plan_epoch(sizes(), settings, 3)
    assert plan_epoch(sizes(), settings, 3) != plan_epoch(sizes(), settings, 4) != plan_epoch(sizes(), replace(settings, seed=1), 4)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_each_step(world_size):
    everything = samples(40)
    settings = BatchSettings(length=200, rows=4 // world_size, world_size=world_size)
    parts = [list(Batches(everything, PROCESSOR, replace(settings, rank=rank))) for rank in range(world_size)]
    whole = list(Batches(everything, PROCESSOR, BatchSettings(length=200, rows=4)))
    assert {len(part) for part in parts} == {len(whole)}
    for step, batch in enumerate(whole): assert sum((part[step].ids for part in parts), ()) == batch.ids


def test_grouping_by_modality():
    some = sizes()
    plan = plan_epoch(some, BatchSettings(length=512, rows=4, group_by_modality=True))
    kinds = [{bool(some.views[i]) for row in step.rows for i in row} for step in plan]
    assert sum(len(kind) > 1 for kind in kinds) <= 2 and {True} in kinds and {False} in kinds
    assert set(seen(plan)) == set(range(500))
    first = [min(kind) for kind in kinds]
    assert first != sorted(first) and first != sorted(first, reverse=True)      # the kinds alternate


def test_buckets_without_packing():
    some = sizes()
    plan = plan_epoch(some, BatchSettings(length=512, rows=4, packing=False, buckets=(128, 256)))
    assert {step.length for step in plan} == {128, 256, 512} and set(seen(plan)) == set(range(500))
    for step in plan: assert all(len(row) == 1 and some.lengths[row[0]] <= step.length for row in step.rows)
    for wrong in ({"packing": True}, {"packing": False, "length": 64}):
        with pytest.raises(ValueError, match="bucket"): BatchSettings(**{"length": 512, "rows": 1, "buckets": (128,), **wrong})


def test_static_views():
    batches = Batches(samples(), PROCESSOR, BatchSettings(length=300, rows=2, views_per_batch=6))
    assert {tuple(batch.pixels[0].shape) for batch in batches} == {(6, 3, 8, 8)}
    with pytest.raises(ValueError, match="multiple of rows"): BatchSettings(length=300, rows=2, views_per_batch=5)


def same(a, b): return a.ids == b.ids and all(torch.equal(x, y) for x, y in zip(a.model_inputs().values(), b.model_inputs().values()) if torch.is_tensor(x))


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_in_the_middle_is_exact(workers):
    settings = BatchSettings(length=200, rows=2, workers=workers)
    def fresh(): return Batches(samples(14), PROCESSOR, settings)
    def run(batches): return itertools.chain.from_iterable(itertools.repeat(batches))
    uninterrupted = list(itertools.islice(run(fresh()), 12))
    for stop in (0, 1, len(fresh()), len(fresh()) + 2):
        first = fresh()
        list(itertools.islice(run(first), stop))
        state = json.loads(json.dumps(first.state_dict()))
        second = fresh(); second.load_state_dict(state)
        rest = list(itertools.islice(run(second), 12 - stop))
        assert len(rest) == 12 - stop and all(map(same, rest, uninterrupted[stop:]))


def test_resuming_on_other_data_or_settings_is_refused():
    batches = Batches(samples(), PROCESSOR, BatchSettings(length=200, rows=2))
    state = batches.state_dict()
    with pytest.raises(ValueError, match="seed: found 1, expected 0"):
        Batches(samples(), PROCESSOR, BatchSettings(length=200, rows=2, seed=1)).load_state_dict(state)
    with pytest.raises(ValueError, match="samples: found"):
        Batches(samples(39), PROCESSOR, BatchSettings(length=200, rows=2)).load_state_dict(state)
    Batches(samples(), PROCESSOR, BatchSettings(length=200, rows=1, world_size=2, workers=3)).load_state_dict(state)


def test_examples_made_before_give_the_same_batches():
    settings = BatchSettings(length=200, rows=2, views_per_batch=12)
    made = Batches([PROCESSOR(s) for s in samples()], None, settings)
    assert all(map(same, made, Batches(samples(), PROCESSOR, settings)))
    assert made.steps(3) == sum(len(plan_epoch(made.sizes, settings, epoch)) for epoch in range(3))


def test_errors_of_workers_reach_the_loop():
    broken = samples(10); broken[4] = replace(broken[4], images=("nowhere.png",) * len(broken[4].images))
    assert broken[4].images
    with pytest.raises(RecordError, match="nowhere.png"): list(Batches(broken, PROCESSOR, BatchSettings(length=200, rows=2, workers=2)))


def test_too_long_for_the_row_and_nothing_left():
    with pytest.raises(ValueError, match="expected at most 60 for a row; give the processor"): Batches(samples(), PROCESSOR, BatchSettings(length=60, rows=2))
    with pytest.raises(ValueError, match="no sample to train on"): Batches(samples(2), PROCESSOR, BatchSettings(length=60, rows=2), skip=[0, 1])
    with pytest.raises(ValueError, match="sizes of 3 samples, expected 2"): Batches(samples(2), PROCESSOR, BatchSettings(length=400, rows=2), sizes=measure(samples(3), PROCESSOR))


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"length": 0}, {"rank": 1}, {"remainder": "keep"}])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ValueError): BatchSettings(**{"length": 10, "rows": 1, **wrong})


def test_expansion_equals_token_by_token():
    "Words are copied run by run; the plain way looks at every token."
    random = np.random.default_rng(0)
    for _ in range(50):
        ids = random.choice([IMAGE_TOKEN_ID, 1, 2, 3], random.integers(0, 20)).tolist()
        layouts = [random.choice([-2, 0, 1, 2], random.integers(0, 5)).tolist() for _ in range(ids.count(IMAGE_TOKEN_ID))]
        found, at, image = expand_images(ids, ids, layouts, [3] * len(layouts), first_row=4), 0, 0
        for token in ids:
            places = [-1]
            if token == IMAGE_TOKEN_ID:
                places, image = [row + 4 + 3 * image if row >= 0 else row for row in layouts[image]], image + 1
            label = IGNORE if token == IMAGE_TOKEN_ID else token
            for place in places:
                assert (found.input_ids[at], found.labels[at], found.image_index[at]) == (token, label, place)
                at += 1
        assert at == len(found.input_ids)
