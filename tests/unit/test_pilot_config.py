"""Reads and writes nothing: a pilot's shares of a source and of a recipe."""

from __future__ import annotations

import pytest

from cca_core.config import ConfigError, SourceConfig
from cca_core.pilot_config import PilotConfig
from cca_core.sources import open_source


def ids(**settings: float) -> list[str]:
    return open_source(SourceConfig(**settings)).list()[0].column("image_id").to_pylist()


def test_a_larger_fraction_adds_images_and_removes_none():
    some, more, everything = ids(fraction=0.1), ids(fraction=0.5), ids()
    assert (len(some), len(more), len(everything)) == (180, 899, 1797)
    assert set(some) < set(more) < set(everything)


def test_a_fraction_is_of_what_the_limit_takes():
    assert set(ids(limit=100, fraction=0.25)) < set(ids(limit=100))
    assert len(ids(limit=100, fraction=0.25)) == 25
    assert len(ids(limit=10_000, fraction=0.5)) == 899


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_shares_lie_above_0_and_at_most_at_1(share):
    with pytest.raises(ConfigError, match="fraction must lie above 0"):
        SourceConfig(fraction=share)
    for name in ("images", "samples"):
        with pytest.raises(ConfigError, match=f"{name} is a share"):
            PilotConfig(**{name: share})
