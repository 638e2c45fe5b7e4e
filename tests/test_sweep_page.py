"""What a sweep's page and table say of made-up trials."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from deploykit.report.sweep_page import headings, print_sweep, render_page, table_rows
from deploykit.sweep.result import SweepReport, TargetTime, TrialResult, best_of, front_of
from deploykit.sweep.spec import Limits, Objective

OBJECTIVES: list[Objective] = ["top1", "ratio", "bytes"]


def trial(number: int, top1: float, ratio: float, size: int, **facts: Any) -> TrialResult:
    time = TargetTime(
        target="cpu-onnxruntime", device="a CPU", p50_ms=10 * ratio, ratio=ratio,
        ratio_low=ratio - 0.01, ratio_high=ratio + 0.01, noisy=facts.pop("noisy", False),
        pinned_to=[0],
    )  # fmt: skip
    return TrialResult(
        number=number, values={"quantize.bits": "w8a8", "prune.ratio": 0.1, "merge.ratio": 0.2},
        recipe_sha256=str(number), folder=f"trials/{number}", state="complete", top1=top1,
        drop=80 - top1, drop_low=79.5 - top1, drop_high=80.5 - top1, bytes=size, times=[time],
        **facts,
    )  # fmt: skip


def report(*trials: TrialResult) -> SweepReport:
    front = front_of(trials, OBJECTIVES, Limits())
    best = best_of([t for t in trials if t.number in front], OBJECTIVES)
    return SweepReport(
        deploykit_version="0", command="deploykit sweep", started="2026-01-02T03:04:05+00:00",
        seconds=1.0, key="", sampler="grid", seed=0, objectives=OBJECTIVES,
        dimensions={"quantize.bits": [], "prune.ratio": [], "merge.ratio": []}, limits=Limits(),
        trials=list(trials), front=front, best=best,
    )  # fmt: skip


def test_a_page_says_who_is_best_and_in_what() -> None:
    found = report(
        trial(0, 80.0, 0.80, 4_000_000), trial(1, 79.0, 0.50, 2_000_000),
        trial(2, 78.0, 0.90, 4_500_000), trial(3, 79.5, 0.60, 2_500_000),
    )  # fmt: skip
    page = render_page(found)
    assert "No other trial beats these: 3 of 4" in page
    assert "In top-1, time and size together." in page and "slower" not in page
    assert "best top-1: trial 0, 80.00 %, 1.25× faster, 8.00 ms, 4.00 MB" in page
    assert "best time and size: trial 1" in page and "best compromise: trial 3" in page
    assert "size, MB" in page and "2026-01-02 03:04 UTC" in page
    rows = dict(zip(headings(found), table_rows(found, found.trials)[1], strict=True))
    assert rows["change, points (95 %)"] == "−1.00 (−1.50 … −0.50)"
    assert (rows["bits"], rows["prune.ratio"], rows["merge.ratio"]) == ("w8a8", "0.1", "0.2")
    assert [row[-1] for row in table_rows(found, found.trials)] == [
        "best top-1", "best time and size", "", "best compromise",
    ]  # fmt: skip


def test_a_best_that_is_slower_than_the_original_is_no_good_news() -> None:
    found = report(trial(0, 80.0, 1.24, 25_000))
    page = render_page(found)
    assert 'class="banner doubt"' in page and "All are slower than the original." in page
    assert "best in all of them: trial 0, 80.00 %, 1.24× slower than the original" in page
    assert "beaten by another" not in page
    noisy = render_page(report(trial(0, 80.0, 0.5, 25_000, noisy=True)))
    assert "time too noisy" in noisy and "faster" not in noisy


def test_the_terminal_s_table_breaks_no_figure() -> None:
    stream = io.StringIO()
    print_sweep(report(trial(0, 80.0, 0.5, 2_000_000)), Console(file=stream, width=80))
    text = stream.getvalue()
    assert "80.00 %" in text and "2.00 MB" in text and max(map(len, text.splitlines())) <= 80
