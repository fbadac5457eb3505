"""Reads bundles, the content filter and the decision; writes model versions and the champion alias into the MLflow
registry."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from cca_core.bundle import FILTER_NAME, BundleInfo, bundle_files, read_bundle
from cca_core.safety_config import FilterSpec
from cca_core.stages.evaluate import best_cfg
from cca_core.store import StageDirectory
from pipelines.stages.decide import PROMOTE
from pipelines.tracking import CHAMPION, Registry

#: Version tag: the real features its metrics were measured against; others do not compare.
FEATURES = "cca.features"


def register(
    registry: Registry,
    *,
    run_id: str,
    base: StageDirectory,
    aligned: StageDirectory,
    safety: StageDirectory,
    filter_spec: FilterSpec | None,
    baseline_rows: list[dict[str, Any]],
    candidate_rows: list[dict[str, Any]],
    decision: dict[str, Any],
    features: str,
) -> dict[str, str]:
    """Make the base with its best CFG a version, then the aligned model; move the alias if the gate says so.

    A version is found again by its digest tag, so running this twice makes nothing twice; the same model with another
    content filter, or none, is another version. Returns version numbers by role, and which of them is the champion now.

    Args:
        safety: holds the file of the content filter, where ``filter_spec`` says that there is one.
    """
    guided = best_cfg(baseline_rows)

    def version(source: StageDirectory, row: dict[str, Any], digest: str) -> str:
        return _version(registry, run_id, source, row, digest, features, safety, filter_spec)

    versions = {"base": version(base, guided, f"{base.digest}:cfg{guided['sampling']['cfg_scale']:g}")}
    if registry.alias(CHAMPION) is None:
        registry.crown(versions["base"])  # the first rollback target, and the verdict "keep CFG"
    versions["aligned"] = version(aligned, candidate_rows[0], aligned.digest)
    if decision["verdict"] == PROMOTE:
        registry.crown(versions["aligned"])
    champion = registry.alias(CHAMPION)
    return {**versions, CHAMPION: champion.version if champion else ""}


def _version(
    registry: Registry,
    run_id: str,
    source: StageDirectory,
    row: dict[str, Any],
    digest: str,
    features: str,
    safety: StageDirectory,
    filter_spec: FilterSpec | None,
) -> str:
    digest += f":filter {filter_spec}" if filter_spec else ""
    found = registry.by_digest(digest)
    if found is not None:
        return found.version
    bundle = read_bundle(source.uri)
    metrics = {name: value for name, value in row["mean"].items() if isinstance(value, float)}
    info: BundleInfo = replace(
        bundle.info,
        sampling={name: row["sampling"][name] for name in bundle.info.sampling},
        metrics=metrics,
        filter=filter_spec,
    )
    filter_data = safety.read_bytes(FILTER_NAME) if filter_spec else None
    with tempfile.TemporaryDirectory() as folder:
        files = bundle_files(info, bundle.model_tensors, bundle.tokenizer_tensors, filter_data)
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        tags = {
            "cca.digest": digest,
            FEATURES: features,
            "cca.label": row["label"],
            "cca.calls_per_image": str(row["cost"]["calls_per_image"]),
            "cca.cfg_scale": f"{row['sampling']['cfg_scale']:g}",
            "cca.digests": json.dumps(info.digests),
            **({"cca.filter": str(filter_spec)} if filter_spec else {}),
            **{f"cca.metric.{name}": f"{value:.6g}" for name, value in metrics.items()},
        }
        return registry.add(run_id, folder, row["label"].split(",")[0], info.sampling, tags)
