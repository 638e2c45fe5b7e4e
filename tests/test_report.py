"""The report as data and as its renderings."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console

from deploykit.errors import UsageError
from deploykit.report import plots, wording
from deploykit.report.distributions import distribution_plots
from deploykit.report.gains import gains_plot
from deploykit.report.html import render_html
from deploykit.report.markdown import render_markdown
from deploykit.report.model import LayerError, Report, json_schema, load_report
from deploykit.report.scatter import scatter_plot
from deploykit.report.terminal import render_terminal
from deploykit.report.write import write_report
from deploykit.types import REPORT_SCHEMA_VERSION, PassRecord, WeightsOrigin
from tests.factories import (
    make_accuracy,
    make_artifact,
    make_measurement,
    make_parity,
    make_report,
)

EVIL = "<script>alert(1)</script>\"'|`*$x^2$\x1b[31m\u202e\n# head https://evil.example/ @all"
UNTRAINED: dict[str, Any] = {
    "weights": WeightsOrigin(kind="untrained", source="no network"),
    "verdict": "not for deployment",
}


def evil_report() -> Report:
    """Every text that comes from files we did not write is an attack."""
    return make_report(
        model=EVIL,
        command=EVIL,
        bits=EVIL,
        calibration=EVIL,
        verdict_reasons=[EVIL],
        warnings=[EVIL],
        weights=WeightsOrigin(kind="file", source=EVIL),
        artifacts=[make_artifact(name="original"), make_artifact(weights=EVIL, integer=[EVIL])],
        accuracy=[make_accuracy(data=EVIL)],
        parity=[make_parity(runtime=EVIL, tolerance=EVIL, passed=False)],
        measurements=[make_measurement(target=EVIL, precision=EVIL, withheld=EVIL)],
        layers=[LayerError(layer=EVIL, op=EVIL, bits=EVIL, sqnr_db=3)],
        passes=[PassRecord(name=EVIL, summary=EVIL, details={EVIL: {EVIL: [EVIL]}})],
        environment={EVIL: {EVIL: EVIL}},
        recipe={EVIL: EVIL},
    )


@pytest.fixture(scope="module")
def html() -> str:
    """The page of the plain report; drawing takes half a second."""
    return render_html(make_report())


def said(page: str) -> str:
    """The page without the coordinates of its pictures, among which any number may occur."""
    return re.sub(r'\b(d|transform|x|y)="[^"]*"', "", page)


def terminal(report: Report, **options: Any) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=80, **options)
    render_terminal(report, console, "out")
    return stream.getvalue()


class Page(HTMLParser):
    """Tags, attributes and ids of a page; complains about unbalanced tags."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_json_round_trip(tmp_path: Path) -> None:
    report = make_report()
    write_report(report, tmp_path / "new" / "out")
    names = {p.name for p in (tmp_path / "new" / "out").iterdir()}
    assert names == {"report.json", "report.md", "report.html", "environment.json"}
    assert load_report(tmp_path / "new" / "out" / "report.json") == report
    assert load_report(tmp_path / "new" / "out") == report
    environment = json.loads((tmp_path / "new/out/environment.json").read_text())
    assert environment == report.environment


def test_numbers_json_lacks_survive(tmp_path: Path) -> None:
    parity = [make_parity(sqnr_db=math.inf), make_parity(max_abs=math.nan, passed=False)]
    report = make_report(parity=parity, environment={"x": [-math.inf]})
    (tmp_path / "report.json").write_text(report.to_json(), encoding="utf-8")
    again = load_report(tmp_path)
    assert again.parity[0].sqnr_db == math.inf
    assert math.isnan(again.parity[1].max_abs)
    jsonschema.validate(json.loads(report.to_json()), json_schema())
    assert wording.sqnr(again.parity[0].sqnr_db) == "identical"


def test_samples_stand_on_one_line() -> None:
    text = make_report(warnings=["[\n 1,\n 2 ]"]).to_json()
    assert len(text.splitlines()) < 700
    assert json.loads(text)["warnings"] == ["[\n 1,\n 2 ]"]


def test_schema_accepts_reports_and_refuses_others() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for report in (make_report(), make_report(**UNTRAINED, accuracy=[], layers=[])):
        jsonschema.validate(json.loads(report.to_json()), schema)
    data = json.loads(make_report().to_json())
    for wrong in ({"verdict": "fine"}, {"schema_version": 2}, {"extra": 1}, {"seconds": "long"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(data | wrong, schema)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no valid JSON"),
        ("{" * 3, "no valid JSON"),
        ("[" * 200_000, "no valid JSON"),
        ("[]", "without schema_version"),
        ('{"schema_version": "1"}', "without schema_version"),
        ('{"schema_version": 2}', "has schema_version 2, this deploykit reads up to 1; update"),
        ('{"schema_version": 0}', "has schema_version 0, this deploykit reads 1; make the report"),
        ('{"schema_version": 1, "model": 3}', "not a valid report: "),
        ("\ud7ff".encode("utf-16").decode("latin-1"), "no valid JSON"),
    ],
)
def test_invalid_reports_are_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_report(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_report(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read report .*No such file"):
        load_report(tmp_path)


def test_schema_version_is_the_house_one() -> None:
    assert make_report().schema_version == REPORT_SCHEMA_VERSION


def test_accessors() -> None:
    report = make_report()
    assert (report.original.name, report.compressed.name) == ("original", "compressed")
    with pytest.raises(UsageError, match="no artefact 'compressed'; it has: none"):
        _ = make_report(artifacts=[]).compressed


def test_html_is_one_inert_file(html: str) -> None:
    page = Page(html)
    assert "script" not in page.tags
    assert {name for name, _ in page.attributes} & {"src", "srcset", "onload", "action"} == set()
    assert not [v for k, v in page.attributes if k.endswith("href") and not str(v).startswith("#")]
    links = {v for k, v in page.attributes if "://" in str(v) and not k.startswith("xmlns")}
    assert links == set()
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert ("name", "viewport") in page.attributes
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_html_ids_are_unique_and_found(html: str) -> None:
    ids = [value for name, value in Page(html).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html)
    assert used
    assert {a or b for a, b in used} <= set(ids)


def test_html_answers_in_order(html: str) -> None:
    questions = [
        "Is it good?", "What did I gain?", "Can I trust it?", "Where is the loss?",
        "What was done?", "Environment",
    ]  # fmt: skip
    places = [html.index(f"<h2>{question}") for question in questions]
    assert places == sorted(places)
    for text in ("12 images lost, 5 gained of 2000", "7.25× smaller", "2.36× faster", "10.4",
                 "61.0 MB", "p99 needs 662 samples", "bits: w4a8", "imagenette val"):  # fmt: skip
        assert text in html


def test_html_is_deterministic(html: str) -> None:
    assert html == render_html(make_report())


def test_attacks_are_shown_as_text() -> None:
    html = render_html(evil_report())
    assert "script" not in Page(html).tags
    assert "&lt;script&gt;alert(1)" in html
    for text in (html, render_markdown(evil_report()), terminal(evil_report())):
        assert "\x1b" not in text
        assert "\u202e" not in text
    markdown = render_markdown(evil_report())
    assert "<script" not in markdown
    assert "https://" not in markdown
    assert "@all" not in markdown
    assert not re.search(r"^# head", markdown, re.MULTILINE)
    rows = [line for line in markdown.splitlines() if line.startswith("| compressed")]
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 10  # nine cells


def test_markdown_is_short_and_whole() -> None:
    text = render_markdown(make_report())
    assert text.startswith("## ✅ shvit_s4 w4a8: OK\n")
    assert "| compressed (w4a8) | cpu-onnxruntime | 79.05 % | 9.12 MB | 4.41 |" in text
    assert "Parity: 2 of 2 comparisons within tolerance." in text
    assert len(text) < 4000
    assert "\n\n\n" not in text


def test_a_run_that_was_held_to_nothing_is_not_called_ok() -> None:
    free = make_report(gates=[])
    assert "## ✅ shvit_s4 w4a8: Measured, no limit was set\n" in render_markdown(free)
    assert "✔ Measured, no limit was set: shvit_s4 w4a8" in terminal(free)
    lossy = make_report(gates=[], accuracy=[make_accuracy(drop=63.0, drop_low=60.0)])
    assert "! Measured, no limit was set" in terminal(lossy)
    assert "Measured, no limit was set" in render_html(lossy)


def test_terminal_fits_80_columns_without_colour() -> None:
    text = terminal(make_report())
    table = text[text.index("artefact") : text.index("Top-1:")]
    assert max(map(len, table.splitlines())) <= 80
    assert "\x1b" not in text
    for part in ("✔ OK: shvit_s4 w4a8", "79.05 %", "2.36× faster", "Parity: 2 of 2",
                 "out/model.onnx", "out/report.html"):  # fmt: skip
        assert part in text
    assert "\x1b[" in terminal(make_report(), force_terminal=True, color_system="standard")


def test_terminal_without_unicode() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    render_terminal(make_report(), Console(file=stream, width=80))
    stream.flush()
    assert b"-0.35 points" in raw.getvalue()


@pytest.mark.parametrize("kind", ["untrained", "random"])
def test_no_accuracy_on_untrained_weights(kind: str) -> None:
    weights = WeightsOrigin(kind=kind, source="seed 0")  # type: ignore[arg-type]
    # Even a report that holds an accuracy does not show it.
    report = make_report(weights=weights, verdict="not for deployment", gates=[])
    page = render_html(report)
    for text in (said(page), render_markdown(report), terminal(report)):
        assert wording.REFUSED in text
        assert "79.05" not in text
        assert "0.35" not in text
    assert "Untrained weights" in page
    assert "size against latency" in page


def test_renders_what_little_there_is() -> None:
    bare = make_report(
        artifacts=[], accuracy=[], parity=[], measurements=[], gates=[], layers=[], passes=[],
        warnings=[], verdict="accuracy not measured", verdict_reasons=[], macs=None,
    )  # fmt: skip
    Page(render_html(bare))
    assert "Parity: not checked" in terminal(bare)
    assert "⚠️" in render_markdown(bare)
    untimed = make_report(measurements=[], accuracy=[])
    for text in (render_html(untimed), render_markdown(untimed), terminal(untimed)):
        assert "not measured" in text


def test_noisy_is_said_and_its_ratio_is_not() -> None:
    report = make_report(measurements=[make_measurement(noisy=True)], verdict_reasons=[])
    for text in (said(render_html(report)), render_markdown(report), terminal(report)):
        assert "too noisy" in text
        assert "2.36" not in text


@pytest.mark.parametrize(
    ("drop", "low", "high", "sentence"),
    [
        (0.35, -0.2, 0.9, "−0.35 points (95 % interval −0.90 … +0.20)"),
        (-0.5, -1.0, 0.0, "+0.50 points (95 % interval 0.00 … +1.00)"),
        (0.001, -0.1, 0.1, "0.00 points (95 % interval −0.10 … +0.10)"),
    ],
)
def test_signs_of_a_drop(drop: float, low: float, high: float, sentence: str) -> None:
    accuracy = make_accuracy(drop=drop, drop_low=low, drop_high=high)
    assert wording.drop_sentence(accuracy).startswith(sentence)


@pytest.mark.parametrize(
    ("ratio", "low", "high", "text"),
    [
        (0.5, 0.48, 0.52, "2.00× faster"),
        (1.5, 1.4, 1.6, "1.50× slower"),
        (0.98, 0.95, 1.01, "no clear change"),
        (None, None, None, "–"),
    ],
)
def test_ratios(ratio: float | None, low: float | None, high: float | None, text: str) -> None:
    measurement = make_measurement(ratio=ratio, ratio_low=low, ratio_high=high)
    assert wording.ratio_short(measurement) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(None, "–"), (0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (66_140_000, "66.1 MB")],
)
def test_sizes(size: int | None, text: str) -> None:
    assert wording.bytes_text(size) == text


def test_wording_corners() -> None:
    assert wording.ms(0.0123) == "0.0123"
    assert wording.ms(None) == "–"
    assert wording.shorten("a" * 50, 11) == "aaaaa…aaaaa"
    assert wording.clean("a\nb\tc\x00") == "a b c\N{REPLACEMENT CHARACTER}"


def test_plots_take_their_colours_from_the_page() -> None:
    report = make_report()
    made = [plots.drop_plot(report), plots.layer_plot(report), plots.worst_layers_plot(report)]
    made += [scatter_plot(report), gains_plot(report), *distribution_plots(report)]
    for plot in made:
        assert plot is not None
        assert plot.svg.startswith('<svg role="img" aria-label="')
        assert "var(--ink)" in plot.svg
        assert not re.search(r"#[0-9a-f]{6}", plot.svg)
        assert "<metadata" not in plot.svg
        assert "<title>" in plot.svg
