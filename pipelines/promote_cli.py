"""Reads the registry, writes its aliases and a running service: ``cca promote``, ``cca rollback``, ``cca follow``."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.console import Console

from cca_core.config import ConfigError
from pipelines.settings import Settings

app = typer.Typer()
console = Console()
RecipeArgument = Annotated[str, typer.Argument(help="The recipe whose model it is.")]
_PERCENT = re.compile(r"([0-9]{1,2}(?:\.[0-9]+)?)%")
#: A canary that draws more than the champion is none.
MAX_PERCENT = 50.0
#: The registry is asked this often for its champion, in seconds.
FOLLOW_EVERY_S = 10.0


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="The model version to make champion.")],
    recipe: RecipeArgument = "digits",
    canary: Annotated[
        str,
        typer.Option(metavar="10%", help="First let the version answer that share of the requests, and judge it."),
    ] = "",
    canary_requests: Annotated[int, typer.Option(min=1, help="Requests that the canary answers to pass.")] = 100,
) -> None:
    """Make a registered version the champion, and roll it out in place where a service runs (CCA_SERVE_ADDRESS).

    With --canary it serves a share of the requests first. Where it fails, blocks or takes longer than the champion, the
    service sends it nothing more, the champion draws what it did not, and the champion stays. Ctrl-C ends the canary.
    Example: cca promote 3 --canary 10%
    """
    from pipelines.stages.release import release

    settings = Settings()
    share = _share(canary, settings)
    registry = _registry(settings, recipe)
    known = [found.version for found in registry.versions()]
    if version not in known:
        raise ConfigError(f"{registry.name} has no version {version}: it has {', '.join(known) or 'none'}")
    model = f"models:/{registry.name}/{version}"
    if share:
        _try(settings.serve_address, model, share, canary_requests)
    # First the rollout: a version that does not come up never becomes the champion.
    said = release(settings.serve_address, model)
    registry.crown(version)
    _say(f"{registry.name} version {version} is the champion; {said}")


@app.command()
def rollback(recipe: RecipeArgument = "digits") -> None:
    """End a running canary; where there is none, make the champion before this one champion again, in place.

    A second rollback goes forward again.
    """
    from pipelines.stages.release import release
    from pipelines.tracking import CHAMPION, PREVIOUS

    settings = Settings()
    registry = _registry(settings, recipe)
    if settings.serve_address:
        from deploy.canary import end

        if end(settings.serve_address):
            _say("the canary has ended; the champion draws everything")
            return
    champion, previous = registry.alias(CHAMPION), registry.alias(PREVIOUS)
    if champion is None or previous is None or champion.version == previous.version:
        raise ConfigError(f"{registry.name} has no champion before this one: choose one with `cca promote VERSION`")
    said = release(settings.serve_address, f"models:/{registry.name}/{previous.version}")
    registry.crown(previous.version)
    _say(f"{registry.name} version {previous.version} is the champion again, instead of {champion.version}; {said}")


@app.command()
def follow(
    recipe: RecipeArgument = "digits",
    every_s: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = FOLLOW_EVERY_S,
) -> None:
    """Roll out whatever version becomes the champion in the registry, until Ctrl-C: who moves the alias in the MLflow
    UI releases.

    A version that does not come up is not tried again, and the one before is served on. Needs CCA_SERVE_ADDRESS.
    """
    from pipelines.tracking import CHAMPION, ERRORS, PREVIOUS

    settings = Settings()
    if not settings.serve_address:
        raise ConfigError("there is no service to change: put the address of its Ray dashboard in CCA_SERVE_ADDRESS")
    registry = _registry(settings, recipe)
    _say(f"following the champion of {registry.name}; Ctrl-C ends it")
    seen = ""
    try:
        while True:
            try:
                champion = registry.alias(CHAMPION)
                if champion is not None and champion.version != seen:
                    if before := _replaced(settings.serve_address, f"models:/{registry.name}/", champion.version):
                        registry.set_alias(PREVIOUS, before)
                    seen = champion.version
            except (ConfigError, *ERRORS) as error:
                _say(f"no look at the registry and the service: {str(error).splitlines()[0]}")
            time.sleep(every_s)
    except KeyboardInterrupt:
        return


def _replaced(address: str, name: str, version: str) -> str:
    """Roll a version of ``name`` (models:/NAME/) out where another is served; the version it has replaced, or nothing.

    ConfigError where the service does not answer.
    """
    from deploy.release import deployment, present
    from pipelines.stages.release import release

    before = str(deployment(present(address), "Generator")["user_config"]["model"])
    if before == name + version:
        return ""
    try:
        _say(release(address, name + version))
    except ConfigError as error:
        _say(f"the registry's champion is not served: {error}")
        return ""
    return before.removeprefix(name) if before.startswith(name) else ""


def _try(address: str, model: str, share: float, requests: int) -> None:
    """Let the model answer its share until it has passed; ConfigError, with the champion as before, where it does
    not."""
    from deploy.canary import begin, end, watch

    _say(f"{model}: starting as a canary for {share:.3g} of the requests")
    begin(address, model, share)
    _say(f"it answers, until {requests} requests have decided; Ctrl-C takes it away")
    reason = "it was stopped"
    try:
        with suppress(KeyboardInterrupt), console.status("") as line:
            reason = watch(address, requests, lambda state: line.update(_state(state, requests)))
    finally:
        if reason:
            end(address)
    if reason:
        raise ConfigError(f"{model} was not promoted, its canary was rolled back: {reason}. The champion is as before.")
    _say(f"{model} has answered {requests} requests and is no worse than the champion")


def _state(state: dict[str, Any], requests: int) -> str:
    def side(name: str) -> str:
        seconds = state[name]["median_seconds"]
        median = "-" if seconds is None else f"{seconds:.2f} s"
        return f"{state[name]['failed']} failed, {state[name]['blocked']} blocked, median {median}"

    return f"canary: {state['canary']['requests']} of {requests}, {side('canary')} (champion: {side('champion')})"


def _share(canary: str, settings: Settings) -> float:
    if not canary:
        return 0.0
    found = _PERCENT.fullmatch(canary)
    if found is None or not 0 < float(found[1]) <= MAX_PERCENT:
        raise ConfigError(f"--canary {canary} is no share: write it as 10%, up to {MAX_PERCENT:.0f}%")
    if not settings.serve_address:
        raise ConfigError("a canary needs a running service: put the address of its Ray dashboard in CCA_SERVE_ADDRESS")
    return float(found[1]) / 100


def _registry(settings: Settings, recipe: str) -> Any:
    from pipelines.recipe import load_recipe
    from pipelines.tracking import Registry, Tracker

    return Registry(Tracker(settings), settings.registered_model(load_recipe(recipe, []).name))


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
