"""Reads both evaluations, writes decide/, report/, the registry and the rollout: the steps that end a run.

They run every time: cheap, idempotent, and the registry and the service may have changed under a finished run.
"""

from __future__ import annotations

import json
from typing import Any

from cca_core.dataset import valid_manifest
from cca_core.manifest import Manifest, stage_digest
from cca_core.parse import as_dict
from cca_core.stages import Context
from cca_core.stages.evaluate import PICTURES, best_cfg, load_results
from cca_core.stages.graph import candidates, rank_of, ranked
from cca_core.stages.sweep import chosen
from cca_core.stages.table import table_rows
from cca_core.store import StageDirectory
from cca_core.workers.sample import grid_file
from pipelines.progress import Progress
from pipelines.settings import Settings
from pipelines.stages.decide import DECISION, decide
from pipelines.stages.register import CHAMPION, FEATURES, register
from pipelines.stages.release import release
from pipelines.stages.report import (
    PLOT,
    REPORT,
    SAMPLES,
    fidelity_diversity,
    png,
    report_markdown,
    sample_panels,
)
from pipelines.stages.show import table_columns
from pipelines.stages.show_sweep import SHOWN_TRIALS, trial_lines
from pipelines.stages.show_tokens import lineage
from pipelines.tracking import DIGEST, Registry, Tracker

#: Goes up when the rules of the gate or the report compute something else from the same results.
CODE_VERSION = 1


class Finish:
    """decide -> report -> register -> release, for one workflow run."""

    def __init__(
        self, context: Context, tracker: Tracker, settings: Settings, parent_id: str, progress: Progress
    ) -> None:
        self.context, self.tracker, self.settings = context, tracker, settings
        self.parent_id, self.progress = parent_id, progress
        self.registry = Registry(tracker, settings.registered_model(context.recipe.name))
        self.baseline = load_results(context.directory("baseline"))
        evaluated = {name: load_results(context.directory(name)) for name in candidates(context.recipe, "evaluate")}
        # Of the candidates that a sweep chose, the gate judges the best.
        best = min(evaluated, key=lambda name: evaluated[name]["rows"][0]["mean"]["distance"])
        self.rank, self.evaluated = rank_of(best), evaluated[best]
        self.champion = self._champion_to_beat()
        upstream = {name: context.digests[name] for name in ("baseline", *evaluated)}
        upstream |= {"champion": self.champion[0]} if self.champion else {}
        self._section = as_dict(context.recipe.decide)
        self._upstream = upstream

    def decide(self) -> dict[str, Any]:
        """The verdict, kept in decide/ so that the same results are judged once."""
        directory = self._directory("decide")
        if directory.manifest() is None:
            metrics = self.champion[1] if self.champion else None
            decision = decide(self.context.recipe.decide, self.baseline["rows"], self.evaluated["rows"], metrics)
            self._commit(directory, {DECISION: json.dumps(decision, indent=1, sort_keys=True).encode()})
        decision = directory.read_json(DECISION)
        self.progress.end_stage("decide", decision["verdict"])
        return decision

    def report(self, decision: dict[str, Any]) -> None:
        """The report's files, and the same on the workflow run in MLflow."""
        rows = table_rows(self.context)
        directory = self._directory("report")
        if directory.manifest() is None:
            text = report_markdown(self.context.recipe.name, decision, self.evaluated, rows, self._swept())
            panels = sample_panels(self._panels())
            self._commit(directory, {REPORT: text.encode(), PLOT: png(fidelity_diversity(rows)), SAMPLES: png(panels)})
        for name in (REPORT, PLOT, SAMPLES):
            self.tracker.artifact(self.parent_id, name, directory.read_bytes(name))
        text = directory.read_bytes(REPORT).decode()
        self.tracker.note(self.parent_id, text)
        self.tracker.table(self.parent_id, table_columns(rows), "evaluation.json")
        tokens = self.context.directory("tokens")
        lineage(self.tracker, self.parent_id, tokens, valid_manifest(tokens), self.context.recipe)
        aligned, guided, base = self.evaluated["rows"][0], best_cfg(self.baseline["rows"]), self.baseline["rows"][0]
        for prefix, row in (("aligned", aligned), ("best_cfg", guided), ("base", base)):
            self.tracker.metrics(self.parent_id, {f"{prefix}.{name}": v for name, v in row["mean"].items()})
            self.tracker.metrics(self.parent_id, {f"{prefix}.{name}": v for name, v in row["cost"].items()})
        self.tracker.tags(self.parent_id, {"cca.verdict": decision["verdict"], "cca.says": decision["says"]})
        self.progress.end_stage("report", f"{directory.uri}/{REPORT}")

    def register(self, decision: dict[str, Any]) -> dict[str, str]:
        versions = register(
            self.registry,
            run_id=self.parent_id,
            base=self.context.directory("base"),
            aligned=self.context.directory(ranked("align", self.rank)),
            baseline_rows=self.baseline["rows"],
            candidate_rows=self.evaluated["rows"],
            decision=decision,
            features=self.context.digests["features"],
        )
        self.tracker.tags(self.parent_id, {f"cca.version.{role}": version for role, version in versions.items()})
        self.progress.end_stage("register", f"{self.registry.name} champion is version {versions[CHAMPION]}")
        return versions

    def release(self, versions: dict[str, str]) -> str:
        model = f"models:/{self.registry.name}/{versions[CHAMPION]}"
        said = release(self.settings.serve_address, model)
        self.tracker.tag(self.parent_id, "cca.release", said)
        self.progress.end_stage("release", said)
        return said

    def _champion_to_beat(self) -> tuple[str, dict[str, float]] | None:
        """The present champion's digest and metrics, if it is another model measured on the same real features."""
        champion = self.registry.alias(CHAMPION)
        if champion is None or champion.tags.get(FEATURES) != self.context.digests["features"]:
            return None
        digest = champion.tags.get(DIGEST, "")
        own = ("base", *candidates(self.context.recipe, "align"))
        if digest.split(":")[0] in {self.context.digests[name] for name in own}:
            return None
        return digest, {"distance": float(champion.tags["cca.metric.distance"])}

    def _swept(self) -> list[str]:
        """Which trial of the sweep the judged candidate was, and the best trials, for the report."""
        if not self.context.recipe.sweep.enabled:
            return []
        directory = self.context.directory("sweep")
        says = f"The candidate has the settings of rank {self.rank}: {chosen(directory, self.rank).label()}."
        return ["", "## The sweep", "", says, "", *trial_lines(load_results(directory)["trials"], SHOWN_TRIALS)]

    def _panels(self) -> dict[str, bytes]:
        """Pictures of the same classes and seeds, one below the other."""
        baseline = self.context.directory("baseline")
        evaluate, label = self.context.directory(ranked("evaluate", self.rank)), self.evaluated["rows"][0]["label"]
        guided = best_cfg(self.baseline["rows"])
        calls = {row["label"]: row["cost"]["calls_per_image"] for row in table_rows(self.context)}
        index = self.baseline["rows"].index(guided)
        return {
            **{title: baseline.read_bytes(name) for title, name in PICTURES.items()},
            f"base, guidance-free ({calls['base']} model calls per image)": baseline.read_bytes(grid_file(0)),
            f"{guided['label']} ({calls[guided['label']]} calls)": baseline.read_bytes(grid_file(index)),
            f"{label}, guidance-free ({calls[label]} calls)": evaluate.read_bytes(grid_file(0)),
        }

    def _directory(self, stage: str) -> StageDirectory:
        return self.context.store.directory(stage, stage_digest(stage, CODE_VERSION, self._section, self._upstream))

    def _commit(self, directory: StageDirectory, files: dict[str, bytes]) -> None:
        entries = {name: directory.write_bytes(name, data) for name, data in files.items()}
        directory.commit(
            Manifest(
                stage=directory.stage,
                code_version=CODE_VERSION,
                digest=directory.digest,
                config=self._section,
                upstream=self._upstream,
                files=entries,
            )
        )
