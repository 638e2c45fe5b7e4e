"""What the pages say and draw, against hand-made cases."""

from __future__ import annotations

import re
from html import unescape

import numpy as np
import pytest

from deploykit.report import plots, scatter
from deploykit.report.distributions import distribution_plots
from deploykit.report.facts import device_facts, parity_grid, timing_facts
from deploykit.report.gains import gains, gains_plot
from deploykit.report.html import render_html
from deploykit.report.model import Report
from deploykit.report.plots import Plot
from deploykit.report.points import points
from deploykit.report.scatter import Dot, Key, scatter_of, scatter_plot
from deploykit.report.view import headline
from deploykit.types import DeviceDescription, WeightsOrigin
from tests.factories import (
    make_accuracy,
    make_artifact,
    make_measurement,
    make_parity,
    make_report,
)

FRONT = "the dashed line is the Pareto front"


def words(plot: Plot | None) -> list[str]:
    assert plot is not None
    return [unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", plot.svg)]


def spot(label: str, ms: float, top1: float | None, *, noisy: bool = False) -> Dot:
    interval = None if top1 is None else (top1 - 1, top1 + 1)
    return Dot(label, Key("", plots.AFTER, "o"), ms, (ms, ms), top1, interval, 9.0, noisy)


def targets_report() -> Report:
    original = make_measurement(artifact="original", precision="fp32", p50_ms=10.0, ratio=None)
    return make_report(
        measurements=[
            original,
            make_measurement(),
            original.model_copy(update={"target": "cpu-openvino"}),
            make_measurement(target="cpu-openvino", p50_ms=12.0, ratio=1.2, ratio_low=1.1,
                             ratio_high=1.3),
        ]
    )  # fmt: skip


def test_the_headline_says_what_was_gained_and_what_it_cost() -> None:
    assert headline(make_report()) == (
        "w4a8 is 7.25× smaller and 2.36× faster on cpu-onnxruntime than the original; "
        "top-1 changed by −0.35 points (95 % interval −0.75 … +0.05)."
    )
    assert "2.36× faster on cpu-onnxruntime and 1.20× slower on cpu-openvino" in headline(
        targets_report()
    )
    assert headline(make_report(accuracy=[])).endswith("original; its accuracy was not measured.")
    random = WeightsOrigin(kind="random", source="seed 0")
    assert "can't be known, as the weights are untrained" in headline(make_report(weights=random))
    noisy = headline(make_report(measurements=[make_measurement(noisy=True)]))
    assert noisy.startswith("w4a8 is 7.25× smaller than the original;")
    assert headline(make_report(artifacts=[])).startswith("The run wrote no compressed file")


def test_the_headline_names_the_worst_file_and_stays_short() -> None:
    worse = make_accuracy(format="openvino", drop=2.0, drop_low=1.0, drop_high=3.0)
    assert "−2.00 points" in headline(make_report(accuracy=[make_accuracy(), worse]))
    many = [make_measurement(target=f"t{i}") for i in range(9)]
    assert "t2, and so on (6 more)" not in headline(make_report(measurements=many))
    assert "t2 and so on (6 more) than" in headline(make_report(measurements=many))


def test_a_file_is_rated_on_the_target_that_ran_it() -> None:
    base = targets_report()
    accuracy = [
        make_accuracy(target="cpu-onnxruntime", top1=70.0),
        make_accuracy(target="cpu-openvino", top1=60.0),
    ]
    rated = [point.top1 for point in points(base.model_copy(update={"accuracy": accuracy}))]
    assert rated == [79.4, 70.0, 79.4, 60.0]


def test_scatter_labels_each_file_and_says_what_the_marks_mean() -> None:
    picture = scatter_plot(targets_report())
    seen = words(picture)
    assert seen.count("w4a8") == seen.count("original fp32") == 2
    assert {"cpu-onnxruntime", "cpu-openvino", "top-1, %"} <= set(seen)
    assert picture is not None
    assert FRONT in picture.caption
    assert "area is the file's size" in picture.caption


def test_scatter_without_accuracy_says_so() -> None:
    picture = scatter_plot(make_report(accuracy=[]))
    assert picture is not None
    assert picture.caption.startswith("No accuracy is known, so this is size against latency")
    assert "size, MB" in words(picture)
    assert scatter_plot(make_report(measurements=[])) is None


def test_the_front_has_no_noisy_and_no_beaten_file() -> None:
    dots = [
        spot("best", 1.0, 80.0), spot("more", 2.0, 85.0), spot("beaten", 3.0, 84.0),
        spot("noisy", 0.5, 99.0, noisy=True),
    ]  # fmt: skip
    assert scatter._best(dots, True) == [(1.0, 80.0), (2.0, 85.0)]
    assert scatter._best(dots, False) == [(1.0, 9.0)]  # all are of one size
    alone = scatter_of("k", [dots[1], dots[2]], [])
    assert alone is not None
    assert "one file beats or equals all others in both" in alone.caption
    apart = scatter_of("k", dots, [], comparable=False)
    assert apart is not None
    assert FRONT not in apart.caption
    assert "hollow marks are too noisy" in apart.caption


def test_labels_of_files_at_one_place_cover_no_other() -> None:
    dots = [spot(f"file {i}", 1.0, 80.0) for i in range(6)] + [spot("far", 9.0, 10.0)]
    picture = scatter_of("k", dots, [])
    assert picture is not None
    found = re.findall(r"translate\(([-\d.]+) ([-\d.]+)\)[^>]*>file \d|x=\"([-\d.]+)\" "
                       r"y=\"([-\d.]+)\"[^>]*>file \d", picture.svg)  # fmt: skip
    heights = sorted({float(b or d) for _, b, _, d in found})
    assert len(heights) == 6
    assert min(np.diff(heights)) >= 10


def test_distributions_are_those_of_the_calls() -> None:
    samples = [1.0, 2.0, 3.0, 4.0]
    report = make_report(
        measurements=[make_measurement(samples_ms=samples, p50_ms=2.5), make_measurement(batch=4)]
    )
    first, second = distribution_plots(report)
    assert "batch 1" in first.caption
    assert "batch 4" in second.caption
    assert "ms a call, log scale" in words(first)  # four times between the ends
    assert "ms a call" in words(second)
    none = make_report(measurements=[make_measurement(samples_ms=[])])
    assert distribution_plots(none) == []


def test_gains_are_percent_of_the_original() -> None:
    found = gains(targets_report())
    assert [(g.label, round(g.percent, 1)) for g in found] == [
        ("size of the file", 13.8),
        ("time, cpu-onnxruntime", 42.4),
        ("memory, cpu-onnxruntime", 100.0),
        ("time, cpu-openvino", 120.0),
        ("memory, cpu-openvino", 100.0),
    ]
    assert [g.said for g in found] == [
        "7.25× smaller", "2.36× faster", "about the same", "1.20× slower", "about the same",
    ]  # fmt: skip
    drawn = gains_plot(targets_report())
    assert "120 %, 1.20× slower" in words(drawn)
    assert drawn is not None
    assert "var(--bad)" in drawn.svg
    noisy = make_report(measurements=[make_measurement(noisy=True)])
    assert [g.label for g in gains(noisy)] == ["size of the file"]
    assert gains_plot(make_report(artifacts=[], measurements=[])) is None


def test_sizes_of_two_formats_are_no_gain() -> None:
    mixed = [make_artifact(name="original", format="onnx"), make_artifact(format="openvino")]
    assert [g.label for g in gains(make_report(artifacts=mixed, measurements=[]))] == []


def test_parity_by_batch() -> None:
    rows = [
        make_parity(batch=8), make_parity(batch=1), make_parity(format="openvino", batch=1),
        make_parity(batch=8, passed=False, runtime="other"),
    ]  # fmt: skip
    grid = parity_grid(rows)
    assert grid.batches == [1, 8]
    assert [(r.format, r.runtime, [len(cell) for cell in r.cells]) for r in grid.rows] == [
        ("onnx", "onnxruntime", [1, 1]),
        ("openvino", "onnxruntime", [1, 0]),
        ("onnx", "other", [0, 1]),
    ]


class LaterDevice(DeviceDescription):
    """A description with facts that the pages know nothing of."""

    thermal: dict[str, float]
    features: list[str]
    energy_j: float | None = None


def test_facts_that_are_new_are_shown_without_a_change_to_the_page() -> None:
    old = make_measurement().device.model_dump()
    cool = LaterDevice(**old, thermal={"before_c": 41.5}, features=["amx", "<sve>"])
    warm = cool.model_copy(update={"thermal": {"before_c": 55.0}, "governor": "powersave"})
    timed = [make_measurement(device=cool), make_measurement(artifact="original", device=warm)]
    table = device_facts(timed)
    rows = dict(table.rows)
    assert table.columns == ["cpu-onnxruntime"]
    assert rows["thermal.before c"] == ["41.5; 55.0"]
    assert rows["features"] == ["amx, <sve>"]
    assert rows["governor"] == ["–; powersave"]
    assert "energy j" not in rows  # nobody knows it
    page = render_html(make_report(measurements=timed))
    assert "amx, &lt;sve&gt;" in page
    full = timing_facts(timed)
    assert len(full.columns) == 2
    assert dict(full.rows)["samples"] == ["300", "300"]


@pytest.mark.parametrize(("low", "high", "ticks"), [(1, 2, False), (1, 10, True), (0, 10, False)])
def test_axes_are_logarithmic_where_values_lie_far_apart(
    low: float, high: float, ticks: bool
) -> None:
    picture = plots.draw("k", "c", 1.0, lambda axes: (
        axes.plot([low, high], [0, 1]), plots.plain_log_axis(axes, low, high)
    ))  # fmt: skip
    assert ({"1", "2", "5", "10"} <= set(words(picture))) is ticks


def test_layers_are_named_from_the_worst_on() -> None:
    report = make_report()
    worst = min(report.layers, key=lambda layer: layer.sqnr_db)
    seen = words(plots.worst_layers_plot(report))
    names = [text for text in seen if "stages" in text]
    assert len(names) == 12
    assert names[0].startswith(f"stages.{worst.layer.split('.')[1]}")
    assert f"{worst.sqnr_db:.1f}" in seen
    assert plots.worst_layers_plot(make_report(layers=[])) is None
