"""Reads the energy counters of the hardware (NVML for an NVIDIA GPU, Linux powercap for CPU packages), writes nothing.

They count whatever runs on the device: what is measured has to be alone there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """A counter of joules that starts again from 0 at ``wraps_at``."""

    read: Callable[[], float]
    wraps_at: float = float("inf")


class EnergyMeter:
    """Counts from when it is made."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._counters = counters
        self._start = [counter.read() for counter in counters]

    def joules(self) -> float | None:
        """None where nothing counts."""
        if not self._counters:
            return None
        spent = 0.0
        for counter, start in zip(self._counters, self._start, strict=True):
            now = counter.read()
            spent += now - start if now >= start else now + counter.wraps_at - start
        return spent


def counters_of(device: torch.device, powercap: Path = POWERCAP) -> list[Counter]:
    """Those of a device that may be read: of the GPU, or of all CPU packages; none where the hardware tells nothing."""
    return _gpu(device) if device.type == "cuda" else _packages(powercap)


def _packages(powercap: Path) -> list[Counter]:
    counters = []
    for zone in sorted(powercap.glob("intel-rapl:?")):  # whole packages: their parts have one colon more
        try:
            wraps_at = float((zone / "max_energy_range_uj").read_text()) / 1e6
            (zone / "energy_uj").read_text()
        except OSError:  # since 2020 only root may read it
            continue
        counters.append(Counter(lambda zone=zone: float((zone / "energy_uj").read_text()) / 1e6, wraps_at))
    return counters


def _gpu(device: torch.device) -> list[Counter]:
    try:
        import pynvml
    except ImportError:  # it comes with CUDA builds of monitoring tools, not with torch
        return []
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:  # before Volta there is no counter
        return []
    return [Counter(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)]
