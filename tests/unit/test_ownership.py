"""Reads nothing: cost of guidance and of alignment against a calculation by hand."""

from __future__ import annotations

import math

import pytest

from cca_core.cost_config import CostConfig
from cca_core.metrics.ownership import Ownership
from pipelines.report.costs import cost_data, money


def test_costs_are_those_of_a_calculation_by_hand():
    # 10 and 20 images/s at 3.60 an hour: 0.001 a second, so 0.0001 and 0.00005 an image; 5 hours of alignment are 18.
    cost = Ownership(10, 20, alignment_device_hours=5, price_per_device_hour=3.6)
    assert cost.guided_per_1000 == pytest.approx(0.1)
    assert cost.aligned_per_1000 == pytest.approx(0.05)
    assert cost.alignment == pytest.approx(18)
    # Each image saves 0.00005: 18 / 0.00005.
    assert cost.break_even_images == 360_000
    assert cost.total(360_000) == pytest.approx((36, 36))
    assert cost.total(1_000_000) == pytest.approx((100, 68))


def test_break_even_does_not_depend_on_the_price():
    assert Ownership(10, 20, 5, 1.0).break_even_images == Ownership(10, 20, 5, 99.0).break_even_images


def test_an_aligned_model_that_is_not_faster_never_pays():
    assert Ownership(20, 20, 1, 1.0).break_even_images == math.inf
    assert Ownership(20, 10, 1, 1.0).break_even_images == math.inf


def test_an_alignment_that_cost_nothing_has_paid_at_once():
    assert Ownership(10, 20, 0, 1.0).break_even_images == 0


GUIDED, ALIGNED = ({"images_per_s": s, "tokens_images_per_s": t} for s, t in ((10, 12), (20, 30)))


def test_the_report_says_what_a_calculation_by_hand_says():
    config = CostConfig(price_per_device_hour=3.6, images_per_month=(1000, 100_000), months=10)
    found = cost_data(config, GUIDED, ALIGNED, 5.0)
    whole, tokens = found["per_1000"]["end_to_end"], found["per_1000"]["tokens"]
    assert (whole["guided"], whole["aligned"], whole["saved_share"]) == pytest.approx((0.1, 0.05, 0.5))
    assert (tokens["guided"], tokens["aligned"], tokens["saved_share"]) == pytest.approx((1 / 12, 1 / 30, 0.6))
    assert (whole["guided_seconds"], whole["aligned_seconds"]) == pytest.approx((100, 50))
    assert found["alignment"]["cost"] == pytest.approx(18)
    assert found["alignment"]["break_even_images"] == 360_000
    few, many = found["alignment"]["totals"]
    assert (few["guided"], few["aligned"], few["saved"]) == pytest.approx((1, 18.5, -17.5))
    assert (many["guided"], many["aligned"], many["saved"]) == pytest.approx((100, 68, 32))


def test_without_a_price_costs_are_device_hours():
    found = cost_data(CostConfig(), GUIDED, ALIGNED, 5.0)
    assert found["unit"] == "device-hours"
    assert found["per_1000"]["end_to_end"]["guided"] == pytest.approx(1000 / 10 / 3600)
    assert found["alignment"]["cost"] == 5


def test_an_alignment_whose_run_is_not_there_has_no_break_even():
    assert cost_data(CostConfig(), GUIDED, ALIGNED, None)["alignment"] is None


def test_an_aligned_model_that_is_slower_has_no_break_even_and_saves_less_than_nothing():
    found = cost_data(CostConfig(), ALIGNED, GUIDED, 5.0)
    assert found["alignment"]["break_even_images"] is None
    assert found["per_1000"]["end_to_end"]["saved_share"] == pytest.approx(-1)


def test_an_amount_is_read_without_an_exponent():
    amounts = {0: "0", 0.000091: "0.000091", 0.0123456: "0.0123", 0.1: "0.1", 18: "18", 99.96: "100", -0.316: "-0.316"}
    assert {value: money(value) for value in amounts} == amounts
    assert money(14_422.3) == "14,422"
