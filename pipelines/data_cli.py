"""Reads arguments, writes to the storage and the terminal: the ``cca data`` commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cca_core.config import ConfigError
from cca_core.store import Store
from pipelines.lock import check_idle
from pipelines.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Work on the data sets of a storage.")
console = Console()


@app.callback()
def data() -> None:
    """A group, however few its commands."""


@app.command()
def forget(
    ids: Annotated[Path, typer.Option(help="Text file with one image id per line, as tokens/ has them.")],
) -> None:
    """Take images out of every data set derived from them, for good, and name the models that saw them.

    Token data sets are written again without the images under a new digest; what cannot be cut out (references,
    features) is deleted and made again by the next run. The images themselves are the owner's: delete them too, or
    later runs leave them out by their ids.
    """
    from cca_core.stages.forget import forget as forget_images
    from pipelines.tracking import Tracker

    try:
        wanted = [line.strip() for line in ids.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the ids in {ids} ({error}): give a text file with one id per line") from None
    if not wanted:
        raise ConfigError(f"{ids} holds no id: write one id per line")
    settings = Settings()
    store = Store(settings.storage)
    store.check_writable()
    check_idle(store)
    done = forget_images(store, wanted, _say)
    _say(f"{done.images} of {len(set(wanted))} ids were in the data sets of {store.uri}")
    for old, new in done.rewritten.items():
        _say(f"rewritten  {new or '(nothing left)'}  instead of {old}")
    for uri in done.deleted:
        _say(f"deleted    {uri}")
    for note in done.notes:
        _say(f"note       {note}")
    for uri in done.pictures:
        _say(f"picture    {uri} shows some real images: look whether one of them is among them")
    digests = {digest for found in done.models.values() for digest in found}
    versions = Tracker(settings).versions_of(digests) if digests else []
    for name, version, aliases in versions:
        _say(f"trained on them  models:/{name}/{version}{f' ({aliases})' if aliases else ''}")
    if versions:
        _say("Run the recipe again for a model that never saw them, then: cca promote VERSION")
    elif done.images:
        _say("No registered model saw them. Go on with: cca run RECIPE")


def gc(
    days: Annotated[float, typer.Option(min=0, help="Keep what runs of the last days need, or wrote.")] = 30.0,
    delete: Annotated[bool, typer.Option("--delete", help="Delete; without it, only say what would go.")] = False,
) -> None:
    """Delete stage directories that nothing needs: no registered version, no run that goes on, none of the last days.

    Votes of people stay. A stage that is asked for again after it was deleted is computed again.
    """
    from pipelines.collect import find_garbage
    from pipelines.plan_view import units
    from pipelines.tracking import Tracker

    settings = Settings()
    store = Store(settings.storage)
    store.check_writable()
    check_idle(store)
    found = find_garbage(store, Tracker(settings), days)
    for piece in found:
        if delete:
            piece.directory.remove()
        _say(f"{'deleted' if delete else 'would delete'}  {units(piece.size_bytes):>9}  {piece.directory.uri}")
    total = units(sum(piece.size_bytes for piece in found))
    _say(f"{len(found)} directories, {total}, are needed by nothing since {days:g} days ago")
    if found and not delete:
        _say("Nothing was deleted. Delete them with: cca gc --delete" + (f" --days {days:g}" if days != 30 else ""))


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
