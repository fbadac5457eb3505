"""Reads votes, writes metrics and votes.json to the workflow run in MLflow, and the summary as a person reads it."""

from __future__ import annotations

import json
import logging
import math
import threading
from dataclasses import asdict
from types import TracebackType
from typing import Any

from cca_core.metrics.votes import VoteSummary, summarize
from cca_core.votes import Vote, VoteStore, counting
from pipelines.tracking import Tracker

ARTIFACT = "votes.json"
#: Votes are published no more often than this.
EVERY_S = 5.0

log = logging.getLogger(__name__)


class Publisher:
    """Publishes at the start, soon after votes have changed, and at the end."""

    def __init__(self, votes: VoteStore, tracker: Tracker, run_id: str) -> None:
        self.votes, self.tracker, self.run_id = votes, tracker, run_id
        self._changed, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._publish_changes, name="publish", daemon=True)

    def __enter__(self) -> Publisher:
        self.publish()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._changed.set()
        self._thread.join()
        self.publish()

    def changed(self) -> None:
        """Votes have changed."""
        self._changed.set()

    def publish(self) -> None:
        votes = self.votes.read()
        summary = summarize(votes)
        self.tracker.metrics(self.run_id, metrics(summary), step=summary.tally.votes)
        self.tracker.artifact(self.run_id, ARTIFACT, votes_json(self.votes.digest, votes, summary))

    def _publish_changes(self) -> None:
        while self._changed.wait() and not self._stopped.is_set():
            self._changed.clear()
            try:
                self.publish()
            except Exception as error:  # a store that is away for a moment; what botocore raises is no OSError
                log.warning("the votes are stored, but could not be published: %s", error)
            self._stopped.wait(EVERY_S)


def metrics(summary: VoteSummary) -> dict[str, float]:
    """The numbers that there are: no rate without a vote, no agreement without a shared pair."""
    low, high = summary.tally.interval
    values = {
        "review_votes": float(summary.tally.votes),
        "review_win_rate": summary.tally.win_rate,
        "review_win_rate_low": low,
        "review_win_rate_high": high,
        "review_agreement": summary.agreement.share,
    }
    return {name: value for name, value in values.items() if not math.isnan(value)}


def votes_json(digest: str, votes: list[Vote], summary: VoteSummary) -> bytes:
    """All votes, replaced ones too, and what those that count say."""
    counted = set(counting(votes))
    tallies = {"all": summary.tally, **{f"class {name}": tally for name, tally in summary.by_class.items()}}
    content: dict[str, Any] = {
        "comparison": digest,
        "metrics": metrics(summary),
        "tallies": {name: asdict(tally) for name, tally in tallies.items()},
        "votes": [{**asdict(vote), "counts": vote in counted} for vote in votes],
    }
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def summary_lines(summary: VoteSummary) -> list[str]:
    """What the votes say, for the terminal."""
    tally, agreement = summary.tally, summary.agreement
    if not tally.votes:
        return ["votes      none yet"]
    low, high = tally.interval
    lines = [
        f"votes      {tally.votes} by {summary.reviewers} reviewer{'s' if summary.reviewers > 1 else ''} on "
        f"{summary.pairs} pairs: aligned {tally.wins}, guided {tally.losses}, equal {tally.equal}",
        f"win rate   {tally.win_rate:.3f} of the aligned model, 95 % interval {low:.3f} to {high:.3f}",
    ]
    if agreement.compared:
        kappa = "" if math.isnan(agreement.kappa) else f", kappa {agreement.kappa:.2f}"
        lines.append(
            f"agreement  {agreement.share:.0%} of {agreement.compared} choices on pairs that two have voted on{kappa}"
        )
    return lines
