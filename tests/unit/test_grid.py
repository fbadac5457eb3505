"""Reads and writes nothing: which settings a sweep tries, what it refuses, and which digests it changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from cca_core.config import AlignConfig, ConfigError, Recipe, SweepConfig
from cca_core.parse import from_dict
from cca_core.stages.graph import active, plan
from cca_core.stages.grid import Settings, trials, with_settings

INPUTS = {"source": "5" * 64}
OWN = Settings.of(AlignConfig())


def swept(**sweep: Any) -> Recipe:
    return Recipe(sweep=SweepConfig(enabled=True, **sweep))


def digests(recipe: Recipe) -> dict[str, str]:
    return plan(recipe, INPUTS)


def test_the_full_grid_has_every_combination_that_differs_in_what_its_objective_looks_at():
    found = trials(
        swept(num_trials=0, betas=(0.1, 0.2, 0.2), lambdas=(1.0, 2.0), lrs=(1e-5, 1e-4), null_shares=(0.0, 0.1))
    )
    assert len(found) == len(set(found))
    count = Counter(settings.objective for settings in found if settings != OWN)
    # beta x lambda x lr x null share; dpo has no lambda, unlearning no beta.
    assert count == {"cca": 2 * 2 * 2 * 2, "dpo": 2 * 2 * 2, "unlearning": 2 * 2 * 2}
    assert {settings.lambda_ for settings in found if settings.objective == "dpo"} == {AlignConfig().lambda_}
    assert {settings.beta for settings in found if settings.objective == "unlearning"} == {AlignConfig().beta}


def test_auto_is_one_of_the_values_to_try():
    grid = {"num_trials": 0, "objectives": ["cca"], "betas": [0.1], "lrs": [3e-5]}
    sweep = {"enabled": True, **grid, "lambdas": [1.5, "auto"], "null_shares": ["auto", 0.1]}
    labels = [settings.label() for settings in trials(from_dict(Recipe, {"sweep": sweep}))]
    assert labels[0] == "cca, beta 0.1, lambda 1.5, lr 3e-05, null share 0.1"
    assert sorted(label.split(", ", 2)[2] for label in labels[1:]) == [
        "lambda 1.5, lr 3e-05, null share auto",
        "lambda auto, lr 3e-05, null share 0.1",
        "lambda auto, lr 3e-05, null share auto",
    ]
    own = Recipe(align=AlignConfig(lambda_="auto"), sweep=SweepConfig(enabled=True))
    assert trials(own)[0].lambda_ == "auto"
    with pytest.raises(ConfigError, match=r"sweep.lambdas: 'fast' is not a number or auto"):
        from_dict(Recipe, {"sweep": {"lambdas": ["fast"]}})


@pytest.mark.parametrize("num_trials", [0, 1, 2, 7, 1000])
def test_the_recipes_own_settings_are_the_first_trial_and_no_other(num_trials):
    for lambdas in ((1.5, 3.0), (3.0,)):
        found = trials(swept(num_trials=num_trials, lambdas=lambdas, keep=1))
        assert found[0] == OWN
        assert found.count(OWN) == 1
        assert num_trials in (0, 1000) or len(found) == num_trials


def test_a_part_of_the_grid_is_drawn_by_the_seed_and_tunes_no_objective_more_than_another():
    recipe = swept(num_trials=13)
    found = trials(recipe)
    assert found == trials(recipe)
    assert found[:7] == trials(swept(num_trials=7)), "more trials are other trials beside the same"
    assert set(found) != set(trials(replace(recipe, seed=1)))
    assert Counter(settings.objective for settings in found[1:]) == {"cca": 4, "dpo": 4, "unlearning": 4}


def test_settings_take_the_place_of_the_recipes_and_leave_the_rest():
    settings = Settings("dpo", 0.3, 1.5, 7e-5, 0.0)
    before, after = Recipe(), with_settings(Recipe(), settings)
    assert Settings.of(after.align) == settings
    assert after.align.optim == replace(before.align.optim, lr=7e-5)
    assert with_settings(after, OWN) == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"lambdas": []}, "sweep.lambdas is empty"),
        ({"fraction": 0.0}, "sweep.fraction must lie"),
        ({"objectives": ["ppo"]}, "one of cca, dpo, unlearning"),
        ({"null_shares": [0.3]}, "raise reference.null_share_max"),
        ({"epochs": 13}, "exceeds align.epochs=12"),
    ],
)
def test_a_sweep_that_cannot_run_is_refused_with_the_remedy(data, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Recipe, {"sweep": {"enabled": True, **data}})


def test_a_sweep_cannot_keep_more_than_it_tries():
    with pytest.raises(ConfigError, match=r"sweep\.keep=3, but the sweep has 2 trials"):
        digests(swept(num_trials=2, keep=3))


def test_a_sweep_that_is_off_is_not_there():
    assert digests(Recipe(sweep=SweepConfig(lrs=(1.0,), keep=2))) == digests(Recipe())
    assert "sweep" not in digests(Recipe())
    # A recipe of one epoch has no contradiction with the sweep's own defaults.
    Recipe(align=AlignConfig(epochs=1), sweep=SweepConfig(epochs=3))


def test_the_sweep_stands_between_reference_and_align_and_decides_what_is_aligned():
    names = [spec.name for spec in active(swept(keep=2))]
    tail = ["sweep", "align", "align-2", "evaluate", "evaluate-2", "safety", "safety-2"]
    assert names[names.index("reference") + 1 :] == tail
    off, one, other = digests(Recipe()), digests(swept(keep=1)), digests(swept(keep=1, lrs=(7e-5,)))
    assert {name for name in off if off[name] != one[name]} == {"align", "evaluate", "safety"}
    assert {name for name in one if one[name] != other[name]} == {"sweep", "align", "evaluate", "safety"}
    # Keeping more candidates measures nothing again.
    two = digests(swept(keep=2))
    assert {name: two[name] for name in one} == one
    assert len(set(two.values())) == len(two)
