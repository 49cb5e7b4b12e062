"""Widgets: the payload that Python computes, the saved page in a browser without a network, and live in JupyterLab."""
import base64
import json
import os
import socket
import subprocess
import sys
import time

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from mllm_nb.samples import photo
from mllm_nb.widgets import (
    Widget, WidgetTooLarge, codebook_browser, flip_book, lora_rank_explorer, patch_grid_explorer, sentence_composer, settings_explorer, token_role_strip, window_viewer)


def gradient(side: int = 64) -> Image.Image:
    "A picture whose grey value rises from left to right."
    return Image.fromarray(np.tile(np.linspace(0, 255, side).astype(np.uint8), (side, 1))).convert("RGB")


def strip() -> Widget:
    roles = ["image"] * 4 + ["prompt"] * 2 + ["answer"] * 2 + ["prompt", "answer", "padding"]
    words = ["▦"] * 4 + ["What?", "</script>", "a", "cat", "2+2", "4", "·"]
    labels = [i if role == "answer" else -100 for i, role in enumerate(roles)]
    return token_role_strip(words, roles, list(range(11)), labels, [1] * 8 + [2] * 2 + [0], title="Two <samples>")


# ---- payloads ----

def test_patch_counts_and_rows():
    payload = patch_grid_explorer(gradient(), sizes=(8, 16, 32), side=64).payload
    assert [(s["patch"], s["rows"], s["columns"], s["tokens"], s["numbers"]) for s in payload["sizes"]] == [
        (8, 8, 8, 64, 192), (16, 4, 4, 16, 768), (32, 2, 2, 4, 3072)]
    rows = np.frombuffer(base64.b64decode(payload["sizes"][1]["matrix"]), np.uint8).reshape(16, 64)
    means = rows.mean(axis=1).reshape(4, 4)
    assert (np.diff(means, axis=1) > 40).all() and np.allclose(means, means[:1])  # rises with the column alone
    assert abs(means[0, 0] - np.asarray(gradient())[:16, :16].mean()) < 2


@pytest.mark.parametrize("size", [(9,), (0,), (), (8, 7)])
def test_patch_sizes_that_do_not_fit_are_named(size):
    with pytest.raises(ValueError, match="must divide the side of 64 pixels"):
        patch_grid_explorer(gradient(), sizes=size, side=64)


@pytest.mark.parametrize("picture", [photo("coins"), np.zeros((3, 40, 50)), np.zeros((30, 20), np.uint8), gradient(31)])
def test_any_picture_becomes_a_square(picture):
    assert patch_grid_explorer(picture, sizes=(32,), side=64).payload["sizes"][0]["tokens"] == 4


def test_a_grey_picture_keeps_its_picture():
    grey = patch_grid_explorer(gradient().convert("L"), sizes=(16,), side=64)
    assert grey.payload == patch_grid_explorer(gradient(), sizes=(16,), side=64).payload


def test_strip_payload():
    payload = strip().payload
    assert payload["counts"] == [["image", 4], ["prompt", 3], ["answer", 3], ["padding", 1]]
    assert payload["learned"] == 3
    assert payload["attends"][7] == [[0, 8]] and payload["attends"][9] == [[8, 10]] and payload["attends"][10] == [[10, 11]]
    assert [token["position"] for token in payload["tokens"]] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 0]
    assert [token["label"] for token in payload["tokens"]][5:8] == [None, 6, 7]


def test_strip_takes_a_mask_of_its_own():
    mask = np.array([[1, 0, 1], [1, 1, 1], [0, 0, 1]], bool)
    payload = token_role_strip(["a", "b", "c"], ["prompt"] * 3, mask=mask).payload
    assert payload["attends"] == [[[0, 1], [2, 3]], [[0, 3]], [[2, 3]]]


def test_lists_of_different_lengths_are_named():
    with pytest.raises(ValueError, match="3 tokens but 2 roles"):
        token_role_strip(["a", "b", "c"], ["prompt"] * 2)
    with pytest.raises(ValueError, match="2 tokens but 1 ids"):
        token_role_strip(["a", "b"], ["prompt"] * 2, ids=[1])


def test_flip_book_frames():
    from mllm_nb.plots import show_matrix
    book = flip_book(lambda size: show_matrix(np.eye(size)), "Eye", size=[1, 2])
    assert [frame["value"] for frame in book.payload["frames"]] == ["1", "2"]
    with pytest.raises(ValueError, match="one control"):
        flip_book(lambda: None)


def viewer() -> Widget:
    weights = np.full((4, 5), .2)
    weights[3] = [.6, .1, .1, .2, 0]
    return window_viewer(gradient(), {"words": weights[:, :1], "pictures": weights[:, 1:]})


def test_window_weights():
    words, pictures = viewer().payload["towers"]
    assert viewer().payload["queries"] == 2 and (words["side"], pictures["side"]) == (2, 4)
    assert words["shares"] == [.2, .2, .2, .6] and pictures["shares"][3] == .4
    assert list(base64.b64decode(pictures["weights"]))[-4:] == [128, 128, 255, 0]


@pytest.mark.parametrize("shapes", [[(4, 1), (9, 4)], [(3, 1)], [(4, 3)], []])
def test_weights_that_do_not_belong_together_are_named(shapes):
    with pytest.raises(ValueError, match="found shapes"):
        window_viewer(gradient(), {str(i): np.full(shape, 1 / shape[1]) for i, shape in enumerate(shapes)})
    with pytest.raises(ValueError, match="sum to 1"):
        window_viewer(gradient(), {"one": np.ones((4, 4))})


def explorer() -> Widget:
    def facts(side, patch):
        if side % patch:
            raise ValueError(f"{patch} does not divide {side}")
        return {"tokens": (side // patch) ** 2}
    return settings_explorer("Cut", facts, side=[64, 96], patch=[16, 32, 48])


def test_settings_are_looked_up_and_refusals_told():
    entries = explorer().payload["entries"]
    assert entries["0,0"]["facts"] == [["tokens", "16", round(16 / 36, 4)]] and entries["1,0"]["facts"][0][2] == 1
    assert entries["0,2"] == {"facts": [], "refused": "48 does not divide 64"}
    with pytest.raises(ValueError, match="at least one value"):
        settings_explorer("Cut", lambda: {}, side=[])


def low_rank(seed: int = 0) -> np.ndarray:
    "A matrix [20, 12] of rank 2."
    rng = np.random.default_rng(seed)
    return rng.normal(size=(20, 2)) @ rng.normal(size=(2, 12))


def test_rank_payload():
    matrix = low_rank()
    payload = lora_rank_explorer(matrix, {0: 2.0, 1: 1.0, 2: 0.25}, shown=8).payload
    values = np.linalg.svd(matrix, compute_uv=False)
    assert np.allclose(payload["singular"], values, atol=1e-4) and len(payload["singular"]) == 12
    assert [entry["numbers"] for entry in payload["ranks"]] == [0, 32, 64] and [entry["loss"] for entry in payload["ranks"]] == [2, 1, .25]
    shares = [entry["kept"] for entry in payload["ranks"]]
    assert shares[0] == 0 and abs(shares[1] - values[0] ** 2 / (values ** 2).sum()) < 1e-5 and abs(shares[2] - 1) < 1e-6
    pictures = [np.frombuffer(base64.b64decode(entry["matrix"]), np.uint8).reshape(8, 8).astype(float) for entry in payload["ranks"]]
    assert (pictures[0] == 128).all()   # rank 0 is no change at all
    assert np.abs((pictures[2] - 128) / 127 * np.abs(matrix[:8, :8]).max() - matrix[:8, :8]).max() < 0.05
    assert json.loads(json.dumps(payload)) == payload


@pytest.mark.parametrize("matrix, ranks, message", [
    (np.zeros(3), (1,), "expected a matrix"), (np.full((3, 3), np.nan), (1,), "finite"), (low_rank(), (13,), "found .13., expected 0 to 12"),
    (low_rank(), (), "expected 0 to 12"), (low_rank(), (-1,), "expected 0 to 12")])
def test_ranks_that_cannot_be_are_refused(matrix, ranks, message):
    with pytest.raises(ValueError, match=message):
        lora_rank_explorer(matrix, ranks)


def test_no_change_at_all_is_drawn_too():
    assert [entry["kept"] for entry in lora_rank_explorer(np.zeros((4, 3)), (1, 2)).payload["ranks"]] == [0, 0]


def test_html_is_self_contained_deterministic_and_safe():
    made = strip().html()
    assert made == strip().html()
    assert "http" not in made.replace("http://www.w3.org", "")
    assert made.count("<script") == made.count("</script") == 1  # a token cannot close the script
    assert strip().identifier != patch_grid_explorer(gradient(), (32,), 64).identifier
    bundle = strip()._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG") and bundle["text/html"] == made
    json.dumps(strip().payload)


def test_a_widget_that_is_too_large_says_so():
    with pytest.raises(WidgetTooLarge, match="at most 1500000"):
        token_role_strip(["word"] * 40_000, ["prompt"] * 40_000, mask=np.zeros((40_000, 1), bool)).html()


def test_the_script_draws_what_python_offers():
    code = (ROOT / "mllm_nb" / "widgets.js").read_text(encoding="utf-8")
    for widget in (strip(), patch_grid_explorer(gradient(), (32,), 64), viewer(), explorer(),
                   lora_rank_explorer(low_rank(), (1, 2))):
        assert f"draw.{widget.payload['kind']} =" in code
    assert "</" not in code.replace("</script>", "") and "http" not in code


# ---- the saved page: file://, no network, no kernel ----

@pytest.fixture
def opened(browser, tmp_path):
    "A function that saves a widget, opens the page from its file and fails when anything else is asked for."
    asked, errors, pages = [], [], []

    def open_page(widget: Widget):
        page = browser.new_page()
        pages.append(page)
        page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(widget.save(tmp_path / f"{widget.identifier}.html").as_uri())
        return page
    browser.set_offline(True)
    yield open_page
    browser.set_offline(False)
    for page in pages:
        page.close()
    assert not asked and not errors


@pytest.mark.xdist_group("browser")
def test_patch_grid_page_by_mouse_and_keyboard(opened):
    page = opened(patch_grid_explorer(gradient(), sizes=(16, 8), side=64))
    image, status = page.locator("[data-part=image]"), page.locator("[role=status]")
    assert image.get_attribute("data-selected") == "0"
    box = image.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.3)
    assert image.get_attribute("data-selected") == "7" and "row 1, column 3" in status.inner_text()
    matrix = page.locator("[data-part=matrix]").bounding_box()
    page.mouse.move(matrix["x"] + 20, matrix["y"] + matrix["height"] * 15.5 / 16)
    assert image.get_attribute("data-selected") == "15"
    image.focus()
    for key, expected in (("Home", "0"), ("ArrowRight", "1"), ("ArrowDown", "5"), ("ArrowLeft", "4"), ("ArrowUp", "0"), ("ArrowUp", "0"), ("End", "15")):
        page.keyboard.press(key)
        assert image.get_attribute("data-selected") == expected, key
    page.keyboard.press("Shift+Tab")  # to the sizes
    page.keyboard.press("ArrowRight")
    assert "8 × 8 = 64 tokens of 192 numbers" in page.locator("[data-part=count]").inner_text()
    value = json.loads(page.locator("[data-mllm-widget]").get_attribute("data-value"))
    assert value == {"patch_size": 8, "patch": 15, "row": 1, "column": 7}


@pytest.mark.xdist_group("browser")
def test_patch_grid_paints_the_picture(opened):
    page = opened(patch_grid_explorer(gradient(), sizes=(32,), side=64))
    page.wait_for_timeout(300)
    read = """() => { const c = document.querySelector('[data-mllm-widget]').shadowRoot.querySelector('[data-part=image]');
                      const at = x => c.getContext('2d').getImageData(x, 40, 1, 1).data[0]; return [at(20), at(300)] }"""
    left, right = page.evaluate(read)
    assert left < 60 and right > 200


@pytest.mark.xdist_group("browser")
def test_token_strip_page(opened):
    page = opened(strip())
    listed, facts = page.locator("[role=listbox]"), page.locator("[data-part=facts]")
    assert listed.get_attribute("data-selected") == "9"  # the last answer token
    tokens = page.locator("[role=option]")
    assert tokens.count() == 11 and tokens.nth(5).inner_text() == "</script>"
    tokens.nth(7).click()
    assert tokens.nth(7).get_attribute("aria-selected") == "true" and "7: learned" in facts.inner_text()
    assert page.locator(".token.far").count() == 3  # the other sample and the padding
    for key, expected in (("ArrowRight", "8"), ("ArrowDown", "9"), ("ArrowDown", "10"), ("ArrowUp", "9"), ("Home", "0"), ("ArrowDown", "4"), ("End", "10")):
        page.keyboard.press(key)
        assert listed.get_attribute("data-selected") == expected, key
    assert listed.get_attribute("aria-activedescendant") == "token-10"
    assert "none (padding)" in facts.inner_text() and page.locator(".token.far").count() == 10


@pytest.mark.xdist_group("browser")
def test_flip_book_page(opened):
    from mllm_nb.plots import show_matrix
    page = opened(flip_book(lambda size: show_matrix(np.eye(size)), "Eye", size=[1, 2, 3]))
    before = page.locator("img.frame").get_attribute("src")
    page.locator("input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("[data-part=value]").inner_text().strip() == "size = 2"
    assert page.locator("img.frame").get_attribute("src") != before


@pytest.mark.xdist_group("browser")
def test_keys_stay_inside_a_widget_unless_combined(opened):
    from mllm_nb.plots import show_matrix
    page = opened(flip_book(lambda size: show_matrix(np.eye(size)), "Eye", size=[1, 2, 3]))
    page.evaluate("window.heard = []; document.addEventListener('keydown', event => window.heard.push(event.key))")
    page.locator("input[type=range]").focus()
    for key in ("d", "ArrowRight", "Delete", "Shift+Enter", "Control+s", "Escape"):
        page.keyboard.press(key)
    assert page.evaluate("window.heard") == ["Enter", "Control", "s", "Escape"]
    assert page.locator("input[type=range]").input_value() == "1"


@pytest.mark.xdist_group("browser")
def test_window_viewer_page(opened):
    page = opened(viewer())
    queries, status = page.locator("[data-part=queries]"), page.locator("[role=status]")
    assert queries.get_attribute("data-selected") == "3" and "words 60 %, pictures 40 %" in status.inner_text()
    queries.focus()
    for key, expected in (("Home", "0"), ("ArrowRight", "1"), ("ArrowDown", "3"), ("ArrowDown", "3")):
        page.keyboard.press(key)
        assert queries.get_attribute("data-selected") == expected, key
    box = queries.bounding_box()
    page.mouse.click(box["x"] + 5, box["y"] + box["height"] - 5)
    value = json.loads(page.locator("[data-mllm-widget]").get_attribute("data-value"))
    assert value == {"query": 2, "row": 1, "column": 0}
    assert page.locator("[data-part=share]").all_inner_texts() == ["20 %", "80 %"]


@pytest.mark.xdist_group("browser")
def test_settings_page(opened):
    page = opened(explorer())
    assert page.locator("[data-part=facts]").inner_text().split() == ["tokens", "16"]
    page.locator("fieldset").nth(0).locator("input").nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("[data-part=facts]").inner_text().split() == ["tokens", "36"]
    page.locator("fieldset").nth(1).locator("input").nth(2).check()
    page.locator("fieldset").nth(0).locator("input").nth(0).check()
    assert "48 does not divide 64" in page.locator("[role=status]").inner_text()
    value = json.loads(page.locator("[data-mllm-widget]").get_attribute("data-value"))
    assert value == {"side": "64", "patch": "48"}


@pytest.mark.xdist_group("browser")
def test_rank_explorer_page(opened):
    page = opened(lora_rank_explorer(low_rank(), {1: 1.0, 2: 0.25, 4: 0.25}))
    facts, status = page.locator("[data-part=facts]"), page.locator("[role=status]")
    assert "64 of 240" in facts.inner_text() and "Rank 2 keeps 100 %" in status.inner_text()   # it opens in the middle
    page.locator("input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    assert "rank 1" in page.locator("[data-part=value]").inner_text() and "1.0000" in facts.inner_text()
    assert json.loads(page.locator("[data-mllm-widget]").get_attribute("data-value")) == {"rank": 1}
    colours = """() => { const c = document.querySelector('[data-mllm-widget]').shadowRoot.querySelector('[data-part=spectrum]');
                         const at = x => [...c.getContext('2d').getImageData(x, 199, 1, 1).data].slice(0, 3); return [at(5), at(40)] }"""
    assert page.evaluate(colours) == [[0xE6, 0x9F, 0], [0x9C, 0xA3, 0xAF]]   # the first direction is kept, the second not
    matrix = page.locator("[data-part=matrix]")
    assert matrix.get_attribute("aria-label").startswith("the change cut to rank 1")


@pytest.mark.xdist_group("browser")
def test_without_scripts_the_picture_remains(browser, tmp_path):
    page = browser.new_page()
    text = strip().html()
    path = tmp_path / "stripped.html"
    path.write_text(text[:text.index("<script>")], encoding="utf-8")
    page.goto(path.as_uri())
    assert page.evaluate("document.querySelector('img').naturalWidth") > 200
    assert page.locator("img").get_attribute("alt") == "Two <samples>"
    page.close()


@pytest.mark.xdist_group("browser")
def test_two_copies_on_a_page_are_both_drawn(browser, tmp_path):
    page = browser.new_page()
    path = tmp_path / "twice.html"
    path.write_text(strip().html() * 2, encoding="utf-8")
    page.goto(path.as_uri())
    assert page.locator("[role=listbox]").count() == 2
    page.close()


# ---- pictures as words ----

def shades(words: np.ndarray, rows: int) -> np.ndarray:
    "Eight words, each a shade of grey; a decoder whose pieces reach no further than their cell."
    return (words.reshape(len(words), rows, -1, 1).repeat(4, 1).repeat(4, 2) / 7).repeat(3, -1)


def browser_of_words(**changes) -> Widget:
    return codebook_browser(np.arange(16).reshape(4, 4) % 8, np.arange(8.0)[:, None], shades, title="Shades", **changes)


def composer() -> Widget:
    pictures = [(f"shade {level}", np.full((8, 8, 3), level / 4), [level] * 6) for level in range(3)]
    return sentence_composer(pictures, lambda order: np.full((8, 8, 3), len(order) / 5), ahead=[[0], [0, 1]], start=[0, 1], begin=[9])


def pixels_at(address: str) -> np.ndarray:
    import io
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))), int)


def test_codebook_payload():
    payload = browser_of_words(near=3).payload
    assert payload["neighbours"][0] == [1, 2, 3] and payload["neighbours"][7] == [6, 5, 4]
    assert len(payload["redrawn"]) == 16 * 3 and payload["boxes"][0] == [0, 0, 8, 8] and payload["boxes"][5] == [0, 0, 12, 12]
    assert (pixels_at(payload["image"])[4:8, 4:8] == round(5 / 7 * 255)).all()
    piece = pixels_at(payload["redrawn"]["5,4"])
    assert abs(piece[5, 5, 0] - 4 / 7 * 255) < 6                      # place 5 painted with word 4
    tiles = pixels_at(payload["tiles"])
    assert payload["side"] == 4 and [tiles[2, 4 * code + 2, 0] for code in range(8)] == [round(code / 7 * 255) for code in range(8)]


def test_codebook_answers_live_edits():
    widget = browser_of_words()
    codes = [7] * 16
    assert (pixels_at(widget.respond({"place": 0, "code": 7, "codes": codes})["image"]) == 255).all()
    with pytest.raises(ValueError, match="expected \\[rows, columns\\] of 0 to 7"):
        codebook_browser(np.full((2, 2), 8), np.arange(8.0)[:, None], shades)


def test_composer_payload():
    payload = composer().payload
    assert set(payload["answers"]) == {"0", "0,1"} and payload["pictures"][2]["words"] == [2] * 6
    assert composer().respond({"order": [2, 1], "chosen": 0})["order"] == "2,1"
    with pytest.raises(ValueError, match="expected numbers from 0 to 0"):
        sentence_composer([("a", np.zeros((2, 2, 3)), [1])], start=[1])
    with pytest.raises(ValueError, match="expected `sample` with them"):
        sentence_composer([("a", np.zeros((2, 2, 3)), [1])], ahead=[[0]])


@pytest.mark.parametrize("make", [browser_of_words, composer])
def test_live_words_get_an_answer(make):
    pytest.importorskip("anywidget")
    live = make().live()
    assert live.payload["live"] is True
    live.value = {"place": 1, "code": 0, "codes": [0] * 16, "order": [1, 0], "chosen": 0}
    assert live.answer["image"].startswith("data:image/png")


@pytest.mark.xdist_group("browser")
def test_codebook_page(opened):
    page = opened(browser_of_words())
    picture, status, near = page.locator("[data-part=picture]"), page.locator("[role=status]"), page.locator("[role=listbox]")
    assert page.locator("[role=option]").count() == 4
    picture.focus()
    for key, expected in (("ArrowRight", "1"), ("ArrowDown", "5"), ("Home", "0"), ("End", "15"), ("ArrowUp", "11")):
        page.keyboard.press(key)
        assert picture.get_attribute("data-selected") == expected
    assert "Word 3" in status.inner_text() and "2 of 16" in status.inner_text()
    page.keyboard.press("Enter")                       # to the neighbours
    page.keyboard.press("ArrowRight")
    assert near.get_attribute("aria-activedescendant") == "near-1"
    page.keyboard.press("Enter")                       # the second nearest word is put in
    assert "Word 4, put in for 3" in status.inner_text() and "Painted by the decoder" in status.inner_text()
    read = """() => { const c = document.querySelector('[data-mllm-widget]').shadowRoot.querySelector('[data-part=picture]');
                      return c.getContext('2d').getImageData(c.width - 30, c.height * .62, 1, 1).data[0] }"""
    wait_for(lambda: abs(page.evaluate(read) - 4 / 7 * 255) < 8, 5, "the piece is painted")
    value = json.loads(page.locator("[data-mllm-widget]").get_attribute("data-value"))
    assert value["place"] == 11 and value["code"] == 4 and value["codes"][11] == 4
    page.locator("button").click()
    assert "Word 3," in status.inner_text()
    page.locator("input[type=number]").fill("7")
    page.keyboard.press("Enter")
    assert "Shown alone" in status.inner_text() or "Painted" in status.inner_text()


@pytest.mark.xdist_group("browser")
def test_composer_page_by_mouse_and_keyboard(opened):
    page = opened(composer())
    sentence, words = page.locator("[data-part=sentence]"), page.locator("[data-part=words]")
    assert sentence.get_attribute("data-order") == "0,1" and "(13 words)" in words.inner_text()
    assert page.locator("[data-part=next] img").count() == 1
    page.locator("button").nth(2).click()
    assert sentence.get_attribute("data-order") == "0,1,2" and page.locator("[data-part=next] img").count() == 0
    sentence.focus()
    page.keyboard.press("Shift+ArrowLeft")
    assert sentence.get_attribute("data-order") == "0,2,1" and sentence.get_attribute("aria-activedescendant") == "at-1"
    page.keyboard.press("Delete")
    assert sentence.get_attribute("data-order") == "0,1" and page.locator("[data-part=next] img").count() == 1
    page.locator("[role=option]").nth(0).drag_to(page.locator("[role=option]").nth(1))
    assert sentence.get_attribute("data-order") == "1,0"
    page.locator("button").nth(2).drag_to(page.locator("[role=option]").nth(0))
    assert sentence.get_attribute("data-order") == "2,1,0"
    value = json.loads(page.locator("[data-mllm-widget]").get_attribute("data-value"))
    assert value["order"] == [2, 1, 0]


# ---- live in JupyterLab ----

CELLS = ["""
from pathlib import Path
from PIL import Image
from mllm_nb.widgets import patch_grid_explorer
explorer = patch_grid_explorer(Image.linear_gradient('L'), sizes=(32, 16), side=64)
explorer""", """
live = explorer.live()
live.observe(lambda change: Path('heard.txt').write_text(repr(change['new'])), 'value')
live"""]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def lab(tmp_path):
    "JupyterLab over a folder with one notebook, with settings and kernels of its own; its address."
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source.strip()) for source in CELLS],
                                        metadata={"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}})
    root = tmp_path / "book"
    root.mkdir()
    nbformat.write(notebook, root / "live.ipynb")
    home = {name: str(tmp_path / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    environment = {**os.environ, **home, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    port = free_port()
    settings = tmp_path / "jupyter_config_dir" / "labconfig" / "page_config.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip", "127.0.0.1", "--port", str(port),
         "--ServerApp.token=", "--ServerApp.password=", f"--ServerApp.root_dir={root}"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield f"http://127.0.0.1:{port}/lab/tree/live.ipynb?reset", root
    server.terminate()
    server.wait(20)


def wait_for(condition, seconds: float, what: str):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.3)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


def goto_when_up(page, address: str) -> None:
    from playwright.sync_api import Error
    for _ in range(100):
        try:
            page.goto(address)
            return
        except Error:
            time.sleep(0.6)
    raise AssertionError("JupyterLab did not start")


def run_all(page, done, what: str, attempts: int = 4) -> None:
    "Run all cells; once more where a kernel that was not yet connected did not hear it."
    for attempt in range(attempts):
        page.keyboard.press("Escape")  # a menu left open
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        try:
            return wait_for(done, 45, what)
        except AssertionError:
            if attempt == attempts - 1:
                raise


@pytest.mark.xdist_group("browser")
def test_live_in_jupyterlab(browser, lab):
    pytest.importorskip("anywidget")
    address, root = lab
    page, asked = browser.new_page(), []
    page.on("request", lambda request: None if "127.0.0.1" in request.url or request.url.startswith(("data:", "blob:")) else asked.append(request.url))
    goto_when_up(page, address)
    page.locator(".jp-Notebook").wait_for(timeout=90_000)
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(timeout=90_000)
    page.get_by_text("| Idle").wait_for(timeout=90_000)
    images = page.locator("[data-part=image]")
    run_all(page, lambda: images.count() == 2, "the saved and the live widget are drawn")
    images.nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert images.nth(0).get_attribute("data-selected") == "1"          # the static one, inside JupyterLab's page
    images.nth(1).focus()
    page.keyboard.press("ArrowDown")
    heard = root / "heard.txt"
    wait_for(heard.exists, 30, "the kernel hears what was chosen")
    wait_for(lambda: heard.read_text() == "{'patch_size': 32, 'patch': 2, 'row': 1, 'column': 0}", 10, "the value read back in Python")
    assert not asked
    page.close()
