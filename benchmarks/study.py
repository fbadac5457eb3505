"""Reads a study (JSON), writes stage directories below --storage and a report: settings of a recipe against each other,
paired over training seeds, without Ray.

    python benchmarks/study.py benchmarks/studies/lambda_digits.json --storage .cca/study > report.md
    python benchmarks/study.py benchmarks/studies/cifar10.json --set source.uri=DIR --plot plot.png > report.md

A study has a ``recipe`` (sections as in ``python -m cca_core --recipe``), ``arms`` (name -> what they change in it) and
``seeds``. It may have ``variants`` (name -> what they change before the base is trained: its size, its data),
``compare`` (names of arms that stand against the best of all others) and ``measure`` (what the measuring of an arm
changes in ``evaluate``).

Each training seed trains one tokenizer and one feature network on the recipe's own images, and a base per variant. A
base or an arm is then measured as ``python -m cca_core measure`` does it, imported as a checkpoint: with guidance and
temperatures of its own, against the recipe's own images and features, whatever a variant did to the data. What is
finished is reused.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scipy import stats

from cca_core.config import Recipe
from cca_core.models.load import read_spec
from cca_core.parse import from_dict, merge, parse_override
from cca_core.stages import plan
from cca_core.stages.evaluate import load_results
from cca_core.stages.inputs import input_digests
from cca_core.store import Store
from cca_core.train.jobs import CURVE_NAME

Sections = dict[str, Any]
COLUMNS = ("distance", "inception_score", "precision", "recall", "class_consistency")
#: Column -> the name in an arm's training curve.
ENDS = {
    "log-ratio per token": "log_ratio_pos",
    "of null rows": "log_ratio_null",
    "lambda": "lambda_",
    "null share": "null_share",
}
#: A training run measures its base as well; here that is done by itself, so that this may be small.
UNMEASURED = {"num_samples": 100, "seeds": [0], "cfg_scales": [2.0], "temperatures": [], "cost_images": 8}


@dataclass(frozen=True)
class Result:
    """What one training seed gave: the rows of its base or of an arm, and means over the last quarter of its training
    curve."""

    seed: int
    variant: str
    arm: str
    rows: list[dict[str, Any]]
    end: dict[str, float]
    num_tokens: int

    def end_of(self, name: str) -> float:
        """Of the training curve, log-ratios per token; NaN for a weight that did not follow."""
        value = self.end.get(name, math.nan)
        return value / self.num_tokens if name.startswith("log_ratio") else value

    def value(self, name: str, sampler: str = "base") -> float:
        """A mean over sampling seeds; ``base`` is the guidance-free row of whatever was measured."""
        return next(row["mean"][name] for row in self.rows if row["label"] == sampler)


@dataclass(frozen=True)
class Study:
    recipe: Sections
    arms: dict[str, Sections]
    variants: dict[str, Sections]
    seeds: tuple[int, ...]
    compare: tuple[str, ...]
    measure: Sections

    @classmethod
    def read(cls, path: Path) -> Study:
        data = json.loads(path.read_text())
        return cls(
            recipe=data["recipe"],
            arms=data["arms"],
            variants=data.get("variants", {"": {}}),
            seeds=tuple(data["seeds"]),
            compare=tuple(data.get("compare", ())),
            measure=data.get("measure", {}),
        )


class SeedRun:
    """All of a study for one training seed, in a storage of its own."""

    def __init__(self, study: Study, seed: int, storage: Path, threads: int) -> None:
        self.study, self.seed, self.store = study, seed, Store(str(storage / f"seed-{seed}"))
        self.recipe = merge(study.recipe, {"seed": seed})
        self.file = storage / f"seed-{seed}.json"
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads)}

    def run(self) -> list[Result]:
        results = []
        tokenizer = self.cca("train-tokenizer", self.recipe, "tokenizer", "tokenizer")
        own = merge(self.recipe, {"tokenizer": {"checkpoint": tokenizer}})
        for variant, changed in self.study.variants.items():
            training = merge(merge(own, changed), {"evaluate": UNMEASURED})
            base = self.cca("fit-base", training, "base", f"{variant} base")
            results.append(self.measured(own, base, variant, "base"))
            for arm, settings in self.study.arms.items():
                aligned = self.cca("fit", merge(training, settings), "align", f"{variant} {arm}")
                measuring = merge(own, {"evaluate": self.study.measure})
                results.append(self.measured(measuring, aligned, variant, arm))
        return results

    def measured(self, recipe: Sections, bundle: str, variant: str, arm: str) -> Result:
        """The guidance-free row and the others that ``evaluate`` asks for, of a bundle."""
        imported = merge(recipe, {"base": {"checkpoint": bundle}})
        where = self.cca("measure", imported, "baseline", f"{variant} {arm}")
        rows = load_results(self.store.directory("baseline", Path(where).name))["rows"]
        curve = json.loads((Path(bundle) / CURVE_NAME).read_text())
        last = curve[-max(1, len(curve) // 4) :]
        end = {name: statistics.fmean(record[name] for record in last) for name in last[-1]}
        return Result(self.seed, variant, arm, rows, end, read_spec(bundle, "model").num_tokens)

    def cca(self, command: str, recipe: Sections, stage: str, what: str) -> str:
        """Run ``python -m cca_core COMMAND``; where the stage that it ends with lies."""
        self.file.write_text(json.dumps(recipe))
        parsed = from_dict(Recipe, recipe)
        digest = plan(parsed, input_digests(parsed, self.store))[stage]
        directory = self.store.directory(stage, digest)
        if directory.manifest() is None:
            started = time.perf_counter()
            call = [sys.executable, "-m", "cca_core", command, f"--recipe={self.file}", f"--storage={self.store.uri}"]
            done = subprocess.run(call, env=self.environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"seed {self.seed}, {what}: {command} failed\n{done.stderr[-3000:]}")
            seconds = time.perf_counter() - started
            print(f"seed {self.seed}: {what.strip()}: {command} {seconds:.0f} s", file=sys.stderr, flush=True)
        return directory.uri


def table(results: Sequence[Result], study: Study) -> list[str]:
    """Markdown: every sampler of bases and arms, means and standard deviations over training seeds."""
    lines = ["| sampler | " + " | ".join(COLUMNS) + " | calls/image | " + " | ".join(ENDS) + " |"]
    lines.append("| --- |" + " ---: |" * (len(COLUMNS) + 1 + len(ENDS)))
    for variant in study.variants:
        for arm in ("base", *study.arms):
            same = [r for r in results if (r.variant, r.arm) == (variant, arm)]
            for row in same[0].rows:
                label = row["label"].replace("base", f"{variant} {arm}".strip(), 1)
                cells = [mean_sd([r.value(name, row["label"]) for r in same]) for name in COLUMNS]
                trained = row["label"] == "base" and arm != "base"
                ends = [mean_sd(r.end_of(name) for r in same) if trained else "" for name in ENDS.values()]
                lines.append(f"| {label} | {' | '.join([*cells, str(row['cost']['calls_per_image']), *ends])} |")
    return lines


def mean_sd(given: Iterable[float]) -> str:
    values = list(given)
    if any(map(math.isnan, values)):
        return ""
    spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences and the ends of its 95 % interval (Student's t)."""
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return mean, -math.inf, math.inf
    half = stats.t.ppf(0.975, count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return mean, mean - half, mean + half


def paired(results: Sequence[Result], study: Study) -> list[str]:
    """Markdown: each compared arm against every other one, as ratios of distances, guidance-free."""
    if not study.compare:
        return []
    lines = []
    for variant in study.variants:
        of = {
            arm: {r.seed: r for r in results if (r.variant, r.arm) == (variant, arm)} for arm in ("base", *study.arms)
        }
        others = [arm for arm in study.arms if arm not in study.compare]
        logs = {arm: [math.log(of[arm][s].value("distance")) for s in study.seeds] for arm in of}
        best = min(others, key=lambda arm: statistics.fmean(logs[arm]))
        lines += [
            "",
            f"Distances as ratios, geometric means over training seeds, 95 % intervals; best other arm: {best}",
        ]
        lines += ["", "| arm | against | ratio | interval | by seed |", "| --- | --- | ---: | ---: | --- |"]
        for arm in study.compare:
            for other in (best, *(o for o in ("base", *others) if o != best)):
                ratios = [a - b for a, b in zip(logs[arm], logs[other], strict=True)]
                mean, low, high = (math.exp(x) for x in interval(ratios))
                by_seed = ", ".join(f"{math.exp(x):.2f}" for x in ratios)
                lines.append(f"| {variant} {arm} | {other} | {mean:.3f} | {low:.3f} to {high:.3f} | {by_seed} |")
    return lines


def plot(results: Sequence[Result], study: Study, path: Path) -> None:
    """Fidelity against diversity: the base's curves over guidance and temperature, and the arms, guidance-free; means
    over training seeds, bars of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("recall", "precision"), ("recall", "class_consistency"), ("class_consistency", "distance")]
    variant = next(iter(study.variants))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 5.5), layout="constrained")
    bases = [r for r in results if (r.variant, r.arm) == (variant, "base")]
    labels = [row["label"] for row in bases[0].rows]
    for axis, (x, y) in zip(axes, panels, strict=True):
        for kind in ("CFG", "temperature"):
            curve = ["base", *(label for label in labels if kind in label)]
            points = [[statistics.fmean(r.value(name, label) for r in bases) for label in curve] for name in (x, y)]
            axis.plot(*points, marker="o", label=f"base over {kind}")
            for label, *point in zip(curve, *points, strict=True):
                text = label.rpartition(" ")[2]
                axis.annotate(text, point, textcoords="offset points", xytext=(4, 4), fontsize="small")
        for arm in study.arms:
            same = [r for r in results if (r.variant, r.arm) == (variant, arm)]
            values = [[r.value(name) for r in same] for name in (x, y)]
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            means = [statistics.fmean(v) for v in values]
            axis.errorbar(*means, xerr=spread[0], yerr=spread[1], marker="*", markersize=12, ls="", label=arm)
        axis.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
        axis.grid(alpha=0.3)
    axes[-1].set_yscale("log")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("study", type=Path, help="the JSON file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override of the recipe"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="training seeds in the place of the file's")
    parser.add_argument("--storage", type=Path, default=Path(".cca/study"), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="training seeds at once (default: cores)")
    parser.add_argument("--plot", type=Path, help="also draw fidelity against diversity, as PNG")
    arguments = parser.parse_args()
    study = Study.read(arguments.study)
    recipe = study.recipe
    for override in arguments.set:
        recipe = merge(recipe, parse_override(override))
    study = replace(study, recipe=recipe, seeds=tuple(arguments.seeds or study.seeds))
    arguments.storage.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    runs = [SeedRun(study, seed, arguments.storage, threads) for seed in study.seeds]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = [result for found in pool.map(SeedRun.run, runs) for result in found]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    one = results[0].rows[0]["per_seed"]
    print(
        f"`python {' '.join(sys.argv)}`, commit {commit}, {platform.machine()}, {os.cpu_count()} CPU cores.\n"
        f"Mean +- standard deviation over training seeds {list(study.seeds)}; each is the mean of sampling seeds "
        f"{[row['seed'] for row in one]} with {one[0]['n']} samples, against {one[0]['n_real']} real images.\n"
    )
    print("\n".join([*table(results, study), *paired(results, study)]))
    if arguments.plot:
        plot(results, study, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
