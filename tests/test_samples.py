"Sample pictures: where they are, that they are whole, and that their licences are listed."
import json

import numpy as np
import pytest

from mllm_nb.samples import PHOTOS, build_digits, build_photos, digits, photo, photo_table, samples_path


def test_every_photo_opens_and_is_listed():
    names = {path.stem for path in samples_path("photos").iterdir()}
    assert names == {item.name for item in PHOTOS}
    for name in names:
        assert max(photo(name).size) <= 512
    assert photo_table() in samples_path("README.md").read_text(encoding="utf-8")


def test_a_missing_sample_is_named():
    with pytest.raises(FileNotFoundError, match="nothing.jpg.* holds: .*chelsea.jpg.*MLLM_NB_DATA"):
        samples_path("photos", "nothing.jpg")


def test_another_folder_by_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_NB_DATA", str(tmp_path))
    (tmp_path / "x").write_text("")
    assert samples_path("x") == tmp_path / "x"
    with pytest.raises(FileNotFoundError):
        samples_path("photos")


def test_digits_are_those_of_scikit_learn():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    images, labels = digits()
    expected = load_digits()
    assert images.dtype == np.uint8 and (images == expected.images).all() and (labels == expected.target).all()


def test_the_files_can_be_built_again(tmp_path):
    pytest.importorskip("skimage")
    build_photos(tmp_path)
    build_digits(tmp_path)
    assert (tmp_path / "digits.json").read_bytes() == samples_path("digits.json").read_bytes()
    from PIL import Image
    for item in PHOTOS:
        again = Image.open(tmp_path / "photos" / f"{item.name}.jpg")
        assert again.size == photo(item.name).size and again.mode == photo(item.name).mode
        assert np.abs(np.asarray(again, int) - np.asarray(photo(item.name), int)).mean() < 1


def test_records_name_pictures_that_exist():
    for line in samples_path("photos.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        named = record.get("image", [])
        assert all(samples_path(name).is_file() for name in ([named] if isinstance(named, str) else named))
