"""Reads a recipe (JSON) and images, writes stage directories: the whole method on one machine without Ray.

The same stages, digests and files as ``cca run``: what one made, the other reuses.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from cca_core.config import ConfigError, Recipe
from cca_core.parse import from_dict, merge, parse_override
from cca_core.stages import Context, LocalExecutor, plan, run_stage
from cca_core.stages.evaluate import load_results
from cca_core.stages.graph import active
from cca_core.stages.inputs import check_checkpoints, input_digests
from cca_core.stages.table import markdown_table, table_rows
from cca_core.store import Store

#: Command -> (the stage it ends with, help). Stages before it run first where their result is missing.
COMMANDS = {
    "train-tokenizer": ("tokenizer", "train the image tokenizer, or import the one the recipe names"),
    "encode": ("tokens", "turn the images into tokens"),
    "fit-base": ("base", "train the base model, or import the one the recipe names"),
    "measure": ("baseline", "measure the base: guidance-free, over CFG scales and temperatures"),
    "score": ("reference", "cache the log-probs of the frozen base"),
    "fit": ("align", "align the base with CCA (or the recipe's objective)"),
    "sample": ("evaluate", "draw samples of base and aligned model and measure them"),
    "report": ("safety", "everything, then the table of results"),
}


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m cca_core", description=__doc__.split("\n\n")[1])
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (stage, help_) in COMMANDS.items():
        command = commands.add_parser(name, help=help_, description=f"{help_}. Runs the stages up to '{stage}'.")
        command.add_argument("--recipe", help="recipe as JSON; without it, the embedded digits")
        command.add_argument(
            "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override, repeatable"
        )
        command.add_argument(
            "--storage",
            default=os.environ.get("CCA_STORAGE", ".cca/storage"),
            help="folder or s3:// prefix of the results (CCA_STORAGE; default %(default)s)",
        )
    return main


def load_recipe(path: str | None, overrides: list[str]) -> Recipe:
    try:
        data = json.loads(Path(path).read_text()) if path else {}
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {path}: give a JSON file") from None
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object of sections")
    for override in overrides:
        data = merge(data, parse_override(override))
    recipe = from_dict(Recipe, data)
    if recipe.profile:
        raise ConfigError(f"profile={recipe.profile} belongs to `cca run`: without it, take a share by source.fraction")
    return recipe


class Progress:
    """One line that moves on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self.last = 0.0

    def show(self, text: str, *, final: bool = False) -> None:
        now = time.monotonic()
        if not final and now - self.last < (0.2 if sys.stderr.isatty() else 5):
            return
        self.last = now
        end = "\n" if final or not sys.stderr.isatty() else ""
        start = "\r\x1b[K" if sys.stderr.isatty() else ""
        print(f"{start}{text}", end=end, file=sys.stderr, flush=True)


def run(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.recipe, arguments.set)
    store = Store(arguments.storage)
    store.check_writable()
    digests = plan(recipe, input_digests(recipe, store))
    check_checkpoints(recipe, store.directory("base", digests["base"]))
    progress = Progress()
    stage_name = ""

    def on_log(record: dict[str, float]) -> None:
        shown = ", ".join(f"{key} {value:.4g}" for key, value in record.items() if key in SHOWN)
        progress.show(f"  {stage_name}: {shown}")

    executor = LocalExecutor(
        on_log, lambda done, total: progress.show(f"  {stage_name}: {done}/{total}"), recipe.execution.device
    )
    context = Context(recipe, store, digests, executor)
    stages = active(recipe)
    last = max(i for i, spec in enumerate(stages) if spec.folder == COMMANDS[arguments.command][0])
    for spec in stages[: last + 1]:
        stage_name = spec.name
        reused = context.directory(spec.name).manifest() is not None
        start = time.perf_counter()
        manifest = run_stage(spec.name, context)
        seconds = time.perf_counter() - start
        what = "reused" if reused else f"{seconds:.1f} s"
        progress.show(f"{spec.name:<10} {what:>8}  {context.directory(spec.name).uri}", final=True)
        if spec.name == "tokens" and (bad := manifest.facts["quarantined"]):
            where = context.directory("tokens").sibling("quarantine").uri
            progress.show(f"  {bad} images cannot be read and are left out: see {where}", final=True)
    if arguments.command == "measure":
        print(markdown_table(load_results(context.directory("baseline"))["rows"]))
    elif arguments.command in ("sample", "report"):
        print(markdown_table(table_rows(context)))


#: What the progress line shows of a training record.
SHOWN = (
    "step",
    "loss",
    "accuracy",
    "margin",
    "images_per_s",
    "seconds_left",
    "bad_images",
    "squared_error",
    "held_out_accuracy",
    "trials_done",
    "trials_left",
    "best_distance",
)


def main() -> int:
    try:
        run(parser().parse_args())
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
