"""Writes to a temporary folder: a run that waits for votes, `cca review` that collects them, and the verdict after."""

from __future__ import annotations

import io
import json
import shutil
import signal

import httpx
import numpy as np
import pytest
from PIL import Image

from cca_core.votes import aligned_side
from tests.driver import TINY, Driver, cca, written

ASKED = (str(TINY), "--set", "decide.min_votes=6")
REVIEW = ("review", *ASKED, "--pairs", "12", "--port", "0")


@pytest.fixture(scope="module")
def waiting(finished, tmp_path_factory):
    """A folder whose run has everything but votes, and what it printed. It adopts what another run has computed."""
    folder = tmp_path_factory.mktemp("review")
    computed = shutil.ignore_patterns("decide", "report", "_locks")
    shutil.copytree(finished[0] / ".cca" / "storage", folder / ".cca" / "storage", ignore=computed)
    result = cca(folder, "run", *ASKED)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout


@pytest.fixture
def tracker(waiting, monkeypatch):
    folder, _ = waiting
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/.cca/mlflow.db")
    from pipelines.settings import Settings
    from pipelines.tracking import Tracker

    return Tracker(Settings())


class Reviewing:
    """A running `cca review`, and a reviewer who asks it."""

    def __init__(self, folder, *arguments: str) -> None:
        self.driver = Driver(folder, *arguments, verb=REVIEW)
        address = self.driver.wait_line(r"Review 12 pairs at (http://\S+) \(Ctrl-C ends it")[1]
        self.client = httpx.Client(base_url=address, timeout=30)

    def opened(self, name: str) -> dict:
        return self.client.get("/api/review", params={"reviewer": name}).json()

    def vote(self, name: str, pair: int, choice: str) -> None:
        body = {"review": self.opened(name)["review"], "reviewer": name, "pair": pair, "choice": choice}
        assert self.client.post("/api/votes", json=body).json() == {"saved": True}

    def image(self, name: str, pair: int, side: str) -> np.ndarray:
        who = {"reviewer": name, "review": self.opened(name)["review"]}
        answer = self.client.get(f"/api/images/{pair}/{side}", params=who)
        return np.asarray(Image.open(io.BytesIO(answer.content)))

    def end(self, number: int = signal.SIGTERM) -> str:
        self.driver.process.send_signal(number)
        assert self.driver.finish(60) == 0, self.driver.output
        return self.driver.output


def comparison_digest(folder) -> str:
    (found,) = (folder / ".cca/storage/votes").iterdir()
    return found.name


def test_a_run_without_enough_votes_waits_and_says_what_to_type(waiting, tracker):
    folder, output = waiting
    assert "awaiting votes: Every other rule has passed; 0 of the 6 votes are in" in output
    assert f"cca review {' '.join(ASKED)} " in output
    assert f"cca run {' '.join(ASKED)} " in output
    run = tracker.parents()[0]
    assert (run.info.status, run.data.tags["cca.state"]) == ("SCHEDULED", "awaiting votes")
    assert tracker.client.search_model_versions() == []
    assert not (folder / ".cca/storage/decide").exists()
    assert not (folder / ".cca/storage/report").exists()


def test_a_review_needs_a_finished_evaluation_and_a_free_port(tmp_path, waiting):
    result = cca(tmp_path, "review", str(TINY))
    assert result.returncode == 2
    assert "before baseline and evaluate of tiny have finished: run it first with: cca run" in result.stderr
    folder, _ = waiting
    result = cca(folder, "review", *ASKED, "--port", "99999")
    assert (result.returncode, "choose with --host and --port" in result.stderr) == (2, True), result.stderr


def test_votes_reach_the_gate(waiting, tracker):
    folder, _ = waiting
    first = Reviewing(folder)
    assert "none yet" in first.driver.output
    for pair in range(4):
        first.vote("Ann", pair, aligned_side_in(folder, pair) if pair else "equal")
    images = [first.image("Ann", pair, side) for pair in range(12) for side in ("left", "right")]
    assert {picture.shape for picture in images} == {(8, 8, 3)}
    assert len({picture.tobytes() for picture in images}) > 12, "two models, many seeds"
    drawn = {path: at for path, at in written(folder).items() if path.startswith("pairs/")}
    assert len(drawn) == 2 * 12 + 2
    first.driver.kill()  # kill -9: what was acknowledged is stored

    still = cca(folder, "run", *ASKED)
    assert (still.returncode, "4 of the 6 votes are in" in still.stdout) == (0, True), still.stdout + still.stderr

    second = Reviewing(folder)
    assert second.opened("Ann")["choices"].keys() == {"0", "1", "2", "3"}
    again = [second.image("Ann", pair, side) for pair in range(12) for side in ("left", "right")]
    assert all(np.array_equal(a, b) for a, b in zip(images, again, strict=True))
    assert {path: at for path, at in written(folder).items() if path.startswith("pairs/")} == drawn, "drawn once"
    for pair in range(2):
        second.vote("Bob", pair, "equal")
    said = second.end()
    assert "aligned 3, guided 0, equal 3" in said
    assert "win rate   0.750 of the aligned model, 95 % interval" in said
    assert "agreement  50% of 2 choices" in said
    assert said.rstrip().endswith(f"Go on with: cca run {' '.join(ASKED)}")
    assert "Traceback" not in said

    run = tracker.parents()[0]
    assert {name: run.data.metrics[name] for name in ("review_votes", "review_win_rate", "review_agreement")} == {
        "review_votes": 6,
        "review_win_rate": 0.75,
        "review_agreement": 0.5,
    }
    assert run.data.metrics["review_win_rate_low"] < 0.75 < run.data.metrics["review_win_rate_high"]
    assert run.info.status == "SCHEDULED"
    kept = json.loads((folder / path_of(tracker, run, "votes.json")).read_text())
    assert [vote["reviewer"] for vote in kept["votes"]] == ["Ann"] * 4 + ["Bob"] * 2

    result = cca(folder, "run", *ASKED)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "promote: Promote the aligned model" in result.stdout
    run = tracker.parents()[0]
    assert (run.info.status, run.data.tags["cca.state"]) == ("FINISHED", "promote")
    assert "win rate among people (6 votes, 95 % interval" in run.data.tags["mlflow.note.content"]
    assert len(tracker.parents()) == 1
    assert len(tracker.client.search_model_versions()) == 2


def test_more_votes_after_the_verdict_are_judged_again(waiting):
    folder, _ = waiting
    unchanged = cca(folder, "run", *ASKED)
    assert "nothing had changed" in unchanged.stdout, unchanged.stdout + unchanged.stderr
    third = Reviewing(folder)
    for pair in range(12):
        left = aligned_side(comparison_digest(folder), "Cid", pair) == "left"
        third.vote("Cid", pair, "right" if left else "left")
    assert "guided 12" in third.end(signal.SIGINT)
    result = cca(folder, "run", *ASKED)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "nothing had changed" not in result.stdout
    assert "keep CFG: Keep base, CFG 1.5" in result.stdout
    assert "people prefer guidance" in result.stdout


def aligned_side_in(folder, pair: int) -> str:
    """The aligned side of Ann's; her first vote, on pair 0, has made the folder that is named by the digest."""
    return aligned_side(comparison_digest(folder), "Ann", pair)


def path_of(tracker, run, name: str) -> str:
    return f"{run.info.artifact_uri.removeprefix('file://')}/{name}"
