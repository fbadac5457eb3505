"""Reads data/metrics: our metrics against recorded torch-fidelity and guided-diffusion values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from cca_core.metrics import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from cca_core.metrics.fidelity import squared_radii

DATA = Path(__file__).parent / "data" / "metrics"


@pytest.fixture(scope="module")
def features() -> dict[str, np.ndarray]:
    return load_file(DATA / "features.safetensors")


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads((DATA / "reference.json").read_text())


def distance(real_ND, sample_ND) -> float:
    real, sample = Moments.of(real_ND), Moments.of(sample_ND)
    return frechet_distance(real.mean, real.covariance, sample.mean, sample.covariance)


def test_frechet_distance(features, golden):
    value = distance(features["features_ref"], features["features_sample"])
    assert value == pytest.approx(golden["fid_torch_fidelity"], abs=1e-5)
    assert value == pytest.approx(golden["fid_float64_eigh"], abs=1e-7)
    assert Moments.of(features["features_ref"]).mean == pytest.approx(features["mu_ref"], abs=1e-6)


def test_frechet_distance_of_fewer_samples_than_features(features, golden):
    value = distance(features["features_ref"], features["features_sample"][:40])
    assert value == pytest.approx(golden["fid_torch_fidelity_first40_samples_vs_ref"], abs=1e-4)


def test_inception_score(features, golden):
    logits = features["logits"]
    plain = golden["is_torch_fidelity_10splits_noshuffle"]
    assert inception_score(logits) == pytest.approx((plain["mean"], plain["std"]), abs=1e-6)
    shuffled = golden["is_torch_fidelity_10splits_shuffle2020"]
    order = features["is_shuffle_permutation"]
    assert inception_score(logits[order]) == pytest.approx((shuffled["mean"], shuffled["std"]), abs=1e-6)
    one_split = golden["is_guided_diffusion_default_split5000"]
    assert inception_score(logits, splits=1) == pytest.approx((one_split, 0.0), abs=1e-6)


def test_kernel_distance(features, golden):
    real, sample = features["features_ref"], features["features_sample"]
    assert kernel_distance(real, sample) == pytest.approx(golden["kid_torch_fidelity_full_mmd2"], abs=1e-6)
    assert kernel_distance(sample, real) == pytest.approx(kernel_distance(real, sample), rel=1e-12)


def test_kernel_distance_on_the_subsets_of_kid(features, golden):
    subsets = zip(features["kid_subset_idx_ref"], features["kid_subset_idx_sample"], strict=True)
    real, sample = features["features_ref"], features["features_sample"]
    values = [kernel_distance(real[i], sample[j]) for i, j in subsets]
    expected = golden["kid_torch_fidelity_poly3_10x100"]
    assert np.mean(values) == pytest.approx(expected["mean"], abs=1e-5)
    assert np.std(values) == pytest.approx(expected["std"], abs=1e-5)


@pytest.mark.parametrize("block_elements", [1, 777, 1 << 24])
def test_precision_and_recall_in_blocks_of_any_size(features, golden, monkeypatch, block_elements):
    monkeypatch.setattr("cca_core.metrics.fidelity._BLOCK_ELEMENTS", block_elements)
    expected = golden["precision_recall_evaluator_fp32"]
    real, sample = (torch.from_numpy(features[f"features_{x}"]) for x in ("ref", "sample"))
    assert precision_recall(real, sample, k=3) == (expected["precision"], expected["recall"])
    assert kernel_distance(real, sample) == pytest.approx(golden["kid_torch_fidelity_full_mmd2"], abs=1e-6)


@pytest.mark.parametrize("side", ["ref", "sample"])
def test_neighbour_radii(features, side):
    radii = squared_radii(features[f"features_{side}"], 3)
    assert radii == pytest.approx(features[f"radii_sq_{side}"], rel=1e-5)
