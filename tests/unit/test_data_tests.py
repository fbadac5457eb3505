"""Reads token tables made here; checks that every harm to a data set is found, and is called by its name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pytest

from cca_core.config import ConfigError
from cca_core.manifest import FileEntry
from cca_core.schema import tokens_schema
from cca_core.stages.data_tests import check_tokens
from cca_core.store import shard_name

VIEWS, CODES, IMAGES, CLASSES = 2, 16, 400, 4


@dataclass
class Data:
    """Two shards of a sound data set of 400 images and 4 classes; the first has lost two images to quarantine."""

    ids: list[str] = field(default_factory=lambda: [f"{i:04d}" for i in range(IMAGES)])
    labels: np.ndarray = field(default_factory=lambda: np.random.default_rng(0).integers(CLASSES, size=IMAGES))
    tokens: np.ndarray = field(default_factory=lambda: np.random.default_rng(1).integers(CODES, size=(800, 5)))
    views: np.ndarray = field(default_factory=lambda: np.tile([0, 1], IMAGES))
    quarantined: int = 2
    images_entry: int = 200

    def check(self) -> dict:
        rows = {
            "image_id": [image_id for image_id in self.ids for _ in range(VIEWS)],
            "view": self.views.astype(np.uint8),
            "label": np.repeat(self.labels, VIEWS).astype(np.int32),
            "held_out": np.zeros(2 * IMAGES, bool),
            "tokens": self.tokens.tolist(),
        }
        table = pa.table(rows, schema=tokens_schema(5, CODES))
        names = shard_name(0, 202), shard_name(202, 402)
        shards = dict(zip(names, (table.slice(0, 400), table.slice(400)), strict=True))
        sizes = {"tokens": (400, 400), "images": (200, self.images_entry), "quarantine": (self.quarantined, 0)}
        files = {
            sibling: {name: FileEntry(1, "", rows) for name, rows in zip(names, counts, strict=True)}
            for sibling, counts in sizes.items()
        }
        counted = np.bincount(Data().labels, minlength=CLASSES)
        return check_tokens(shards, files, num_views=VIEWS, images_per_class=counted, codebook_size=CODES, seed=0)


def changed(array: np.ndarray, index: int, value: int) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


def test_a_sound_data_set_passes_and_says_what_was_found():
    found = Data().check()
    assert set(found["data_tests"]) == {
        "token range",
        "rows per class",
        "duplicate ids",
        "negatives equal to positives",
        "shards against manifest",
    }
    assert found["data_tests"]["token range"] == "0 to 15 of 16 codes"
    assert found["data_tests"]["shards against manifest"] == "2 shards, 800 rows"
    shares = np.bincount(Data().labels) / IMAGES
    assert found["expected_share_negative_equals_positive"] == pytest.approx((shares**2).sum())
    assert found["share_negative_equals_positive"] == pytest.approx((shares**2).sum(), abs=0.1)


IDS, LABELS = Data().ids, Data().labels
HARMS = {
    "token range": {"tokens": changed(Data().tokens, 7, CODES)},
    "rows per class: unknown": {"labels": changed(LABELS, 3, CLASSES)},
    "rows per class: moved": {"labels": changed(LABELS, 3, (LABELS[3] + 1) % CLASSES)},
    "duplicate ids: side by side": {"ids": [*IDS[:9], IDS[8], *IDS[10:]]},
    "duplicate ids: across shards": {"ids": [*IDS[:200], IDS[199], *IDS[201:]]},
    "views": {"views": changed(Data().views, 5, 0)},
    "shards against manifest: rows": {"quarantined": 1},
    "shards against manifest: siblings": {"images_entry": 199},
}


@pytest.mark.parametrize(("name", "harm"), HARMS.items(), ids=HARMS)
def test_every_harm_is_called_by_its_name(name, harm):
    with pytest.raises(ConfigError, match=f"data test '{name.partition(':')[0]}' failed"):
        replace(Data(), **harm).check()


def test_negatives_that_are_too_often_the_positives_are_found(monkeypatch):
    monkeypatch.setattr("cca_core.pairs.negatives", lambda hashes, labels, **key: labels)
    with pytest.raises(ConfigError, match=r"'negatives equal to positives' failed: their share is 1\.0000"):
        Data().check()
