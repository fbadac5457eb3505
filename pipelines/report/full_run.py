"""Reads the numbers of a report in memory, writes nothing: what a pilot expects of the full run, or what came of it."""

from __future__ import annotations

from typing import Any

from pipelines.report.costs import money
from pipelines.report.parts import Block, Fact, Row, Section, Table, Text
from pipelines.report.texts import Texts, duration
from pipelines.stages.decide import GO

Data = dict[str, Any]


def full_run_fact(pilot: Data, say: Texts) -> Fact:
    """What the full run will take, or of which pilot this one is."""
    expected = pilot["expected_seconds"]
    time = say("fact_full_unknown") if expected is None else duration(expected)
    if pilot["kind"] == "pilot":
        return Fact(say("fact_full"), time, _spent(pilot, say))
    took = say("fact_full_unknown") if pilot["seconds"] is None else duration(pilot["seconds"])
    return Fact(say("fact_pilot"), say("fact_pilot_value"), say("fact_pilot_note", time=time, took=took))


def full_run_section(data: Data, pilot: Data, say: Texts) -> Section:
    if pilot["kind"] == "full":
        return Section(
            say("section_pilot"), [Text(say("pilot_passed", run=pilot["run_id"])), Text(full_run_fact(pilot, say).note)]
        )
    shares = {name: f"{data['recipe']['pilot'][name]:.0%}" for name in ("images", "samples")}
    rows = [
        Row([stage["stage"], _time(stage["seconds"]), _time(stage["expected_seconds"]), str(stage["devices"])])
        for stage in pilot["stages"]
    ]
    rows.append(Row([say("all_stages"), "", _time(pilot["expected_seconds"]), ""], "own"))
    columns = [say(f"column_{name}") for name in ("stage", "pilot", "full", "devices")]
    blocks: list[Block] = [Text(say("full_text", **shares)), Table(columns, rows)]
    if pilot["expected_seconds"] is None:
        return Section(say("section_full"), [*blocks, Text(say("full_unknown"))])
    blocks += [Text(_spent(pilot, say)), Text(say("full_advice"))]
    blocks += [Text(say("full_start"))] if data["verdict"] == GO else []
    return Section(say("section_full"), blocks)


def _spent(pilot: Data, say: Texts) -> str:
    if pilot["expected_device_hours"] is None:
        return say("full_unknown")
    hours = money(pilot["expected_device_hours"])
    if pilot["expected_cost"] is None:
        return say("full_hours", hours=hours)
    return say("full_money", hours=hours, cost=money(pilot["expected_cost"]))


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)
