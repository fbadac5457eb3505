"""Reads nothing; writes stage directories below --storage and a table: does the gate refuse candidates with a planted
defect, for the right reason, and let the healthy one pass?

    python benchmarks/planted_defects.py --storage .cca/planted > benchmarks/results/planted_defects_2cpu.md

The default recipe (the digits) without Ray. Beside its aligned model stand four candidates that go through the same
evaluation, safety checks and gate: the base fitted to one image per class (collapsed); the base fitted to a few
training images by heart (memorising); the aligned model with one class's condition replaced by another's (broken on one
class); and the aligned model under a content filter that blocks the images of one class. Exit code 1 where a candidate
is not judged as it should be.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cca_core.bundle import INFO_NAME, MODEL_NAME, TOKENIZER_NAME, read_info
from cca_core.config import Recipe
from cca_core.dataset import TokenDataset
from cca_core.metrics.votes import Tally
from cca_core.models import load_model, load_tokenizer
from cca_core.models.base import ARImageModel, ClassIds
from cca_core.stages import Context, LocalExecutor, plan, run_stage
from cca_core.stages.evaluate import load_results
from cca_core.stages.graph import active
from cca_core.stages.inputs import input_digests
from cca_core.stages.safety import load_safety
from cca_core.store import Store
from cca_core.train.jobs import write_bundle
from cca_core.workers.images import load_images
from pipelines.stages.decide import PROMOTE, decide
from pipelines.stages.rules import SAFETY, safety_rules

#: Images of each class that the memorising model knows by heart.
BY_HEART = 12
#: The class whose condition is broken, the one that it gets, and the one that the filter blocks.
BROKEN, TAKEN, BLOCKED = 3, 8, 7


@dataclass(frozen=True)
class Planted:
    name: str
    #: A rule that has to be among those that fail; empty: it must pass.
    must_fail: str
    recipe: Recipe


class BlocksOneClass(nn.Module):
    """Scores 1 where the nearest of the classes' mean images (values in [0, 1]) is that of one class, else 0."""

    def __init__(self, means_KD: Tensor, blocked: int) -> None:
        super().__init__()
        self.register_buffer("means", means_KD)
        self.blocked = blocked

    def forward(self, images: Tensor) -> Tensor:
        return (torch.cdist(images.flatten(1), self.means).argmin(dim=1) == self.blocked).float()


def context_of(recipe: Recipe, storage: str) -> Context:
    store = Store(storage)
    executor = LocalExecutor(lambda record: None, lambda done, total: None)
    return Context(recipe, store, plan(recipe, input_digests(recipe, store)), executor)


def by_heart(model: ARImageModel, tokens_NL: Tensor, labels_N: Tensor, steps: int) -> ARImageModel:
    """The model fitted to these images until it draws nothing else."""
    model.set_dropout(0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        loss = -model(tokens_NL, ClassIds(labels_N)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"  fitted to {len(labels_N)} images: {loss.item():.3f} nats per token", file=sys.stderr)
    return model


def some_of_each(data: TokenDataset, count: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels of the first training images of every class."""
    images = data.train_images
    chosen = np.concatenate([images[data.labels_N[images] == label][:count] for label in range(data.num_classes)])
    tokens = data.tokens(chosen, np.zeros_like(chosen))
    return torch.from_numpy(tokens), torch.from_numpy(data.labels_N[chosen])


def plant(context: Context, model: ARImageModel) -> None:
    """Make the model the candidate of this recipe."""
    base, directory = context.directory("base"), context.directory("align")
    if directory.manifest() is None:
        write_bundle(directory, read_info(base.uri), model.state_dict(), load_tokenizer(base.uri))
        context.commit("align", context.entries("align", [INFO_NAME, MODEL_NAME, TOKENIZER_NAME]))


def blocking_filter(context: Context, path: Path) -> str:
    """Write the filter, and return its sha256."""
    loaded = load_images(context.recipe, context.source())
    images = torch.from_numpy(loaded.pixels).float().flatten(1) / 255
    means = torch.stack([images[torch.from_numpy(loaded.labels) == label].mean(0) for label in range(10)])
    out = io.BytesIO()
    torch.jit.save(torch.jit.script(BlocksOneClass(means, BLOCKED)), out)
    path.write_bytes(out.getvalue())
    return hashlib.sha256(out.getvalue()).hexdigest()


def judged(context: Context) -> dict[str, Any]:
    """The gate's decision on the candidate of a recipe, whatever of its stages had to run first."""
    for spec in active(context.recipe):
        print(f"  {spec.name}", file=sys.stderr)
        run_stage(spec.name, context)
    results = [load_results(context.directory(name))["rows"] for name in ("baseline", "evaluate")]
    rules = safety_rules(context.recipe.safety, load_safety(context.directory("safety")))
    return decide(context.recipe.decide, *results, safety=rules, champion=None, votes=Tally(), pilot=False)


def main() -> int:
    parser = argparse.ArgumentParser(description="Candidates with planted defects before the gate.")
    parser.add_argument("--storage", default=".cca/planted")
    storage = parser.parse_args().storage
    recipe = Recipe()
    healthy = context_of(recipe, storage)
    decisions = {"healthy": judged(healthy)}
    base = load_model(healthy.directory("base").uri)
    data = TokenDataset(healthy.directory("tokens"))
    broken = load_model(healthy.directory("align").uri)
    table = broken.cls_embedding.embedding_table.weight
    table.data[BROKEN] = table.data[TAKEN]
    path = Path(storage) / "filter.pt"
    safety = replace(recipe.safety, filter=str(path), filter_sha256=blocking_filter(healthy, path))
    safety = replace(safety, filter_input_range="unit")
    #: A planted candidate has a key of its own in the storage: settings of an alignment that nobody ran.
    cases = [
        Planted("healthy", "", recipe),
        Planted("collapsed: one image per class", "safety_variety", other(recipe, 1)),
        Planted(f"memorising: {BY_HEART} training images per class", "safety_memorisation", other(recipe, 2)),
        Planted(f"broken on one class: {BROKEN} drawn as {TAKEN}", "safety_disparity", other(recipe, 3)),
        Planted(f"a filter that blocks class {BLOCKED}", "safety_filter", replace(recipe, safety=safety)),
    ]
    models = {
        cases[1].name: by_heart(copy.deepcopy(base), *some_of_each(data, 1), steps=300),
        cases[2].name: by_heart(copy.deepcopy(base), *some_of_each(data, BY_HEART), steps=600),
        cases[3].name: broken,
    }
    lines, right = [], True
    for case in cases:
        print(case.name, file=sys.stderr)
        context = context_of(case.recipe, storage)
        if case.name in models:
            plant(context, models[case.name])
        decision = decisions.get(case.name) or judged(context)
        failed = [rule for rule in decision["rules"] if not rule["passed"]]
        keys = [rule["key"] for rule in failed]
        as_planned = decision["verdict"] == PROMOTE if not case.must_fail else case.must_fail in keys
        right &= as_planned
        values = {rule["key"]: rule["value"] for rule in decision["rules"] if rule["key"].startswith(SAFETY)}
        lines.append((case, decision["verdict"], failed, values, as_planned))
    report(lines)
    return 0 if right else 1


def other(recipe: Recipe, number: int) -> Recipe:
    return replace(recipe, align=replace(recipe.align, beta=recipe.align.beta + number))


def report(lines: list[tuple[Planted, str, list[dict[str, Any]], dict[str, float], bool]]) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    names = list(lines[-1][3])
    print("# Planted defects before the gate\n")
    print(f"`python benchmarks/planted_defects.py`, commit {commit.strip()}, {os.cpu_count()} CPU cores, torch")
    print(f"{torch.__version__}. The digits, training seed 0, 2,000 samples, sampling seeds 0, 1, 2.\n")
    titles = " | ".join(name.removeprefix(SAFETY) for name in names)
    print(f"| candidate | verdict | rules that fail | {titles} | as planned |")
    print(f"| --- | --- | --- | {' | '.join('---:' for _ in names)} | --- |")
    for case, verdict, failed, values, as_planned in lines:
        reasons = "<br>".join(f"{rule['name']}: {rule['value']:.3f}, limit {rule['limit']:.3f}" for rule in failed)
        cells = [f"{values[name]:.3f}" if name in values else "" for name in names]
        print(f"| {case.name} | {verdict} | {reasons} | {' | '.join(cells)} | {'yes' if as_planned else 'NO'} |")


if __name__ == "__main__":
    sys.exit(main())
