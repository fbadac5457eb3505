"""Reads tokens/, the base, its reference, the features and baseline/; writes sweep/: every trial's evaluations and
pictures, and results.json, which ranks the trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cca_core.config import ConfigError
from cca_core.dataset import classes_with_images
from cca_core.manifest import Manifest
from cca_core.stages.evaluate import RESULTS, best_cfg, load_results
from cca_core.stages.grid import Settings, trials
from cca_core.stages.run import Context, OnLog
from cca_core.stages.trial import run_trial, trial_file, trial_states
from cca_core.store import StageDirectory

#: What a trial is ranked by, after how far it got: lower is better.
METRIC = "distance"
Record = dict[str, Any]


def run(stage: str, context: Context) -> Manifest:
    """Successive halving: all trials up to the first evaluation, the better half of them up to the second, ...

    Who goes on is decided when all have arrived, so that the result is a function of the trials alone: not of how many
    run at once, nor of which ended first. What an interrupted sweep measured is not measured again.
    """
    directory, config = context.directory(stage), context.recipe.sweep
    own, *_ = found = trials(context.recipe)
    base_row, guided_row = _baseline(context)
    arguments = _arguments(context, directory, guided_row["sampling"]["cfg_scale"])
    records: dict[Settings, list[Record]] = {settings: [] for settings in found}
    running, watch = list(found), _Watch(context.executor.on_log)
    for evaluation in range(1, config.evaluations + 1):
        watch.start(len(running))
        context.store.fs.invalidate_cache()
        left = []
        for settings in running:
            if directory.exists(trial_file(settings.key, evaluation)):
                watch(directory.read_json(trial_file(settings.key, evaluation)))
            else:
                left.append({"settings": settings, "evaluation": evaluation})
        context.executor.trials(run_trial, arguments, left, watch)
        for settings in running:
            records[settings].append(directory.read_json(trial_file(settings.key, evaluation)))
        going_on = survivors(own, running, records) if evaluation < config.evaluations else []
        for settings in set(running) - set(going_on):
            trial_states(directory, settings.key).remove()
        running = going_on
    rows = ranking(own, records, config.evaluations)
    if rows[0]["error"]:
        reason = records[own][-1]["error"]
        raise ConfigError(f"all {len(rows)} trials failed, that of the recipe's own settings with: {reason}")
    results = {
        "trials": rows,
        "winner": rows[0]["settings"],
        "metric": METRIC,
        "cfg_scale": arguments["cfg_scale"],
        "base": {"label": base_row["label"], "mean": base_row["mean"]},
        "best_cfg": {"label": guided_row["label"], "mean": guided_row["mean"]},
    }
    directory.write_json(RESULTS, results)
    names = [RESULTS, *(name for settings, known in records.items() for name in _files(settings, known))]
    (own_row,) = (row for row in rows if row["own"])
    facts = {
        "trials": len(rows),
        "failed_trials": sum(bool(row["error"]) for row in rows),
        "winner": rows[0]["label"],
        f"winner_{METRIC}": rows[0]["metrics"][METRIC],
        # Not where they failed: a sweep may well be what finds others.
        **({f"own_{METRIC}": own_row["metrics"][METRIC]} if own_row["metrics"] else {}),
    }
    return context.commit(stage, context.entries(stage, names), facts=facts)


def survivors(own: Settings, running: Sequence[Settings], records: dict[Settings, list[Record]]) -> list[Settings]:
    """The better half of those that did not fail, and the recipe's own settings if they are not among them: a winner
    has beaten them at their end."""
    alive = [settings for settings in running if not records[settings][-1]["error"]]
    best = sorted(alive, key=lambda settings: _distance(records[settings][-1]))[: -(-len(alive) // 2)]
    return [*best, *(settings for settings in alive if settings == own and settings not in best)]


def ranking(own: Settings, records: dict[Settings, list[Record]], evaluations: int) -> list[dict[str, Any]]:
    """All trials, best first: those that ran to their end by distance, then those that were stopped, the later the
    better, then those that failed."""

    def order(item: tuple[Settings, list[Record]]) -> tuple[bool, int, float, bool]:
        settings, known = item
        last = known[-1]
        return bool(last["error"]), -len(known), _distance(last), settings != own

    rows = []
    for rank, (settings, known) in enumerate(sorted(records.items(), key=order), start=1):
        last = known[-1]
        ended = "at its end" if len(known) == evaluations else f"stopped after evaluation {len(known)}"
        rows.append(
            {
                "rank": rank,
                "key": settings.key,
                "label": settings.label(),
                "settings": asdict(settings),
                "own": settings == own,
                "ended": "failed" if last["error"] else ended,
                "evaluations": len(known),
                "step": last["step"],
                "metrics": last["metrics"],
                "error": last["error"],
                "seconds": sum(record["seconds"] for record in known),
            }
        )
    return rows


def chosen(directory: StageDirectory, rank: int) -> Settings:
    """The settings of that rank in a finished sweep; ConfigError where so many trials did not work."""
    rows = load_results(directory)["trials"]
    working = [row for row in rows if not row["error"]]
    if rank > len(working):
        raise ConfigError(
            f"only {len(working)} of {len(rows)} trials of the sweep worked: set sweep.keep to {len(working)} at most"
        )
    return Settings(**working[rank - 1]["settings"])


def trial_records(directory: StageDirectory, row: dict[str, Any]) -> list[Record]:
    """The evaluations of a trial in ``results.json``, each with the curve that led to it."""
    return [directory.read_json(trial_file(row["key"], number + 1)) for number in range(row["evaluations"])]


def _distance(record: Record) -> float:
    return record["metrics"].get(METRIC, float("inf"))


def _files(settings: Settings, known: list[Record]) -> list[str]:
    names = [trial_file(settings.key, record["evaluation"]) for record in known]
    return names + [trial_file(settings.key, r["evaluation"], "png") for r in known if not r["error"]]


def _baseline(context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """The base, guidance-free and with its best CFG scale."""
    rows = load_results(context.directory("baseline"))["rows"]
    return rows[0], best_cfg(rows)


def _arguments(context: Context, directory: StageDirectory, cfg_scale: float) -> dict[str, Any]:
    """What all trials are given."""
    recipe = context.recipe
    return {
        "directory": directory,
        "recipe": recipe,
        "tokens": context.directory("tokens"),
        "base": context.directory("base"),
        "reference": context.directory("reference") if recipe.reference.mode == "cached" else None,
        "features": context.directory("features"),
        "classes": classes_with_images(context.directory("tokens")),
        "cfg_scale": cfg_scale,
    }


class _Watch:
    """Says how many trials have been measured since ``start``, and the best distance of those."""

    def __init__(self, on_log: OnLog) -> None:
        self.on_log, self.measured = on_log, 0
        self.done, self.left, self.best = 0, 0, float("inf")

    def start(self, trials: int) -> None:
        self.done, self.left, self.best = 0, trials, float("inf")

    def __call__(self, record: Record) -> None:
        self.measured, self.done, self.left = self.measured + 1, self.done + 1, self.left - 1
        self.best = min(self.best, _distance(record))
        numbers = {"step": self.measured, "trials_done": self.done, "trials_left": self.left}
        self.on_log(numbers | ({f"best_{METRIC}": self.best} if math.isfinite(self.best) else {}))
