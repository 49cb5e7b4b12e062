"Mixtures: what is asked for is what comes out, always the same, without copies, leaks and broken records."
import io
import json
import random
import subprocess
import sys
import tarfile
from dataclasses import replace
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mllm_nb.data.mixture import (
    CAMBRIAN_RATIOS, LETTER, SHORT, AnswerPrompt, Mixture, MixtureError, Pictures, Shards, Source, allocate, category_shares,
    difference_hash, draw, exact_copies, form_of, jaccard, key_of, make_plan, minhash, near_copies, quotas, ranks, read_mixture, read_surveys,
    report_notes, report_rows, report_table, shared_out, shingles, survey, write_plan, write_report, write_shards)
from mllm_nb.data.records import RecordError, Records, Sample, check_records
from mllm_nb.data.world import CATEGORIES
from mllm_nb.language.chat import Turn


def said(question, answer, **more):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def many(name, count, words="zero one two three four five six seven eight nine ten".split()):
    random_ = random.Random(name)
    return [said(f"{name} {i} {' '.join(random_.choices(words, k=12))}?", f"answer {i * 7}", id=f"{name}{i}") for i in range(count)]


def picture(seed, size=(48, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8).repeat(2, 0).repeat(2, 1))


def write(folder, sources, **settings):
    "A mixture file: {name: (category, records, fields of the source)}."
    listed = []
    for name, (category, records, *fields) in sources.items():
        (folder / f"{name}.jsonl").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
        listed.append({"name": name, "file": f"{name}.jsonl", "category": category, **(fields[0] if fields else {})})
    (folder / "mixture.json").write_text(json.dumps({"sources": listed, **settings}))
    return read_mixture(folder / "mixture.json")


# ---- how many

@given(st.integers(0, 5000), st.dictionaries(st.sampled_from("abcdefg"), st.integers(0, 1000), min_size=1))
def test_shares_add_up_and_are_nearest(total, weights):
    parts = shared_out(total, weights)
    whole = sum(weights.values())
    assert sum(parts.values()) == (total if whole else 0)
    for name, part in parts.items():
        exact = Fraction(total * weights[name], whole) if whole else 0
        assert exact - 1 < part < exact + 1 or part == exact


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(CATEGORIES), st.integers(0, 400), min_size=1),
       st.none() | st.dictionaries(st.sampled_from(CATEGORIES), st.floats(0, 50).map(lambda x: round(x, 2)), min_size=1).filter(lambda r: any(r.values())),
       st.none() | st.integers(1, 3000))
def test_quotas(supply, ratios, total):
    given_ = quotas(supply, ratios, total)
    assert set(given_) == set(supply) and all(0 <= given_[c] <= supply[c] for c in supply)
    usable = {c: supply[c] for c in supply if supply[c] and (ratios or supply).get(c)}
    if total is not None: assert sum(given_.values()) == min(total, sum(usable.values()))
    weights = {c: (ratios or supply)[c] for c in usable}
    free = [c for c in usable if given_[c] < supply[c]]          # who did not fall short got its share, to one record
    if free and total is not None:
        level = sum(given_[c] for c in free) / sum(weights[c] for c in free)
        assert all(abs(given_[c] - level * weights[c]) <= 1 for c in free)
    if total is None and usable:
        largest = min(usable[c] / weights[c] for c in usable)
        assert abs(sum(given_.values()) - largest * sum(weights.values())) <= 1 + 1e-6 * sum(given_.values())


def test_by_hand():
    supply = {"ocr": 400, "general": 300, "counting": 30}
    ratios = {"ocr": .4, "general": .5, "counting": .1}
    assert quotas(supply, ratios, None) == {"ocr": 120, "general": 150, "counting": 30}
    assert quotas(supply, None, None) == supply and quotas(supply, None, 73) == {"ocr": 40, "general": 30, "counting": 3}
    assert sum(CAMBRIAN_RATIOS.values()) == pytest.approx(100.40), "the published percentages, as they are"


def test_caps_and_categories():
    sources = (Source("a", "a", "ocr"), Source("b", "b", "ocr", cap=10), Source("c", "c", "math"), Source("d", "d", "math", held_out=True))
    mixture = Mixture(sources, threshold=100)
    assert allocate(mixture, [1000, 1000, 40, 500]) == [100, 10, 40, 0]
    assert allocate(replace(mixture, ratios={"ocr": 1, "math": 1}), [1000, 1000, 40, 500]) == [36, 4, 40, 0]
    assert allocate(replace(mixture, threshold=None), [1000, 1000, 40, 500]) == [1000, 10, 40, 0]
    assert allocate(replace(mixture, ratios={"ocr": 1, "code": 5}), [10, 10, 10, 10]) == [10, 10, 0, 0], "a category without sources is left out"
    assert allocate(mixture, [0, 0, 0, 0]) == [0, 0, 0, 0]


# ---- which ones

def splitmix(number, key):
    "Steele 2014, with Python's integers."
    mask = (1 << 64) - 1
    z = (key + number * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@given(st.integers(0, 300), st.integers(0, 60), st.integers(0, 2 ** 64 - 1), st.sets(st.integers(0, 299)), st.integers(1, 400))
def test_draw_takes_the_smallest_ranks(records, count, key, without, chunk):
    without = sorted(i for i in without if i < records)
    plain = sorted((i for i in range(records) if i not in without), key=lambda i: splitmix(i, key))[:count]
    assert draw(count, records, key, np.array(without, np.int64), chunk).tolist() == sorted(plain)


def test_ranks_are_even_and_independent_of_platform():
    assert ranks(np.array([0, 1, 2], np.uint64), 42).tolist() == [splitmix(i, 42) for i in range(3)]
    assert key_of("vqa", 0) == 2 ** 64 - 1 - (2 ** 64 - 1 - key_of("vqa", 0)) and key_of("a", "b") != key_of("ab")
    counts = np.bincount(draw(10_000, 100_000, 7) // 10_000, minlength=10)
    assert (abs(counts - 1000) < 150).all()


def test_a_larger_cap_contains_the_smaller_and_sources_do_not_disturb_each_other(tmp_path):
    sources = {"a": ("ocr", many("a", 80)), "b": ("math", many("b", 60))}
    mixture = write(tmp_path, sources, threshold=20)
    small, large = make_plan(mixture), make_plan(replace(mixture, threshold=50))
    assert all(set(one) < set(other) for one, other in zip(small.chosen, large.chosen))
    alone = make_plan(replace(mixture, sources=mixture.sources[1:]))
    assert np.array_equal(alone.chosen[0], small.chosen[1])
    assert not np.array_equal(small.chosen[0], make_plan(replace(mixture, seed=1)).chosen[0])


def test_the_same_in_every_process(tmp_path):
    write(tmp_path, {"a": ("ocr", many("a", 80)), "b": ("math", many("b", 60))}, threshold=20, seed=3)
    code = ("import sys; from mllm_nb.data.mixture import *; p = make_plan(read_mixture(sys.argv[1]));"
            "print(p.fingerprint(), [p[i].id for i in range(3)])")
    plan = make_plan(read_mixture(tmp_path / "mixture.json"))
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path / "mixture.json")], capture_output=True, text=True, check=True).stdout.strip()
    assert found == f"{plan.fingerprint()} {[plan[i].id for i in range(3)]}"


# ---- settings

@pytest.mark.parametrize("change, said_", [
    ({"threshold": 0}, "threshold: found 0"), ({"total": -3}, "total"), ({"total": 2.5}, "total"), ({"ratios": {"poetry": 1}}, "poetry"),
    ({"ratios": {"ocr": -1}}, "ratios"), ({"ratios": {"ocr": 0}}, "ratios"), ({"ratios": {"ocr": "much"}}, "ratios"), ({"prompt": "loud"}, "prompt"),
    ({"sources": ()}, "no sources"), ({"sources": (Source("a", "a", "ocr"), Source("a", "b", "ocr"))}, "'a' comes 2 times"),
    ({"sources": (Source("a", "a", "OCR"),)}, "'OCR', expected one of language"), ({"sources": (Source("a", "a", "ocr", cap=0),)}, "cap: found 0")])
def test_wrong_settings_are_named(change, said_):
    with pytest.raises(MixtureError, match=said_): Mixture(**{"sources": (Source("a", "a", "ocr"),), **change})


def test_mixture_files(tmp_path):
    path = tmp_path / "m.json"
    for text, said_ in (("{", "expected a mixture as JSON"), ("[]", "list of sources"), ('{"sources": [{"name": "a", "file": "x"}]}', "source 0: no category"),
                        ('{"sources": [], "seeds": 1}', "unknown seeds"), ('{"sources": [3]}', "expected an object"),
                        ('{"sources": [{"name": "a", "file": 3, "category": "ocr"}]}', "file: found 3, expected a text"),
                        ('{"sources": [{"name": "a\\nb", "file": "x", "category": "ocr"}]}', "expected a line of text"),
                        ('{"sources": [{"name": "a", "file": "x", "category": "ocr"}], "ratios": [1]}', "expected a weight for each category"),
                        ('{"sources": [{"name": "a", "file": "x", "category": "ocr"}], "seed": "x"}', "seed: found 'x', expected a whole number"),
                        ("[" * 100_000, "expected a mixture as JSON")):
        path.write_text(text)
        with pytest.raises(MixtureError, match=said_): read_mixture(path)
    with pytest.raises(MixtureError, match="no such file"): read_mixture(tmp_path / "none.json")


def test_a_mixture_of_nothing_usable_is_reported(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n')
    mixture = Mixture((Source("a", "a.jsonl", "ocr"),), folder=str(tmp_path))
    plan = make_plan(mixture, survey(mixture))
    assert len(plan) == 0 and "| a " in report_table(plan) and write_report(plan, tmp_path / "out").is_file()


def test_all_missing_files_are_named_at_once(tmp_path):
    mixture = write(tmp_path, {"a": ("ocr", many("a", 3)), "b": ("ocr", many("b", 3), {"images": "no-folder"}), "c": ("math", many("c", 3))})
    (tmp_path / "c.jsonl").unlink()
    for call in (mixture.open, lambda: survey(mixture), lambda: make_plan(mixture)):
        with pytest.raises(MixtureError) as caught: call()
        assert "2 missing" in str(caught.value) and "source 'c': no file" in str(caught.value) and str(tmp_path / "c.jsonl") in str(caught.value)
        assert "source 'b': no image folder" in str(caught.value)


# ---- copies

def test_minhash_estimates_the_jaccard_index():
    random_ = random.Random(1)
    for share in (0, .3, .6, .9, 1):
        one = [f"w{random_.randrange(10 ** 6)}" for _ in range(120)]
        other = [word if i < share * 120 else f"v{i}" for i, word in enumerate(one)]
        a, b = shingles(" ".join(one)), shingles(" ".join(other))
        plain = [" ".join(text[i:i + 3]) for text in (one, other) for i in range(118)]
        assert jaccard(a, b) == pytest.approx(len(set(plain[:118]) & set(plain[118:])) / len(set(plain)))
        assert abs(jaccard(a, b) - (minhash(a) == minhash(b)).mean()) < .2
    assert len(shingles("")) == 1 and jaccard(shingles("one"), shingles("one")) == 1


def test_exact_copies_are_read_again_so_a_collision_is_none():
    forms = [form_of(said(q, "a"), []) for q in ("one", "two", "ONE ", "three", "two")]
    assert exact_copies(np.zeros(5, np.uint64), forms.__getitem__) == {2: 0, 4: 1}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10 ** 6))
def test_near_copies_are_those_of_the_plain_search(seed):
    random_, words = random.Random(seed), [f"w{i}" for i in range(40)]
    texts = []
    for _ in range(8):
        base = random_.choices(words, k=30)
        texts += [" ".join(base), " ".join(random_.choice(words) if random_.random() < .03 else word for word in base)]
    forms = [form_of(said(text, "yes"), []) for text in texts]
    from mllm_nb.data.mixture import band_keys
    keys = np.stack([band_keys(form) for form in forms])
    found = near_copies(keys.T, forms.__getitem__)
    similar = {(j, i) for i, j in combinations(range(16), 2) if jaccard(shingles(forms[i].text), shingles(forms[j].text)) >= .8}
    for i, keeper in found.items(): assert keeper < i and keeper not in found
    assert set(found) <= {i for i, _ in similar}, "nothing is called a copy that is not similar"
    clear = {i for i, j in similar if jaccard(shingles(forms[i].text), shingles(forms[j].text)) > .9}
    assert clear <= set(found) | {j for _, j in similar if j not in found} and len(clear - set(found)) == 0


def test_a_crowd_of_look_alikes_is_not_quadratic():
    forms = [form_of(said(f"{' '.join('abcdefghij')} {i}", "x"), []) for i in range(400)]
    compared = [0]
    def form(i): compared[0] += 1; return forms[i]
    near_copies([np.zeros(400, np.uint64)], form, similarity=.99)
    assert compared[0] < 400 * 9 * 4


@pytest.fixture
def pile(tmp_path):
    "Sources with every flaw, and a benchmark of which two records leaked under other names."
    for name in ("coco", "web", "bench"): (tmp_path / name).mkdir()
    for i in range(12): picture(i).save(tmp_path / "coco" / f"{i}.png")
    for i in (3, 4): picture(i).save(tmp_path / "web" / f"copy{i}.png")
    picture(5).save(tmp_path / "web" / "again.jpg", quality=70)
    picture(50).save(tmp_path / "bench" / "b.png"); picture(50).save(tmp_path / "coco" / "leak.png")
    (tmp_path / "coco" / "torn.png").write_bytes((tmp_path / "coco" / "1.png").read_bytes()[:500])
    long = "a man walks his dog along the beach in the evening while the sun goes down behind the old lighthouse on the hill"
    coco = [said(f"<image>\nwhat is in picture {i} of the series?", f"thing {i}", id=f"c{i}", image=f"{i}.png") for i in range(12)]
    coco += [said("<image>\nfrom the benchmark", "yes", id="leak", image="leak.png"), said("<image>\nhm", "x", id="torn", image="torn.png"),
             said("<image>\nhm", "x", id="gone", image="gone.png"), '{"id": "cut', said("<image>\nx", "", id="mute", image="1.png")]
    web = [{**coco[3], "image": "copy3.png", "id": "w3"}, {**coco[4], "image": "copy4.png", "id": "w4"}, {**coco[5], "image": "again.jpg", "id": "w5"},
           said("Tell me a story", long, id="s1"), said("TELL me a  story", long, id="s2"), said("Tell me a story", long.replace("evening", "morning"), id="s3"),
           said("Tell me a story", "completely different words here", id="s4"), said("what leaked as text only, word for word?", "this did", id="s5")]
    bench = [said("<image>\nfrom the benchmark", "yes", id="b", image="b.png"), said("what leaked as text only, word for word?", "this did", id="t")]
    return write(tmp_path, {"coco": ("general", coco, {"images": "coco"}), "web": ("language", web, {"images": "web"}),
                            "bench": ("general", bench, {"images": "bench", "held_out": True})})


@pytest.mark.parametrize("images, broken, exact, near, leaked", [
    ("names", {14, 15, 16}, {4, 7}, {5}, 1), ("bytes", {13, 14, 15, 16}, {0, 1, 4, 7}, {5}, 2), ("pixels", {13, 14, 15, 16}, {0, 1, 2, 4, 7}, {5}, 2)])
def test_the_survey_finds_what_it_can_see(pile, images, broken, exact, near, leaked):
    coco, web, bench = survey(pile, images)
    assert set(coco.broken) == broken and not web.broken and not bench.broken
    assert {copy[0] for copy in web.exact} == exact and {copy[0] for copy in web.near} == near
    assert sum(one.leaked([2]) for one in (coco, web)) == leaked and bench.leaked([2]) == 0 and not len(bench.bad)
    assert (4, 1, 3) in web.exact and (5, 1, 3) in web.near and (7, 2, 1) in web.exact
    assert any("gone.png" in problem and "no such file" in problem for problem in coco.problems)
    assert sum(web.lengths) == 8 and sum(coco.lengths) == 17 - len(broken)
    assert (coco.shown, web.shown, bench.shown) == ((0 if images == "names" else 1), 0, 0)
    without = survey(pile, images, near=False)
    assert not without[1].near and without[1].exact == web.exact


def test_what_is_bad_is_not_in_the_plan(pile):
    surveys = survey(pile, "pixels")
    plan = make_plan(pile, surveys)
    ids = [plan[i].id for i in range(len(plan))]
    assert len(ids) == len(set(ids)) == len(plan) == 12 + 2
    assert not {"coco/leak", "coco/torn", "coco/gone", "coco/mute", "web/w3", "web/s2", "web/s5"} & set(ids) and not any(i.startswith("bench") for i in ids)
    for i in range(len(plan)): plan[i].open_images()
    rows = {row["source"]: row for row in report_rows(plan)}
    assert rows["web"]["exact"] == 5 and rows["web"]["near"] == 1 and rows["coco"]["leaked"] == 1 and rows["bench"]["taken"] == 0
    assert "| all" in report_table(plan)


def test_a_file_that_is_cut_off_is_told(tmp_path):
    mixture = write(tmp_path, {"a": ("ocr", many("a", 3)), "b": ("ocr", []), "c": ("ocr", ["not json"])})
    (tmp_path / "a.jsonl").write_text(json.dumps(many("a", 4))[:-30])
    (tmp_path / "b.jsonl").write_text("")
    a, b, c = survey(mixture)
    assert "not closed" in a.problems[0] and a.broken == (3,) and "empty" in b.problems[0] and c.broken == (0,)
    assert len(make_plan(mixture, [a, b, c])) == 3


def test_a_survey_of_other_files_is_refused(pile):
    surveys = survey(pile)
    with open(pile.path("web.jsonl"), "a") as file: file.write(json.dumps(said("new", "new")) + "\n")
    with pytest.raises(MixtureError, match="'web': found 9 records in .* the survey was of 8"): make_plan(pile, surveys)
    with pytest.raises(MixtureError, match="survey was of coco, web: make"): make_plan(pile, surveys[:2])


def test_a_stored_survey_serves_another_mixture(pile, tmp_path):
    surveys = survey(pile, "bytes")
    write_report(make_plan(pile, surveys), tmp_path / "out")
    assert read_surveys(tmp_path / "out" / "report.json") == surveys
    assert np.array_equal(make_plan(pile, surveys).order, make_plan(pile, read_surveys(tmp_path / "out" / "report.json")).order)
    with pytest.raises(MixtureError, match="no such file"): read_surveys(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(MixtureError, match="expected a report"): read_surveys(tmp_path / "x.json")


def test_pictures_of_plain_paper_are_not_all_the_same():
    paper = [Image.new("RGB", (100, 80), "white") for _ in range(3)]
    for image, box in zip(paper, ((10, 10, 40, 40), (60, 40, 90, 70))): image.paste("black", box)
    hashes = [difference_hash(image).tobytes() for image in paper]
    look = Pictures("pixels")
    assert len({look.resembling(hash) for hash in hashes}) == 3
    buffer = io.BytesIO(); paper[0].save(buffer, "JPEG", quality=50)
    assert look.resembling(difference_hash(Image.open(buffer)).tobytes()) == hashes[0]
    with pytest.raises(ValueError, match="names"): Pictures("smell")


# ---- reports

def test_reports(tmp_path):
    mixture = write(tmp_path, {"a": ("ocr", many("a", 90)), "b": ("math", many("b", 30)), "c": ("language", many("c", 10))}, ratios="cambrian", total=100)
    plan = make_plan(mixture, survey(mixture))
    assert len(plan) == 100
    shares = category_shares(plan)
    assert sum(shares["taken"].values()) == pytest.approx(1) and shares["pile"]["ocr"] == pytest.approx(90 / 130)
    notes = report_notes(plan)
    assert any(note.startswith("general: 34.52 of 100.4 wanted, but no source") for note in notes) and any(note.startswith("language: 10.0 % instead") for note in notes)
    path = write_report(plan, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert facts["samples"] == 100 and facts["fingerprint"] == plan.fingerprint() and len(facts["surveys"]) == 3
    assert all((tmp_path / "out" / f"{name}.png").stat().st_size > 3000 for name in ("sources", "balance", "lengths")) and "| a " in path.read_text()
    few = make_plan(replace(mixture, total=10 ** 6, ratios=None))
    assert len(few) == 130 and report_notes(few)[-1] == "130 samples instead of 1000000: there are no more"


# ---- shards

@pytest.fixture
def plan(pile): return make_plan(pile, survey(pile, "bytes"))


def test_shards_hold_the_same_samples_and_are_records_when_unpacked(plan, tmp_path):
    folder = tmp_path / "shards"
    write_shards(plan, folder, per_shard=4, fingerprint=plan.fingerprint())
    shards = Shards(folder)
    assert len(shards) == len(plan) == 15 and len(list(folder.glob("*.tar"))) == 4 and shards.check() == []
    for i in (0, 3, 4, 14, -1):
        assert shards[i].turns == plan[i % 15].turns and shards[i].id == plan[i % 15].id
        assert [image.tobytes() for image in shards[i].open_images()] == [image.tobytes() for image in plan[i % 15].open_images()]
    with pytest.raises(IndexError): shards[15]
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as archive: archive.extractall(tmp_path / "out", filter="data")
    lines = [path.read_text() for path in sorted((tmp_path / "out").glob("*.json"))]
    (tmp_path / "out" / "all.jsonl").write_text("\n".join(lines))
    records = Records(tmp_path / "out" / "all.jsonl")
    assert check_records(records, "decode").ok and [records[i].turns for i in range(15)] == [plan[i].turns for i in range(15)]


def test_shards_go_on_after_a_stop_in_parts_and_byte_for_byte(plan, tmp_path):
    whole = tmp_path / "whole"
    write_shards(plan, whole, per_shard=2, fingerprint="f")
    class Stop(Exception): pass
    class Breaks:
        def __init__(self): self.left = 5
        def __len__(self): return len(plan)
        def __getitem__(self, i):
            self.left -= 1
            if self.left < 0: raise Stop
            return plan[i]
    torn = tmp_path / "torn"
    with pytest.raises(Stop): write_shards(Breaks(), torn, per_shard=2, fingerprint="f")
    with pytest.raises(MixtureError, match="2 shards are finished"): Shards(torn)
    for part in (1, 0): write_shards(plan, torn, per_shard=2, fingerprint="f", part=(part, 2))
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {p.name: p.read_bytes() for p in torn.iterdir() if ".partial" not in p.name}
    with pytest.raises(MixtureError, match="another|mixture f"): write_shards(plan, torn, per_shard=2, fingerprint="g")


def test_damaged_shards_are_named(plan, tmp_path):
    write_shards(plan, tmp_path / "s", per_shard=5)
    path = tmp_path / "s" / "shard-00001.tar"
    data = bytearray(path.read_bytes())
    data[100:400] = bytes(300)
    path.write_bytes(data)
    assert len(Shards(tmp_path / "s").check()) == 1 and "shard-00001.tar" in Shards(tmp_path / "s").check()[0]
    with pytest.raises(RecordError, match="shard-00001.tar, byte 0"): Shards(tmp_path / "s")[5]
    path.unlink()
    with pytest.raises(MixtureError, match="missing shard-00001.tar"): Shards(tmp_path / "s")


def test_a_picture_that_cannot_be_read_stops_or_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    turns = (Turn("human", "<image>\nx"), Turn("gpt", "y"))
    samples = [Sample("good", (picture(1),), turns), Sample("bad", (tmp_path / "bad.png",), turns), Sample("none", (), (Turn("human", "x"), Turn("gpt", "y")))]
    with pytest.raises(RecordError, match="'bad'"): write_shards(samples, tmp_path / "s")
    write_shards(samples, tmp_path / "t", skip_bad=True)
    shards = Shards(tmp_path / "t")
    assert [shards[i].id for i in range(len(shards))] == ["good", "none"]
    assert json.loads((tmp_path / "t" / "shards.json").read_text())["shards"][0]["refused"] == 1


def test_a_plan_as_one_file(plan, tmp_path):
    path, root = write_plan(plan, tmp_path / "out")
    records = Records(path, root)
    assert check_records(records, "decode").ok and [records[i].turns for i in range(15)] == [plan[i].turns for i in range(15)]


# ---- the answer machine

def chat(*texts): return tuple(Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts))


@pytest.mark.parametrize("question, answer, wish", [
    ("How many?", "2", SHORT), ("What colour?", "dark blue", SHORT), ("What is it?", "A dog.", ""), ("Why?", "Because the sun is low in the sky", ""),
    ("Which?\nA. pug\nB. husky", "B", LETTER), ("Which? (A) pug (B) husky ", "(A)", LETTER), ("Which letter is it?", "B", SHORT),
    (f"How many?\n{SHORT}", "2", ""), ("How many dogs?", "There are two!", "")])
def test_who_wants_a_short_answer(question, answer, wish):
    assert AnswerPrompt().wanted(question, answer) == wish
    turns = AnswerPrompt()(chat(question, answer))
    assert turns[0].text == (f"{question}\n{wish}" if wish else question) and turns[1].text == answer
    assert AnswerPrompt()(turns) == turns


def test_system_prompts_only_where_all_is_short():
    system = AnswerPrompt(place="system")
    assert system(chat("How many?", "2", "And now?", "3"))[0] == Turn("system", SHORT)
    for turns in (chat("How many?", "2", "Why?", "Because it is so."), (Turn("system", "Be kind."), *chat("How many?", "2"))):
        assert system(turns) == turns


def test_prompts_by_source(tmp_path):
    sources = {name: ("ocr", [said(f"{name} how many?", "2", id="1")], extra) for name, extra in (("a", {}), ("b", {"prompt": ""}), ("c", {"prompt": "system"}))}
    plan = make_plan(write(tmp_path, sources, prompt="suffix"))
    turns = {plan[i].id[0]: plan[i].turns for i in range(3)}
    assert turns["a"][0].text.endswith(SHORT) and turns["b"][0].text == "b how many?" and turns["c"][0] == Turn("system", SHORT)


def test_a_plan_is_what_batches_want(plan):
    from mllm_nb.data.batches import Batches, BatchSettings
    from mllm_nb.training.miniatures import load_tokenizer, miniature_processor
    batches = Batches(plan, miniature_processor(load_tokenizer()), BatchSettings(512, 2))
    assert {name for batch in batches for row in batch.ids for name in row} == {plan[i].id for i in range(len(plan))}
