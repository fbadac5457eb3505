"""Writes storages with random histories: garbage is exactly what no needed digest leads to, however often it is taken
out, and whenever that is interrupted."""

from __future__ import annotations

import datetime
import hashlib
import tempfile

from hypothesis import given, settings
from hypothesis import strategies as st

from cca_core.manifest import Manifest
from cca_core.stages.garbage import garbage
from cca_core.store import StageDirectory, Store

FOLDERS = ("source", "tokens", "base", "align", "evaluate", "safety", "decide", "report", "pairs")
DERIVED = FOLDERS[-3:]
LATER = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)

#: (folder, finished, earlier directories that it was made from, whether something needs it); numbers are taken modulo
#: how many there are.
history = st.lists(
    st.tuples(st.sampled_from(FOLDERS), st.booleans(), st.lists(st.integers(0, 99), max_size=3), st.booleans()),
    min_size=1,
    max_size=20,
)


def build(store: Store, steps: list) -> tuple[list[StageDirectory], list[dict[str, str]], set[str]]:
    """The directories, what each finished one was made from, and the digests that something needs."""
    made: list[StageDirectory] = []
    upstreams: list[dict[str, str]] = []
    needed: set[str] = set()
    for number, (folder, finished, earlier, wanted) in enumerate(steps):
        directory = store.directory(folder, hashlib.sha256(str(number).encode()).hexdigest())
        sources = [made[i % len(made)] for i in earlier] if made else []
        upstream = {d.stage: d.digest for d in sources if d.stage not in DERIVED}
        directory.write_bytes("part", b"x" * (number + 1))
        if finished:
            manifest = Manifest(
                stage=folder, code_version=1, digest=directory.digest, config={}, upstream=upstream, files={}
            )
            directory.commit(manifest)
        if wanted and folder not in DERIVED:
            needed.add(directory.digest)
        made.append(directory)
        upstreams.append(upstream if finished else {})
    return made, upstreams, needed


def reachable(made: list[StageDirectory], upstreams: list[dict[str, str]], needed: set[str]) -> set[str]:
    """Digests that have to stay, walking from the newest directory to the oldest."""
    stay = set(needed)
    for directory, upstream in reversed(list(zip(made, upstreams, strict=True))):
        if directory.digest in stay and directory.stage not in DERIVED:
            stay |= set(upstream.values())
    return stay


@settings(max_examples=150, deadline=None)
@given(history, st.integers(0, 20))
def test_what_is_needed_stays_with_what_it_was_made_from_and_all_else_goes(steps, interrupted_after):
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        made, upstreams, needed = build(store, steps)
        stay = reachable(made, upstreams, needed)
        expected = {
            directory.uri
            for directory, upstream, (_, finished, _, _) in zip(made, upstreams, steps, strict=True)
            if directory.digest in stay or (directory.stage in DERIVED and finished and set(upstream.values()) <= stay)
        }
        for piece in garbage(store, needed, older_than=LATER)[:interrupted_after]:
            piece.directory.remove()
        for piece in garbage(store, needed, older_than=LATER):
            piece.directory.remove()
        assert {d.uri for d in made if d.exists("part")} == expected
        assert garbage(store, needed, older_than=LATER) == []


def test_what_was_written_lately_is_left_alone_and_votes_are_never_garbage(tmp_path):
    store = Store(str(tmp_path))
    store.directory("align", "a" * 64).write_bytes("part", b"12345")
    store.directory("votes", "b" * 64).write_bytes("vote.json", b"{}")
    before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    assert garbage(store, [], older_than=before) == []
    (found,) = garbage(store, [], older_than=LATER)
    assert (found.directory.stage, found.size_bytes) == ("align", 5)
