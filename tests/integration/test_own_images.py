"""Writes to temporary folders: `cca run` on a folder as people have it, with images of many kinds and some broken."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cca_core.store import Store
from tests.driver import TINY, cca, manifests

SMALL = [
    "tokens.rows_per_shard=25",
    "evaluate.num_samples=100",
    "evaluate.seeds=[0]",
    "features.epochs=2",
    "base.epochs=2",
    "align.epochs=1",
]


def arguments(source, *more: str) -> list[str]:
    settings = ["source.kind=folder", f"source.uri={source}", *SMALL, *more]
    return [part for setting in settings for part in ("--set", setting)]


def write_folder(root, per_class: int = 30) -> None:
    """Two classes of images of mixed sizes and modes, told apart by their brightness."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("dusk", "noon")):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            height, width = rng.integers(8, 40, size=2)
            grey = rng.integers(0, 90, size=(height, width)) + 160 * label
            image = Image.fromarray(np.stack([grey] * 3, -1).astype(np.uint8))
            path = root / name / f"{i:02d}"
            if i % 5 == 0:
                image.convert("RGBA").save(path.with_suffix(".png"))
            elif i % 5 == 1:
                image.convert("P").save(path.with_suffix(".gif"))
            elif i % 5 == 2:
                Image.fromarray((grey * 257).astype(np.uint16)).save(path.with_suffix(".png"))
            elif i % 5 == 3:
                exif = Image.Exif()
                exif[0x0112] = 6  # turned by a quarter
                image.save(path.with_suffix(".jpg"), exif=exif)
            else:
                image.save(path.with_suffix(".webp"), lossless=True)
    whole = (root / "noon" / "00.png").read_bytes()
    (root / "noon" / "torn.png").write_bytes(whole[: len(whole) // 2])
    (root / "notes.txt").write_text("no image")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_folder(folder / "images")
    result = cca(folder, "run", str(TINY), *arguments("images"))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout


def test_every_readable_image_becomes_tokens_and_the_broken_one_is_named(finished):
    folder, output = finished
    facts = manifests(folder)["tokens"].facts
    assert (facts["num_images"], facts["quarantined"]) == (60, 1)
    assert facts["images_per_class"] == [30, 30]
    assert "1 images cannot be read and are left out" in output
    assert "noon/torn.png" in output
    found = manifests(folder)["quarantine"]
    store = Store(str(folder / ".cca" / "storage")).directory("quarantine", found.digest)
    rows = [row for name in found.files for row in store.read_table(name).to_pylist()]
    assert [row["image_id"] for row in rows] == ["noon/torn"]


def test_class_names_are_those_of_the_folders(finished):
    folder, output = finished
    digest = manifests(folder)["conditions"].digest
    names = Store(str(folder / ".cca" / "storage")).directory("conditions", digest).read_table("conditions.arrow")
    assert names.column("name").to_pylist() == ["dusk", "noon"]
    assert "| aligned " in output


def digests(folder, *more: str) -> dict[str, str]:
    """What `cca plan` would make, by stage."""
    result = cca(folder, "plan", str(TINY), *arguments("images", *more))
    assert result.returncode == 0, result.stderr
    rows = [line.split("│") for line in result.stdout.splitlines() if line.startswith("│")]
    return {row[1].strip(): row[4].strip() for row in rows if row[4].strip()}


def test_a_changed_image_is_noticed(finished):
    folder, _ = finished
    before = digests(folder)
    assert digests(folder) == before
    # Of the same size and name: only its content, and so its time of change, differs.
    path = folder / "images" / "dusk" / "04.webp"
    Image.open(path).convert("RGB").rotate(180).save(path, lossless=True)
    after = digests(folder)
    assert set(before) == set(after)
    assert all(before[stage] != after[stage] for stage in before)


def test_a_changed_checkpoint_is_noticed(finished):
    folder, _ = finished
    (base,) = (folder / ".cca" / "storage" / "base").glob("*")
    copy = folder / "checkpoint"
    copy.mkdir()
    for path in base.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    # The bundle serves as both: an image has the tokens that its own tokenizer gives it.
    more = (f"tokenizer.checkpoint={copy}", f"base.checkpoint={copy}")
    before = digests(folder, *more)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    after = digests(folder, *more)
    assert all(before[stage] != after[stage] for stage in ("base", "baseline", "reference", "align", "evaluate"))
    assert before["features"] == after["features"]


def test_a_checkpoint_of_another_shape_is_refused_before_anything_runs(finished, tmp_path):
    folder, _ = finished
    (base,) = (folder / ".cca" / "storage" / "base").glob("*")
    result = cca(tmp_path, "run", "--set", f"base.checkpoint={base}", "--set", "tokenizer.codebook_size=32")
    assert result.returncode == 2
    assert "has vocabulary 64, the data set has 32" in result.stderr
    result = cca(tmp_path, "run", "--set", f"base.checkpoint={base}")
    assert result.returncode == 2
    assert "has classes 2, the data set has 10" in result.stderr
    assert not manifests(tmp_path)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "no image file found"),
        (["only/a.png"], "CCA needs at least two classes"),
        (["a/1.png", "b/1.png"], "no readable image among the 2"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(tmp_path, names, says):
    (tmp_path / "images").mkdir()
    for name in names:
        path = tmp_path / "images" / name
        path.parent.mkdir()
        path.write_bytes(b"\x89PNG nothing more")
    result = cca(tmp_path, "run", str(TINY), *arguments("images"))
    assert result.returncode == 2, result.stdout + result.stderr
    assert says in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1


def test_forgotten_images_leave_every_data_set_and_the_models_that_saw_them_are_named(finished):
    """The last of those that share a folder: it takes data away."""
    folder, _ = finished
    (folder / "ids.txt").write_text("dusk/07\nnoon/12\n")
    result = cca(folder, "data", "forget", "--ids", "ids.txt")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 of 2 ids were in the data sets of" in result.stdout
    assert "trained on them  models:/cca-tiny/1" in result.stdout
    assert "models:/cca-tiny/2 (champion)" in result.stdout
    for picture in ("grid-real.png", "copies.png", "least_varied.png"):
        assert picture in result.stdout, "it may show one of them"
    found = manifests(folder)
    assert found["tokens"].facts["num_images"] == 58
    assert not {"reference", "features"} & set(found)
    result = cca(folder, "run", str(TINY), *arguments("images"), "--only", "tokenizer")
    assert result.returncode == 0, "what is left is a source as before"
    result = cca(folder, "data", "forget", "--ids", "nowhere.txt")
    assert result.returncode == 2
    assert "cannot read the ids in nowhere.txt" in result.stderr
