"""Reads a plan and its sizes, writes nothing: both as a person reads them in a terminal."""

from __future__ import annotations

from rich.table import Table

from cca_core.config import Recipe
from cca_core.models import family
from cca_core.stages.grid import trials
from cca_core.stages.sizes import Sizes
from pipelines.workflow import Plan

#: What runs after the computing stages, every time.
LAST = (
    ("decide", "the gate's verdict"),
    ("report", "table, plot and pictures on the MLflow run"),
    ("register", "model versions, champion alias"),
    ("release", "rollout to a running service"),
)


def stage_table(plan: Plan) -> Table:
    """What would run, what is reused, and why."""
    table = Table("stage", "would", "why", "digest", "makes")
    for stage in plan.stages:
        table.add_row(stage.spec.name, "reuse" if stage.done else "run", stage.why, stage.digest[:12], stage.spec.makes)
    for name, makes in LAST:
        table.add_row(name, "run", "always: it looks at the registry and the service", "", makes)
    return table


def missing_lines(recipe: Recipe, missing: dict[str, str]) -> list[str]:
    """Which files keep the stages from being planned, and where released ones are published."""
    lines = ["The stages cannot be planned yet. Not there:"]
    lines += [f"  {key:<22} {uri}" for key, uri in missing.items()]
    if any(key.endswith(".checkpoint") for key in missing) and (recipe.expect.model or recipe.expect.tokenizer):
        lines.append(f"Released weights are published at {family(recipe.family).released.published}")
    return lines


def size_lines(recipe: Recipe, sizes: Sizes, gpu_bytes: int) -> list[str]:
    """The sizes of a run, one per line; decimal units."""
    lines = [
        ("images", _images(recipe, sizes)),
        ("tokens per image", f"{sizes.num_tokens}; {_count(sizes.num_views, 'view')} of each image"),
        ("tokenizer", _named(recipe.expect.tokenizer, sizes.tokenizer_parameters)),
        ("model", _named(recipe.expect.model, sizes.model_parameters)),
        ("model calls per image", f"{sizes.calls_guided} guided, {sizes.calls_free} without guidance once aligned"),
        ("tokens/", _data(sizes, sizes.tokens_bytes)),
        ("reference/", _reference(recipe, sizes)),
        *([("sweep", _sweep(recipe))] if recipe.sweep.enabled else []),
        ("decoded images", f"{_data(sizes, sizes.decoded_bytes)}, in TMPDIR where that is above 1 GB"),
    ]
    found, gpu = sizes.spread, units(gpu_bytes)
    rows = f"{_count(sizes.micro_batch_size, 'image')}, {2 * sizes.micro_batch_size} sequences"
    return [
        "Sizes",
        *(f"  {name:<24} {value}" for name, value in lines),
        f"Memory of one align worker on a GPU: {recipe.precision}, micro-batches of {rows}",
        *(f"  {name:<24} {units(part):>8}" for name, part in found.memory.parts.items()),
        f"  {'in all':<24} {units(found.memory.total_bytes):>8} of {gpu}",
        *(f"  {line}" for line in _spread(recipe, sizes)),
    ]


def _images(recipe: Recipe, sizes: Sizes) -> str:
    if not sizes.num_images:
        return "unknown: they are not there, and expect.images is not set"
    if not sizes.counted:
        return f"{sizes.num_images:,} expected"
    expected, limited = recipe.expect.images, bool(recipe.source.limit) or recipe.source.fraction < 1
    unlike = f", where {expected:,} were expected" if expected not in (0, sizes.num_images) and not limited else ""
    return f"{sizes.num_images:,} counted{unlike}"


def _named(released: str, parameters: int) -> str:
    return f"{parameters:,} parameters" + (f" ({released})" if released else "")


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _data(sizes: Sizes, size_bytes: int) -> str:
    return units(size_bytes) if sizes.num_images else "unknown"


def _reference(recipe: Recipe, sizes: Sizes) -> str:
    if recipe.reference.mode == "online":
        return "nothing: the frozen model runs in the loop"
    return f"{_data(sizes, sizes.reference_bytes)} for {_count(recipe.align.epochs, 'epoch')}"


def _sweep(recipe: Recipe) -> str:
    """What trains: early stopping leaves half of the trials after each evaluation but the last."""
    sweep, running = recipe.sweep, len(trials(recipe))
    count, trained = running, 0.0
    for _ in range(sweep.evaluations):
        trained += running / sweep.evaluations
        running = -(-running // 2)
    cost = trained * sweep.fraction * (sweep.epochs or recipe.align.epochs) / recipe.align.epochs
    return f"{count} trials, about {cost:.2g} times the work of align; then align for the best {sweep.keep}"


def _spread(recipe: Recipe, sizes: Sizes) -> list[str]:
    """How the step fits, and what would make it fit."""
    found, smaller = sizes.spread, sizes.spread.micro_batch_size_with_ddp
    if found.kind == "DDP":
        steps = _count(sizes.micro_batches, "micro-batch", "micro-batches")
        workers = _count(recipe.execution.max_workers, "worker")
        return [f"It fits with DDP: {workers} (execution.num_workers), each a whole copy and {steps} per step."]
    if found.kind:
        lines = [f"It needs FSDP2 over {found.gpus} GPUs or more: execution.sharding=fsdp2."]
    else:
        lines = ["It fits no number of such GPUs: the activations of one micro-batch are never spread."]
    if smaller:
        lines.append(f"With execution.micro_batch_size={smaller} it fits with DDP.")
    elif sizes.micro_batch_size > 1 and not found.kind:
        lines.append("Lower execution.micro_batch_size.")
    return lines


def units(size_bytes: float) -> str:
    """Three digits and a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 999.5:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"
