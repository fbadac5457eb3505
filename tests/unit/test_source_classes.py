"""Reads folders, Parquet files and shards made here; checks class maps, classes and files chosen, and the limit."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cca_core.config import ConfigError, SourceConfig
from cca_core.sources import open_source


def source(kind: str, uri: Path, **settings):
    return open_source(SourceConfig(kind=kind, uri=str(uri), **settings))


def folder(root: Path, *names: str) -> Path:
    for name in names:
        path = root / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root / "data"


def parquet(path: Path, labels: list, prefix: str = "") -> Path:
    """Rows with ids a, b, c, ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = [f"{prefix}{chr(97 + row)}" for row in range(len(labels))]
    pq.write_table(pa.table({"image": [b"image"] * len(labels), "label": labels, "key": ids}), path)
    return path


def shard(path: Path, **labels: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, label in labels.items():
            for name, data in ((f"{key}.png", b"image"), (f"{key}.cls", label.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def class_map(root: Path, content: object) -> dict[str, str]:
    path = root / "classes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return {"class_map": str(path)}


def named(source_) -> dict[str, str | None]:
    """Image id -> name of its class, or what is wrong with the row."""
    table, names = source_.list()
    return {row["image_id"]: row["error"] or names[row["label"]] for row in table.to_pylist()}


def labels(source_) -> dict[str, int]:
    table, _ = source_.list()
    return dict(zip(table["image_id"].to_pylist(), table["label"].to_pylist(), strict=True))


NONE = "wrong label: {} is none of the {} classes"
WORDNET = {"n03": "eel", "n01": "cat", "n02": "dog"}
IMAGENET = {"1": ["n01", "cat"], "0": ["n03", "eel"], "2": ["n02", "dog"]}


@pytest.mark.parametrize("content", [WORDNET, IMAGENET, [["n03", "eel"], ["n01", "cat"], ["n02", "dog"]]])
def test_a_class_map_names_and_numbers_the_folders(tmp_path, content):
    root = folder(tmp_path, "n01/a.png", "n02/b.png", "n04/c.png", "cat/d.png")
    mapped = source("folder", root, **class_map(tmp_path, content))
    assert mapped.list()[1] == ("eel", "cat", "dog")
    error = NONE.format("n04", 3)
    assert named(mapped) == {"n01/a": "cat", "n02/b": "dog", "n04/c": error, "cat/d": "cat"}
    assert labels(mapped) == {"n01/a": 1, "n02/b": 2, "n04/c": -1, "cat/d": 1}
    assert {image.id: image.data for image in mapped.read(mapped.list()[0])}["n04/c"] == b""


def test_a_list_numbers_the_folders_in_its_order(tmp_path):
    root = folder(tmp_path, "cat/a.png", "dog/b.png", "fox/c.png")
    mapped = source("folder", root, **class_map(tmp_path, ["dog", "eel", "cat"]))
    assert mapped.list()[1] == ("dog", "eel", "cat")
    assert named(mapped) == {"cat/a": "cat", "dog/b": "dog", "fox/c": NONE.format("fox", 3)}
    assert named(source("folder", root, class_names=("dog", "eel", "cat"))) == named(mapped)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (["eel", "cat", "dog"], ["eel", "dog", NONE.format(7, 3), "no label", NONE.format(-1, 3)]),
        (IMAGENET, ["eel", "dog", NONE.format(7, 3), "no label", NONE.format(-1, 3)]),
        (WORDNET, ["eel", "dog", NONE.format(7, 3), "no label", NONE.format(-1, 3)]),
        ({"2": "dog", "0": "eel", "1": "cat"}, ["eel", "dog", NONE.format(7, 3), "no label", NONE.format(-1, 3)]),
        ({"7": "seven", "2": "two"}, [NONE.format(0, 2), "two", "seven", "no label", NONE.format(-1, 2)]),
        ({"2": "two", "7": "seven", "1": "one"}, [NONE.format(0, 3), "two", "seven", "no label", NONE.format(-1, 3)]),
    ],
    ids=["list", "ImageNet's", "names in order", "counted from 0", "with gaps", "counted from 1"],
)
def test_a_class_map_names_integer_labels(tmp_path, content, expected):
    path = parquet(tmp_path / "f.parquet", [0, 2, 7, None, -1])
    mapped = source("parquet", path, id_column="key", **class_map(tmp_path, content))
    assert list(named(mapped).values()) == expected


def test_the_number_of_a_class_is_its_place_in_the_map(tmp_path):
    path = parquet(tmp_path / "f.parquet", [7, 2, 7])
    mapped = source("parquet", path, id_column="key", **class_map(tmp_path, {"7": "seven", "4": "four", "2": "two"}))
    assert mapped.list()[1] == ("seven", "four", "two")
    assert labels(mapped) == {"a": 0, "b": 2, "c": 0}


def test_two_classes_of_one_name_stay_two(tmp_path):
    """ImageNet's map has crane, the bird, and crane, the machine."""
    cranes = class_map(tmp_path, {"0": ["n01", "crane"], "1": ["n02", "dog"], "2": ["n03", "crane"]})
    root = folder(tmp_path, "n01/a.png", "n02/b.png", "n03/c.png")
    assert labels(source("folder", root, **cranes)) == {"n01/a": 0, "n02/b": 1, "n03/c": 2}
    assert labels(source("folder", root, classes=("crane",), **cranes)) == {"n01/a": 0, "n03/c": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[broken", r"classes\.json is not JSON: "),
        ([], r"does not list classes: write a list of names"),
        ({}, r"does not list classes"),
        ("3", r"does not list classes"),
        ([1, 2], r"does not list classes"),
        ({"cat": 0, "dog": 1}, r"does not list classes"),
        ({"cat": "", "dog": "dog"}, r"does not list classes"),
        ({"0": ["n01", "cat", "x"]}, r"does not list classes"),
        (["cat", "dog", "cat"], r"does not list classes.*each label once"),
        ({"0": ["n01", "cat"], "1": ["n01", "dog"]}, r"does not list classes.*each label once"),
    ],
)
def test_a_map_that_is_none_is_refused_with_the_remedy(tmp_path, content, message):
    root = folder(tmp_path, "cat/a.png", "dog/b.png")
    with pytest.raises(ConfigError, match=message):
        source("folder", root, **class_map(tmp_path, content)).list()


def test_a_map_that_is_not_there_is_refused(tmp_path):
    root = folder(tmp_path, "cat/a.png", "dog/b.png")
    with pytest.raises(ConfigError, match=r"nowhere\.json does not exist: correct it, or create it"):
        source("folder", root, class_map=str(tmp_path / "nowhere.json")).list()


@pytest.mark.parametrize("classes", [("eel", "dog"), ("n03", "n02"), ("n02", "eel")])
def test_classes_are_chosen_by_name_or_by_what_the_data_calls_them(tmp_path, classes):
    root = folder(tmp_path, "n01/a.png", "n02/b.png", "n03/c.png", "n04/d.png", "loose.png")
    chosen = source("folder", root, classes=classes, **class_map(tmp_path, WORDNET))
    assert chosen.list()[1] == ("eel", "cat", "dog")
    assert labels(chosen) == {"n02/b": 2, "n03/c": 0, "n04/d": -1, "loose": -1}
    assert named(chosen)["loose"] == "no label: it lies in no class folder"


def test_without_a_map_the_chosen_folders_are_numbered_anew(tmp_path):
    root = folder(tmp_path, "ant/a.png", "bee/b.png", "cat/c.png", "dog/d.png", "loose.png")
    chosen = source("folder", root, classes=("dog", "bee"))
    assert chosen.list()[1] == ("bee", "dog")
    assert labels(chosen) == {"bee/b": 0, "dog/d": 1, "loose": -1}


def test_integer_labels_keep_their_numbers(tmp_path):
    path = parquet(tmp_path / "f.parquet", [0, 3, 1, None, 3])
    chosen = source("parquet", path, id_column="key", classes=("3", "0"))
    assert chosen.list()[1] == ("0", "1", "2", "3")
    assert labels(chosen) == {"a": 0, "b": 3, "d": -1, "e": 3}


@pytest.mark.parametrize("named_by", ["nothing", "class_map", "class_names"])
def test_a_class_that_is_unknown_is_refused(tmp_path, named_by):
    settings = {
        "nothing": {},
        "class_map": class_map(tmp_path, ["cat", "dog"]),
        "class_names": {"class_names": ("cat", "dog")},
    }
    root = folder(tmp_path, "cat/a.png", "dog/b.png")
    with pytest.raises(ConfigError, match=r"source\.classes has 'eel', which is no class of .*: correct it"):
        source("folder", root, classes=("cat", "dog", "eel"), **settings[named_by]).list()


def test_one_class_is_not_enough(tmp_path):
    root = folder(tmp_path, "cat/a.png", "dog/b.png")
    with pytest.raises(ConfigError, match=r"1 class\(es\) with images \(dog\).*source\.classes"):
        source("folder", root, classes=("dog",)).list()


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        ({"include": ("train/*",)}, ["train/1", "train/old/2"]),
        ({"exclude": ("train/*",)}, ["val/3", "val/4"]),
        ({"include": ("*/2.*", "val/*"), "exclude": ("*/4.*",)}, ["train/old/2", "val/3"]),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_globs_take_files_of_images(tmp_path, kind, globs, expected):
    for path in ("train/1", "train/old/2", "val/3", "val/4"):
        file = tmp_path / "data" / f"{path}.{kind}"
        if kind == "parquet":
            parquet(file, [0, 1], f"{path}/")
        else:
            shard(file, **{f"{path}/a": "0", f"{path}/b": "1"})
    key = {"id_column": "key"} if kind == "parquet" else {}
    found = source(kind, tmp_path / "data", **key, **globs)
    assert list(labels(found)) == [f"{path}/{row}" for path in expected for row in "ab"]
    assert not any(image.error for image in found.read(found.list()[0]))


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        ({"include": ("*.jpg", "dog/*")}, ["cat/old/b", "dog/c", "dog/d"]),
        ({"exclude": ("*/old/*", "eel/*")}, ["cat/a", "dog/c", "dog/d"]),
        ({"include": ("*.png",), "exclude": ("eel*",)}, ["cat/a", "dog/c"]),
    ],
)
def test_globs_take_images_of_a_folder(tmp_path, globs, expected):
    root = folder(tmp_path, "cat/a.png", "cat/old/b.jpg", "dog/c.png", "dog/d.jpg", "eel/e.png")
    assert list(labels(source("folder", root, **globs))) == expected


@pytest.mark.parametrize(
    ("kind", "file"), [("folder", "a/b.png"), ("parquet", "a.parquet"), ("tar", "a.tar")], ids=lambda value: str(value)
)
def test_globs_that_take_nothing_are_named(tmp_path, kind, file):
    root = folder(tmp_path, file)
    with pytest.raises(ConfigError, match=r"no .* that source\.include and source\.exclude take found in"):
        source(kind, root, include=("z*",)).list()


def test_a_larger_limit_adds_images_and_removes_none(tmp_path):
    names = [f"{('cat', 'dog')[n % 2]}/{n:02d}.png" for n in range(40)]
    root, few = folder(tmp_path / "all", *names), folder(tmp_path / "few", *names[:20])
    everything = labels(source("folder", root))
    taken = [set(labels(source("folder", root, limit=limit))) for limit in range(1, 42)]
    assert [len(ids) for ids in taken] == [*range(1, 41), 40]
    assert all(less <= more for less, more in pairwise(taken))
    assert taken[9] != set(sorted(everything)[:10])  # not simply the first
    limited = source("folder", root, limit=15)
    assert labels(limited).items() <= everything.items()
    assert list(labels(limited)) == sorted(labels(limited))
    # Which images they are follows from their own ids.
    assert set(labels(source("folder", few, limit=5))) >= taken[4] & set(labels(source("folder", few)))


def test_limit_counts_the_images_of_the_chosen_classes(tmp_path):
    root = folder(tmp_path, *(f"{name}/{n}.png" for name in ("ant", "bee", "cat") for n in range(10)))
    chosen = labels(source("folder", root, classes=("ant", "cat"), limit=12))
    assert len(chosen) == 12
    assert {image_id.partition("/")[0] for image_id in chosen} == {"ant", "cat"}
