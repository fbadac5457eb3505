"""Reads CSV and JSONL lists of files made here; checks addresses, ids, labels, the errors of rows and the digest."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path

import fsspec
import pytest

from cca_core.config import ConfigError, SourceConfig
from cca_core.sources import LISTING, listing_digest, open_source

FORMATS = pytest.mark.parametrize("extension", ["csv", "jsonl"])


def source(uri: Path | str, **settings):
    return open_source(SourceConfig(kind="list", uri=str(uri), **settings))


def files(root: Path, *names: str) -> Path:
    """Files whose content is their own name, so that a mix-up shows."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def write(root: Path, extension: str, columns: str, *rows: tuple) -> Path:
    """A list with these columns; None is a field that is not there."""
    names, out = columns.split(), io.StringIO()
    if extension == "csv":
        csv.writer(out).writerows([names, *rows])
    else:
        rows_ = ({name: value for name, value in zip(names, row, strict=True) if value is not None} for row in rows)
        out.writelines(json.dumps(row) + "\n" for row in rows_)
    path = root / f"list.{extension}"
    path.write_text(out.getvalue())
    return path


def listed(source_) -> list[tuple[str, int]]:
    table, _ = source_.list()
    assert table.schema == LISTING
    return list(zip(table["image_id"].to_pylist(), table["label"].to_pylist(), strict=True))


def read(source_) -> list[tuple[str, bytes, str]]:
    return [(image.id, image.data, image.error) for image in source_.read(source_.list()[0])]


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([3, 0, 2], ("0", "1", "2", "3"), [3, 0, 2]),
        (["dog", "cat", "dog"], ("cat", "dog"), [1, 0, 1]),
        (["null", "NA", "dog"], ("NA", "dog", "null"), [2, 0, 1]),
    ],
)
@FORMATS
def test_csv_and_jsonl_are_read_alike(tmp_path, extension, labels, names, numbers):
    files(tmp_path, "a.png", "d/b c.JPEG", "ä,.png")
    rows = zip([9, 8, 7], labels, ["a.png", "d/b c.JPEG", "ä,.png"], strict=True)
    path = write(tmp_path, extension, "other label uri", *rows)
    table, class_names = source(path).list()
    assert class_names == names
    assert listed(source(path)) == list(zip(["a.png", "d/b c.JPEG", "ä,.png"], numbers, strict=True))
    assert read(source(path)) == [(name, name.encode(), "") for name in ("a.png", "d/b c.JPEG", "ä,.png")]
    assert table["uri"][1].as_py() == f"file://{tmp_path}/d/b c.JPEG"


def test_the_columns_are_those_of_the_recipe(tmp_path):
    files(tmp_path, "a.png", "b.png", "c.png")
    path = write(tmp_path, "csv", "uri kind key file", ("x", 0, 12, "a.png"), ("x", 1, 7, "b.png"))
    chosen = source(path, uri_column="file", label_column="kind", id_column="key")
    assert listed(chosen) == [("12", 0), ("7", 1)]
    assert read(chosen) == [("12", b"a.png", ""), ("7", b"b.png", "")]


def test_addresses_of_several_kinds_keep_their_order(tmp_path):
    """More of them than are read at once, and those of one file system are not side by side."""
    root, memory = files(tmp_path / "lists", *(f"in/{n:03d}.png" for n in range(300))), fsspec.filesystem("memory")
    files(tmp_path, "beside/b.png")
    rows, expected = [], []
    for n in range(300):
        memory.pipe_file(f"/list-mixed/{n:03d}.png", f"memory {n}".encode())
        name = f"in/{n:03d}.png"
        address, data = [
            (name, name.encode()),
            (f"memory://list-mixed/{n:03d}.png", f"memory {n}".encode()),
            (f"{root}/{name}", name.encode()),
            (f"file://{root}/{name}", name.encode()),
            ("../beside/b.png", b"beside/b.png"),
        ][n % 5]
        rows.append((address, f"{n:03d}", n % 2))
        expected.append((f"{n:03d}", data, ""))
    path = write(root, "jsonl", "uri key label", *rows)
    mixed = source(path, id_column="key")
    assert read(mixed) == expected
    table, _ = mixed.list()
    part = [(image.id, image.data, image.error) for image in mixed.read(table.slice(7, 270))]
    assert part == expected[7:277]


def test_without_a_column_the_id_is_the_address_below_or_beside_the_list(tmp_path):
    root = files(tmp_path / "lists", "d/a.png", "b.png", "c.png")
    rows = [("./d/a.png", 0), (f"{root}/b.png", 1), (f"file://{root}/c.png", 0), ("../e.png", 1), ("/no/f.png", 0)]
    assert [image_id for image_id, _ in listed(source(write(root, "csv", "uri label", *rows)))] == [
        "../e.png",
        "/no/f.png",
        "b.png",
        "c.png",
        "d/a.png",
    ]


@FORMATS
@pytest.mark.parametrize(("cat", "dog", "empty"), [("cat", "dog", ""), ("cat", "dog", None), (3, 7, None)])
def test_what_is_wrong_with_a_row_is_its_own_error(tmp_path, extension, cat, dog, empty):
    files(tmp_path, "a.png", "b.png", "folder/x.png")
    rows = [
        ("a.png", "a", dog),
        ("", "no address", dog),
        ("b.png", "", dog),
        ("b.png", "no label", empty),
        ("gone.png", "gone", dog),
        ("b.png", "a", dog),
        ("folder", "folder", dog),
        ("a.png/b.png", "below a file", dog),
        ("b.png", "z", cat),
    ]
    path = write(tmp_path, extension, "uri key label", *rows)
    assert read(source(path, id_column="key")) == [
        ("a", b"a.png", ""),
        ("a", b"", f"duplicate id: file://{tmp_path}/a.png has it already; give it another"),
        ("below a file", b"", f"NotADirectoryError: [Errno 20] Not a directory: '{tmp_path}/a.png/b.png'"),
        ("folder", b"", f"IsADirectoryError: [Errno 21] Is a directory: '{tmp_path}/folder'"),
        ("gone", b"", f"FileNotFoundError: [Errno 2] No such file or directory: '{tmp_path}/gone.png'"),
        ("line:000000002", b"", "no address: uri is empty"),
        ("line:000000003", b"", "no id: key is empty"),
        ("no label", b"", "no label"),
        ("z", b"b.png", ""),
    ]


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        ({"include": ("*.png",)}, ["a.png", "d/b.png"]),
        ({"exclude": ("d/*",)}, ["/list-globs/m.bmp", "a.png", "c.jpg"]),
        ({"include": ("d/*", "memory:*"), "exclude": ("*.tif",)}, ["/list-globs/m.bmp", "d/b.png"]),
    ],
)
def test_globs_take_addresses_as_they_stand_in_the_list(tmp_path, globs, expected):
    rows = [("a.png", 0), ("d/b.png", 1), ("c.jpg", 1), ("d/e.tif", 0), ("memory://list-globs/m.bmp", 0)]
    path = write(tmp_path, "csv", "uri label", *rows)
    assert [image_id for image_id, _ in listed(source(path, **globs))] == expected


def test_rows_without_an_address_are_taken_whatever_the_globs(tmp_path):
    path = write(files(tmp_path, "a.png", "b.png"), "csv", "uri label", ("a.png", 0), ("", 1), ("b.png", 1), ("c.x", 1))
    errors = [error for _, _, error in read(source(path, include=("*.png",)))]
    assert errors == ["", "", "no address: uri is empty"]


FINE = "uri,label\na.png,0\nb.png,1\n"


@pytest.mark.parametrize(
    ("name", "text", "settings", "message"),
    [
        (
            "l.csv",
            FINE,
            {"uri_column": "u"},
            r"l\.csv has no column 'u': set source\.uri_column to one of .* uri, label",
        ),
        ("l.csv", FINE, {"label_column": "k"}, r"no column 'k': set source\.label_column to one of .* uri, label"),
        ("l.csv", FINE, {"id_column": "k"}, r"no column 'k': set source\.id_column to one of .* uri, label"),
        ("l.txt", FINE, {}, r"l\.txt is no list: give a file that ends in \.csv, \.jsonl"),
        ("l.csv", FINE + "c.png,1,2\n", {}, r"l\.csv cannot be read as a list: .*Expected 2 columns, got 3"),
        ("l.csv", "", {}, r"l\.csv cannot be read as a list: Empty"),
        ("l.csv", "uri,label\n", {}, r"no address found in .*l\.csv: correct source\.uri"),
        ("l.csv", FINE, {"include": ("z*",)}, r"no address that source\.include and source\.exclude take found"),
        ("l.csv", "uri,label\na,0.5\nb,1\n", {}, r"'label' of .*l\.csv is double: labels and ids are"),
        ("l.csv", FINE + "nosuch://c.png,1\n", {}, r"address nosuch://c\.png cannot be opened: .*nosuch"),
        ("l.jsonl", '{"uri": "a.png", "label": 0}\n{"uri": "b.p', {}, r"l\.jsonl cannot be read as a list: JSON"),
        ("l.jsonl", '{"uri": "a", "label": 0}\n{"uri": "b", "label": "x"}\n', {}, r"changed from number to string"),
        ("l.jsonl", '{"u": "a", "label": 0}\n', {}, r"no column 'uri': set source\.uri_column .* u, label"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused_with_the_remedy(tmp_path, name, text, settings, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        source(tmp_path / name, **settings).list()


def test_the_digest_is_that_of_a_copy_and_sees_data_changed_in_place(tmp_path):
    root = files(tmp_path / "one", "lists/a.png", "images/b.png", "lists/c.png", "store/d.png")
    (root / "lists/link.png").symlink_to("../store/d.png")
    addresses = ["a.png", "../images/b.png", "c.png", "link.png"]
    write(root / "lists", "csv", "uri label", *((address, n % 2) for n, address in enumerate(addresses)))
    other = tmp_path / "two" / "deep"
    shutil.copytree(root, other, symlinks=True)  # keeps the times of change

    def digest(root_: Path) -> str:
        return listing_digest(*source(root_ / "lists/list.csv").list())

    digests = [digest(root)]
    assert digest(other) == digest(root)
    os.utime(root / "lists/a.png", (1, 1))
    digests.append(digest(root))
    for name in ("images/b.png", "store/d.png"):
        (root / name).write_bytes(b"of another size")
        digests.append(digest(root))
    assert len(set(digests)) == 4


def test_the_failure_of_the_store_passes(tmp_path, monkeypatch):
    rows = [("a.png", 0), ("memory://list-failure/b.png", 1)]
    path = write(files(tmp_path, "a.png"), "csv", "uri label", *rows)
    table, _ = source(path).list()

    def cat_file(self, path, *args, **kwargs):
        raise ConnectionError("store down")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", cat_file)
    with pytest.raises(ConnectionError, match="store down"):
        list(source(path).read(table))
