"""Reads and writes the keys file: who may ask, known by the sha256 of their keys, and how much each may ask for.

A key is 256 random bits, so a plain hash is enough: there is nothing to guess. The file is looked at again for every
request, so that a key that is added, replaced or disabled counts from the next request on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import tempfile
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cca_core.config import ConfigError

log = logging.getLogger("ray.serve")
#: Environment variable that may hold the keys file's content instead, for places where secrets are variables.
VARIABLE = "CCA_API_KEYS"
PREFIX = "cca-"

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]


class Holder(BaseModel):
    """Somebody who may ask. Limits are the holder's, whichever of the keys is used: a new key brings no new quota."""

    model_config = ConfigDict(extra="forbid", strict=True)

    #: Several during a rotation: the new key and the one before.
    sha256: list[Sha256]
    requests_per_minute: int | None = Field(default=None, ge=1)
    images_per_day: int | None = Field(default=None, ge=1)
    disabled: bool = False


Holders = TypeAdapter(dict[Name, Holder])


class KeyRing:
    """The keys of a file, or of the environment variable where no file is named; without both, the service is open."""

    def __init__(self, file: str) -> None:
        text = os.environ.get(VARIABLE, "")
        if file and text:
            raise ConfigError(f"keys are given twice, by the file {file} and by {VARIABLE}: keep one of the two")
        self.file = Path(file) if file else None
        self.seen = _version(self.file) if self.file else None
        self.by_hash = _by_hash(_parsed(self.file.read_bytes(), str(self.file)) if self.file else _of_variable(text))
        self.open = not (self.file or text)

    def find(self, key: str) -> tuple[str, Holder] | None:
        """The name and holder of a key that may be used now."""
        self._look_again()
        name, holder = self.by_hash.get(_hash(key), ("", None))
        return (name, holder) if holder and not holder.disabled else None

    def _look_again(self) -> None:
        if self.file is None:
            return
        try:
            version = _version(self.file)
            if version == self.seen:
                return
            self.by_hash = _by_hash(_parsed(self.file.read_bytes(), str(self.file)))
            self.seen = version
            log.info("keys read again: %d may be used", len(self.by_hash))
        except ConfigError as error:
            # The service goes on with the keys it knows: a slip in the file must neither stop it nor open it.
            log.error("the keys before stay in use: %s", error)


def add_key(file: Path, name: str, *, replace: bool, **limits: int | None) -> str:
    """Make a key for ``name``, add its hash to the file, and return the key, which is kept nowhere.

    Args:
        replace: take the holder's other keys out.
        limits: requests_per_minute and images_per_day; None leaves what the file says.
    """
    holders = _parsed(file.read_bytes(), str(file)) if file.exists() else {}
    key = PREFIX + secrets.token_urlsafe(32)
    before = holders.get(name)
    kept = before.sha256 if before and not replace and not before.disabled else []
    said = {limit: value for limit, value in limits.items() if value is not None}
    old = before.model_dump(exclude={"sha256", "disabled"}) if before else {}
    try:
        added = Holders.validate_python({name: {**old, **said, "sha256": [*kept, _hash(key)]}})
    except ValidationError as error:
        raise ConfigError(_first(error)) from None
    _write(file, {**holders, **added})
    return key


def disable(file: Path, name: str) -> None:
    """Refuse all keys of ``name`` from now on."""
    holders = _parsed(file.read_bytes(), str(file)) if file.exists() else {}
    if name not in holders:
        raise ConfigError(f"{file} has no {name}: it has {', '.join(sorted(holders)) or 'nobody'}")
    _write(file, {**holders, name: holders[name].model_copy(update={"disabled": True})})


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _version(file: Path) -> tuple[int, int, int]:
    try:
        found = file.stat()
    except OSError as error:
        raise ConfigError(f"the keys file {file} cannot be read ({error.strerror}): make it with `cca key`") from error
    return found.st_mtime_ns, found.st_size, found.st_ino


def _of_variable(text: str) -> dict[str, Holder]:
    return _parsed(text.encode(), VARIABLE) if text else {}


def _parsed(data: bytes, where: str) -> dict[str, Holder]:
    try:
        return Holders.validate_json(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first(error)}; `cca key NAME` writes such a file") from None


def _first(error: ValidationError) -> str:
    found = error.errors(include_input=False)[0]
    place = ".".join(str(part) for part in found["loc"] if part != "[key]")
    return f"{place or 'keys'}: {found['msg'].lower()}"


def _by_hash(holders: dict[str, Holder]) -> dict[str, tuple[str, Holder]]:
    found: dict[str, tuple[str, Holder]] = {}
    for name, holder in holders.items():
        for value in holder.sha256:
            if value in found:
                raise ConfigError(f"one key is {found[value][0]}'s and {name}'s: take it out of one of them")
            found[value] = (name, holder)
    return found


def _write(file: Path, holders: dict[str, Holder]) -> None:
    """Replace the file at once: a service that reads it meanwhile sees the old or the new one, never a part."""
    content = {name: holder.model_dump(exclude_defaults=True) for name, holder in holders.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    # Temporary files are readable by their owner alone, and so is what they become.
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}.", delete=False) as out:
        json.dump(content, out, indent=2)
        out.write("\n")
    os.replace(out.name, file)
