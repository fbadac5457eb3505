"""Reads JSON-like data and ``section.key=value`` texts, gives checked configurations (config.py); writes nothing."""

from __future__ import annotations

import dataclasses
import difflib
import json
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cca_core.config import ConfigError


def as_dict(config: Any) -> dict[str, Any]:
    """The configuration as JSON-ready data (tuples become lists), the form in which it enters digests."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def check_keys(cls: type, data: dict[str, Any], where: str = "") -> None:
    """Refuse keys that the dataclass does not have, naming the nearest one it has."""
    types = get_type_hints(cls)
    known = {f.name: types[f.name] for f in dataclasses.fields(cls)}
    for key, value in data.items():
        name = f"{where}{key}"
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {where}{nearest[0]}?" if nearest else f"known here: {', '.join(known)}"
            raise ConfigError(f"unknown recipe key {name}: {hint}")
        if dataclasses.is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"recipe key {name} is a section: give keys below it, such as {name}.{_first(known[key])}"
                )
            check_keys(known[key], value, f"{name}.")


def _first(cls: type) -> str:
    return dataclasses.fields(cls)[0].name


def parse_override(text: str) -> dict[str, Any]:
    """``align.beta=0.05`` as {"align": {"beta": 0.05}}; the value is JSON where it parses as JSON, else text."""
    path, equals, raw = text.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set {text}: write section.key=value, for example --set align.beta=0.05")
    try:
        value: Any = json.loads(raw)
    except json.JSONDecodeError:
        value = raw
    for part in reversed(path.strip().split(".")):
        value = {part: value}
    return value


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def from_dict(cls: Any, data: dict[str, Any]) -> Any:
    """The dataclass from JSON-like data; keys are checked, lists become tuples, sections may be partial."""
    check_keys(cls, data)
    return _build(cls, data)


def _build(cls: Any, data: dict[str, Any], where: str = "") -> Any:
    types = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in data.items():
        if dataclasses.is_dataclass(types[key]):
            # A partial section keeps the defaults of this place, such as a stage's own learning rate.
            field_ = next(f for f in dataclasses.fields(cls) if f.name == key)
            default = dataclasses.asdict(field_.default_factory()) if callable(field_.default_factory) else {}
            value = _build(types[key], merge(default, value), f"{where}{key}.")
        else:
            _check_value(value, types[key], f"{where}{key}")
        values[key] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def _check_value(value: Any, wanted: Any, name: str, or_word: str = "") -> None:
    """Refuse a value of another kind than the field's: a number for a text, a word that is no choice."""
    if get_origin(wanted) in (UnionType, Union):
        # A value, or a list of them or a word in its place.
        one, other = get_args(wanted)
        if get_origin(other) is not Literal:
            return _check_value(value, other if isinstance(value, (list, tuple)) else one, name)
        return None if value in get_args(other) else _check_value(value, one, name, f" or {get_args(other)[0]}")
    if get_origin(wanted) is Literal:
        ok, kind = value in get_args(wanted), f"one of {', '.join(get_args(wanted))}"
    elif get_origin(wanted) is tuple:
        items = get_args(wanted)
        ok, kind = isinstance(value, (list, tuple)), "a list"
        if ok and items[-1] is not Ellipsis:
            ok, kind = len(value) == len(items), f"a list of {len(items)}"
        for item in value if ok else ():
            _check_value(item, items[0], name)
    else:
        accepted = (int, float) if wanted is float else wanted
        # True is an integer to Python, not to people.
        ok = isinstance(value, accepted) and (wanted is bool or not isinstance(value, bool))
        kind = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}[wanted]
    if not ok:
        raise ConfigError(f"recipe key {name}: {value!r} is not {kind}{or_word}")
