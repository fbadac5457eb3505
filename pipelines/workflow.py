"""Reads a recipe, writes stage directories and MLflow runs: the resumable graph, from images to a released champion."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import threading
import time
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from cca_core.config import ConfigError, Recipe
from cca_core.dataset import shard_tables
from cca_core.manifest import Manifest
from cca_core.parse import as_dict
from cca_core.stages import Context, run_stage
from cca_core.stages.graph import StageSpec, active, plan
from cca_core.stages.inputs import check_checkpoints, input_digests
from cca_core.stages.table import markdown_table, table_rows
from cca_core.store import Store
from cca_core.train.train_state import TrainStates
from pipelines.finish import Finish
from pipelines.lock import RunLock
from pipelines.pilot import FULL, PILOT, PILOT_RUN, Expected, as_pilot, passed_pilot
from pipelines.progress import Progress
from pipelines.ray_errors import INFRASTRUCTURE_ERRORS, LOST, WorkerError, lost_for_good
from pipelines.ray_executor import RayExecutor
from pipelines.recipe import to_yaml
from pipelines.report.texts import duration
from pipelines.settings import Settings
from pipelines.stages.decide import AWAITING_VOTES
from pipelines.stages.show import show
from pipelines.tracking import DIGEST, RUN_KEY, STAGE, STATE, SUBMISSION, Tracker

#: Steps after the computing stages; cheap, and they look at the registry, so they run every time.
LAST_STAGES = ("decide", "report", "register", "release")
#: A running stage is looked after this often, in seconds.
LOOK_EVERY_S = 0.2
#: Unreadable images that the terminal names; quarantine/ and MLflow have all.
SHOWN_BAD_IMAGES = 5


class StageTimeoutError(RuntimeError):
    """A stage took longer than execution.stage_timeout_s."""


@dataclass(frozen=True)
class PlannedStage:
    spec: StageSpec
    digest: str
    done: bool
    #: Why it runs or is reused, in words.
    why: str


@dataclass(frozen=True)
class Plan:
    """What a run would do, known before anything runs."""

    recipe: Recipe
    #: As it was given; ``recipe`` is that on the pilot's share where it asks for one.
    given: Recipe
    store: Store
    digests: dict[str, str]
    stages: tuple[PlannedStage, ...]
    run_key: str

    @property
    def complete(self) -> bool:
        return all(stage.done for stage in self.stages)


def run_key(recipe: Recipe, inputs: dict[str, str]) -> str:
    """Identity of a run: the recipe without what computes nothing, and its inputs as they are now."""
    computes_nothing = {"execution", "expect", "pilot", *([] if recipe.sweep.enabled else ["sweep"])}
    computes_nothing |= set() if recipe.profile else {"profile"}
    config = {name: value for name, value in as_dict(recipe).items() if name not in computes_nothing}
    return hashlib.sha256(json.dumps([config, inputs], sort_keys=True).encode()).hexdigest()


def make_plan(recipe: Recipe, settings: Settings) -> Plan:
    """List the source, compute every digest and look at what is there."""
    given, recipe = recipe, as_pilot(recipe) if recipe.profile == PILOT else recipe
    store = Store(settings.storage)
    store.check_writable()
    inputs = input_digests(recipe, store)
    digests = plan(recipe, inputs)
    check_checkpoints(recipe, store.directory("base", digests["base"]))
    stages = []
    for spec in active(recipe):
        directory = store.directory(spec.folder, digests[spec.name])
        done = directory.manifest() is not None
        if done:
            why = "same configuration and input as before"
        elif store.fs.exists(directory.path):
            why = "begun, not finished: goes on with what is missing"
        elif store.fs.exists(f"{store.root}/{spec.folder}"):
            why = "configuration, code or input is new"
        else:
            why = "first time in this storage"
        stages.append(PlannedStage(spec, digests[spec.name], done, why))
    return Plan(recipe, given, store, digests, tuple(stages), run_key(recipe, inputs))


@dataclass(frozen=True)
class Outcome:
    """What a run ends with."""

    run_id: str
    verdict: str
    says: str
    table: str
    versions: dict[str, str]
    release: str
    #: Nothing had to be done.
    unchanged: bool
    #: What the full run will take; None unless this is its pilot.
    expected: Expected | None

    @property
    def awaits_votes(self) -> bool:
        """There is no verdict yet, and the run is not finished."""
        return self.verdict == AWAITING_VOTES


class Workflow:
    """Drives one plan. The manifest is the truth, MLflow the view: a valid manifest without a finished run is
    adopted."""

    def __init__(self, plan: Plan, settings: Settings, progress: Progress) -> None:
        self.plan, self.settings, self.progress = plan, settings, progress
        self._stopped = threading.Event()
        self.tracker = Tracker(settings, self._stopped)
        self.executor = RayExecutor(
            plan.store, plan.recipe.execution, settings.ray_address, self._on_log, progress.units
        )
        self.context = Context(plan.recipe, plan.store, plan.digests, self.executor)
        self._passed: dict[str, Any] | None = None
        self._stage_run = ""
        self._logged_steps: set[int] = set()

    def run(self, *, first: str = "", only: str = "") -> Outcome | None:
        """Run what is missing and end with the outcome; None where ``only`` left the run unfinished.

        Args:
            first: stages before this one must be finished already.
            only: run this stage alone.
        """
        self._check_upstream(first or only)
        if self.plan.recipe.profile == FULL:
            self._passed = self._find_pilot()
        with RunLock(self.plan.store, self.plan.run_key) as lock:
            parent = self.tracker.find_parent(self.plan.run_key)
            if parent is not None and parent.info.status == "FINISHED" and self.plan.complete and not (first or only):
                self._name_submission(parent.info.run_id)
                return self._finish(parent.info.run_id, unchanged=True)
            parent_id = self._open_parent(parent)
            try:
                for stage in self.plan.stages:
                    lock.check()
                    self._check_stopped()
                    if only and stage.spec.name != only:
                        continue
                    self._stage(stage, parent_id)
                if only and only not in LAST_STAGES:
                    self.tracker.end(parent_id, "KILLED")
                    return None
                outcome = self._finish(parent_id, unchanged=False)
                if not outcome.awaits_votes:
                    self.tracker.end(parent_id, "FINISHED")
                return outcome
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    self.progress.line("stopping ...")
                self.tracker.tag(parent_id, STATE, f"failed: {str(error)[:400] or type(error).__name__}")
                self.tracker.end(parent_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
                raise
            finally:
                self.executor.stop()

    def _find_pilot(self) -> dict[str, Any]:
        pilot = as_pilot(self.plan.given)
        found = passed_pilot(self.tracker, run_key(pilot, input_digests(pilot, self.plan.store)))
        took = found["expected_seconds"]
        self.progress.line(
            f"starts from pilot run {found['run_id']}: go"
            + (f", expected to take {duration(took)}" if took is not None else "")
        )
        return found

    def stop(self) -> None:
        """End the run soon, from a signal handler: ``run`` raises KeyboardInterrupt where nothing is half-written."""
        self._stopped.set()

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise KeyboardInterrupt

    def _check_upstream(self, stage: str) -> None:
        if not stage:
            return
        names = [planned.spec.name for planned in self.plan.stages] + list(LAST_STAGES)
        if stage not in names:
            raise ConfigError(f"unknown stage {stage}: this recipe has {', '.join(names)}")
        before = self.plan.stages[: names.index(stage)]
        missing = [planned.spec.name for planned in before if not planned.done]
        if missing:
            raise ConfigError(f"{stage} needs {', '.join(missing)} first: run without --from and --only")

    def _open_parent(self, parent: Any) -> str:
        if parent is not None and parent.info.status != "FINISHED":
            run_id = str(parent.info.run_id)
            self.tracker.reopen(run_id)
            stale = self.tracker.kill_stale(run_id)
            self.progress.line(f"continuing run {run_id}" + (f" (was in {', '.join(stale)})" if stale else ""))
        else:
            tags = {STAGE: "workflow", RUN_KEY: self.plan.run_key}
            run_id = self.tracker.start(self.plan.recipe.name, tags)
            self.tracker.params(run_id, as_dict(self.plan.recipe))
            self.tracker.artifact(run_id, "recipe.yaml", to_yaml(self.plan.given).encode())
            if self._passed:
                self.tracker.tag(run_id, PILOT_RUN, self._passed["run_id"])
        submission = self.settings.submission
        self.tracker.tag(run_id, STATE, f"running as {submission}" if submission else "running")
        self._name_submission(run_id)
        self.tracker.tags(run_id, {f"cca.digest.{name}": value for name, value in self.plan.digests.items()})
        return run_id

    def _name_submission(self, run_id: str) -> None:
        if self.settings.submission:
            self.tracker.tag(run_id, f"{SUBMISSION}.{self.settings.submission}", "true")

    def _stage(self, planned: PlannedStage, parent_id: str) -> None:
        name = planned.spec.name
        if planned.done:
            finished = self.tracker.finished_stage(name, planned.digest)
            if finished is not None:
                self.tracker.tag(parent_id, f"cca.stage.{name}", f"reused from run {finished.info.run_id}")
                self.progress.end_stage(name, "reused")
                return
        self.progress.start_stage(name, planned.spec.makes)
        if not planned.done and (saved := TrainStates(self.context.directory(name)).steps()):
            self.progress.line(f"     {name:<10} goes on from step {max(saved)}")
        tags = {STAGE: name, DIGEST: planned.digest, **({"cca.adopted": "true"} if planned.done else {})}
        self._stage_run = self.tracker.start(name, tags, parent_id)
        self._logged_steps = set()
        self.tracker.params(self._stage_run, planned.spec.section(self.plan.recipe))
        started = time.monotonic()
        try:
            manifest = self._attempts(name)
            directory = self.context.directory(name)
            show(self.tracker, self._stage_run, directory, manifest, self.plan.recipe, self._logged_steps)
        except BaseException as error:
            self.tracker.tag(self._stage_run, STATE, str(error)[:400] or type(error).__name__)
            self.tracker.end(self._stage_run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        self.tracker.metrics(self._stage_run, {"seconds": time.monotonic() - started})
        self.tracker.end(self._stage_run, "FINISHED")
        self.tracker.tag(parent_id, f"cca.stage.{name}", f"run {self._stage_run}")
        self.progress.end_stage(name, "adopted" if planned.done else f"{time.monotonic() - started:.1f} s")
        self._say_quarantine(name, manifest)
        self._say_winner(name, manifest.facts)

    def _say_winner(self, name: str, facts: dict[str, Any]) -> None:
        if name != "sweep":
            return
        own = f"{facts['own_distance']:.2f} with" if "own_distance" in facts else "none with"
        self.progress.line(
            f"     best of {facts['trials']} trials, {facts['failed_trials']} of which failed: {facts['winner']}; "
            f"distance {facts['winner_distance']:.2f}, {own} the recipe's own settings"
        )

    def _say_quarantine(self, name: str, manifest: Manifest) -> None:
        """Name the images that were left out; a run goes on without them, but not silently."""
        if name != "tokens" or not manifest.facts["quarantined"]:
            return
        directory = self.context.directory("tokens").sibling("quarantine")
        bad = pa.concat_tables(shard_tables(directory)).to_pylist()
        self.progress.line(f"     {len(bad)} images cannot be read and are left out (all of them in {directory.uri}):")
        for row in bad[:SHOWN_BAD_IMAGES]:
            self.progress.line(f"       {row['uri']}: {row['error']}")

    def _attempts(self, name: str) -> Manifest:
        """One stage with its time limit, tried again after infrastructure errors, with growing pauses."""
        execution = self.plan.recipe.execution

        def announce(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            self.progress.line(f"{name}: {type(error).__name__}, trying again (attempt {state.attempt_number + 1})")
            self.executor.stop()

        retrying = Retrying(
            retry=retry_if_exception_type(INFRASTRUCTURE_ERRORS),
            stop=stop_after_attempt(execution.max_retries + 1),
            wait=wait_exponential(multiplier=1, max=30),
            before_sleep=announce,
            reraise=True,
        )
        try:
            return retrying(self._limited, name, execution.stage_timeout_s)
        except (*INFRASTRUCTURE_ERRORS, WorkerError) as error:
            # S3 answers some requests without a reason ("Bad Request" of a key that has expired); a write gets one.
            self.plan.store.check_writable(" (what finished is kept, and the same command goes on from there)")
            if isinstance(error, LOST):
                raise lost_for_good(error) from error
            raise

    def _limited(self, name: str, timeout_s: float) -> Manifest:
        if self.context.directory(name).manifest() is None:
            # In this thread: Ray's processes die with the thread that started them, not only with the process.
            self.executor.start()
        future: concurrent.futures.Future[Manifest] = concurrent.futures.Future()

        def work() -> None:
            try:
                future.set_result(run_stage(name, self.context))
            except BaseException as error:
                future.set_exception(error)

        # A daemon: a stage that was stopped, or is past its time, keeps no process alive.
        threading.Thread(target=work, name=name, daemon=True).start()
        deadline = time.monotonic() + timeout_s
        while not future.done() and time.monotonic() < deadline:
            self._check_stopped()
            concurrent.futures.wait([future], min(LOOK_EVERY_S, timeout_s))
        if not future.done():
            self.executor.stop()
            raise StageTimeoutError(
                f"{name} took longer than execution.stage_timeout_s={timeout_s:g}: raise it, or give the stage "
                f"more workers; "
                "what it finished is kept"
            )
        return future.result()

    def _on_log(self, record: dict[str, float]) -> None:
        step = int(record.get("step", 0))
        if "images" not in record:  # a point of a curve, not how far the images are
            self._logged_steps.add(step)
        self.tracker.metrics(self._stage_run, record, step)
        self.progress.record(record)

    def _finish(self, parent_id: str, *, unchanged: bool) -> Outcome:
        finish = Finish(
            self.context, self.plan.given, self.tracker, self.settings, parent_id, self.progress, self._passed
        )
        decision = finish.decide()
        verdict, says, table = decision["verdict"], decision["says"], markdown_table(table_rows(self.context))
        if verdict == AWAITING_VOTES:
            self.tracker.tag(parent_id, STATE, verdict)
            self.tracker.wait(parent_id)
            return Outcome(parent_id, verdict, says, table, {}, "", unchanged=False, expected=None)
        unchanged = unchanged and finish.reported
        versions = finish.register(decision)
        if not unchanged:
            finish.report(decision, versions)
        release = finish.release(versions)
        self.tracker.tag(parent_id, STATE, verdict)
        return Outcome(parent_id, verdict, says, table, versions, release, unchanged, finish.expected)
