"""Reads finished stage directories, writes to MLflow: what a reviewer sees of each stage without asking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cca_core.config import Recipe
from cca_core.manifest import Manifest
from cca_core.stages.early_stop import EVALUATIONS_NAME, small_metrics
from cca_core.stages.evaluate import described_network, load_results
from cca_core.stages.grid import Settings
from cca_core.stages.table import table_columns
from cca_core.stages.tokenizer import PICTURE
from cca_core.store import StageDirectory
from cca_core.train.jobs import CURVE_NAME
from cca_core.workers.sample import grid_file
from pipelines.stages.show_safety import safety_note, show_safety
from pipelines.stages.show_sweep import show_sweep, sweep_note
from pipelines.stages.show_tokens import show_tokens
from pipelines.tracking import Tracker


def show(
    tracker: Tracker, run_id: str, directory: StageDirectory, manifest: Manifest, recipe: Recipe, logged_steps: set[int]
) -> None:
    """Log a stage's facts, curve, tables and pictures to its run.

    Args:
        logged_steps: steps of the curve that went to this run while it trained; the others are added.
    """
    numbers = {name: value for name, value in manifest.facts.items() if isinstance(value, (int, float))}
    # What a curve ends with is on the curve.
    tracker.metrics(run_id, {name: value for name, value in numbers.items() if not name.startswith("final_")})
    tracker.artifact(run_id, "manifest.json", manifest.to_json())
    tracker.note(run_id, note(manifest, directory, recipe))
    if CURVE_NAME in manifest.files:
        for record in directory.read_json(CURVE_NAME):
            step = int(record.get("step", record["epoch"]))
            if step not in logged_steps:
                tracker.metrics(run_id, record, step)
    if EVALUATIONS_NAME in manifest.files:
        for record in directory.read_json(EVALUATIONS_NAME):
            if record["step"] not in logged_steps:
                tracker.metrics(run_id, small_metrics(record), record["step"])
    if manifest.stage in _SHOW:
        _SHOW[manifest.stage](tracker, run_id, directory, manifest, recipe)


def note(manifest: Manifest, directory: StageDirectory, recipe: Recipe) -> str:
    """What a stage made and where to look, in a few sentences, for the top of its run."""
    facts, align, swept = manifest.facts, recipe.align, ""
    if "settings" in facts:
        settings = Settings(**facts["settings"])
        align, swept = settings.apply(align), f"Found by the sweep: {settings.label()}. "
    imported = "Imported from the checkpoint that the recipe names. " if facts.get("imported") else ""
    source = recipe.source.uri or "scikit-learn load_digits"
    says = {
        "tokenizer": imported
        or f"Trained on the images. Held-out images above their reconstructions: `{PICTURE}` under Artifacts. ",
        "tokens": f"{facts.get('num_images')} images of {source}, {facts.get('num_views')} view(s) each, as "
        f"{facts.get('num_tokens')} tokens; {facts.get('quarantined')} in quarantine"
        + (" (`quarantine.json` says why)." if facts.get("quarantined") else ".")
        + _reconstructed(facts)
        + "".join(f"\n- {test}: {found}" for test, found in facts.get("data_tests", {}).items())
        + "\n\n",
        "features": f"The network whose features carry every distance, and the features of the real images. It is "
        f"{described_network(recipe)}. "
        + (
            f"Held-out accuracy of the classifier {facts['held_out_accuracy']:.3f}. "
            if "held_out_accuracy" in facts
            else ""
        ),
        "base": imported or "Maximum likelihood on the training images; the loss is in nats per token. ",
        "baseline": "The base model measured: guidance-free, over CFG scales (two model calls per token) and over "
        "temperatures (the control). Table in `evaluation.json`, pictures under `samples/`. ",
        "reference": "Log-probs of every training image under the frozen base, for right, wrong and null condition: "
        f"{facts.get('bytes', 0) / 1e6:.1f} MB for {facts.get('epochs')} epochs. Alignment never holds the base. ",
        "sweep": sweep_note(directory, recipe) if manifest.stage == "sweep" else "",
        "align": f"{swept}{align.objective.upper()}, lambda {align.lambda_}"
        + (f", beta {align.beta:g}" if align.objective != "unlearning" else "")
        + f", {align.epochs} epochs. `log_ratio_pos` (right condition, should stay near 0), `log_ratio_neg` (wrong "
        "condition, should fall), `margin` between them and `accuracy` are over rows with a true negative. "
        + (
            f"`small_distance` and the like are of {align.evaluation_samples} samples, drawn on the way: the weights "
            f"are those of step {facts['best_step']}, the best. "
            if "best_step" in facts
            else ""
        ),
        "evaluate": "The aligned model measured without guidance (one model call per token), and its cost timed beside "
        "the base's in the same process. ",
        "safety": safety_note(manifest),
    }
    return f"{says[manifest.stage]}Stored at `{directory.uri}`."


def _reconstructed(facts: dict[str, Any]) -> str:
    if "reconstruction_psnr_db" not in facts:
        return ""
    return (
        f" {facts['reconstructed_images']} images above their reconstructions: `reconstructions.png`, "
        f"{facts['reconstruction_psnr_db']:.1f} dB PSNR. {facts['codes_used']} of {facts['codebook_size']} codes in "
        "use.\n\nData tests, all passed:"
    )


def _tokenizer(tracker: Tracker, run_id: str, directory: StageDirectory, manifest: Manifest, recipe: Recipe) -> None:
    if PICTURE in manifest.files:
        tracker.artifact(run_id, PICTURE, directory.read_bytes(PICTURE))


def _evaluation(tracker: Tracker, run_id: str, directory: StageDirectory, manifest: Manifest, recipe: Recipe) -> None:
    rows = load_results(directory)["rows"]
    tracker.table(run_id, table_columns(rows), "evaluation.json")
    for index, row in enumerate(rows):
        key = row["label"].replace(", ", "_").replace(" ", "_")
        tracker.metrics(run_id, {f"{key}.{name}": value for name, value in row["mean"].items()})
        for end, side in enumerate(("low", "high")):
            tracker.metrics(run_id, {f"{key}.{name}_{side}": found[end] for name, found in row["interval"].items()})
        tracker.artifact(run_id, f"samples/{key}.png", directory.read_bytes(grid_file(index)))


_SHOW: dict[str, Callable[[Tracker, str, StageDirectory, Manifest, Recipe], None]] = {
    "tokenizer": _tokenizer,
    "tokens": show_tokens,
    "sweep": show_sweep,
    "baseline": _evaluation,
    "evaluate": _evaluation,
    "safety": show_safety,
}
