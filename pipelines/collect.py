"""Reads MLflow and a storage, deletes stage directories: what no run that counts and no registered version needs."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from typing import Any

from cca_core.config import ConfigError
from cca_core.stages.forget import directories
from cca_core.stages.garbage import NAMED, Garbage, garbage
from cca_core.store import Store
from pipelines.tracking import DIGEST, STAGE, Tracker

#: Tags of a workflow run that name its stages' digests.
DIGEST_OF = "cca.digest."
ENDED = ("FINISHED", "FAILED", "KILLED")


def find_garbage(store: Store, tracker: Tracker, days: float) -> list[Garbage]:
    """The directories that may go: none that a registered version, a run that has not ended or one of the last ``days``
    needs, and none that was written in that time.

    Raises ConfigError where MLflow knows nothing of the storage, so that everything would seem to be garbage.
    """
    since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days)
    runs = list(_workflow_runs(tracker))
    _check_known(store, {digest for run in runs for digest in _digests(run)})
    versions = list(tracker.client.search_model_versions())
    registered = {version.run_id for version in versions}
    needed = {digest for version in versions for digest in _version_digests(version.tags)}
    for run in runs:
        counts = run.info.status not in ENDED or run.info.run_id in registered
        if counts or max(run.info.start_time, run.info.end_time or 0) >= since.timestamp() * 1000:
            needed |= _digests(run)
    return garbage(store, needed, older_than=since)


def _workflow_runs(tracker: Tracker) -> Iterator[Any]:
    """Those of all experiments: teams may share a storage."""
    experiments = [experiment.experiment_id for experiment in tracker.client.search_experiments()]
    token: str | None = ""
    while token is not None:
        page = tracker.client.search_runs(
            experiments, f"tags.`{STAGE}` = 'workflow'", max_results=1000, page_token=token or None
        )
        yield from page
        token = page.token or None


def _digests(run: Any) -> set[str]:
    return {value for name, value in run.data.tags.items() if name.startswith(DIGEST_OF)}


def _version_digests(tags: dict[str, str]) -> set[str]:
    """The model's own, and those of what it was made from: its run may have been deleted."""
    own = tags.get(DIGEST, "").partition(":")[0]
    return {own, *json.loads(tags.get("cca.digests", "{}")).values()} - {""}


def _check_known(store: Store, known: set[str]) -> None:
    there = {directory.digest for stage in NAMED for directory in directories(store, stage)}
    if there and not there & known:
        raise ConfigError(
            f"no run in this MLflow knows anything of the storage {store.uri}, so that everything would seem to be "
            "garbage: set MLFLOW_TRACKING_URI and CCA_STORAGE as the runs had them"
        )
