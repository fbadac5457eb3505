"""Reads Parquet files made here; checks the layouts, ids, labels and errors of the parquet source."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cca_core.config import ConfigError, SourceConfig
from cca_core.sources import LISTING, listing_digest, open_source

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def source(root: Path | str, **settings):
    return open_source(SourceConfig(kind="parquet", uri=str(root), **settings))


def images(paths) -> pa.Array:
    """Hugging Face's layout; the bytes of an image are its path, so that a mix-up shows."""
    return pa.array([{"bytes": (path or "none").encode(), "path": path} for path in paths], STRUCT)


def write(path: Path, columns: dict, metadata: dict | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, **options)
    return path


def listed(source_) -> list[tuple[str, int]]:
    table, _ = source_.list()
    assert table.schema == LISTING
    return list(zip(table["image_id"].to_pylist(), table["label"].to_pylist(), strict=True))


def class_label(*names: str) -> dict:
    features = {"label": {"names": list(names), "_type": "ClassLabel"}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def test_struct_of_bytes_and_path_is_listed_by_path(tmp_path):
    write(tmp_path / "b" / "1.parquet", {"image": images(["z.png", "m.JPEG"]), "label": [1, 0]})
    write(tmp_path / "a.parquet", {"image": images(["dir/k.png"]), "label": [1]})
    table, class_names = source(tmp_path).list()
    assert class_names == ("0", "1")
    assert listed(source(tmp_path)) == [("dir/k", 1), ("m", 0), ("z", 1)]
    assert table["location"].to_pylist() == ["a.parquet:0", "b/1.parquet:1", "b/1.parquet:0"]
    assert table["uri"][1].as_py() == f"file://{tmp_path}/b/1.parquet:1"
    read = list(source(tmp_path).read(table))
    assert [(image.id, image.data) for image in read] == [
        ("dir/k", b"dir/k.png"),
        ("m", b"m.JPEG"),
        ("z", b"z.png"),
    ]


def test_plain_bytes_are_listed_by_file_and_row(tmp_path):
    values = [f"image {row}".encode() for row in range(12)]
    path = write(tmp_path / "x.parquet", {"png": values, "y": [0, 1] * 6})
    plain = source(tmp_path, image_column="png", label_column="y")
    assert [image_id for image_id, _ in listed(plain)] == [f"x.parquet:{r:09d}" for r in range(12)]
    assert [image.data for image in plain.read(plain.list()[0])] == values
    one_file = source(path, image_column="png", label_column="y")
    assert listed(one_file) == listed(plain)
    assert [image.data for image in one_file.read(one_file.list()[0])] == values


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a.png", "b.png"], ["a", "b"]),
        (["a.png", "a.jpg"], ["a.jpg", "a.png"]),
        (["v1.0", "v1.5"], ["v1.0", "v1.5"]),
        (["a.png", "a.png"], ["f.parquet:000000000", "f.parquet:000000001"]),
        (["a.png", None], ["f.parquet:000000000", "f.parquet:000000001"]),
    ],
    ids=["stem", "stem repeated", "no extension", "path repeated", "path missing"],
)
def test_path_is_the_id_only_where_it_is_unique(tmp_path, paths, expected):
    write(tmp_path / "f.parquet", {"image": images(paths), "label": [0, 1]})
    assert [image_id for image_id, _ in listed(source(tmp_path))] == expected


def test_a_path_is_unique_over_all_files_or_not_at_all(tmp_path):
    for name in ("f", "g"):
        write(tmp_path / f"{name}.parquet", {"image": images(["a.png"]), "label": [int(name == "g")]})
    assert [image_id for image_id, _ in listed(source(tmp_path))] == [
        "f.parquet:000000000",
        "g.parquet:000000000",
    ]


def test_id_column_wins_over_the_path(tmp_path):
    columns = {"image": images(["a.png", "b.png"]), "label": [0, 1], "key": [12, 7], "same": [3, 3]}
    write(tmp_path / "f.parquet", columns)
    assert listed(source(tmp_path, id_column="key")) == [("12", 0), ("7", 1)]


def test_a_repeated_or_missing_id_is_an_error_of_that_row(tmp_path):
    columns = {"image": images("abcd"), "label": [0, 1, 1, 0], "key": ["x", "y", "x", None]}
    write(tmp_path / "f.parquet", columns)
    keyed = source(tmp_path, id_column="key")
    read = [(image.id, image.data, image.error) for image in keyed.read(keyed.list()[0])]
    assert read == [
        ("f.parquet:000000003", b"", "no id: key is empty"),
        ("x", b"a", ""),
        ("x", b"", f"duplicate id: file://{tmp_path}/f.parquet:0 has it already; give it another"),
        ("y", b"b", ""),
    ]


def test_ids_and_digest_do_not_depend_on_the_root(tmp_path):
    columns = {"image": images([None, None]), "label": [0, 1]}
    for root in (tmp_path / "one", tmp_path / "two" / "deep"):
        os.utime(write(root / "f.parquet", columns), (5, 5))
    one, two = (source(tmp_path / name).list() for name in ("one", "two/deep"))
    assert one[0]["image_id"] == two[0]["image_id"]
    assert listing_digest(*one) == listing_digest(*two)
    os.utime(tmp_path / "one" / "f.parquet", (6, 6))
    assert listing_digest(*source(tmp_path / "one").list()) != listing_digest(*two)


@pytest.mark.parametrize("dictionary", [False, True])
def test_string_labels_are_classes_in_sorted_order(tmp_path, dictionary):
    labels = pa.array(["dog", None, "cat", "dog"])
    labels = labels.dictionary_encode() if dictionary else labels
    write(tmp_path / "f.parquet", {"image": images("abcd"), "label": labels})
    assert source(tmp_path).list()[1] == ("cat", "dog")
    assert listed(source(tmp_path)) == [("a", 1), ("b", -1), ("c", 0), ("d", 1)]
    chosen = source(tmp_path, class_names=("dog", "eel", "cat"))
    assert listed(chosen) == [("a", 0), ("b", -1), ("c", 2), ("d", 0)]


def test_a_label_that_is_no_class_is_an_error_of_that_row(tmp_path):
    write(tmp_path / "f.parquet", {"image": images("abc"), "label": ["dog", "cat", "eel"]})
    chosen = source(tmp_path, class_names=("dog", "eel"))
    assert [image.error for image in chosen.read(chosen.list()[0])] == [
        "",
        "wrong label: cat is none of the 2 classes",
        "",
    ]


def test_rows_without_a_usable_label_are_kept_and_read_as_errors(tmp_path):
    columns = {"image": images("abcde"), "label": [1, None, -7, 2, 0]}
    write(tmp_path / "f.parquet", columns, class_label("cat", "dog"))
    table, class_names = source(tmp_path).list()
    assert class_names == ("cat", "dog")
    assert table["label"].to_pylist() == [1, -1, -1, -1, 0]
    read = list(source(tmp_path).read(table))
    assert [image.data for image in read] == [b"a", b"", b"", b"", b"e"]
    assert [image.error for image in read] == [
        "",
        "no label",
        "wrong label: -7 is none of the 2 classes",
        "wrong label: 2 is none of the 2 classes",
        "",
    ]


def test_class_names_of_the_settings_win(tmp_path):
    columns = {"image": images("ab"), "label": [0, 2]}
    write(tmp_path / "f.parquet", columns, class_label("cat", "dog", "eel"))
    assert source(tmp_path).list()[1] == ("cat", "dog", "eel")
    assert source(tmp_path, class_names=("x", "y", "z")).list()[1] == ("x", "y", "z")


def test_files_that_disagree_on_their_classes_are_refused(tmp_path):
    write(tmp_path / "f.parquet", {"image": images("a"), "label": [0]}, class_label("cat", "dog"))
    write(tmp_path / "g.parquet", {"image": images("b"), "label": [1]}, class_label("dog", "cat"))
    with pytest.raises(ConfigError, match="different class names"):
        source(tmp_path).list()
    write(tmp_path / "g.parquet", {"image": images("b"), "label": ["dog"]}, class_label("cat", "dog"))
    with pytest.raises(ConfigError, match="integer in some files"):
        source(tmp_path).list()


def test_an_image_that_is_not_there_is_an_error_of_its_row(tmp_path):
    column = pa.array([{"bytes": b"1", "path": "a"}, {"bytes": None, "path": "b"}, None], STRUCT)
    write(tmp_path / "f.parquet", {"image": column, "label": [0, 1, 1]})
    table, _ = source(tmp_path).list()
    read = list(source(tmp_path).read(table))
    assert [image.data for image in read] == [b"1", b"", b""]
    assert [bool(image.error) for image in read] == [False, True, True]


def test_any_slice_is_read_as_in_the_whole(tmp_path):
    names = [f"{row * 37 % 101:03d}" for row in range(100)]
    for part in range(4):
        rows = names[part * 25 : part * 25 + 25]
        columns = {"image": images(rows), "label": [int(name) % 3 for name in rows]}
        write(tmp_path / f"{part}.parquet", columns, row_group_size=7)
    write(tmp_path / "empty.parquet", {"image": images([]), "label": pa.array([], pa.int64())})
    table, _ = source(tmp_path).list()
    whole = list(source(tmp_path).read(table))
    assert [image.id for image in whole] == sorted(names)
    assert all(image.data == image.id.encode() and not image.error for image in whole)
    assert list(source(tmp_path).read(table.slice(13, 40))) == whole[13:53]
    assert list(source(tmp_path).read(table.slice(0, 0))) == []


def test_a_row_group_is_read_once_for_all_its_parts(tmp_path, monkeypatch):
    columns = {"image": images(f"{row:02d}" for row in range(20)), "label": [0, 1] * 10}
    write(tmp_path / "f.parquet", columns, row_group_size=10)
    reads, read = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, i, **kw: reads.append(i) or read(self, i, **kw))
    kept = source(tmp_path)
    table, _ = kept.list()
    parts = [image.id for start in range(0, 20, 3) for image in kept.read(table.slice(start, 3))]
    assert parts == [f"{row:02d}" for row in range(20)]
    assert reads == [0, 1]


def test_rows_are_found_across_the_batches_of_a_large_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr("cca_core.sources.parquet.BATCH_ROWS", 4)
    monkeypatch.setattr("cca_core.sources.parquet.KEPT_BYTES", 0)
    columns = {"image": images(f"{row:02d}" for row in range(23)), "label": [0, 1] * 11 + [0]}
    write(tmp_path / "f.parquet", columns, row_group_size=11)
    table, _ = source(tmp_path).list()
    assert [image.data.decode() for image in source(tmp_path).read(table)] == [f"{row:02d}" for row in range(23)]


def overwrite_images(path: Path, row_group: int) -> None:
    """Damages the image bytes of one row group, and nothing else of the file."""
    group = pq.read_metadata(path).row_group(row_group)
    columns = [group.column(index) for index in range(group.num_columns)]
    (chunk,) = [column for column in columns if column.path_in_schema == "image.bytes"]
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)


def test_images_are_read_only_where_they_are_wanted(tmp_path):
    columns = {"image": images("abcdef"), "label": [0, 1] * 3}
    path = write(tmp_path / "f.parquet", columns, row_group_size=2)
    overwrite_images(path, 1)
    table, _ = source(tmp_path).list()  # a listing reads no image at all
    read = source(tmp_path).read(table.take([5, 0]))
    assert [image.data for image in read] == [b"f", b"a"]
    with pytest.raises(OSError, match=r"."):
        list(source(tmp_path).read(table.slice(2, 1)))


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"img": [b"a"], "label": [0]}, {}, r"no column 'image': set source.image_column .*img, label"),
        ({"image": [b"a"], "y": [0]}, {}, r"no column 'label': set source.label_column .*image, y"),
        ({"image": [b"a"], "label": [0]}, {"id_column": "k"}, r"no column 'k': set source.id_column"),
        ({"image": ["a.png"], "label": [0]}, {}, r"'image' .* is string, not image bytes"),
        ({"image": [b"a"], "label": [0.5]}, {}, r"'label' .* is double: labels and ids are"),
        (
            {"image": [b"a", b"b"], "label": [3, 3]},
            {},
            r"1 class\(es\) with images \(3\), and CCA needs at least two",
        ),
        ({"image": [b"a"], "label": [-1]}, {}, r"0 class\(es\) with images,"),
        ({"image": [b"a", b"b"], "label": [0, 1 << 40]}, {}, r"too many classes: set source.label_column"),
    ],
)
def test_unusable_columns_are_refused_with_the_remedy(tmp_path, columns, settings, message):
    write(tmp_path / "f.parquet", columns)
    with pytest.raises(ConfigError, match=message):
        source(tmp_path, **settings).list()


def test_a_folder_without_parquet_or_with_a_broken_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no .parquet file found in"):
        source(tmp_path).list()
    (tmp_path / "half.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(ConfigError, match=r"half.parquet is not a whole Parquet file"):
        source(tmp_path).list()


def test_file_row_names_images_by_place_though_they_have_paths(tmp_path):
    write(tmp_path / "f.parquet", {"image": images(["z.png", "a.png"]), "label": [0, 1]})
    by_row = source(tmp_path, id_column="file:row")
    assert listed(by_row) == [("f.parquet:000000000", 0), ("f.parquet:000000001", 1)]
    assert [image.data for image in by_row.read(by_row.list()[0])] == [b"z.png", b"a.png"]


def test_ids_in_random_order_are_refused_where_each_part_would_read_everything(tmp_path, monkeypatch):
    rows = 6400
    shuffled = [f"{number:05d}.png" for number in np.random.default_rng(0).permutation(rows)]
    for name, paths in (("random", shuffled), ("sorted", sorted(shuffled))):
        columns = {"image": images(paths), "label": [row % 2 for row in range(rows)]}
        write(tmp_path / name / "f.parquet", columns, row_group_size=64)
    # All of these files are small: what would be a hundred GiB of them is a MiB here.
    monkeypatch.setattr("cca_core.sources.parquet.MAX_READ_BYTES", 1 << 20)
    with pytest.raises(ConfigError, match=r"4\d times its files.*set source\.id_column=file:row"):
        source(tmp_path / "random").list()
    assert source(tmp_path / "random", id_column="file:row").list()[0].num_rows == rows
    assert source(tmp_path / "sorted").list()[0].num_rows == rows
