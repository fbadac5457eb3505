"""Writes to temporary folders: kill -9 of readers, encoders and drivers while images become tokens, many times."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from cca_core.models import family
from cca_core.models.llamagen.tokenizer import VQSpec
from tests.driver import TINY, Driver, cca, manifests, until
from tests.unit.test_bundle import write as write_bundle

ROUNDS = 20
#: 450 shards of 4 images, each of which costs a fast encoder a tenth of a second: more than twenty drivers finish.
SETTINGS = {
    "tokens.image_size": "96",
    "tokens.batch_size": "4",
    "tokens.rows_per_shard": "4",
    "tokenizer.checkpoint": "vq",
}
COMPARED = ("tokens", "images", "quarantine", "conditions", "source")


def arguments() -> list[str]:
    return [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")] + ["--only"]


@pytest.fixture(scope="module")
def tokenizer() -> torch.nn.Module:
    spec = VQSpec(
        width=64, width_multipliers=(1, 1, 1), num_res_blocks=2, latent_channels=64, codebook_size=64, codebook_dim=8
    )
    torch.manual_seed(0)
    return family("llamagen").build_tokenizer(spec).eval()


def prepared(folder: Path, tokenizer: torch.nn.Module) -> Path:
    write_bundle(folder / "vq", None, tokenizer)
    result = cca(folder, "run", str(TINY), *arguments(), "tokenizer")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def shards(folder: Path) -> dict[str, int]:
    """Finished token shards and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(".cca/storage/tokens/*/rows-*.arrow")}


def data_sets(folder: Path) -> dict[str, bytes]:
    root = folder / ".cca" / "storage"
    return {
        str(path.relative_to(root)): path.read_bytes()
        for name in COMPARED
        for path in (root / name).rglob("*")
        if path.is_file()
    }


def kill_actor(driver: Driver) -> None:
    """kill -9 of one of the actors that turn images into pixels or tokens, a reader or an encoder."""

    def actors() -> list[psutil.Process]:
        tree = psutil.Process(driver.process.pid).children(recursive=True)
        return [process for process in tree if "MapWorker(MapBatches" in " ".join(process.cmdline()[:1])]

    found = until(actors)
    os.kill(random.choice(found).pid, signal.SIGKILL)


# Twenty drivers, each of which starts Ray.
@pytest.mark.timeout(1800)
def test_twenty_kills_of_actor_and_driver_leave_no_trace(tmp_path, tokenizer):
    undisturbed = prepared(tmp_path / "undisturbed", tokenizer)
    result = cca(undisturbed, "run", str(TINY), *arguments(), "tokens")
    assert result.returncode == 0, result.stdout + result.stderr
    folder = prepared(tmp_path / "killed", tokenizer)
    random.seed(0)
    for turn in range(ROUNDS):
        before = shards(folder)
        driver = Driver(folder, *arguments(), "tokens")
        more = random.choice((1, 2))
        until(lambda before=before, more=more: len(shards(folder)) >= len(before) + more)
        kill_actor(driver)
        after_actor = len(shards(folder))
        more = random.choice((1, 2))
        until(lambda n=after_actor, more=more: len(shards(folder)) >= n + more)
        driver.kill()
        assert "tokens" not in manifests(folder), f"all was done by round {turn}: nothing is left to kill"
        now = shards(folder)
        assert {name: now[name] for name in before} == before, "a finished shard was redone"
    started = time.time_ns()
    result = cca(folder, "run", str(TINY), *arguments(), "tokens")
    assert result.returncode == 0, result.stdout + result.stderr
    assert any(written > started for written in shards(folder).values()), "the last run had something to do"
    assert data_sets(folder) == data_sets(undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system needs the right to mount one: {done.stderr}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_ends_the_run_in_a_sentence_and_with_more_room_it_goes_on(tmp_path, tokenizer, small_disk):
    undisturbed = prepared(tmp_path / "undisturbed", tokenizer)
    result = cca(undisturbed, "run", str(TINY), *arguments(), "tokens")
    assert result.returncode == 0, result.stdout + result.stderr
    folder = prepared(tmp_path / "full", tokenizer)
    # All that is there already stays there; only what the stage writes from now on meets the small disk.
    storage = folder / ".cca" / "storage"
    for name in ("tokens", "images", "quarantine", "conditions", "source"):
        (small_disk / name).mkdir()
        (storage / name).symlink_to(small_disk / name)
    result = cca(folder, "run", str(TINY), *arguments(), "tokens")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "No space left on device" in result.stderr
    assert "what finished is kept, and the same command goes on from there" in result.stderr
    assert "Traceback" not in result.stderr
    before = shards(folder)
    assert before, "it had begun"
    subprocess.run(["mount", "-o", "remount,size=256m", small_disk], check=True)
    result = cca(folder, "run", str(TINY), *arguments(), "tokens")
    assert result.returncode == 0, result.stdout + result.stderr
    now = shards(folder)
    assert {name: now[name] for name in before} == before, "a finished shard was redone"
    assert data_sets(folder) == data_sets(undisturbed)
