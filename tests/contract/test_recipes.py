"""Reads the built-in recipes: they load, and the default states every value there is."""

from __future__ import annotations

from importlib.resources import files

import yaml

from cca_core.config import Recipe
from cca_core.parse import as_dict
from pipelines.recipe import built_in, load_recipe, to_yaml


def test_the_default_recipe_states_every_value_and_the_configuration_agrees():
    assert load_recipe("digits", []) == Recipe()
    stated = yaml.safe_load((files("pipelines") / "recipes" / "digits.yaml").read_text())
    assert stated == as_dict(Recipe())


def test_every_recipe_loads_and_survives_its_resolved_form(tmp_path):
    assert {"digits", "cifar10_small"} <= set(built_in())
    for name in built_in():
        recipe = load_recipe(name, [] if name == "digits" else ["source.uri=somewhere"])
        resolved = tmp_path / f"{name}.yaml"
        resolved.write_text(to_yaml(recipe))
        assert load_recipe(str(resolved), []) == recipe
