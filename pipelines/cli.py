"""Reads arguments, writes to the terminal: the ``cca`` command. Errors are one sentence with the remedy, exit
code 2."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import shlex
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cca_core.config import ConfigError
from pipelines import data_cli, model_cli, promote_cli, submit_cli
from pipelines.settings import Settings, quiet_libraries

quiet_libraries()
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Guidance-free image generation: align an autoregressive model with CCA, measure, register, serve.",
)
app.add_typer(data_cli.app, name="data")
app.add_typer(model_cli.app)
app.add_typer(promote_cli.app)
app.add_typer(submit_cli.app)
app.command()(data_cli.gc)
console = Console(stderr=False)


class StoppedError(Exception):
    """A run that was stopped from outside, and the command that continues it."""


RecipeArgument = Annotated[
    str, typer.Argument(help="A YAML file, or a built-in recipe such as digits or cifar10_small.")
]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a recipe value; repeatable.")
]


@app.callback()
def main_options(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and library logs.")] = False,
) -> None:
    """Options that stand before the command."""
    ctx.obj = debug
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if not debug:
        warnings.filterwarnings("ignore")
        for noisy in ("mlflow", "alembic", "ray", "httpx", "fsspec", "asyncio", "urllib3"):
            logging.getLogger(noisy).setLevel(logging.ERROR)


@app.command()
def run(
    recipe: RecipeArgument = "digits",
    set_: SetOption = [],  # noqa: B006  (typer reads the default, nothing changes it)
    profile: Annotated[
        str,
        typer.Option(
            help="pilot: on a share of the images, which ends with go or no-go and what the full run will take; full: "
            "all of them, once the pilot has passed. Short for --set profile=..."
        ),
    ] = "",
    only: Annotated[str, typer.Option(help="Run this stage alone; those before it must be finished.")] = "",
    from_: Annotated[str, typer.Option("--from", help="Run from this stage on; those before must be finished.")] = "",
) -> None:
    """Run a recipe from images to a registered champion. The same command continues after any interruption.

    Without arguments: the embedded handwritten digits, in a few minutes on a laptop.
    Example: cca run --set source.kind=folder --set source.uri=./images --set tokens.image_size=32
    """
    from pipelines.pilot import FULL, PILOT
    from pipelines.progress import Progress
    from pipelines.recipe import load_recipe
    from pipelines.stages.decide import GO
    from pipelines.workflow import Workflow, make_plan

    started = time.monotonic()
    settings = Settings()
    set_ = [*set_, *([f"profile={profile}"] if profile else [])]
    plan = make_plan(load_recipe(recipe, set_), settings)
    console.print(f"{plan.recipe.name}: storage {plan.store.uri}", highlight=False, soft_wrap=True)
    workflow = Workflow(plan, settings, Progress(console))
    for name in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, and a scheduler's way of it
        signal.signal(name, lambda *_: workflow.stop())
    try:
        outcome = workflow.run(first=from_, only=only)
    except KeyboardInterrupt:
        raise StoppedError(f"cca {shlex.join(sys.argv[1:])}") from None
    console.print()
    if outcome is None:
        console.print(f"{only} is finished. Go on with: cca run {recipe}")
        return
    console.print(outcome.table, highlight=False, soft_wrap=True, markup=False)
    console.print(f"\n[bold]{outcome.verdict}[/]: {outcome.says}", highlight=False, soft_wrap=True)
    took = (
        f"nothing had changed, {time.monotonic() - started:.1f} s"
        if outcome.unchanged
        else f"{time.monotonic() - started:.0f} s"
    )
    if outcome.awaits_votes:
        _say(f"\nRun {outcome.run_id} waits ({took}). Next:")
        _say(f"  {_command('review', recipe, set_)}    people compare the images, blind, in a browser")
        _say(f"  {_command('run', recipe, set_)}    the verdict, once the votes are in")
        return
    if outcome.expected:
        _say(f"The full run will take about {outcome.expected}.")
        _say(f"\nRun {outcome.run_id} ({took}). Next:")
        _say("  cca ui       review the run in MLflow: the report has what the full run will take, stage by stage")
        if outcome.verdict == GO:
            others = [value for value in set_ if value != f"profile={PILOT}"]
            _say(f"  {_command('run', recipe, [*others, f'profile={FULL}'])}    the full run")
        return
    name = settings.registered_model(plan.recipe.name)
    _say(f"\nRun {outcome.run_id} ({took}). Next:")
    _say("  cca ui       review the run in MLflow: curves, tables, pictures, lineage")
    _say(f"  cca serve --model models:/{name}@champion    serve it over the OpenAI Images API")
    _say(f"  cca status {recipe}    versions of {name} and the state of the run")


@app.command()
def plan(
    recipe: RecipeArgument = "digits",
    set_: SetOption = [],  # noqa: B006
    gpu_gb: Annotated[
        float, typer.Option(min=0, help="Memory of one GPU in GB; 0 takes that of the GPU here, or 80 without one.")
    ] = 0.0,
) -> None:
    """Say what a run would do and why, and how large it is, without doing it.

    The sizes need neither weights nor images where the recipe says what they will be (expect.*): tokens, parameters,
    bytes of the data sets, memory of an alignment worker and how it fits on GPUs, model calls before and after.
    Example: cca plan llamagen_3b_384 --gpu-gb 40
    """
    from cca_core.stages.expected import missing_files
    from cca_core.stages.sizes import plan_sizes
    from cca_core.train.memory import gpu_memory_bytes
    from pipelines import plan_view
    from pipelines.recipe import load_recipe
    from pipelines.workflow import make_plan

    loaded = load_recipe(recipe, set_)
    missing = missing_files(loaded)
    if missing:
        _say("\n".join(plan_view.missing_lines(loaded, missing)))
    else:
        console.print(plan_view.stage_table(make_plan(loaded, Settings())))
    gpu_bytes = round(gpu_gb * 1e9) or gpu_memory_bytes()
    try:
        sizes = plan_sizes(loaded, gpu_bytes=gpu_bytes, missing=missing)
    except ConfigError as error:
        if not missing:
            raise
        _say(f"Sizes cannot be told yet: {error}")
    else:
        _say("\n".join(plan_view.size_lines(loaded, sizes, gpu_bytes)))
    _say(f"{'With those in place, run' if missing else 'Run'} it with: cca run {recipe}")


@app.command()
def review(
    recipe: RecipeArgument = "digits",
    set_: SetOption = [],  # noqa: B006
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of images; classes in turn.")] = 60,
    port: Annotated[int, typer.Option(help="Port of the page; 0 takes a free one.")] = 8600,
    host: Annotated[str, typer.Option(help="Address to listen on; there is no login.")] = "127.0.0.1",
) -> None:
    """Let people compare the aligned model with guidance, blind, on a page in the browser, until Ctrl-C.

    Every vote is stored at once; the same command goes on where reviewers were. What they choose counts in the gate
    where the recipe asks for votes (decide.min_votes).
    """
    from pipelines.progress import Progress
    from pipelines.recipe import load_recipe
    from pipelines.review.session import review_here
    from pipelines.workflow import make_plan

    settings = Settings()
    made = make_plan(load_recipe(recipe, set_), settings)
    run_command = _command("run", recipe, set_)
    try:
        review_here(
            made,
            settings,
            Progress(console),
            num_pairs=pairs,
            host=host,
            port=port,
            say=_say,
            run_command=run_command,
        )
    except KeyboardInterrupt:  # before the page was there
        raise StoppedError(f"cca {shlex.join(sys.argv[1:])}") from None


@app.command()
def status(
    recipe: RecipeArgument = "digits",
    set_: SetOption = [],  # noqa: B006
) -> None:
    """The state of a recipe's newest run: stages, verdict, registered versions."""
    from pipelines.recipe import load_recipe
    from pipelines.tracking import CHAMPION, STATE, Registry, Tracker
    from pipelines.workflow import make_plan

    settings = Settings()
    loaded = load_recipe(recipe, set_)
    tracker = Tracker(settings)
    made = make_plan(loaded, settings)
    parent = tracker.find_parent(made.run_key)
    if parent is None:
        console.print(
            f"{loaded.name} has not run yet with this configuration and input. Start it with: cca run {recipe}"
        )
        return
    console.print(
        f"run {parent.info.run_id}: {parent.info.status}, {parent.data.tags.get(STATE, '')}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("stage", "state", "digest", "directory")
    for stage in made.stages:
        uri = made.store.directory(stage.spec.folder, stage.digest).uri
        table.add_row(stage.spec.name, "finished" if stage.done else stage.why, stage.digest[:12], uri)
    console.print(table)
    registry = Registry(tracker, settings.registered_model(loaded.name))
    champion = registry.alias(CHAMPION)
    for version in registry.versions():
        mark = " <- champion" if champion and champion.version == version.version else ""
        calls = version.tags.get("cca.calls_per_image", "?")
        console.print(
            f"{registry.name} version {version.version}: {version.tags.get('cca.label', '')}, {calls} "
            f"calls/image{mark}",
            highlight=False,
        )


@app.command()
def runs() -> None:
    """The workflow runs of the experiment, newest first."""
    from pipelines.tracking import STATE, Tracker

    tracker = Tracker(Settings())
    table = Table("run", "recipe", "status", "outcome", "started")
    for run_ in tracker.parents():
        start = time.strftime("%Y-%m-%d %H:%M", time.localtime(run_.info.start_time / 1000))
        table.add_row(run_.info.run_id, run_.info.run_name, run_.info.status, run_.data.tags.get(STATE, ""), start)
    console.print(table)


@app.command()
def serve(
    model: Annotated[
        str, typer.Option(help="models:/NAME@champion, models:/NAME/VERSION or a bundle.")
    ] = "models:/cca-digits@champion",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the HTTP API.")] = 8000,
    min_replicas: Annotated[
        int,
        typer.Option(help="Generation replicas at least; with 0 an idle service holds none, and a request starts one."),
    ] = 1,
    max_replicas: Annotated[int, typer.Option(help="Generation replicas at most; autoscaled on load.")] = 2,
    keys: Annotated[str, typer.Option(help="Keys file, made by cca key; without one, no key is asked.")] = "",
    audit: Annotated[str, typer.Option(help="File that gets a JSON line per request; without one, none.")] = "",
    address: Annotated[
        str,
        typer.Option(help="Dashboard of a running Ray cluster, http://HEAD:8265: serve there, and leave it serving."),
    ] = "",
) -> None:
    """Serve a model over the OpenAI Images API: on this machine until Ctrl-C, or on a Ray cluster."""
    from deploy.local import serve_here
    from deploy.release import ServiceConfig
    from deploy.remote import serve_there

    service = ServiceConfig(
        tracking_uri=Settings().resolved_tracking_uri,
        host=host,
        port=port,
        min_replicas=min_replicas,
        max_replicas=max_replicas,
        keys=keys,
        audit=audit,
    )
    if address:
        serve_there(model, service, _say, address=address)
    else:
        serve_here(model, service, _say)


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Who gets the key: a user, a team, a service.")],
    file: Annotated[str, typer.Option("--keys", help="Keys file of the service.")] = "keys.json",
    requests_per_minute: Annotated[int | None, typer.Option(help="Limit of all keys of NAME.")] = None,
    images_per_day: Annotated[int | None, typer.Option(help="Limit of all keys of NAME.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="NAME's other keys end now.")] = False,
    disable: Annotated[bool, typer.Option("--disable", help="No new key: all keys of NAME end now.")] = False,
) -> None:
    """Make an API key: it is printed once, and its hash goes into the keys file. Running services follow at once."""
    from deploy import keys

    if disable:
        if replace or requests_per_minute is not None or images_per_day is not None:
            raise ConfigError("--disable makes no key: leave the other options out")
        keys.disable(Path(file), name)
        _say(f"{name} is disabled in {file}; a new key enables again: cca key {name} --keys {file}")
        return
    limits = {"requests_per_minute": requests_per_minute, "images_per_day": images_per_day}
    made = keys.add_key(Path(file), name, replace=replace, **limits)
    _say(f"{made}\n{name} uses it as OPENAI_API_KEY; it is shown this once. Next: cca serve --keys {file}")


@app.command()
def ui(port: Annotated[int, typer.Option(help="Port of the MLflow UI.")] = 5000) -> None:
    """Open the MLflow UI on the run's store until Ctrl-C."""
    from pipelines.tracking import Tracker

    settings = Settings()
    uri = settings.resolved_tracking_uri
    tracker = Tracker(settings)
    if uri.startswith("http"):
        _say(f"the runs are at {tracker.page(uri)}")
        return
    _say(f"MLflow UI (Ctrl-C ends it): {tracker.page(f'http://127.0.0.1:{port}')}")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--port", str(port)]
    command += ["--workers", "1", "--default-artifact-root", settings.artifact_root]
    sys.stdout.flush()
    os.execv(sys.executable, command)  # noqa: S606  (fixed program, no shell; a signal then reaches the server)


def _command(verb: str, recipe: str, overrides: list[str]) -> str:
    """Another command on the same run, as it is typed."""
    return shlex.join(["cca", verb, recipe, *(word for value in overrides for word in ("--set", value))])


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """Entry point: errors that people can mend are one sentence; the rest ask for --debug."""
    # Ray, MLflow and torch leave 700,000 objects that live to the end: to walk them at every turn and again at the exit
    # takes as long as a short command.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    debug = "--debug" in sys.argv
    if debug:  # accepted anywhere
        sys.argv = [sys.argv[0], "--debug", *(a for a in sys.argv[1:] if a != "--debug")]
    try:
        app(standalone_mode=True)
    except ConfigError as error:
        if debug:
            raise
        Console(stderr=True).print(f"error: {error}", highlight=False, soft_wrap=True, markup=False)
        sys.exit(2)
    except StoppedError as stopped:
        say = Console(stderr=True).print
        say(f"stopped; what finished is kept. Go on with: {stopped}", highlight=False, soft_wrap=True, markup=False)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        Console(stderr=True).print(
            f"error: {type(error).__name__}: {first} (what finished is kept, and the same command goes on from there; "
            "--debug shows the traceback)",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
        sys.exit(1)
