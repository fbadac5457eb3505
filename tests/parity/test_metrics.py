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
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from cca_core.metrics.kernel import distances_of_subsets
from cca_core.metrics.neighbours import squared_radii

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
    assert value == pytest.approx(golden["fid_guided_diffusion"], abs=1e-5)
    for side in ("ref", "sample"):
        assert Moments.of(features[f"features_{side}"]).mean == pytest.approx(features[f"mu_{side}"], abs=1e-6)


def test_frechet_distance_of_fewer_samples_than_features(features, golden):
    value = distance(features["features_ref"], features["features_sample"][:40])
    for code in ("torch_fidelity", "guided_diffusion"):
        assert value == pytest.approx(golden[f"fid_{code}_first40_samples_vs_ref"], abs=1e-4)


def test_inception_score(features, golden):
    logits = features["logits"]
    plain = golden["is_torch_fidelity_10splits_noshuffle"]
    assert inception_score(logits) == pytest.approx((plain["mean"], plain["std"]), abs=1e-6)
    shuffled = golden["is_torch_fidelity_10splits_shuffle2020"]
    order = features["is_shuffle_permutation"]
    assert inception_score(logits[order]) == pytest.approx((shuffled["mean"], shuffled["std"]), abs=1e-6)
    one_split = golden["is_guided_diffusion_default_split5000"]
    assert inception_score(logits, splits=1) == pytest.approx((one_split, 0.0), abs=1e-6)
    # The evaluator's splits are 50 images each, so 10 of 500.
    assert inception_score(logits)[0] == pytest.approx(golden["is_guided_diffusion_split50_mean"], abs=1e-4)


def test_kernel_distance(features, golden):
    real, sample = features["features_ref"], features["features_sample"]
    assert kernel_distance(real, sample) == pytest.approx(golden["kid_torch_fidelity_full_mmd2"], abs=1e-6)
    assert kernel_distance(sample, real) == pytest.approx(kernel_distance(real, sample), rel=1e-12)


def test_kernel_distance_on_the_subsets_of_kid(features, golden):
    subsets = list(zip(features["kid_subset_idx_ref"], features["kid_subset_idx_sample"], strict=True))
    real, sample = features["features_ref"], features["features_sample"]
    found = distances_of_subsets(real, sample, subsets)
    expected = golden["kid_torch_fidelity_poly3_10x100"]
    assert found.mean == pytest.approx(expected["mean"], abs=1e-5)
    assert found.sd == pytest.approx(expected["std"], abs=1e-5)
    assert found.distances == pytest.approx([kernel_distance(real[i], sample[j]) for i, j in subsets], rel=1e-9)


@pytest.mark.parametrize("block_elements", [1, 777, 1 << 24])
def test_precision_and_recall_in_blocks_of_any_size(features, golden, monkeypatch, block_elements):
    for module in ("kernel", "neighbours"):
        monkeypatch.setattr(f"cca_core.metrics.{module}._BLOCK_ELEMENTS", block_elements)
    expected = golden["precision_recall_evaluator_fp32"]
    real, sample = (torch.from_numpy(features[f"features_{x}"]) for x in ("ref", "sample"))
    found = precision_recall(real, sample, k=3)
    assert found == (expected["precision"], expected["recall"])
    for name in ("torch_fidelity", "torch_fidelity_save_ram", "evaluator_fp16_emulated"):
        other = golden[f"precision_recall_{name}"]
        # Half precision moves one sample of 500; the others agree exactly up to their rounding.
        assert found == pytest.approx((other["precision"], other["recall"]), abs=0.0021 if "fp16" in name else 1e-6)
    assert kernel_distance(real, sample) == pytest.approx(golden["kid_torch_fidelity_full_mmd2"], abs=1e-6)


@pytest.mark.parametrize("side", ["ref", "sample"])
def test_neighbour_radii(features, side):
    radii = squared_radii(features[f"features_{side}"], 3)
    assert radii == pytest.approx(features[f"radii_sq_{side}"], rel=1e-5)


def test_density_and_coverage_equal_their_definition_on_the_whole_matrix(features):
    # Naeem et al. 2020, equations 3 and 4; no recorded value exists.
    real, sample = (features[f"features_{x}"].astype(np.float64) for x in ("ref", "sample"))
    within = np.linalg.norm(real[:, None] - real, axis=2)
    across = np.linalg.norm(real[:, None] - sample, axis=2)
    radii = np.sort(within, axis=1)[:, 5, None]
    inside = across <= radii
    expected = inside.sum() / (5 * len(sample)), inside.any(axis=1).mean()
    assert density_coverage(real, sample, k=5) == pytest.approx(expected, rel=1e-12)
    assert 0.1 < expected[1] < 1
