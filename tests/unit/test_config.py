"""Reads and writes nothing: recipes as data, what they refuse and with which words, and what enters a digest."""

from __future__ import annotations

import dataclasses
import json

import pytest

from cca_core.config import AlignConfig, BaseConfig, ConfigError, OptimConfig, Recipe, TokenizerConfig
from cca_core.parse import as_dict, from_dict, merge, parse_override
from cca_core.stages.graph import STAGES, plan

INPUTS = {"source": "5" * 64}


def recipe(*overrides: str) -> Recipe:
    data: dict = {}
    for override in overrides:
        data = merge(data, parse_override(override))
    return from_dict(Recipe, data)


def changed(*overrides: str, inputs: dict[str, str] = INPUTS, before: Recipe | None = None) -> set[str]:
    """The stages whose digest differs from that of the default recipe."""
    old, new = plan(before or Recipe(), INPUTS), plan(recipe(*overrides), inputs)
    stages = {spec.name for spec in STAGES}
    return {name for name in stages if old.get(name) != new.get(name)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"algin": {}}, r"unknown recipe key algin: did you mean align\?"),
        ({"align": {"betta": 1}}, r"unknown recipe key align\.betta: did you mean align\.beta\?"),
        ({"align": {"lambda": 1}}, r"unknown recipe key align\.lambda: did you mean align\.lambda_\?"),
        ({"align": {"optim": {"zzz": 1}}}, r"unknown recipe key align\.optim\.zzz: known here: lr, betas, eps"),
        ({"zzz": 1}, r"unknown recipe key zzz: known here: name, family, profile, seed, precision, source, "),
        ({"align": 3}, r"recipe key align is a section: give keys below it, such as align\.objective"),
        ({"align": {"optim": 1e-4}}, r"recipe key align\.optim is a section: .* such as align\.optim\.lr"),
    ],
)
def test_a_key_that_is_not_there_is_named_with_what_is(data, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Recipe, data)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("align.beta=0.05", {"align": {"beta": 0.05}}),
        ("seed=7", {"seed": 7}),
        ("decide.beat_temperature=false", {"decide": {"beat_temperature": False}}),
        ("evaluate.seeds=[0, 1]", {"evaluate": {"seeds": [0, 1]}}),
        ("align.optim.lr=1e-5", {"align": {"optim": {"lr": 1e-5}}}),
        ("source.uri=s3://bucket/images?a=b", {"source": {"uri": "s3://bucket/images?a=b"}}),
        ("source.uri=", {"source": {"uri": ""}}),
        ('name="12"', {"name": "12"}),
        (" align.beta =2", {"align": {"beta": 2}}),
    ],
)
def test_an_override_is_json_or_else_text(text, expected):
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["align.beta", "=3", "  =3", ""])
def test_an_override_without_key_or_value_is_refused(text):
    with pytest.raises(ConfigError, match=r"write section\.key=value, for example --set align\.beta=0\.05"):
        parse_override(text)


def test_merge_goes_section_by_section_and_leaves_its_arguments_alone():
    base = {"align": {"beta": 1, "optim": {"lr": 1}}, "seed": 1}
    over = {"align": {"optim": {"eps": 2}}, "seed": 2, "name": "n"}
    before = json.dumps([base, over])
    assert merge(base, over) == {"align": {"beta": 1, "optim": {"lr": 1, "eps": 2}}, "seed": 2, "name": "n"}
    assert json.dumps([base, over]) == before


def test_the_last_override_wins():
    assert recipe("align.beta=1", "align.epochs=9", "align.beta=2").align == AlignConfig(beta=2, epochs=9)


CONTRADICTIONS = {
    "source.uri=/data": r"source\.kind=digits reads no uri: remove source\.uri",
    "source.kind=codes": r"source\.kind=codes needs source\.uri",
    "source.kind=folder": r"source\.kind=folder needs source\.uri",
    "source.held_out_fraction=0": r"held_out_fraction must lie between 0 and 1",
    "source.held_out_fraction=1": r"held_out_fraction must lie between 0 and 1",
    "source.max_bad_fraction=1.01": r"source\.max_bad_fraction must lie in \[0, 1\]",
    "source.max_bad_fraction=-0.1": r"source\.max_bad_fraction must lie in \[0, 1\]",
    "source.limit=-1": r"source\.limit must not be negative: 0 takes all",
    "align.beta=0": r"align\.beta must be positive",
    "align.lambda_=-1": r"align\.lambda_ must not be negative",
    "align.null_share=1.0": r"align\.null_share must lie in \[0, 1\)",
    "align.null_share=0.3": r"exceeds reference\.null_share_max=0\.2.*raise reference\.null_share_max",
    "evaluate.seeds=[]": r"at least one seed",
    "evaluate.cfg_scales=[]": r"at least one scale",
    "evaluate.cfg_scales=[1.0, 2.0]": r"above 1: 1 means no guidance",
    "execution.num_workers=0": r"must be positive",
    "execution.num_actors=0": r"must be positive",
    "execution.micro_batch_size=0": r"must be positive",
    "tokenizer.width_multipliers=[1, 1, 1, 1, 1]": r"image_size=8 is no multiple of the tokenizer's 16 pixels",
}


@pytest.mark.parametrize(("override", "reason"), CONTRADICTIONS.items(), ids=CONTRADICTIONS)
def test_options_that_contradict_are_refused_with_the_reason(override, reason):
    with pytest.raises(ConfigError, match=reason):
        recipe(override)


@pytest.mark.parametrize(
    "override",
    ["align.objective=ccaa", "reference.mode=onlin", "tokens.views=nine", "align.beta=strong", "seed=1.5"],
)
def test_a_value_of_another_kind_is_refused(override):
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=key):
        recipe(override)


def test_classes_are_named_in_one_place_only():
    with pytest.raises(ConfigError, match=r"class_names and source\.class_map both name the classes: remove one"):
        recipe('source.class_names=["cat", "dog"]', "source.class_map=classes.json")


def test_codes_need_the_tokenizer_that_made_them():
    codes = ("source.kind=codes", "source.uri=/codes")
    with pytest.raises(ConfigError, match=r"no images to train a tokenizer on: set tokenizer\.checkpoint"):
        recipe(*codes)
    recipe(*codes, "tokenizer.checkpoint=vq.pt")


def test_options_that_resolve_the_contradiction_are_taken():
    assert recipe("align.null_share=0.3", "reference.null_share_max=0.3").align.null_share == 0.3
    # A checkpoint brings its own sizes, which are checked once it is read.
    recipe("tokenizer.width_multipliers=[1, 1, 1, 1, 1]", "tokenizer.checkpoint=vq.pt")


def test_a_recipe_survives_json():
    made = recipe("align.beta=0.3", "evaluate.seeds=[4, 5]", "source.kind=folder", "source.uri=/d", "seed=3")
    data = json.loads(json.dumps(as_dict(made)))
    assert from_dict(Recipe, data) == made
    assert from_dict(Recipe, as_dict(Recipe())) == Recipe() == from_dict(Recipe, {})
    assert isinstance(from_dict(Recipe, data).evaluate.seeds, tuple)


def test_a_partial_section_keeps_the_defaults_of_its_place():
    assert recipe("align.optim.eps=1e-6").align.optim == OptimConfig(lr=3e-5, eps=1e-6)
    base = recipe("base.optim.weight_decay=0.5").base.optim
    assert base == dataclasses.replace(BaseConfig().optim, weight_decay=0.5)
    tokenizer = recipe("tokenizer.optim.lr=1", "tokenizer.epochs=2").tokenizer
    assert tokenizer.optim == dataclasses.replace(TokenizerConfig().optim, lr=1)
    assert (tokenizer.epochs, tokenizer.width) == (2, TokenizerConfig().width)


def test_how_it_is_run_changes_no_digest():
    fields = {f.name for f in dataclasses.fields(Recipe().execution)} - {"device", "sharding"}
    fields -= (switches := {"compile", "activation_checkpointing"})
    numbers = (f"execution.{name}=77" for name in fields)
    assert changed(*numbers, *(f"execution.{name}=true" for name in switches), "execution.device=cpu") == set()
    assert changed("execution.num_workers=[1, 4]", "execution.sharding=fsdp2") == set()
    assert changed("decide.max_class_drop=1.0", "safety.max_twins=1", "cost.months=3", "name=other") == set()


EVERYTHING = {spec.name for spec in STAGES}
CHANGES = {
    "align.beta=0.2": {"align", "evaluate", "safety"},
    "align.optim.lr=1": {"align", "evaluate", "safety"},
    "align.epochs=4": {"reference", "align", "evaluate", "safety"},
    "reference.null_share_max=0.3": {"reference", "align", "evaluate", "safety"},
    "reference.mode=online": {"reference", "align", "evaluate", "safety"},
    "evaluate.aligned_temperatures=[0.8]": {"evaluate", "safety"},
    "evaluate.cfg_scales=[2.0]": {"baseline", "evaluate", "safety"},
    "evaluate.seeds=[0]": {"baseline", "evaluate", "safety"},
    "features.epochs=1": {"features", "baseline", "evaluate", "safety"},
    "base.dim=64": {"base", "baseline", "reference", "align", "evaluate", "safety"},
    "tokens.batch_size=1": EVERYTHING - {"tokenizer", "features"},
    "tokenizer.epochs=1": EVERYTHING - {"features"},
    "tokens.image_size=16": EVERYTHING,
    "source.held_out_fraction=0.3": EVERYTHING,
    "seed=1": EVERYTHING,
}


@pytest.mark.parametrize(("override", "stages"), CHANGES.items(), ids=CHANGES)
def test_a_change_is_seen_by_the_stages_it_concerns_and_by_no_other(override, stages):
    assert changed(override) == stages


def test_what_comes_from_outside_counts_by_content():
    assert changed(inputs={"source": "6" * 64}) == EVERYTHING
    one, other = recipe("base.checkpoint=a.pt"), recipe("base.checkpoint=b.pt")
    inputs = INPUTS | {"base_checkpoint": "b" * 64}
    assert plan(one, inputs) == plan(other, inputs)
    assert plan(one, inputs)["base"] != plan(one, INPUTS | {"base_checkpoint": "c" * 64})["base"]
    # An imported tokenizer was trained on nothing of ours, but what is held out stands among the tokens.
    before = recipe("tokenizer.checkpoint=vq.pt")
    others = changed("tokenizer.checkpoint=vq.pt", "source.held_out_fraction=0.3", before=before)
    assert others == EVERYTHING - {"tokenizer"}


@pytest.mark.parametrize(("kind", "stages"), [("folder", EVERYTHING - {"features"}), ("codes", EVERYTHING)])
def test_features_depend_on_the_tokenizer_where_it_makes_the_images(kind, stages):
    made = recipe(f"source.kind={kind}", "source.uri=/d", "tokenizer.checkpoint=vq.pt")
    one, other = (plan(made, INPUTS | {"tokenizer_checkpoint": letter * 64}) for letter in "ab")
    assert {name for name in EVERYTHING if one[name] != other[name]} == stages
