"""Reads nothing, writes nothing: the statistics of a study's report."""

from __future__ import annotations

import math

import pytest

from benchmarks.study import Result, Study, interval, paired


def result(seed: int, arm: str, distance: float) -> Result:
    return Result(seed, "", arm, [{"label": "base", "mean": {"distance": distance}}], {}, 16)


def test_an_interval_is_students():
    # By hand: mean 2, standard deviation 1, t(0.975, 2) = 4.3027.
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4)
    assert interval([5.0]) == (5.0, -math.inf, math.inf), "one seed says nothing of the others"


def test_an_arm_stands_against_the_best_of_the_others_seed_by_seed():
    arms = {"lambda 1": {}, "lambda 2": {}, "auto": {}}
    study = Study({}, arms, {"": {}}, (0, 1), ("auto",), {})
    distances = {"base": (4.0, 8.0), "lambda 1": (2.0, 4.0), "lambda 2": (3.0, 3.0), "auto": (1.0, 4.0)}
    results = [result(seed, arm, distances[arm][seed]) for arm in distances for seed in (0, 1)]
    lines = paired(results, study)
    assert "best other arm: lambda 1" in lines[1], "the smaller geometric mean"
    against = {cells[1]: cells for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in lines[5:])}
    assert list(against) == ["lambda 1", "base", "lambda 2"]
    assert against["lambda 1"][2] == f"{math.sqrt(0.5):.3f}"
    assert against["lambda 1"][4] == "0.50, 1.00"
    assert against["base"][4] == "0.25, 0.50"
