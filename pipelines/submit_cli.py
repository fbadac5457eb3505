"""Reads arguments and a Ray cluster, writes to the terminal: the ``cca`` commands on runs that were submitted to it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cca_core.config import ConfigError
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pipelines.cluster import Cluster

app = typer.Typer()
console = Console()

AddressOption = Annotated[
    str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Dashboard of the Ray cluster: http://HEAD:8265.")
]
SubmissionArgument = Annotated[str, typer.Argument(help="The name that cca submit gave the run.")]


@app.command()
def submit(
    address: AddressOption,
    recipe: Annotated[str, typer.Argument(help="A YAML file or a built-in recipe.")] = "",
    set_: Annotated[
        list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a recipe value; repeatable.")
    ] = [],  # noqa: B006  (typer reads the default, nothing changes it)
    resume: Annotated[
        str, typer.Option(metavar="SUBMISSION", help="Instead of a recipe: go on with the run of that submission.")
    ] = "",
) -> None:
    """Run a recipe on a Ray cluster, and follow it. It goes on without this terminal: Ctrl-C only stops following.

    The code, the recipe and the files that it names by relative paths are sent. CCA_*, MLFLOW_* and AWS_* of this
    environment go along, encrypted with the cluster's token (RAY_AUTH_TOKEN).
    """
    from pipelines import submit as jobs
    from pipelines.cluster import check_size, connect
    from pipelines.recipe import load_recipe

    if bool(recipe) == bool(resume) or (resume and set_):
        raise ConfigError("give a recipe, or --resume SUBMISSION, which has the recipe and its overrides already")
    settings = Settings()
    loaded = load_recipe(recipe, set_) if recipe else None
    jobs.check_settings(settings)
    cluster = connect(address)
    with tempfile.TemporaryDirectory() as folder:
        if resume:
            recipe = _recipe_of(resume, cluster, settings, Path(folder))
            loaded = load_recipe(recipe, [])
        assert loaded is not None
        for note in check_size(loaded.execution, cluster):
            _say(note)
        name = jobs.submit(cluster, loaded, recipe, set_)
    _say(f"{name}: submitted to {cluster.address}. Ctrl-C stops following, not the run")
    _follow(cluster, name, settings)


@app.command()
def logs(
    address: AddressOption,
    submission: Annotated[str, typer.Argument(help="The name that cca submit gave; without it, the newest.")] = "",
) -> None:
    """Follow a submitted run, from the first line of its log."""
    from pipelines.cluster import connect

    cluster = connect(address)
    if not submission:
        newest = next(iter(cluster.submissions()), None)
        if newest is None:
            raise ConfigError(
                f"nothing was submitted to {cluster.address}: cca submit RECIPE --address {cluster.address}"
            )
        submission = str(newest.submission_id)
    found = cluster.submission(submission)
    _say(f"{submission}: {found.status.lower()}")
    _follow(cluster, submission, Settings())


@app.command()
def stop(submission: SubmissionArgument, address: AddressOption) -> None:
    """Stop a submitted run where nothing is half-written; what finished is kept."""
    from pipelines.cluster import connect, follow

    cluster = connect(address)
    found = cluster.submission(submission)
    if found.status.is_terminal():
        _say(f"{submission} has ended already: {found.status.lower()}")
        return
    cluster.client.stop_job(submission)
    ended = follow(cluster, submission, lambda _: None)
    _say(f"{submission}: {ended.status.lower()}; what finished is kept. Go on with: {_resume(submission, cluster)}")


def _follow(cluster: Cluster, submission: str, settings: Settings) -> None:
    """Until the run ends or Ctrl-C; the exit code says which, and whether it ended well."""
    from pipelines.cluster import follow, reason

    try:
        ended = follow(cluster, submission, lambda text: console.out(text, end="", highlight=False))
    except KeyboardInterrupt:
        options = f"{submission} --address {cluster.address}"
        _say(f"\nNo longer followed; the run goes on.\n  cca logs {options}    follow it again")
        _say(f"  cca runs    how far it and others are, in MLflow\n  cca stop {options}    end it")
        raise typer.Exit(130) from None
    if ended.status == "SUCCEEDED":
        _say(f"{submission} has ended. In MLflow: {_page(submission, settings)}")
        return
    _say(f"{submission}: {ended.status.lower()}. {reason(ended)}".rstrip())
    _say(f"What finished is kept. Go on with: {_resume(submission, cluster)}")
    raise typer.Exit(1)


def _page(submission: str, settings: Settings) -> str:
    from pipelines.tracking import Tracker

    tracker = Tracker(settings)
    found = tracker.find_submitted(submission)
    return tracker.run_page(found.info.run_id) if found else tracker.page(settings.tracking_uri)


def _recipe_of(submission: str, cluster: Cluster, settings: Settings, folder: Path) -> str:
    """Path of the recipe that a submission ran, as MLflow has it: the cluster may be another one by now."""
    from pipelines.tracking import Tracker

    running = [job for job in cluster.submissions() if job.submission_id == submission and not job.status.is_terminal()]
    if running:
        raise ConfigError(f"{submission} still runs: cca logs {submission} --address {cluster.address}")
    tracker = Tracker(settings)
    found = tracker.find_submitted(submission)
    if found is None:
        raise ConfigError(
            f"experiment {settings.experiment} at MLFLOW_TRACKING_URI has no run of {submission}: correct the name or "
            "CCA_EXPERIMENT, or submit the recipe again, which goes on too"
        )
    path = folder / f"{found.info.run_name}.yaml"
    path.write_text(tracker.text(found.info.run_id, "recipe.yaml"))
    return str(path)


def _resume(submission: str, cluster: Cluster) -> str:
    return f"cca submit --resume {submission} --address {cluster.address}"


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
