"""Reads the numbers of a report made by hand: what its three forms say, in both languages."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser
from string import Formatter
from typing import Any

import pytest
from matplotlib import pyplot as plt

from cca_core.parse import ConfigError
from pipelines.recipe import load_recipe
from pipelines.report.render import report_html, report_json, report_markdown, report_note
from pipelines.report.sections import page
from pipelines.report.texts import LANGUAGES, duration
from pipelines.stages.decide import AWAITING_VOTES, KEEP_CFG, KEEP_CHAMPION, PROMOTE
from pipelines.stages.figures import fidelity_diversity, quality_cost
from tests.reporting import TAG, data, passed_pilot, pictures, pilot, row, votes

BOTH = pytest.mark.parametrize("language", sorted(LANGUAGES))
#: Kind of report -> what makes it.
CASES: dict[str, dict[str, Any]] = {
    PROMOTE: {},
    KEEP_CFG: {"distance": 1.9},
    KEEP_CHAMPION: {"distance": 1.25, "champion": {"distance": 1.0}},
    AWAITING_VOTES: {"min_votes": 30, "given": votes(8, 2)},
    "promote, after votes": {"min_votes": 30, "given": votes(15, 5)},
    "go": {"pilot": pilot()},
    "no-go": {"pilot": pilot(None), "distance": 1.9},
    "promote, after a pilot": {"pilot": passed_pilot()},
    "promote, without recall": {"recall": None, "price": 0.0},
}


class Tags(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, html: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def html(case: str, language: str = "en") -> Tags:
    return Tags(report_html(data(**CASES[case]), language, pictures()))


def test_the_numbers_have_a_version_and_stable_names_and_are_strict_json():
    found = json.loads(report_json(data(**CASES["promote, after votes"])), parse_constant=pytest.fail)
    assert found["format_version"] == 1
    assert set(found) == {
        *("format_version", "recipe_name", "recipe", "verdict", "says", "base", "best_cfg", "candidate"),
        *("distance_name", "calls_per_image", "costs", "samplers", "rules", "left_out", "safety", "min_votes", "votes"),
        *("sweep", "pilot", "measured", "lineage"),
    }
    assert found["verdict"] == PROMOTE
    assert found["calls_per_image"] == {"guided": 32, "aligned": 16}
    assert [sampler["label"] for sampler in found["samplers"]] == ["base", "base, CFG 1.5", "aligned"]
    distance = found["samplers"][2]["measured"]["distance"]
    assert (distance["mean"], distance["sd"], distance["interval"]) == (1.1, 0.5, pytest.approx([0.85, 1.35]))
    rule = next(rule for rule in found["rules"] if rule["key"] == "distance_vs_best_cfg")
    assert rule["name"] == "distance over that of base, CFG 1.5"
    assert rule["value"] == pytest.approx(1.1)
    assert (rule["limit"], rule["bound"], rule["passed"], rule["safety"]) == (1.3, "at_most", True, False)
    assert sum(rule["safety"] for rule in found["rules"]) == 5
    assert (found["votes"]["votes"], found["votes"]["win_rate"]) == (40, 0.75)
    assert found["votes"]["agreement"]["share"] == 1
    assert found["recipe"]["decide"]["min_votes"] == 30


def test_what_is_no_number_is_null():
    found = data(given=votes(5, 0), min_votes=100)
    assert found["votes"]["agreement"]["kappa"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("case", "headline", "kind"),
    [
        (PROMOTE, "Serve the aligned model.", "good"),
        (KEEP_CFG, "Keep serving base, CFG 1.5.", "bad"),
        (KEEP_CHAMPION, "Keep serving the present champion.", "bad"),
        (AWAITING_VOTES, "Let people look first: 20 of 30 votes are in.", "open"),
    ],
)
def test_the_verdict_comes_first_and_says_what_to_do(case, headline, kind):
    found = data(**CASES[case])
    assert found["verdict"] == case
    shown = page(found, "en")
    assert (shown.headline, shown.kind, shown.title) == (headline, kind, f"digits: {case}")
    assert "16 model calls per image instead of 32" in shown.why
    assert "saves 50% of the time and cost of an image end to end (50% saved counting the tokens alone)" in shown.why
    failed = [rule["name"] for rule in found["rules"] if not rule["passed"]]
    assert all(name in shown.why for name in failed)
    assert bool(failed) == (kind == "bad")
    said = html(case).text
    assert said.index(headline) < said.index("Quality against cost")
    text = report_markdown(found, "en").splitlines()
    assert text[0] == f"# digits: {case}"
    assert text[2].startswith(headline)
    ja = page(found, "ja")
    assert ja.kind == kind
    assert ja.headline not in (headline, "")


@pytest.mark.parametrize(
    ("case", "people"),
    [
        (PROMOTE, "Nobody was asked"),
        (AWAITING_VOTES, "20 of 30 votes"),
        ("promote, after votes", "win rate 0.750"),
    ],
)
def test_it_says_whether_safety_passed_and_whether_people_looked(case, people):
    facts = {fact.name: fact for fact in page(data(**CASES[case]), "en").facts}
    assert facts["Safety"].value == "5 of 5 checks passed"
    assert facts["Did people look?"].value == people


def test_a_pilot_says_what_the_full_run_will_take():
    shown = html("go").text
    assert "Start the full run." in shown
    assert "10 min" in shown, "60 s on a tenth of the images"
    assert "0.333 device-hours, which cost 1 at" in shown, "two workers for 600 s at 3 an hour"
    assert "Start it with --profile full." in shown
    assert "cannot be told" in html("no-go").text
    assert "--profile full" not in Tags(report_html(data(pilot=pilot(), distance=1.9), "en", pictures())).text
    assert "expected 10 min for this run, whose stages took 9 min" in html("promote, after a pilot").text


def test_energy_is_shown_where_the_hardware_told_it():
    found = data()
    assert "joules/image" not in report_markdown(found, "en")
    found["samplers"][-1]["cost"]["joules_per_image"] = 12.34
    table = report_markdown(found, "en").split("## Evaluation")[1]
    assert "joules/image" in table
    assert "| 12.3 |" in table


def test_a_slower_model_is_said_to_be_slower():
    found = data()
    for way in found["costs"]["per_1000"].values():
        way["saved_share"] = -0.1
    shown = page(found, "en")
    assert "takes 10% more time and cost" in shown.why
    assert [fact.kind for fact in shown.facts[1:3]] == ["bad", "bad"]


def test_costs_are_those_of_a_calculation_by_hand_in_every_form():
    # 10 and 20 images/s at 3.60 an hour: 1,000 images cost 0.1 and 0.05; 5 hours of alignment 18.
    found = data()
    whole = found["costs"]["per_1000"]["end_to_end"]
    assert (whole["guided"], whole["aligned"]) == pytest.approx((0.1, 0.05))
    assert found["costs"]["alignment"]["break_even_images"] == 360_000
    text = report_markdown(found, "en")
    assert "| end to end, with image decoding | 0.1 | 0.05 | 50% |" in text
    assert "It has paid for itself after 360,000 images" in text
    said = html(PROMOTE).text
    assert "100 s" in said
    assert "1,000 images: 50 s instead of 100 s; 0.05 instead of 0.1" in said
    assert "360,000" in said
    assert "device-hours; set cost.price" in report_markdown(data(price=0.0), "en")


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_the_page_loads_nothing_and_runs_nothing(case, language):
    tags = html(case, language).tags
    names = {name for name, _ in tags}
    assert not names & {"script", "iframe", "object", "embed", "form", "base"}
    links = [found[key] for _, found in tags for key in ("src", "href", "srcset", "action", "data") if key in found]
    assert links
    assert all(link.startswith("data:") for link in links)
    assert not any(key.startswith("on") for _, found in tags for key in found)
    style = report_html(data(), language, pictures()).decode().split("</style>")[0]
    assert "@import" not in style
    assert "url(" not in style
    images = [found for name, found in tags if name == "img"]
    assert len(images) == len(pictures())
    assert all(found["alt"] for found in images)


@BOTH
def test_names_of_users_are_text_and_never_tags(language):
    raw = report_html(data(**CASES["promote, after votes"]), language, pictures()).decode()
    assert "<script" not in raw
    assert "&lt;script&gt;" in raw
    assert TAG in Tags(raw.encode()).text
    text = report_markdown(data(**CASES["promote, after votes"]), language)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert "<script" not in "\n".join(tables)
    (line,) = [line for line in tables if line.startswith("| aligned |") and "0.020" in line]
    assert line.count("|") == 7, "a bar in a name ends no cell"


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name}


def test_every_text_is_there_in_both_languages_with_the_same_values():
    en, ja = LANGUAGES["en"], LANGUAGES["ja"]
    assert list(en.keys() - ja.keys()) == list(ja.keys() - en.keys()) == []
    assert {key for key in en if fields(en[key]) - fields(ja[key])} == set()
    assert {key for key in en if fields(ja[key]) - fields(en[key])} == set()
    japanese = re.compile("[\u3041-\u30ff\u4e00-\u9fff]")
    assert {key for key in en if re.search("[A-Za-z]{2} [a-z]{2}", en[key]) and not japanese.search(ja[key])} == set()


@pytest.mark.parametrize("case", CASES)
def test_the_japanese_report_has_no_english_sentence(case):
    found = data(**CASES[case])
    pages = (html(case, "ja").text, unescape(report_markdown(found, "ja")))
    pages = tuple(said.replace(f"({KEEP_CHAMPION})", "") for said in pages)  # what MLflow's tag says
    # What stands between the values; short ones are terms, which stay.
    parts = (part.strip(" ();:.,") for text in LANGUAGES["en"].values() for part, *_ in Formatter().parse(text))
    sentences = {part for part in parts if len(part.split()) > 3}
    assert len(sentences) > 90
    for said in pages:
        assert [sentence for sentence in sentences if sentence in said] == []
        assert re.search(r"\b(the|is|are|was|than|which|with)\b", said) is None


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_the_forms_say_the_same(case, language):
    found = data(**CASES[case])
    shown, said, text = page(found, language), html(case, language).text, unescape(report_markdown(found, language))
    for section in shown.sections:
        assert section.title in said
        assert f"## {section.title}" in text
    for fact in shown.facts:
        assert fact.value in said
        assert f"- {fact.name}: {fact.value}." in text
    assert shown.why in said
    assert shown.why in text


@BOTH
def test_a_long_report_becomes_a_note_of_whole_sections(language):
    found = data()
    text = report_markdown(found, language)
    assert report_note(text, language) == text
    found["rules"] *= 10
    long = report_markdown(found, language)
    note = report_note(long, language)
    assert len(note) <= 8000 < len(long)
    *head, rest, _ = note.split("\n")
    assert "report.html" in rest
    assert long.startswith("\n".join(head) + "\n## ")


def test_without_recall_it_says_what_the_gate_cannot_tell():
    text = report_markdown(data(**CASES["promote, without recall"]), "en")
    assert "lost diversity would pass" in text
    assert "Published statistics of real images" in text
    assert "4.00" not in text
    plt.close(fidelity_diversity([row("base", 1.0, recall=None), row("aligned", 1.0, recall=None)]))


def test_quality_against_cost_has_a_point_for_every_sampler():
    found = data()
    figure = quality_cost(found["samplers"], "distance", "money")
    points = {tuple(point) for group in figure.axes[0].collections for point in group.get_offsets().tolist()}
    assert points == {(s["cost_per_1000"], s["measured"]["distance"]["mean"]) for s in found["samplers"]}
    assert {text.get_text() for text in figure.axes[0].texts} == {"base", "CFG 1.5", "aligned"}
    plt.close(figure)


def test_times_are_read_without_arithmetic():
    assert [duration(s) for s in (0.5, 50, 119, 600, 36_000)] == ["0.5 s", "50 s", "119 s", "10 min", "10 h"]


def test_the_language_is_a_key_of_the_recipe():
    assert load_recipe("digits", ["report.language=ja"]).report.language == "ja"
    with pytest.raises(ConfigError, match=r"report\.language"):
        load_recipe("digits", ["report.language=fr"])
