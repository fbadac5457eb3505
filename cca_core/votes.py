"""Reads and writes votes/ in a storage: what reviewers chose between two images, one small file per vote.

A vote belongs to the digest of what was compared, so those of another candidate never count. A reviewer's later vote on
the same pair replaces the earlier one, which stays as history.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import unicodedata
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from cca_core.config import ConfigError
from cca_core.store import Store

#: What a reviewer may find better, as it is stored: never by the side on which it stood.
Choice = Literal["aligned", "guided", "equal"]
CHOICES: tuple[str, ...] = get_args(Choice)
NAME_AT_MOST = 40


@dataclass(frozen=True)
class Vote:
    """One choice between the images of a pair."""

    reviewer: str
    pair: int
    class_name: str
    choice: Choice
    #: The side on which the aligned model's image stood.
    aligned_side: Literal["left", "right"]
    #: When it was given, in nanoseconds since 1970; of one reviewer's votes on a pair the last counts.
    time_ns: int


def reviewer_name(text: str) -> str:
    """The name as it is kept: characters composed, spaces single; ConfigError where it is none."""
    name = " ".join(unicodedata.normalize("NFC", text).split())
    if not 0 < len(name) <= NAME_AT_MOST or not name.isprintable():
        raise ConfigError(f"a reviewer's name has 1 to {NAME_AT_MOST} printable characters")
    return name


def reviewer_key(name: str) -> str:
    """Whose votes they are: equal for names that differ in case alone, and safe as a folder's name."""
    return hashlib.sha256(name.casefold().encode()).hexdigest()[:16]


def aligned_side(digest: str, reviewer: str, pair: int) -> Literal["left", "right"]:
    """Where the aligned model's image stands: one hash decides, so that a reload shows the same sides.

    The digest is the secret: who does not know it can tell nothing from the name and the pair.
    """
    drawn = hashlib.sha256(f"{digest} {reviewer_key(reviewer)} {pair}".encode()).digest()
    return "left" if drawn[0] % 2 else "right"


class VoteStore:
    """The votes on one comparison. Several may write at once: no file is ever written twice."""

    def __init__(self, store: Store, digest: str) -> None:
        self.store, self.digest = store, digest
        self.folder = f"{store.root}/votes/{digest}"
        self._lock = threading.Lock()
        self._last_ns = max((vote.time_ns for vote in self.read()), default=0)

    def add(self, reviewer: str, pair: int, class_name: str, choice: Choice) -> Vote:
        """Store a vote; it is safe when this returns."""
        side = aligned_side(self.digest, reviewer, pair)
        vote = Vote(reviewer, pair, class_name, choice, side, self._next_ns())
        name = f"{pair:06d}-{vote.time_ns:020d}-{uuid.uuid4().hex[:8]}.json"
        data = json.dumps(asdict(vote), indent=1, sort_keys=True).encode()
        self.store.write_bytes(f"{self.folder}/{reviewer_key(reviewer)}/{name}", data)
        return vote

    def read(self, reviewer: str = "") -> list[Vote]:
        """All votes, or one reviewer's, replaced ones too, in the order in which they were given."""
        folder = f"{self.folder}/{reviewer_key(reviewer)}" if reviewer else self.folder
        fs = self.store.fs
        fs.invalidate_cache()
        paths = [path for path in fs.find(folder) if path.endswith(".json")]  # others are being written
        found = fs.cat(paths) if paths else {}
        votes = [Vote(**json.loads(data)) for data in found.values()]
        return sorted(votes, key=lambda vote: (vote.time_ns, reviewer_key(vote.reviewer), vote.pair))

    def _next_ns(self) -> int:
        # Later than all before it, though the clock was set back.
        with self._lock:
            self._last_ns = max(time.time_ns(), self._last_ns + 1)
            return self._last_ns


def counting(votes: Iterable[Vote]) -> list[Vote]:
    """The last vote of each reviewer on each pair, of votes in the order in which they were given."""
    last = {(reviewer_key(vote.reviewer), vote.pair): vote for vote in votes}
    return sorted(last.values(), key=lambda vote: (reviewer_key(vote.reviewer), vote.pair))


def votes_digest(votes: Iterable[Vote]) -> str:
    """Identity of the votes that count: who chose what, whenever."""
    chosen = [[reviewer_key(vote.reviewer), vote.pair, vote.choice] for vote in counting(votes)]
    return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
