"""Reads the numbers of a report in memory, writes nothing: its sections on lineage, measurement and reproduction."""

from __future__ import annotations

from typing import Any

import yaml

from pipelines.report.parts import Block, Code, Row, Section, Table, Text
from pipelines.report.texts import Texts

Data = dict[str, Any]


def lineage_section(data: Data, say: Texts) -> Section:
    lineage = data["lineage"]
    found = [
        (say("lineage_recipe"), data["recipe_name"]),
        (say("lineage_source"), lineage["source"]["uri"] or say("embedded_digits")),
        (say("lineage_tokens"), lineage["tokens"]["uri"]),
        *((say("lineage_version", role=role), name) for role, name in lineage["versions"].items()),
        (say("lineage_run"), lineage["run_id"]),
        (say("lineage_package"), f"cca-pipeline {lineage['package_version']}"),
        *((say("lineage_stage", stage=stage), digest) for stage, digest in lineage["digests"].items()),
    ]
    rows = [Row([what, value]) for what, value in found]
    return Section(say("section_lineage"), [Table([say("column_what"), say("column_value")], rows, words=(0, 1))])


def measured_section(data: Data, say: Texts) -> Section:
    found, network = data["measured"], data["measured"]["network"]
    if found["real_statistics"]:
        real = say("real_published", name=found["real_statistics"])
    else:
        real = say("real_codes" if found["codes"] else "real_images", real=found["real"])
    count = found["real_images"]
    seeds = ", ".join(str(seed) for seed in found["seeds"])
    sentences = [
        say("measured_samples", samples=f"{found['samples']:,}", seeds=seeds),
        say("measured_real", count=f"{count:,}", real=real) if count else say("measured_statistics", real=real),
        say(f"measured_{network['kind']}", name=network["name"], sha256=network["sha256"]),
        say("measured_intervals"),
        say("measured_cost", images=found["cost_images"], batch=found["batch_size"]),
    ]
    return Section(say("section_measured"), [Text(sentence) for sentence in sentences])


def reproduce_section(data: Data, say: Texts) -> Section:
    blocks: list[Block] = [
        Text(say("reproduce_text")),
        Code("\n".join(data["lineage"]["commands"])),
        Code(yaml.safe_dump(data["recipe"], sort_keys=False, allow_unicode=True), say("reproduce_recipe")),
    ]
    return Section(say("section_reproduce"), blocks)
