"""Writes to a temporary folder: joules from counters as Linux shows them (made here: this machine has none)."""

from __future__ import annotations

import pytest
import torch

from cca_core.metrics.energy import EnergyMeter, counters_of

CPU = torch.device("cpu")


@pytest.fixture
def powercap(tmp_path):
    """Two packages, and a part of the first that is counted in it already."""

    def count(name: str, microjoules: int) -> None:
        zone = tmp_path / name
        zone.mkdir(exist_ok=True)
        (zone / "energy_uj").write_text(f"{microjoules}\n")
        (zone / "max_energy_range_uj").write_text("10000000\n")

    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        count(name, 9_000_000)
    return tmp_path, count


def test_joules_are_those_of_all_packages_and_a_counter_may_start_again(powercap):
    folder, count = powercap
    meter = EnergyMeter(counters_of(CPU, folder))
    assert meter.joules() == 0
    count("intel-rapl:0", 9_500_000)
    count("intel-rapl:0:0", 9_900_000)
    count("intel-rapl:1", 1_000_000)  # past its 10 J
    assert meter.joules() == pytest.approx(0.5 + 2.0)


def test_a_package_that_may_not_be_read_is_left_out(powercap):
    folder, _ = powercap
    (folder / "intel-rapl:1" / "energy_uj").unlink()
    assert len(counters_of(CPU, folder)) == 1


def test_where_nothing_counts_there_is_no_number(tmp_path):
    assert EnergyMeter(counters_of(CPU, tmp_path)).joules() is None
