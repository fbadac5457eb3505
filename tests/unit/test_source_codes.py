"""Writes folders of codes as the official extraction does; checks what is listed, what is read and what is refused."""

from __future__ import annotations

import io
import os
import re
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from cca_core.config import ConfigError, SourceConfig
from cca_core.sources import LISTING, listing_digest, open_source
from cca_core.sources.codes import read_integers

CODES = {str(n): np.arange(2 * 4).reshape(2, 4) + n for n in range(12)}
LABELS = {str(n): n % 3 for n in range(12)}


def source(root: Path | str, **settings):
    return open_source(SourceConfig(kind="codes", uri=str(root), **settings))


def npy(array, **settings) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **settings)
    return out.getvalue()


@pytest.fixture
def root(tmp_path, write_codes) -> Path:
    write_codes(tmp_path / "official", CODES, LABELS, name="imagenet384")
    return tmp_path / "official"


def test_the_listing_has_ids_labels_and_ordered_rows(root):
    listing, class_names = source(root).list()
    assert listing.schema == LISTING
    assert class_names == ("0", "1", "2")
    ids = listing["image_id"].to_pylist()
    assert ids == sorted(CODES)
    assert ids[:3] == ["0", "1", "10"]
    assert listing["label"].to_pylist() == [int(n) % 3 for n in ids]
    assert listing["uri"].to_pylist()[2] == f"file://{root}/imagenet384_codes/10.npy"
    assert len(set(listing["stamp"].to_pylist())) > 1


def test_any_slice_is_read_in_the_order_of_the_listing(root):
    listing, _ = source(root).list()
    images = list(source(root).read(listing))
    assert [image.id for image in images] == listing["image_id"].to_pylist()
    assert [image.label for image in images] == listing["label"].to_pylist()
    assert all(np.array_equal(read_integers(image.data), CODES[image.id][None]) for image in images)
    assert list(source(root).read(listing.slice(3, 5))) == images[3:8]
    assert list(source(root).read(listing.slice(0, 0))) == []


def test_ids_are_the_names_as_they_are(tmp_path, write_codes):
    write_codes(tmp_path, {"007": CODES["0"], "7": CODES["1"]}, {"007": 0, "7": 1})
    listing, _ = source(tmp_path).list()
    assert listing.select(["image_id", "label"]).to_pydict() == {"image_id": ["007", "7"], "label": [0, 1]}


def test_ids_and_digest_do_not_depend_on_the_root_or_its_spelling(root, tmp_path, monkeypatch):
    shutil.copytree(root, tmp_path / "elsewhere" / "deep")  # keeps the times of change
    expected = source(tmp_path / "elsewhere" / "deep").list()
    monkeypatch.chdir(tmp_path)
    folder = root / "imagenet384_codes"
    for spelling in (root, f"{root}/", f"file://{root}", "official", folder, f"{folder}/"):
        listing, class_names = source(spelling).list()
        assert listing_digest(listing, class_names) == listing_digest(*expected)


def test_the_digest_sees_data_changed_in_place(root):
    before = listing_digest(*source(root).list())
    assert listing_digest(*source(root).list()) == before
    os.utime(root / "imagenet384_codes" / "3.npy", (1, 1))
    touched = listing_digest(*source(root).list())
    (root / "imagenet384_labels" / "3.npy").write_bytes(npy(np.array([2])))
    assert len({before, touched, listing_digest(*source(root).list())}) == 3


def test_an_object_store_is_read_alike(root, write_codes):
    write_codes("memory://bucket/codes", CODES, LABELS, name="imagenet384")
    local, _ = source(root).list()
    for uri in ("memory://bucket/codes", "memory://bucket/codes/imagenet384_codes"):
        listing, _ = source(uri).list()
        same = ["image_id", "location", "label"]
        assert listing.select(same).equals(local.select(same))
        assert listing["uri"].to_pylist()[0].endswith("bucket/codes/imagenet384_codes/0.npy")
        read = [[image.data for image in source(at).read(part)] for at, part in ((uri, listing), (root, local))]
        assert read[0] == read[1]


def test_class_names_are_the_recipes_where_it_has_them(root):
    assert source(root, class_names=("ant", "bee", "cat", "dog")).list()[1] == ("ant", "bee", "cat", "dog")
    short = source(root, class_names=("ant", "bee"))
    errors = {image.label: image.error for image in short.read(short.list()[0])}
    assert errors == {0: "", 1: "", -1: "wrong label: 2 is none of the 2 classes"}


LABELS_THAT_ARE_NONE = {
    "gone": (None, "FileNotFoundError"),
    "empty": (b"", "the file is empty"),
    "text": (b"3", "not a whole .npy array"),
    "negative": (npy(np.array([-1])), "-1 is no class"),
    "beyond": (npy(np.array([1 << 40])), f"{1 << 40} is no class"),
    "several": (npy(np.array([1, 2])), r"shape \[2\] instead of \[1\]"),
    "float": (npy(np.array([1.0])), "holds float64, not integers"),
}


@pytest.mark.parametrize(("data", "reason"), LABELS_THAT_ARE_NONE.values(), ids=LABELS_THAT_ARE_NONE)
def test_a_code_without_label_is_an_error_of_that_image(root, data, reason):
    path = root / "imagenet384_labels" / "5.npy"
    path.unlink() if data is None else path.write_bytes(data)
    listing, class_names = source(root).list()
    assert (listing.num_rows, class_names) == (12, ("0", "1", "2"))
    images = {image.id: image for image in source(root).read(listing)}
    assert images["5"].data == b""
    assert not any(image.error for name, image in images.items() if name != "5")
    assert re.match(f"no label: .*{reason}", images["5"].error)


def test_a_label_without_code_is_an_error_of_that_image(root):
    (root / "imagenet384_codes" / "5.npy").unlink()
    listing, _ = source(root).list()
    errors = {image.id: image.error for image in source(root).read(listing)}
    assert "FileNotFoundError" in errors.pop("5")
    assert set(errors.values()) == {""}


def test_the_failure_of_the_store_passes(root, monkeypatch):
    listing, _ = source(root).list()

    def cat_file(self, path, *args, **kwargs):
        raise ConnectionError("store down")

    monkeypatch.setattr(type(fsspec.filesystem("file")), "cat_file", cat_file)
    with pytest.raises(ConnectionError, match="store down"):
        source(root).list()
    with pytest.raises(ConnectionError, match="store down"):
        list(source(root).read(listing))


def test_of_several_data_sets_one_is_to_be_named(root, write_codes):
    write_codes(root, CODES, LABELS, name="imagenet256")
    with pytest.raises(ConfigError, match=r"several data sets \(imagenet256_codes, imagenet384_codes\): set source"):
        source(root).list()
    assert source(root / "imagenet256_codes").list()[0].num_rows == 12
    shutil.rmtree(root / "imagenet256_labels")
    assert source(root).list()[0].num_rows == 12, "one pair is left"
    shutil.move(root, root.with_name("all_codes"))
    assert source(root.with_name("all_codes")).list()[0].num_rows == 12, "whatever the folder around it is called"


def test_folders_that_cannot_be_used_are_refused_with_the_remedy(root, write_codes):
    def refused(uri: Path, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            source(uri).list()

    refused(root / "nowhere", r"does not exist: correct it")
    refused(root / "imagenet384_labels", r"holds no folder <name>_codes: set source\.uri to the folder with")
    write_codes(root / "one", CODES, dict.fromkeys(CODES, 7))
    refused(root / "one", r"1 class\(es\) with images \(7\), and CCA needs at least two")
    for path in (root / "imagenet384_codes").iterdir():
        path.unlink()
    refused(root, r"no \.npy file found in .*official")
    shutil.rmtree(root / "imagenet384_labels")
    for uri in (root, root / "imagenet384_codes"):
        refused(uri, r"imagenet384_codes has no labels beside it: put imagenet384_labels/ there")


NO_INTEGERS = {
    "empty": (b"", "the file is empty"),
    "text": (b"codes", r"not a whole \.npy array"),
    "half": (npy(np.arange(99))[:400], r"not a whole \.npy array"),
    "header only": (npy(np.arange(99))[:40], r"not a whole \.npy array"),
    "pickle": (npy(np.array([{}], dtype=object), allow_pickle=True), r"Object arrays cannot be loaded"),
    "float": (npy(np.ones(3)), "holds float64, not integers"),
}


@pytest.mark.parametrize(("data", "message"), NO_INTEGERS.values(), ids=NO_INTEGERS)
def test_only_whole_arrays_of_integers_are_taken(data, message):
    with pytest.raises(ValueError, match=message):
        read_integers(data)


def test_an_archive_of_arrays_is_not_taken():
    out = io.BytesIO()
    np.savez(out, codes=np.arange(3))
    with pytest.raises(ValueError, match="holds an archive, not integers"):
        read_integers(out.getvalue())
