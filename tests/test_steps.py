"""The way from the original to the compressed file, in a report."""

from __future__ import annotations

from deploykit.report.html import render_html
from deploykit.report.steps import step_plots, steps
from tests.factories import TARGET, make_accuracy, make_artifact, make_measurement, make_report


def _report():  # type: ignore[no-untyped-def]
    names = ("original", "merged", "compressed")
    sizes, ratios = (100e6, 100e6, 25e6), (1.0, 0.7, 0.3)
    artifacts = [
        make_artifact(name=n, bytes=int(b), precision="w8a8" if n == "compressed" else "fp32")
        for n, b in zip(names, sizes, strict=True)
    ]
    measurements = [
        make_measurement(artifact=n, ratio=r, p50_ms=10 * r)
        for n, r in zip(names, ratios, strict=True)
    ]
    accuracy = [
        make_accuracy(artifact="merged", top1=79.0), make_accuracy(artifact="compressed", top1=78.5)
    ]  # fmt: skip
    return make_report(artifacts=artifacts, measurements=measurements, accuracy=accuracy)


def test_each_step_stands_beside_the_one_before() -> None:
    found = steps(_report())
    assert [step.label for step in found] == ["original", "merged", "w8a8"]
    assert [step.times for step in found] == [{TARGET: t} for t in (100.0, 70.0, 30.0)]
    assert [step.top1 for step in found] == [79.40, 79.0, 78.5]
    assert [step.megabytes for step in found] == [100.0, 100.0, 25.0]


def test_three_waterfalls_are_drawn_and_say_the_changes() -> None:
    plots = step_plots(_report())
    assert len(plots) == 3
    assert "79.0 (−0.4)" in plots[1].svg and "78.5 (−0.5)" in plots[1].svg
    assert all(plot.svg in render_html(_report()) for plot in plots)


def test_a_noisy_measurement_is_no_step() -> None:
    report = _report()
    noisy = [m.model_copy(update={"noisy": True}) for m in report.measurements]
    report = report.model_copy(update={"measurements": noisy})
    assert [step.times[TARGET] for step in steps(report)] == [100.0, None, None]
    assert len(step_plots(report)) == 2


def test_every_target_has_its_waterfall() -> None:
    report = _report()
    other = [
        m.model_copy(update={"target": "other", "ratio": (m.ratio or 0) / 2})
        for m in report.measurements
    ]
    report = report.model_copy(update={"measurements": [*report.measurements, *other]})
    assert [step.times["other"] for step in steps(report)] == [100.0, 35.0, 15.0]
    captions = [plot.caption for plot in step_plots(report)]
    assert [c for c in captions if "time" in c] == [
        f"Step by step: % of the original's time on {target}" for target in (TARGET, "other")
    ]


def test_without_a_step_there_is_nothing_to_draw() -> None:
    assert steps(make_report()) == [] and step_plots(make_report()) == []
