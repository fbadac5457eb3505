"""Writes pairs of two random models below a temporary folder: same class and seed, the same however many there are."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cca_core.generate import Sampling, decode_images, generate
from cca_core.models import load_model, load_tokenizer, to_uint8
from cca_core.stages.review_pairs import PAIRS_SEED, Comparison, draw_pairs, read_pairs
from cca_core.store import Store
from cca_core.workers.sample import Sampler
from tests.service import bundle


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


@pytest.fixture
def compared(store):
    uris = []
    for seed in range(2):
        directory = store.directory("base", str(seed) * 64)
        for name, data in bundle(seed).items():
            directory.write_bytes(name, data)
        uris.append(directory.uri)
    return Comparison(
        guided=Sampler("base, CFG 1.5", uris[0], Sampling(cfg_scale=1.5)),
        aligned=Sampler("aligned", uris[1], Sampling()),
        models={"base": "0" * 64, "align": "1" * 64},
        classes=((2, "3"), (0, "ant")),
    )


def drawn(compared, store, count: int) -> list:
    records = []
    draw_pairs(on_log=records.append, compared=compared, store=store, num_pairs=count, device="cpu")
    assert records[-1] == {"images": 2 * count, "share_done": 1.0}
    return read_pairs(compared.directory(store, count))


def pixels(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert image.info == {}, "no metadata"
    return np.asarray(image)


def test_a_pair_is_one_class_and_seed_drawn_by_either_model(compared, store):
    pairs = drawn(compared, store, 5)
    assert [pair.class_name for pair in pairs] == ["3", "ant", "3", "ant", "3"]
    for side, sampler in (("guided", compared.guided), ("aligned", compared.aligned)):
        model, tokenizer = load_model(sampler.bundle_uri), load_tokenizer(sampler.bundle_uri)
        seeds = PAIRS_SEED * (1 << 32) + torch.arange(5)
        tokens = generate(model, torch.tensor([2, 0, 2, 0, 2]), sampler.sampling, seeds)
        expected = to_uint8(decode_images(tokenizer, tokens)).numpy()
        assert np.array_equal([pixels(getattr(pair, side)) for pair in pairs], expected), side


def test_a_pair_is_the_same_however_many_there_are(compared, store):
    few, many = drawn(compared, store, 3), drawn(compared, store, 40)
    assert many[:3] == few
    assert compared.directory(store, 3).manifest() is not None
    assert len({pair.aligned for pair in many}) == 40


def test_votes_belong_to_what_is_compared_and_not_to_how_many_pairs(compared, store):
    digests = {
        compared.digest,
        replace(compared, models={**compared.models, "align": "2" * 64}).digest,
        replace(compared, models={**compared.models, "base": "2" * 64}).digest,
        replace(compared, guided=replace(compared.guided, sampling=Sampling(cfg_scale=2.0))).digest,
        replace(compared, classes=compared.classes[:1]).digest,
    }
    assert len(digests) == 5
    moved = replace(compared, aligned=replace(compared.aligned, bundle_uri="s3://elsewhere", label="other"))
    assert moved.digest == compared.digest
    assert compared.directory(store, 3).digest != compared.directory(store, 4).digest
