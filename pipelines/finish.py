"""Reads both evaluations, writes decide/, the registry, report/ and the rollout: the steps that end a run.

They run every time: cheap, idempotent, and the registry and the service may have changed under a finished run.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from typing import Any

from cca_core.config import Recipe
from cca_core.dataset import valid_manifest
from cca_core.manifest import Manifest, stage_digest
from cca_core.metrics.votes import summarize
from cca_core.parse import as_dict
from cca_core.stages import Context
from cca_core.stages.evaluate import PICTURES, best_cfg, best_evaluated, load_results
from cca_core.stages.filtered import FILTERED
from cca_core.stages.graph import active, candidates, rank_of, ranked
from cca_core.stages.review_pairs import comparison
from cca_core.stages.safety import PICTURES as WORST_CASES
from cca_core.stages.safety import load_safety
from cca_core.stages.sweep import chosen
from cca_core.stages.table import table_columns, table_rows
from cca_core.store import StageDirectory
from cca_core.votes import VoteStore, votes_digest
from cca_core.workers.sample import grid_file
from pipelines.pilot import EXPECTED_HOURS, EXPECTED_S, FULL, PILOT, Expected, devices, expected, stage_seconds
from pipelines.progress import Progress
from pipelines.report.data import report_data
from pipelines.report.render import HTML, JSON, MARKDOWN, report_html, report_json, report_markdown, report_note
from pipelines.settings import Settings
from pipelines.stages.decide import AWAITING_VOTES, DECISION, decide
from pipelines.stages.figures import PLOT, QUALITY_COST, SAMPLES, fidelity_diversity, png, quality_cost, sample_panels
from pipelines.stages.register import FEATURES, register
from pipelines.stages.release import release
from pipelines.stages.rules import safety_rules
from pipelines.stages.show_sweep import SHOWN_TRIALS, best_trials
from pipelines.stages.show_tokens import lineage
from pipelines.tracking import CHAMPION, DIGEST, Registry, Tracker

#: Goes up when the rules of the gate or the report compute something else from the same results.
CODE_VERSION = 4
#: The parts of the recipe that they depend on.
SECTIONS = {
    "decide": ("decide", "safety", "profile"),
    "report": ("decide", "safety", "cost", "report", "profile", "pilot"),
}


class Finish:
    """decide -> register -> report -> release, for one workflow run."""

    def __init__(
        self,
        context: Context,
        given: Recipe,
        tracker: Tracker,
        settings: Settings,
        parent_id: str,
        progress: Progress,
        passed: dict[str, Any] | None,
    ) -> None:
        """
        Args:
            given: the recipe as it was given; that of the context is a pilot's where it asks for one.
            passed: the pilot that a full run starts from.
        """
        self.given, self.passed = given, passed
        self.context, self.tracker, self.settings = context, tracker, settings
        self.parent_id, self.progress = parent_id, progress
        self.registry = Registry(tracker, settings.registered_model(context.recipe.name))
        self.baseline = load_results(context.directory("baseline"))
        evaluated = {name: load_results(context.directory(name)) for name in candidates(context.recipe, "evaluate")}
        best = best_evaluated(evaluated)
        self.rank, self.evaluated = rank_of(best), evaluated[best]
        checked = ranked("safety", self.rank)
        self.safety = load_safety(context.directory(checked))
        self.champion = self._champion_to_beat()
        upstream = {name: context.digests[name] for name in ("baseline", *evaluated, checked)}
        upstream |= {"champion": self.champion[0]} if self.champion else {}
        # Votes that the gate does not ask for change nothing.
        asked = context.recipe.decide.min_votes > 0
        self.votes = VoteStore(context.store, comparison(context).digest).read() if asked else []
        upstream |= {"votes": votes_digest(self.votes)} if asked else {}
        self._upstream = upstream

    def decide(self) -> dict[str, Any]:
        """The verdict, kept in decide/ so that the same results are judged once; while votes are awaited there is none
        to keep."""
        directory = self._directory("decide")
        if directory.manifest() is not None:
            decision = directory.read_json(DECISION)
        else:
            recipe = self.context.recipe
            decision = decide(
                recipe.decide,
                self.baseline["rows"],
                self.evaluated["rows"],
                safety=safety_rules(recipe.safety, self.safety),
                champion=self.champion[1] if self.champion else None,
                votes=summarize(self.votes).tally,
                pilot=recipe.profile == PILOT,
            )
            if decision["verdict"] != AWAITING_VOTES:
                self._commit(directory, {DECISION: json.dumps(decision, indent=1, sort_keys=True).encode()})
        self.progress.end_stage("decide", decision["verdict"])
        return decision

    @property
    def reported(self) -> bool:
        """Whether the report on this decision is written: votes and the champion change under a finished run."""
        return self._directory("report").manifest() is not None

    def report(self, decision: dict[str, Any], versions: dict[str, str]) -> None:
        """The report's files, and the same on the workflow run in MLflow."""
        rows = table_rows(self.context)
        directory = self._directory("report")
        if directory.manifest() is None:
            self._commit(directory, self._report(decision, versions, rows))
        for name in (HTML, JSON, MARKDOWN, QUALITY_COST, PLOT, SAMPLES):
            self.tracker.artifact(self.parent_id, name, directory.read_bytes(name))
        text = directory.read_bytes(MARKDOWN).decode()
        self.tracker.note(self.parent_id, report_note(text, self.context.recipe.report.language))
        self.tracker.table(self.parent_id, table_columns(rows), "evaluation.json")
        tokens = self.context.directory("tokens")
        lineage(self.tracker, self.parent_id, tokens, valid_manifest(tokens), self.context.recipe)
        aligned, guided, base = self.evaluated["rows"][0], best_cfg(self.baseline["rows"]), self.baseline["rows"][0]
        for prefix, row in (("aligned", aligned), ("best_cfg", guided), ("base", base)):
            self.tracker.metrics(self.parent_id, {f"{prefix}.{name}": v for name, v in row["mean"].items()})
            self.tracker.metrics(self.parent_id, {f"{prefix}.{name}": v for name, v in row["cost"].items()})
        if self.expected and self.expected.expected_seconds is not None:
            seconds, hours = self.expected.expected_seconds, self.expected.expected_device_hours
            self.tracker.metrics(self.parent_id, {EXPECTED_S: seconds, EXPECTED_HOURS: hours})
        self.tracker.tags(self.parent_id, {"cca.verdict": decision["verdict"], "cca.says": decision["says"]})
        self.progress.end_stage("report", f"{directory.uri}/{HTML}")

    @cached_property
    def expected(self) -> Expected | None:
        """What the full run will take; None unless this is a pilot."""
        return expected(self.given, self._seconds()) if self.context.recipe.profile == PILOT else None

    def _seconds(self) -> dict[str, float | None]:
        return stage_seconds(self.tracker, self.context.digests, [spec.name for spec in active(self.context.recipe)])

    def register(self, decision: dict[str, Any]) -> dict[str, str]:
        if self.context.recipe.profile == PILOT:
            self.progress.end_stage("register", "a pilot registers nothing")
            return {}
        versions = register(
            self.registry,
            run_id=self.parent_id,
            base=self.context.directory("base"),
            aligned=self.context.directory(ranked("align", self.rank)),
            safety=self.context.directory(ranked("safety", self.rank)),
            filter_spec=self.context.recipe.safety.filter_spec,
            baseline_rows=self.baseline["rows"],
            candidate_rows=self.evaluated["rows"],
            decision=decision,
            features=self.context.digests["features"],
        )
        self.tracker.tags(self.parent_id, {f"cca.version.{role}": version for role, version in versions.items()})
        self.progress.end_stage("register", f"{self.registry.name} champion is version {versions[CHAMPION]}")
        return versions

    def release(self, versions: dict[str, str]) -> str:
        """Roll the champion out; a pilot has none."""
        if not versions:
            return ""
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

    def _report(
        self, decision: dict[str, Any], versions: dict[str, str], rows: list[dict[str, Any]]
    ) -> dict[str, bytes]:
        context, language = self.context, self.given.report.language
        data = report_data(
            self.given,
            decision,
            rows=rows,
            compared=self.evaluated["compared_costs"],
            safety=self.safety,
            votes=summarize(self.votes),
            device_hours=self._device_hours(),
            sweep=self._swept(),
            pilot=self._piloted(),
            lineage=self._lineage(versions),
        )
        cost = quality_cost(data["samplers"], data["distance_name"], data["costs"]["unit"])
        pictures = {
            QUALITY_COST: png(cost),
            PLOT: png(fidelity_diversity(rows)),
            SAMPLES: png(sample_panels(self._panels())),
        }
        checked = context.directory(ranked("safety", self.rank))
        names = [*WORST_CASES, *([FILTERED] if "filtered" in self.safety[0] else [])]
        worst = {name: checked.read_bytes(name) for name in names}
        return {
            HTML: report_html(data, language, pictures | worst),
            JSON: report_json(data),
            MARKDOWN: report_markdown(data, language).encode(),
            **pictures,
        }

    def _lineage(self, versions: dict[str, str]) -> dict[str, Any]:
        """Where everything came from, and the commands that make it again."""
        tokens = self.context.directory("tokens")
        own = {stage: self._directory(stage).digest for stage in SECTIONS}
        database = "MLFLOW_TRACKING_URI=sqlite:///.cca/mlflow.db " if self.settings.local_tracking else ""
        fetch = f"mlflow artifacts download --run-id {self.parent_id} --artifact-path recipe.yaml --dst-path ."
        return {
            "source": {"uri": self.context.recipe.source.uri, "digest": self.context.digests["source"]},
            "tokens": {"uri": tokens.uri, "digest": tokens.digest},
            "digests": self.context.digests | own,
            "versions": {role: f"models:/{self.registry.name}/{version}" for role, version in versions.items()},
            "run_id": self.parent_id,
            "package_version": version("cca-pipeline"),
            "commands": [
                f"{database}{fetch}",
                "cca run recipe.yaml",
            ],
        }

    def _piloted(self) -> dict[str, Any] | None:
        """A pilot's expectation of the full run, or the pilot that this full run started from."""
        if self.expected is not None:
            return {"kind": PILOT, **asdict(self.expected)}
        if self.passed is None:
            return None
        took = self._seconds().values()
        return {"kind": FULL, **self.passed, "seconds": None if None in took else sum(filter(None, took))}

    def _device_hours(self) -> float | None:
        """What the judged alignment took, its cached reference included; None where a run of theirs is not there."""
        stages = [name for name in ("reference", ranked("align", self.rank)) if name in self.context.digests]
        took = stage_seconds(self.tracker, self.context.digests, stages)
        if None in took.values():
            return None
        return sum((seconds or 0.0) * devices(self.given, stage) for stage, seconds in took.items()) / 3600

    def _swept(self) -> dict[str, Any] | None:
        """Which trial of the sweep the judged candidate was, and the best trials."""
        if not self.context.recipe.sweep.enabled:
            return None
        directory = self.context.directory("sweep")
        trials = best_trials(load_results(directory)["trials"], SHOWN_TRIALS)
        return {"rank": self.rank, "label": chosen(directory, self.rank).label(), "trials": trials}

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
        section = self._section(stage)
        return self.context.store.directory(stage, stage_digest(stage, CODE_VERSION, section, self._upstream))

    def _section(self, stage: str) -> dict[str, Any]:
        recipe = as_dict(self.context.recipe)
        return {name: recipe[name] for name in SECTIONS[stage]}

    def _commit(self, directory: StageDirectory, files: dict[str, bytes]) -> None:
        entries = {name: directory.write_bytes(name, data) for name, data in files.items()}
        directory.commit(
            Manifest(
                stage=directory.stage,
                code_version=CODE_VERSION,
                digest=directory.digest,
                config=self._section(directory.stage),
                upstream=self._upstream,
                files=entries,
            )
        )
