"""Reads the digits and folders of images made here; checks what is listed, what is read and what is refused."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from cca_core.config import ConfigError, SourceConfig
from cca_core.sources import LISTING, RawImage, listing_digest, open_source
from cca_core.transforms import decode_image


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (2, 2), value).save(out, "PNG")
    return out.getvalue()


def folder(root: Path | str):
    return open_source(SourceConfig(kind="folder", uri=str(root)))


def write(root: Path, *names: str) -> Path:
    """Files whose content is told by their position in ``names``."""
    for value, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(value))
    return root


def ids(source) -> list[str]:
    return source.list()[0]["image_id"].to_pylist()


def test_digits_are_the_1797_embedded_images():
    source = open_source(SourceConfig())
    listing, class_names = source.list()
    assert listing.schema == LISTING
    assert class_names == tuple("0123456789")
    image_ids = listing["image_id"].to_pylist()
    assert image_ids == sorted(image_ids)
    assert (image_ids[0], image_ids[-1], len(set(image_ids))) == ("digit-0000", "digit-1796", 1797)
    assert len(set(listing["stamp"].to_pylist())) > 1700

    images = list(source.read(listing))
    assert [image.label for image in images] == load_digits().target.tolist()
    assert not any(image.error for image in images)
    pixels = np.asarray(decode_image(images[5].data))[..., 0]
    np.testing.assert_allclose(pixels, load_digits().images[5] * 255 / 16, atol=0.5)


def test_digits_of_a_slice_are_those_of_the_whole():
    source = open_source(SourceConfig())
    listing, _ = source.list()
    some = list(source.read(listing.slice(700, 5)))
    assert [image.id for image in some] == [f"digit-{row:04d}" for row in range(700, 705)]
    assert some == list(source.read(listing))[700:705]


def test_folder_lists_its_images_by_id_and_class(tmp_path):
    root = write(tmp_path, "dog/b.png", "dog/a.JPEG", "cat/old/z.webp", "cat/é.tif", "cat/Z.gif")
    write(root, *(f"{name}/1.png" for name in ("yak", "gnu", "owl", "fox", "elk")))
    listing, class_names = folder(root).list()
    assert listing.schema == LISTING
    assert class_names == ("cat", "dog", "elk", "fox", "gnu", "owl", "yak")
    rows = listing.to_pylist()
    assert [(row["image_id"], row["label"]) for row in rows[:5]] == [
        ("cat/Z", 0),
        ("cat/old/z", 0),
        ("cat/é", 0),
        ("dog/a", 1),
        ("dog/b", 1),
    ]
    assert rows[3]["location"] == "dog/a.JPEG"
    assert rows[3]["uri"] == f"file://{root}/dog/a.JPEG"


def test_folder_leaves_out_what_is_no_image_and_marks_an_image_without_a_class(tmp_path):
    root = write(tmp_path, "cat/a.png", "dog/b.png", "loose.png", "cat/.hidden.png", ".cache/c.png")
    write(root, "cat/notes.txt", "dog/.thumbs/b.png", "docs/readme.md")
    source = folder(root)
    listing, class_names = source.list()
    assert class_names == ("cat", "dog")
    assert listing["image_id"].to_pylist() == ["cat/a", "dog/b", "loose"]
    assert [image.error for image in source.read(listing)] == ["", "", "no label: it lies in no class folder"]


def test_folder_ids_do_not_depend_on_the_root_or_its_spelling(tmp_path, monkeypatch):
    first = write(tmp_path / "first", "cat/a.png", "dog/b.png")
    shutil.copytree(first, tmp_path / "elsewhere" / "deep")  # keeps the times of change
    copy, _ = folder(tmp_path / "elsewhere" / "deep").list()
    monkeypatch.chdir(tmp_path)
    for spelling in (first, f"{first}/", f"file://{first}", "first"):
        listing, class_names = folder(spelling).list()
        assert listing["image_id"].to_pylist() == ["cat/a", "dog/b"]
        assert listing_digest(listing, class_names) == listing_digest(copy, class_names)


def test_folder_digest_sees_data_changed_in_place(tmp_path):
    root = write(tmp_path, "cat/a.png", "dog/b.png")
    before = listing_digest(*folder(root).list())
    assert listing_digest(*folder(root).list()) == before
    os.utime(root / "cat/a.png", (1, 1))
    assert listing_digest(*folder(root).list()) != before


def test_of_files_with_one_id_the_first_stays_and_the_others_are_named(tmp_path):
    root = write(tmp_path, "cat/a.jpg", "cat/a.png", "cat/a.PNG", "cat/a.png.webp", "dog/b.png")
    images = list(folder(root).read(folder(root).list()[0]))
    assert [(image.id, image.uri.rpartition("/")[2]) for image in images] == [
        ("cat/a", "a.PNG"),
        ("cat/a", "a.jpg"),
        ("cat/a", "a.png"),
        ("cat/a.png", "a.png.webp"),
        ("dog/b", "b.png"),
    ]
    error = f"duplicate id: file://{root}/cat/a.PNG has it already; give it another"
    assert [image.error for image in images] == ["", error, error, "", ""]
    assert [bool(image.data) for image in images] == [True, False, False, True, True]


def test_folder_follows_linked_class_folders(tmp_path):
    write(tmp_path / "store", "n01/a.png", "n02/b.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "cat").symlink_to(tmp_path / "store" / "n01")
    (root / "dog").symlink_to(tmp_path / "store" / "n02")
    (root / "dog" / "again").symlink_to(root)  # a cycle must end
    listing, class_names = folder(root).list()
    assert class_names == ("cat", "dog")
    assert listing["image_id"].to_pylist() == ["cat/a", "dog/b"]
    assert [image.data for image in folder(root).read(listing.slice(0, 1))] == [png(0)]


def test_folder_reads_any_slice_in_the_order_of_the_listing(tmp_path):
    names = [f"{'cat' if i % 2 else 'dog'}/{i * 37 % 100:02d} [{i}].png" for i in range(70)]
    source = folder(write(tmp_path, *names))
    listing, _ = source.list()
    whole = list(source.read(listing))
    assert [image.id for image in whole] == listing["image_id"].to_pylist()
    assert all(image.data == png(names.index(f"{image.id}.png")) for image in whole)
    assert list(source.read(listing.slice(31, 35))) == whole[31:66]
    assert list(source.read(listing.slice(0, 0))) == []


def test_folder_yields_a_file_that_is_gone_or_locked_as_an_error(tmp_path, monkeypatch):
    root = write(tmp_path, "cat/a.png", "cat/b.png", "dog/c.png")
    listing, _ = folder(root).list()
    (root / "cat/a.png").unlink()
    local = type(fsspec.filesystem("file"))
    real = local.cat_file

    def cat_file(self, path, *args, **kwargs):
        if path.endswith("b.png"):
            raise PermissionError("locked")
        return real(self, path, *args, **kwargs)

    monkeypatch.setattr(local, "cat_file", cat_file)
    gone, locked, whole = folder(root).read(listing)
    assert gone.data == b""
    assert "FileNotFoundError" in gone.error
    assert "locked" in locked.error
    assert whole == RawImage("dog/c", f"file://{root}/dog/c.png", png(2), 1)


def test_folder_lets_the_failure_of_the_store_pass(tmp_path, monkeypatch):
    root = write(tmp_path, "cat/a.png", "dog/b.png")
    listing, _ = folder(root).list()

    def cat_file(self, path, *args, **kwargs):
        raise ConnectionError("store down")

    monkeypatch.setattr(type(fsspec.filesystem("file")), "cat_file", cat_file)
    with pytest.raises(ConnectionError, match="store down"):
        list(folder(root).read(listing))


def test_folder_never_drops_a_class_that_may_not_be_read(tmp_path, monkeypatch):
    root = write(tmp_path, "cat/a.png", "dog/b.png", "eel/c.png")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("eel"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ConfigError, match=r"eel may not be read: grant access"):
        folder(root).list()


def test_folder_reads_an_object_store():
    store = fsspec.filesystem("memory")
    for name, value in (("cat/a.png", 1), ("dog/b.png", 2)):
        store.pipe(f"/bucket/images/{name}", png(value))
    source = folder("memory://bucket/images")
    listing, class_names = source.list()
    assert class_names == ("cat", "dog")
    assert listing["uri"].to_pylist()[1].endswith("bucket/images/dog/b.png")
    assert [(image.id, image.data) for image in source.read(listing)] == [
        ("cat/a", png(1)),
        ("dog/b", png(2)),
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat/notes.txt"], r"no image file found in .*one folder per class"),
        (["a.png", "b.png"], r"no class folders: move the images of each class"),
        (["train/cat/a.png", "train/dog/b.png"], r"only one class folder, train.*at least two"),
    ],
    ids=["no image", "no class folder", "one class"],
)
def test_folder_refuses_with_the_remedy(tmp_path, names, message):
    with pytest.raises(ConfigError, match=message):
        folder(write(tmp_path, *names)).list()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("/nowhere/at/all", r"/nowhere/at/all does not exist: correct it, or create it"),
        ("nosuch://bucket/images", r"nosuch://bucket/images cannot be opened: .*nosuch"),
    ],
)
def test_a_uri_that_leads_nowhere_is_refused(uri, message):
    with pytest.raises(ConfigError, match=message):
        folder(uri).list()


def test_folder_refuses_names_that_no_text_can_hold(tmp_path):
    root = write(tmp_path, "cat/a.png", "dog/b.png")
    Path(os.fsdecode(os.fsencode(root) + b"/cat/\xff.png")).write_bytes(png(9))
    with pytest.raises(ConfigError, match=r"not UTF-8: rename the file"):
        folder(root).list()
