"""Writes small data sets and takes images out of them: what is left is what would be there had they never been."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cca_core.config import ExecutionConfig, Recipe, SourceConfig, TokenizerConfig, TokensConfig
from cca_core.manifest import Manifest
from cca_core.stages import Context, LocalExecutor, plan, run_stage
from cca_core.stages.forget import forget
from cca_core.stages.inputs import input_digests
from cca_core.store import StageDirectory, Store
from tests.invariant.interruptions import Killed, files
from tests.unit.test_bundle import tokenizer_of
from tests.unit.test_bundle import write as write_bundle

DATA = ("source", "tokens", "images", "quarantine", "conditions")
#: One that was tokenized, one in quarantine, one that nobody has.
FORGOTTEN = {"dark/003": "dark/003.png", "light/019": "light/019.png", "nobody": ""}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, write_images) -> Recipe:
    folder = tmp_path_factory.mktemp("images")
    images = write_images(folder / "images")
    for broken in ("dark/007.png", "light/019.png"):
        (images / broken).write_bytes(b"not an image")
    return Recipe(
        source=SourceConfig(kind="folder", uri=str(images)),
        tokens=TokensConfig(rows_per_shard=9, batch_size=8, views="centre_flip"),
        tokenizer=TokenizerConfig(checkpoint=write_bundle(folder / "vq", None, tokenizer_of())),
        execution=ExecutionConfig(device="cpu"),
    )


def planned(recipe: Recipe, root: Path) -> Context:
    store = Store(str(root))
    executor = LocalExecutor(lambda record: None, lambda done, total: None, "cpu")
    return Context(recipe, store, plan(recipe, input_digests(recipe, store)), executor)


def tokenized(recipe: Recipe, root: Path) -> Context:
    context = planned(recipe, root)
    for stage in ("tokenizer", "tokens"):
        run_stage(stage, context)
    return context


def commit(directory: StageDirectory, **upstream: str) -> StageDirectory:
    directory.write_bytes("part", b"rows")
    directory.commit(
        Manifest(stage=directory.stage, code_version=1, digest=directory.digest, config={}, upstream=upstream, files={})
    )
    return directory


def test_what_is_left_is_what_tokenizing_the_others_gives(recipe, tmp_path):
    context = tokenized(recipe, tmp_path / "storage")
    old = context.digests["tokens"]
    done = forget(context.store, list(FORGOTTEN), lambda line: None)
    assert done.images == 2

    after = planned(recipe, tmp_path / "storage")
    assert after.digests["tokens"] != old
    assert after.directory("tokens").manifest() is not None, "the next run finds its tokens made"
    rest = tmp_path / "rest"
    shutil.copytree(recipe.source.uri, rest)  # keeps the times of change
    for name in filter(None, FORGOTTEN.values()):
        (rest / name).unlink()
    fresh = tokenized(Recipe(**{**vars(recipe), "source": SourceConfig(kind="folder", uri=str(rest))}), tmp_path / "b")
    assert fresh.digests["tokens"] == after.digests["tokens"]
    shards = [files(root / "storage" if root == tmp_path else root, *DATA) for root in (tmp_path, tmp_path / "b")]
    # Addresses differ, and with them the files that hold some.
    addresses = ("source", "quarantine")
    left, made = (
        {name: data for name, data in found.items() if not name.startswith(addresses) and "_manifest" not in name}
        for found in shards
    )
    assert left == made
    assert len([name for name in left if name.startswith("tokens")]) == 5
    facts = [run.directory("tokens").manifest().facts for run in (after, fresh)]
    assert facts[0] == facts[1]
    assert (facts[0]["num_images"], facts[0]["quarantined"]) == (37, 1)


def test_nothing_that_is_left_holds_them(recipe, tmp_path):
    context = tokenized(recipe, tmp_path)
    forget(context.store, list(FORGOTTEN), lambda line: None)
    holding = [
        str(path)
        for path in tmp_path.rglob("*")
        if path.is_file() and any(image_id.encode() in path.read_bytes() for image_id in FORGOTTEN)
    ]
    assert holding == []


def test_later_runs_leave_them_out_though_the_images_are_still_there(recipe, tmp_path):
    context = tokenized(recipe, tmp_path)
    forget(context.store, list(FORGOTTEN), lambda line: None)
    other = Recipe(**{**vars(recipe), "tokens": TokensConfig(rows_per_shard=50, batch_size=8)})
    facts = tokenized(other, tmp_path).directory("tokens").manifest().facts
    assert (facts["num_images"], facts["quarantined"]) == (37, 1)


def test_what_was_made_of_them_goes_and_what_was_not_stays(recipe, tmp_path):
    context = tokenized(recipe, tmp_path)
    source, tokens = context.digests["source"], context.digests["tokens"]
    gone = [
        commit(context.store.directory("features", "1" * 64), source=source),
        commit(context.store.directory("reference", "2" * 64), tokens=tokens, base="b" * 64),
    ]
    stays = [
        commit(context.store.directory("features", "3" * 64), source="0" * 64),
        commit(context.store.directory("reference", "4" * 64), tokens="0" * 64, base="b" * 64),
        commit(context.store.directory("base", "5" * 64), tokens=tokens),
        commit(context.store.directory("align", "6" * 64), tokens="0" * 64, base="5" * 64),
        commit(context.store.directory("align", "7" * 64), tokens="0" * 64, base="0" * 64),
    ]
    done = forget(context.store, list(FORGOTTEN), lambda line: None)
    assert [directory.manifest() for directory in gone] == [None, None]
    assert all(directory.manifest() for directory in stays), "models are named, not deleted"
    assert done.models == {"base": ["5" * 64], "align": ["6" * 64]}


def test_a_data_set_without_them_is_left_alone(recipe, tmp_path):
    context = tokenized(recipe, tmp_path)
    before = files(tmp_path, *DATA)
    done = forget(context.store, ["nobody"], lambda line: None)
    assert (done.images, done.rewritten, done.deleted) == (0, {}, [])
    assert files(tmp_path, *DATA) == before


def test_shards_of_an_unfinished_run_go_too(recipe, tmp_path):
    context = tokenized(recipe, tmp_path)
    directory = context.directory("tokens")
    context.store.fs.rm_file(f"{directory.path}/_manifest.json")
    forget(context.store, ["dark/003"], lambda line: None)
    assert not context.store.fs.exists(directory.path)


@pytest.mark.parametrize("killed_at", [0, 2, 5])
def test_an_interrupted_call_is_finished_by_the_next(recipe, tmp_path, monkeypatch, killed_at):
    context = tokenized(recipe, tmp_path)
    remove, removed = StageDirectory.remove, []

    def remove_or_die(self: StageDirectory) -> None:
        if len(removed) == killed_at:
            raise Killed
        removed.append(self.uri)
        remove(self)

    with monkeypatch.context() as patch:
        patch.setattr(StageDirectory, "remove", remove_or_die)
        if killed_at < 5:
            with pytest.raises(Killed):
                forget(context.store, list(FORGOTTEN), lambda line: None)
        else:
            forget(context.store, list(FORGOTTEN), lambda line: None)
    forget(context.store, list(FORGOTTEN), lambda line: None)
    holding = [path for path in tmp_path.rglob("*.arrow") if b"dark/003" in path.read_bytes()]
    assert holding == []
    assert planned(recipe, tmp_path).directory("tokens").manifest() is not None
