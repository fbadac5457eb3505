"""Reads scikit-learn's digits: the gate refuses a content filter that blocks a class, and names it; a filter that is
not the pinned one, or gives no scores, is refused before it is used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cca_core.config import ConfigError, Recipe
from cca_core.metrics.content_filter import ContentFilter
from cca_core.safety_config import SafetyConfig
from cca_core.stages.filtered import Filtered
from cca_core.stages.graph import STAGES, plan
from cca_core.stages.safety import Finding, row_of
from pipelines.stages.rules import safety_rules
from tests.planted_filters import Brightness, Columns, Constant, FlagsOneClass, scripted, spec_of
from tests.unit.test_safety import NAMES, Digits

PINNED = {"filter": "f.pt", "filter_sha256": "0" * 64}


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def as_images(pixels_ND: np.ndarray) -> Tensor:
    """Digits (0 to 16) as RGB in [-1, 1]."""
    unit = torch.from_numpy(pixels_ND).reshape(-1, 1, 8, 8) / 16
    return (unit * 2 - 1).expand(-1, 3, -1, -1)


def checked(data: bytes, **changes) -> ContentFilter:
    return ContentFilter(data, spec_of(data, **changes), key="safety.filter_sha256")


def row(digits: Digits, content_filter: ContentFilter) -> dict:
    """The row of safety.json of a perfect model, its samples given to a filter."""
    scores = content_filter.scores(as_images(digits.spare.features), batch_size=50).numpy()
    filtered = Filtered.of(digits.spare.labels, scores, NAMES, content_filter.spec.threshold)
    return row_of("aligned", [Finding.of(digits.train, digits.held_out, digits.spare)], range(10), NAMES, filtered)


def refusals(found: dict, **limits) -> list[str]:
    config = SafetyConfig(**PINNED, **limits)
    return [rule.sentence() for rule in safety_rules(config, [found]) if not rule.passed]


def test_a_filter_that_blocks_a_class_is_refused_and_the_class_is_named(digits):
    means = torch.stack([as_images(digits.centres[k : k + 1].astype(np.float32))[0] for k in range(10)])
    found = row(digits, checked(scripted(FlagsOneClass((means + 1) / 2, flagged=3))))
    (refused,) = refusals(found)
    assert refused.startswith("share of the samples of three that the content filter blocks, the most of all classes: ")
    assert found["worst"]["filtered_in_class"] == ["three"]
    assert found["filtered_in_class"] == found["filtered_per_class"]["three"] > 0.8
    assert found["filtered"] == pytest.approx(
        np.average(list(found["filtered_per_class"].values()), weights=np.bincount(digits.spare.labels))
    )
    assert found["filtered_per_class"]["zero"] == 0
    assert refusals(found, max_filtered=1.0) == []


def test_a_filter_that_blocks_nothing_passes_and_no_filter_has_no_rule(digits):
    found = row(digits, checked(scripted(Constant(0.4))))
    assert found["filtered"] == found["filtered_in_class"] == 0
    assert refusals(found) == []
    assert any("content filter" in rule.name for rule in safety_rules(SafetyConfig(**PINNED), [found]))
    without = row_of("aligned", [Finding.of(digits.train, digits.held_out, digits.spare)], range(10), NAMES)
    assert not any("content filter" in rule.name for rule in safety_rules(SafetyConfig(), [without]))
    assert not [name for name in without if name.startswith("filtered")]


def test_the_threshold_itself_blocks_and_padding_changes_nothing():
    images = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = scripted(Brightness())
    scores = checked(data).scores(images, batch_size=7)
    assert torch.equal(checked(data).scores(images, batch_size=4), scores)
    pixels = (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    torch.testing.assert_close(scores, pixels.float().mean(dim=(1, 2, 3)) / 255)
    edge = scores.sort().values[3].item()
    assert checked(data, threshold=edge).blocked(images, 4) == (scores >= edge).tolist()
    assert sum(checked(data, threshold=edge).blocked(images, 4)) == 4


def test_the_filter_sees_images_in_the_size_and_range_of_its_spec():
    class SideAndRange(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            assert images.shape[2] == 12
            return (images.amin(dim=(1, 2, 3)) < 0).float()

    dark = torch.full((2, 3, 8, 8), -1.0)
    data = scripted(SideAndRange())
    assert checked(data, input_size=12, input_range="symmetric").blocked(dark, 2) == [True, True]
    assert checked(data, input_size=12, input_range="unit").blocked(dark, 2) == [False, False]


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Columns(), r"gives \[2, 2\] for 2 images, not one score each"),
        (Constant(1.5), r"scores outside \[0, 1\]"),
        (Constant(-0.1), r"scores outside \[0, 1\]"),
        (Constant(float("nan")), r"scores outside \[0, 1\]"),
    ],
)
def test_a_network_that_gives_no_score_is_refused(module, says):
    with pytest.raises(ConfigError, match=says):
        checked(scripted(module)).scores(torch.zeros(2, 3, 8, 8), 2)


def test_another_file_is_refused_before_it_is_loaded_and_its_hash_is_told(monkeypatch):
    data = scripted(Brightness())
    monkeypatch.setattr("torch.jit.load", lambda *args, **kwargs: pytest.fail("it was loaded"))
    with pytest.raises(ConfigError, match=f"has sha256 {spec_of(data).sha256}, not {'0' * 64} as safety.filter_sha256"):
        checked(data, sha256="0" * 64)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"filter": "f.pt"}, r"safety\.filter and safety\.filter_sha256 belong together"),
        ({"filter_sha256": "0" * 64}, "belong together"),
        ({**PINNED, "filter_sha256": "abc"}, r"safety\.filter_sha256=abc is no sha256"),
        ({**PINNED, "filter_input_size": -1}, "must not be negative"),
        ({**PINNED, "filter_threshold": 0.0}, "0 would block all"),
        ({**PINNED, "filter_threshold": 1.5}, "filter_threshold must lie"),
        ({**PINNED, "max_filtered": -0.1}, "max_filtered must not be negative"),
        ({"filter_threshold": 0.6}, r"are of safety\.filter: name it"),
        ({"filter_input_range": "unit"}, r"are of safety\.filter: name it"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        SafetyConfig(**settings)


def test_what_the_filter_computes_is_in_the_digest_of_safety_and_nothing_else_is():
    (spec,) = (spec for spec in STAGES if spec.name == "safety")
    assert (spec.section(Recipe()), spec.code_version) == ({}, 1), "runs without a filter are what they were"

    def digests(**settings) -> dict[str, str]:
        return plan(Recipe(safety=SafetyConfig(**settings)), {"source": "s"})

    one = digests(**PINNED)
    assert {name for name, digest in digests().items() if digest != one[name]} == {"safety"}
    assert one == digests(**{**PINNED, "filter": "elsewhere.pt"}) == digests(**PINNED, max_filtered=0.5)
    changes = [{"filter_sha256": "1" * 64}, {"filter_threshold": 0.6}]
    changes += [{"filter_input_size": 32}, {"filter_input_range": "unit"}]
    found = {digests(**{**PINNED, **change})["safety"] for change in changes}
    assert len(found | {one["safety"]}) == len(changes) + 1
