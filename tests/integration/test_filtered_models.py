"""Writes bundles below temporary folders: what a content filter blocks leaves neither the service nor the pyfunc, and
registered versions carry their filter."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cca_core.bundle import FILTER_NAME, INFO_NAME, read_info
from cca_core.config import ConfigError
from cca_core.generate import Sampling
from cca_core.inspect import describe
from cca_core.metrics.content_filter import load_filter
from cca_core.store import Store
from deploy.generator import Loaded, load
from pipelines.mlflow_model import BUNDLE, ImageModel
from pipelines.stages.register import register
from pipelines.stages.show_safety import cell, shown_values
from tests.planted_filters import Brightness, Columns, Constant, scripted, spec_of
from tests.service import CLASSES, brightness, bundle


def write_bundle(folder: Path, data: bytes | None = None, **changes) -> str:
    """A small model, with a filter where ``data`` is one."""
    folder.mkdir(exist_ok=True)
    for name, content in bundle(0, data, **changes).items():
        (folder / name).write_bytes(content)
    return str(folder)


def test_a_bundle_carries_its_filter_and_one_without_is_what_it_was(tmp_path):
    data = scripted(Brightness())
    uri = write_bundle(tmp_path / "filtered", data, threshold=0.7)
    assert read_info(uri).filter == spec_of(data, threshold=0.7)
    assert load_filter(uri).spec == spec_of(data, threshold=0.7)
    assert describe(uri)["content filter"] == spec_of(data, threshold=0.7)
    raw = json.loads((tmp_path / "filtered" / INFO_NAME).read_text())
    assert raw["format_version"] == 2, "an older release refuses it"
    plain = write_bundle(tmp_path / "plain")
    raw = json.loads((tmp_path / "plain" / INFO_NAME).read_text())
    assert raw["format_version"] == 1
    assert "filter" not in raw
    assert read_info(plain).filter is None
    assert load_filter(plain) is None


def test_a_service_does_not_load_a_filter_that_was_exchanged_or_lost(tmp_path):
    data, other = scripted(Brightness()), scripted(Constant(0.0))
    uri = write_bundle(tmp_path / "b", data)
    assert load(uri, "", "cpu").filter.spec == spec_of(data)
    (tmp_path / "b" / FILTER_NAME).write_bytes(other)
    with pytest.raises(ConfigError, match=rf"has sha256 {spec_of(other).sha256}, not {spec_of(data).sha256} as bundle"):
        load(uri, "", "cpu")
    (tmp_path / "b" / FILTER_NAME).unlink()
    with pytest.raises(ConfigError, match=r"names a content filter and has no filter\.pt"):
        load(uri, "", "cpu")
    path = tmp_path / "b" / INFO_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "filter": None}))
    with pytest.raises(ConfigError, match="bundle format 2 and no content filter"):
        load(uri, "", "cpu")


def test_a_filter_that_breaks_its_contract_does_not_come_into_service(tmp_path):
    with pytest.raises(ConfigError, match="not one score each"):
        load(write_bundle(tmp_path / "b", scripted(Columns())), "", "cpu")


def draw_eight(loaded: Loaded) -> list[np.ndarray | None]:
    async def together() -> list[np.ndarray | None]:
        sampling = Sampling(cfg_scale=1.5)
        return await asyncio.gather(*(loaded.drawing.draw(1, seed, sampling) for seed in range(8)))

    return asyncio.run(together())


def test_blocked_images_leave_neither_the_service_nor_the_pyfunc(tmp_path):
    plain = load(write_bundle(tmp_path / "plain"), "", "cpu")
    images = draw_eight(plain)
    means = sorted(brightness(image) for image in images)
    data, edge = scripted(Brightness()), (means[3] + means[4]) / 2
    expected = [brightness(image) >= edge for image in images]
    uri = write_bundle(tmp_path / "filtered", data, threshold=edge)
    loaded = load(uri, "", "cpu")
    drawn = draw_eight(loaded)
    assert [image is None for image in drawn] == expected
    assert all(np.array_equal(a, b) for a, b in zip(drawn, images, strict=True) if a is not None)

    model = ImageModel()
    model.load_context(SimpleNamespace(artifacts={BUNDLE: uri}))
    answers = model.predict(None, pd.DataFrame({"class": [CLASSES[1]] * 8, "seed": range(8)}))["image_png_base64"]
    assert answers.isna().tolist() == expected
    first = expected.index(False)
    png = np.asarray(Image.open(io.BytesIO(base64.b64decode(answers[first]))))
    assert brightness(png) == pytest.approx(brightness(images[first]), abs=0.01)


class Versions:
    """A registry that keeps what it is given in memory."""

    def __init__(self) -> None:
        self.added: list[tuple[dict[str, bytes], dict[str, str]]] = []

    def by_digest(self, digest: str) -> SimpleNamespace | None:
        found = [i for i, (_, tags) in enumerate(self.added, start=1) if tags["cca.digest"] == digest]
        return SimpleNamespace(version=str(found[0])) if found else None

    def add(self, run_id: str, folder: str, name: str, sampling: dict, tags: dict[str, str]) -> str:
        self.added.append(({path.name: path.read_bytes() for path in Path(folder).iterdir()}, tags))
        return str(len(self.added))

    def alias(self, alias: str) -> None:
        return None

    def crown(self, version: str) -> None:
        pass


def test_both_registered_versions_carry_the_filter_and_another_filter_makes_others(tmp_path):
    store, data = Store(str(tmp_path)), scripted(Brightness())
    base, aligned, safety = (store.directory(name, name[0] * 64) for name in ("base", "align", "safety"))
    for directory in (base, aligned):
        for name, content in bundle(0).items():
            directory.write_bytes(name, content)
    safety.write_bytes(FILTER_NAME, data)
    spec = spec_of(data)
    rows = [
        {"label": label, "sampling": asdict(Sampling(cfg_scale=cfg)), "mean": {"distance": 1.0}}
        | {"cost": {"calls_per_image": 16}}
        for label, cfg in (("base", 1.0), ("base, CFG 2", 2.0))
    ]
    registry = Versions()

    def versions(filter_spec) -> dict[str, str]:
        return register(
            registry,
            run_id="r",
            base=base,
            aligned=aligned,
            safety=safety,
            filter_spec=filter_spec,
            baseline_rows=rows,
            candidate_rows=rows[:1],
            decision={"verdict": "keep CFG"},
            features="f",
        )

    assert versions(spec) == versions(spec) == {"base": "1", "aligned": "2", "champion": ""}
    for files, tags in registry.added:
        assert files[FILTER_NAME] == data
        assert json.loads(files[INFO_NAME])["filter"] == asdict(spec)
        assert tags["cca.filter"] == str(spec)
        assert tags["cca.digest"].split(":")[0] in (base.digest, aligned.digest)
    assert versions(replace(spec, threshold=0.9)) == {"base": "3", "aligned": "4", "champion": ""}
    assert versions(None) == {"base": "5", "aligned": "6", "champion": ""}
    assert FILTER_NAME not in registry.added[4][0]
    assert registry.added[5][1]["cca.digest"] == aligned.digest


def test_the_table_has_columns_of_the_filter_only_where_there_is_one():
    names = ("within_class_diversity", "twins", "memorisation", "class_disparity", "leakage")
    row = {"label": "aligned", "worst": {}, **dict.fromkeys(names, 0.5)}
    assert "filtered" not in shown_values([row]).values()
    found = row | {"filtered": 0.1, "filtered_in_class": 0.875, "worst": {"filtered_in_class": ["three"]}}
    assert list(shown_values([found]))[-2:] == ["filtered", "filtered, worst class"]
    assert [cell(found, name) for name in list(shown_values([found]).values())[-2:]] == ["0.100", "0.875 (three)"]
