"""Reads WebDataset shards made here, on disk and in memory; checks keys, labels, errors and what is refused."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import fsspec
import pytest

from cca_core.config import ConfigError, SourceConfig
from cca_core.sources import LISTING, listing_digest, open_source

Members = Iterable[tuple[str, bytes]]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CCA_CACHE", str(tmp_path / "cache"))


def shard(members: Members, tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sample(key: str, label: object = None, name: str = "png") -> Members:
    """An image whose bytes are its key, so that a mix-up shows, and its .cls."""
    cls = [] if label is None else [(f"{key}.cls", f"{label}\n".encode())]
    return [(f"{key}.{name}", key.encode()), *cls]


#: Two classes, so that whatever stands beside it may have none.
TWO = [*sample("x", 0), *sample("y", 1)]


def write(root: Path, **shards: Members) -> Path:
    """Shards by path below the root, "__" for "/"."""
    for name, members in shards.items():
        path = root / f"{name.replace('__', '/')}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(shard(members))
    return root


def source(uri: Path | str, **settings):
    return open_source(SourceConfig(kind="tar", uri=str(uri), **settings))


def read(source_) -> dict[str, tuple[int, bytes, str]]:
    table, _ = source_.list()
    return {image.id: (image.label, image.data, image.error) for image in source_.read(table)}


def only(tmp_path: Path, members: Members, **settings) -> dict[str, tuple[int, bytes, str]]:
    """What is read of one shard with these members and ``TWO``, without ``TWO``."""
    found = read(source(write(tmp_path / "data", s=[*members, *TWO]), **settings))
    assert (found.pop("x")[1:], found.pop("y")[1:]) == ((b"x", ""), (b"y", ""))
    return found


def test_shards_in_folders_are_one_data_set(tmp_path):
    root = write(
        tmp_path / "data",
        part__1=[*sample("n01/b", 1), ("n01/b.txt", b"a caption"), *sample("a", 0)],
        part__deep__0=sample("n01/a.b/c", 2, "JPEG"),
        z=sample("n02/a", 0),
    )
    table, class_names = source(root).list()
    assert table.schema == LISTING
    assert class_names == ("0", "1", "2")
    assert table["image_id"].to_pylist() == ["a", "n01/a.b/c", "n01/b", "n02/a"]
    assert table["label"].to_pylist() == [0, 2, 1, 0]
    assert table["uri"][1].as_py() == f"file://{root}/part/deep/0.tar:n01/a.b/c.JPEG"
    assert [image.data.decode() for image in source(root).read(table)] == table["image_id"].to_pylist()


def test_ids_do_not_depend_on_the_root_or_on_the_shard(tmp_path):
    one = write(tmp_path / "one", a=sample("d/k", 0), b=sample("l", 1))
    other = write(tmp_path / "other" / "deep", c=[*sample("l", 1), *sample("d/k", 0)])
    assert read(source(one)) == read(source(other)) == read(source(other / "c.tar"))


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([3, 0, 10], ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"), [3, 0, 10]),
        (["dog", "cat", "dog"], ("cat", "dog"), [1, 0, 1]),
        ([3, "cat", 3], ("3", "cat"), [0, 1, 0]),
    ],
    ids=["integers", "names", "mixed"],
)
@pytest.mark.parametrize("extension", ["cls", "json", "CLS", "Json"])
def test_labels_are_integers_or_names(tmp_path, labels, names, numbers, extension):
    members = []
    for number, label in enumerate(labels):
        text = json.dumps({"class": label, "label": 99}) if extension.lower() == "json" else f" {label}\n"
        members += [*sample(str(number)), (f"{number}.{extension}", text.encode())]
    table, class_names = source(write(tmp_path / "data", s=members), label_column="class").list()
    assert class_names == names
    assert table["label"].to_pylist() == numbers
    assert table["error"].to_pylist() == [""] * 3


@pytest.mark.parametrize("document", [{"label": 0}, {"label": [1, 2]}, {"label": True}, {}, "{broken"])
@pytest.mark.parametrize("first", ["cls", "json"])
def test_cls_is_preferred_over_json_whatever_the_json_holds(tmp_path, document, first):
    text = document if isinstance(document, str) else json.dumps(document)
    labels = sorted([("k.cls", b"1"), ("k.json", text.encode())], reverse=first == "json")
    assert only(tmp_path, [*sample("k"), *labels]) == {"k": (1, b"k", "")}


@pytest.mark.parametrize(
    ("members", "label", "error"),
    [
        ([("k.cls", b"1"), ("k.txt", b"t")], 1, "no image under this key"),
        ([*sample("k", 1), ("k.jpg", b"other")], 1, "several images under this key: k.png and k.jpg"),
        ([("k.png", b""), ("k.cls", b"1")], 1, "k.png is empty"),
        (sample("k"), -1, "no label: neither a .cls nor a .json with 'label' under this key"),
        (sample("k", " "), -1, "no label: neither a .cls nor a .json with 'label' under this key"),
        ([*sample("k"), ("k.json", b'{"other": 1}')], -1, "no label: neither a .cls nor a .json with 'label'"),
        ([*sample("k"), ("k.json", b"[1]")], -1, "no label: neither a .cls nor a .json with 'label'"),
        ([*sample("k"), ("k.json", b"{broken")], -1, "wrong label: the .json cannot be read (Expecting"),
        ([*sample("k"), ("k.json", b"[" * 99999)], -1, "wrong label: the .json cannot be read (maximum recursion"),
        ([*sample("k"), ("k.cls", b"\xff")], -1, "wrong label: the .cls cannot be read ("),
        ([*sample("k"), ("k.json", b'{"label": true}')], -1, "wrong label: True is neither an integer nor a name"),
        ([*sample("k"), ("k.json", b'{"label": 0.5}')], -1, "wrong label: 0.5 is neither an integer nor a name"),
        (sample("k", -3), -1, "wrong label: -3 is none of the 2 classes"),
    ],
)
def test_what_is_wrong_with_a_sample_is_its_own_error(tmp_path, members, label, error):
    ((key, (its_label, data, its_error)),) = only(tmp_path, members).items()
    assert (key, its_label, data) == ("k", label, b"")
    assert its_error.startswith(error)


def test_of_samples_with_one_key_the_first_stays(tmp_path):
    root = write(tmp_path / "data", a=sample("k", 0), b=[("k.png", b"other"), ("k.cls", b"1"), *TWO])
    table, _ = source(root).list()
    first, second = list(source(root).read(table))[:2]
    assert (first.id, first.label, first.data, first.error) == ("k", 0, b"k", "")
    error = f"duplicate id: file://{root}/a.tar:k.png has it already; give it another"
    assert (second.id, second.data, second.error) == ("k", b"", error)


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_may_be_spelled_as_tar_writes_them(tmp_path, tar_format):
    long = "folder/" * 40 + "é" * 60
    members = [*sample("./a", 0, "PNG"), ("./._a.png", b"of macOS"), (".b.png", b"hidden"), ("README", b"no extension")]
    (tmp_path / "s.tar").write_bytes(shard([*members, *sample(long, 1, "JpEg")], tar_format))
    assert read(source(tmp_path)) == {"a": (0, b"./a", ""), long: (1, long.encode(), "")}


def test_any_slice_is_read_as_in_the_whole(tmp_path):
    keys = [f"{number * 37 % 101:03d}" for number in range(100)]
    shards = {str(part): [m for key in keys[part::4] for m in sample(key, int(key) % 3)] for part in range(4)}
    tar = source(write(tmp_path / "data", **shards))
    table, _ = tar.list()
    whole = list(tar.read(table))
    assert [image.data.decode() for image in whole] == sorted(keys)
    assert list(tar.read(table.slice(13, 70))) == whole[13:83]
    assert list(tar.read(table.slice(0, 0))) == []


WHOLE = shard([*TWO, ("z.png", b"z" * 2000), ("z.cls", b"1")])
#: Where the header and the data of z.png, those of z.cls, and the end begin.
HEADER, DATA, NEXT, LABEL, END = 4096, 4608, 6656, 7168, 7680


@pytest.mark.parametrize(
    "damaged",
    [
        *(WHOLE[:size] for size in (0, HEADER, HEADER + 9, DATA, DATA + 9, NEXT, LABEL, LABEL + 1, END)),
        *(WHOLE[:at] + fill * 512 + WHOLE[at + 512 :] for at in (0, HEADER, NEXT) for fill in (b"\0", b"\xff")),
        WHOLE + shard(TWO),
        shard([("\udcff.png", b"no text"), *TWO], tarfile.GNU_FORMAT),
    ],
)
def test_a_shard_that_is_not_whole_is_refused_by_name(tmp_path, damaged):
    with tarfile.open(fileobj=io.BytesIO(WHOLE)) as tar:
        assert [(m.offset, m.offset_data) for m in tar][4:] == [(HEADER, DATA), (NEXT, LABEL)]
    write(tmp_path, a=TWO)
    (tmp_path / "b.tar").write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"/b\.tar .*: (replace|write) it"):
        source(tmp_path).list()


def test_padding_after_the_end_is_fine(tmp_path):
    for name, size in (("short", 8192), ("long", 60000)):
        (tmp_path / f"{name}.tar").write_bytes(WHOLE[:8192].ljust(size, b"\0"))
        assert list(read(source(tmp_path / f"{name}.tar"))) == ["x", "y", "z"]


def test_a_folder_without_shards_is_refused(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no \.tar file found in .*shards are not compressed"):
        source(tmp_path).list()


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The paths that were opened in the object store to be read."""
    paths: list[str] = []
    store = type(fsspec.filesystem("memory"))
    real = store.open

    def open_(self, path, mode="rb", *args, **kwargs):
        paths.extend([path] * (mode == "rb"))
        return real(self, path, mode, *args, **kwargs)

    monkeypatch.setattr(store, "open", open_)
    return paths


def test_an_object_store_is_read_through_once(tmp_path, opened):
    fs, uri = fsspec.filesystem("memory"), "memory://tar-once"
    root = write(tmp_path / "data", a=[*sample("k", 1), *sample("none")], d__b=sample("l", 0))
    for path in ("a.tar", "d/b.tar"):
        fs.pipe_file(f"/tar-once/{path}", (root / path).read_bytes())
    before = source(uri).list()
    assert read(source(uri)) == read(source(root))
    assert sorted(opened) == ["/tar-once/a.tar", "/tar-once/d/b.tar"]
    assert before[0] == source(uri).list()[0]
    assert listing_digest(*before) == listing_digest(*source(uri).list())

    read(source(uri, label_column="other"))  # another label is another index
    assert len(opened) == 4
    fs.pipe_file("/tar-once/d/b.tar", shard(sample("m", 0)))
    assert list(read(source(uri))) == ["k", "m", "none"]
    assert opened[4:] == ["/tar-once/d/b.tar"]
    assert listing_digest(*before) != listing_digest(*source(uri).list())


def test_the_failure_of_the_store_passes_and_a_shard_that_is_gone_is_an_error(tmp_path, monkeypatch):
    root = write(tmp_path / "data", a=sample("k", 1), b=sample("l", 0))
    table, _ = source(root).list()
    (root / "a.tar").unlink()
    gone, whole = source(root).read(table)
    assert "FileNotFoundError" in gone.error
    assert (whole.data, whole.error) == (b"l", "")

    def cat_file(self, path, *args, **kwargs):
        raise ConnectionError("store down")

    monkeypatch.setattr(type(fsspec.filesystem("file")), "cat_file", cat_file)
    with pytest.raises(ConnectionError, match="store down"):
        list(source(root).read(table))
