"""Reads the numbers of a report in memory, writes nothing: its page in one language, which HTML and Markdown show."""

from __future__ import annotations

from typing import Any

from cca_core.stages.filtered import FILTERED
from cca_core.stages.safety import PICTURES
from cca_core.stages.table import MEASURED, WITH_SD
from pipelines.report.costs import money
from pipelines.report.full_run import full_run_section
from pipelines.report.parts import Block, Page, Picture, Row, Section, Table, Text
from pipelines.report.provenance import lineage_section, measured_section, reproduce_section
from pipelines.report.texts import Texts
from pipelines.report.verdict import KINDS, distance_title, facts, headline, rule_name, vote_numbers, why
from pipelines.stages.figures import PLOT, QUALITY_COST, SAMPLES
from pipelines.stages.show_safety import shown_values

Data = dict[str, Any]


def page(data: Data, language: str) -> Page:
    """The whole report, the verdict first."""
    say = Texts(language)
    key, kind = KINDS[data["verdict"]]
    verdict = say(f"verdict_{key}")
    sections = [
        *([full_run_section(data, data["pilot"], say)] if data["pilot"] else []),
        _quality_cost(say),
        _evaluation(data, say),
        _gate(data, say),
        _costs(data, say),
        _safety(data, say),
        *([_votes(data, data["votes"], say)] if data["votes"] else []),
        *([_sweep(data, data["sweep"], say)] if data["sweep"] else []),
        Section(say("section_samples"), [Picture(SAMPLES, say("picture_samples"))]),
        _worst_cases(data, say),
        lineage_section(data, say),
        measured_section(data, say),
        reproduce_section(data, say),
    ]
    return Page(
        language=language,
        title=say("title", recipe=data["recipe_name"], verdict=verdict),
        verdict=verdict,
        headline=headline(data, say),
        why=why(data, say),
        kind=kind,
        facts=facts(data, say),
        sections=sections,
    )


def _quality_cost(say: Texts) -> Section:
    return Section(
        say("section_quality_cost"),
        [
            Text(say("quality_cost_text")),
            Picture(QUALITY_COST, say("picture_quality_cost"), wide=True),
            Picture(PLOT, say("picture_fidelity_diversity"), wide=True),
        ],
    )


def _evaluation(data: Data, say: Texts) -> Section:
    rows = data["samplers"]
    names = [name for name in MEASURED if any(name in row["measured"] for row in rows)]
    titles = {name: say(f"metric_{name}") for name in names} | {"distance": distance_title(data, say)}
    columns = [say("column_sampler"), *(titles[name] for name in names)]
    columns += [say("column_calls"), say("column_speed"), say(f"column_cost_{data['costs']['unit']}")]
    told = any(row["cost"].get("joules_per_image") for row in rows)
    columns += [say("column_joules")] if told else []
    lines = []
    for row in rows:
        cells = [row["label"], *(_measured(row["measured"].get(name), name, say) for name in names)]
        cells += [
            str(row["cost"]["calls_per_image"]),
            money(row["cost"]["images_per_s"]),
            money(row["cost_per_1000"]),
        ]
        if told:
            joules = row["cost"].get("joules_per_image")
            cells.append("-" if joules is None else money(joules))
        lines.append(Row(cells, "own" if row["label"] in (data["candidate"], data["best_cfg"]) else ""))
    return Section(say("section_evaluation"), [Text(say("evaluation_text")), Table(columns, lines)])


def _measured(found: Data | None, name: str, say: Texts) -> str:
    if found is None:
        return "-"
    decimals = MEASURED[name][1]
    text = f"{found['mean']:.{decimals}f}" + (f" +- {found['sd']:.{decimals}f}" if name in WITH_SD else "")
    if found["interval"] is None:
        return text
    low, high = (f"{value:z.{decimals}f}" for value in found["interval"])  # z: rounding leaves no -0.000
    return f"{text}\n{say('interval', low=low, high=high)}"


def _gate(data: Data, say: Texts) -> Section:
    names = ("rule", "value", "limit", "passed", "remedy")
    lines = [
        Row(
            [
                rule_name(rule, say),
                f"{rule['value']:.3f}",
                say(rule["bound"], limit=f"{rule['limit']:.3f}"),
                say("yes" if rule["passed"] else "no"),
                "" if rule["passed"] else say(f"remedy_{rule['key']}", **rule["params"]),
            ],
            "" if rule["passed"] else "bad",
        )
        for rule in data["rules"]
    ]
    blocks: list[Block] = [Table([say(f"column_{name}") for name in names], lines, words=(0, 3, 4))]
    blocks += [Text(say(f"left_out_{key}") + ".") for key in data["left_out"]]
    return Section(say("section_gate"), blocks)


def _costs(data: Data, say: Texts) -> Section:
    costs, guided = data["costs"], data["best_cfg"]
    aligned, saved = say("column_aligned"), say("column_saved")
    lines = [
        Row([say(f"row_{way}"), money(cost["guided"]), money(cost["aligned"]), f"{cost['saved_share']:.0%}"])
        for way, cost in costs["per_1000"].items()
    ]
    blocks: list[Block] = [
        Text(say(f"costs_{costs['unit']}", price=money(costs["price_per_device_hour"]))),
        Table([say("column_1000"), guided, aligned, saved], lines),
    ]
    took = costs["alignment"]
    if took is None:
        return Section(say("section_costs"), [*blocks, Text(say("alignment_unknown"))])
    images = took["break_even_images"]
    paid = say("break_even_never") if images is None else say("break_even", images=f"{images:,.0f}")
    spent = [say("alignment_took", hours=money(took["device_hours"]))]
    if costs["price_per_device_hour"]:
        spent.append(say("alignment_money", cost=money(took["cost"])))
    monthly = [
        Row([f"{line['images_per_month']:,}", *(money(line[name]) for name in ("guided", "aligned", "saved"))])
        for line in took["totals"]
    ]
    columns = [say("column_monthly", months=took["months"]), guided, say("column_aligned_total"), saved]
    return Section(say("section_costs"), [*blocks, *map(Text, (*spent, paid)), Table(columns, monthly, words=())])


def _safety(data: Data, say: Texts) -> Section:
    names = shown_values(data["safety"]).values()
    columns = [say("column_sampler"), *(say(f"column_{name}") for name in names)]
    lines = [
        Row(
            [row["label"], *(_found(row, name, say) for name in names)],
            "own" if row["label"] == data["candidate"] else "",
        )
        for row in data["safety"]
    ]
    return Section(say("section_safety"), [Table(columns, lines), Text(say("safety_text"))])


def _worst_cases(data: Data, say: Texts) -> Section:
    pictures = [*PICTURES, *([FILTERED] if "filtered" in data["safety"][0] else [])]
    return Section(say("section_worst"), [Picture(name, say(f"picture_{name}")) for name in pictures])


def _found(row: Data, name: str, say: Texts) -> str:
    worst = row["worst"].get(name, [])
    classes = say("taken_as", drawn=worst[0], taken=worst[1]) if len(worst) == 2 else "".join(worst)
    return f"{row[name]:.3f}" + (f"\n{classes}" if classes else "")


def _votes(data: Data, votes: Data, say: Texts) -> Section:
    agreement = votes["agreement"]
    said = say(
        "votes_text", guided=data["best_cfg"], reviewers=votes["reviewers"], pairs=votes["pairs"], **vote_numbers(votes)
    )
    kappa = "-" if agreement["kappa"] is None else f"{agreement['kappa']:.2f}"
    agree = (
        say("votes_agreement", share=f"{agreement['share']:.0%}", compared=agreement["compared"], kappa=kappa)
        if agreement["compared"]
        else say("votes_no_agreement")
    )
    columns = [say(f"column_{name}") for name in ("class", "wins", "losses", "equal", "rate")]
    lines = [
        Row([name, *(str(tally[choice]) for choice in ("wins", "losses", "equal")), _rate(tally, say)], kind)
        for name, tally, kind in (
            (say("all_classes"), votes, "own"),
            *((name, tally, "") for name, tally in votes["by_class"].items()),
        )
    ]
    return Section(say("section_votes"), [Text(said), Text(agree), Table(columns, lines)])


def _rate(tally: Data, say: Texts) -> str:
    found = vote_numbers(tally)
    return f"{found['rate']}\n{say('interval', low=found['low'], high=found['high'])}"


def _sweep(data: Data, sweep: Data, say: Texts) -> Section:
    distance = distance_title(data, say)
    columns = [say("column_rank"), say("column_settings"), distance, say("metric_class_consistency")]
    columns += [say("metric_recall"), say("column_guided_distance")]
    lines = [
        Row(
            [
                str(trial["rank"]),
                say("own_settings", label=trial["label"]) if trial["own"] else trial["label"],
                f"{trial['distance']:.2f}",
                f"{trial['class_consistency']:.3f}",
                "-" if trial["recall"] is None else f"{trial['recall']:.3f}",
                f"{trial['distance_cfg']:.2f}",
            ],
            "own" if trial["rank"] == sweep["rank"] else "",
        )
        for trial in sweep["trials"]
    ]
    said = say("sweep_text", rank=sweep["rank"], label=sweep["label"])
    return Section(say("section_sweep"), [Text(said), Table(columns, lines, words=(1,))])
