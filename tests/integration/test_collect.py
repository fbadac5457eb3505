"""Writes to a copy of a finished run: `cca gc` finds what nothing needs, and spoils nothing."""

from __future__ import annotations

import shutil

import pytest

from tests.driver import TINY, cca, manifests, written


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, with an alignment that no run knows."""
    folder, _ = finished
    shutil.copytree(folder / ".cca", tmp_path / ".cca")
    align = tmp_path / ".cca" / "storage" / "align"
    (known,) = align.iterdir()
    shutil.copytree(known, align / ("f" * 64))
    return tmp_path


def test_gc_says_what_would_go_and_deletes_only_that(copied):
    before = written(copied)
    lately = cca(copied, "gc")
    assert "0 directories" in lately.stdout, "written today"
    said = cca(copied, "gc", "--days", "0")
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("would delete") == 1
    assert "align/" + "f" * 64 in said.stdout
    assert "cca gc --delete --days 0" in said.stdout
    assert written(copied) == before
    assert cca(copied, "gc", "--days", "0", "--delete").returncode == 0
    gone = before.keys() - written(copied).keys()
    assert {path.rsplit("/", 1)[0] for path in gone} == {"align/" + "f" * 64}
    assert set(manifests(copied)) >= {"align", "report"}
    again = cca(copied, "run", str(TINY))
    assert "nothing had changed" in again.stdout


def test_gc_refuses_an_mlflow_that_knows_nothing_of_the_storage(copied):
    before = written(copied)
    result = cca(copied, "gc", "--days", "0", "--delete", env={"MLFLOW_TRACKING_URI": f"sqlite:///{copied}/another.db"})
    assert result.returncode == 2
    assert "set MLFLOW_TRACKING_URI and CCA_STORAGE" in result.stderr
    assert written(copied) == before
