"""Several reports side by side: nothing is lost, and what can't be compared is said."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from deploykit.cli import _main
from deploykit.report.matrix import Matrix, build_matrix
from deploykit.report.matrix_page import render_matrix_html, render_matrix_markdown
from deploykit.report.model import Report
from deploykit.report.points import front
from deploykit.types import Artifact, WeightsOrigin
from tests.factories import make_accuracy, make_artifact, make_measurement, make_report
from tests.test_report import EVIL, Page, said


def on(device: str, **overrides: Any) -> Report:
    """The usual run, timed on another device."""
    base = make_report(**overrides)
    timed = [
        m.model_copy(update={"device": m.device.model_copy(update={"device": device})})
        for m in base.measurements
    ]
    return base.model_copy(update={"measurements": timed})


def recipe(**sections: Any) -> dict[str, Any]:
    return {"version": 1, "model": {"name": "shvit_s4"}, "quantize": {"bits": "w4a8"}} | sections


def notes(*reports: Report) -> list[str]:
    return build_matrix([(f"r{i}", report) for i, report in enumerate(reports)]).notes


def artifacts(precision: str) -> list[Artifact]:
    original = make_artifact(name="original", precision="fp32", bytes=66_140_000)
    return [original, make_artifact(precision=precision)]


def test_devices_are_columns_and_files_are_rows() -> None:
    matrix = build_matrix([("a", on("laptop")), ("b", on("phone"))])
    assert [row.label for row in matrix.rows] == ["shvit_s4 original fp32", "shvit_s4 w4a8"]
    assert [column.device for column in matrix.columns] == ["laptop", "phone"]
    assert [len(matrix.at(r, c)) for r in range(2) for c in range(2)] == [1, 1, 1, 1]
    cell = matrix.at(1, 1)[0]
    assert (cell.source, cell.p50_ms, cell.ratio, cell.top1, cell.drop) == (
        1, 4.41, 0.424, 79.05, 0.35,
    )  # fmt: skip
    assert matrix.comparable
    assert matrix.notes == []


def test_runs_on_the_same_device_do_not_replace_each_other() -> None:
    first, second = on("laptop"), on("laptop", started="2030-02-02T00:00:00Z")
    matrix = build_matrix([("a", first), ("b", second)])
    assert [cell.source for cell in matrix.at(1, 0)] == [0, 1]
    assert len(matrix.rows) == 2


def test_a_report_that_is_given_twice_counts_once() -> None:
    matrix = build_matrix([("a", on("laptop")), ("b", on("laptop"))])
    assert matrix.notes == ["b is the same report as a"]
    assert len(matrix.cells) == 2


def test_a_recipe_is_the_same_wherever_it_runs() -> None:
    here = on("laptop", recipe=recipe(targets=["cpu-onnxruntime"], calibration={"data": "/a/c"}))
    there = on("phone", recipe=recipe(targets=["coreml"], calibration={"data": "/b/c"}))
    assert len(build_matrix([("a", here), ("b", there)]).rows) == 2


def test_recipes_of_the_same_bits_are_told_apart_by_what_differs() -> None:
    fast = on("x", recipe=recipe(quantize={"bits": "w4a8", "preset": "fast"}))
    best = on("x", recipe=recipe(quantize={"bits": "w4a8", "preset": "best"}), seconds=1.0)
    labels = [row.label for row in build_matrix([("a", fast), ("b", best)]).rows]
    assert labels == [
        "shvit_s4 original fp32",
        "shvit_s4 w4a8 (quantize.preset=fast)",
        "shvit_s4 w4a8 (quantize.preset=best)",
    ]


def test_labels_are_unique_even_where_nothing_tells_the_rows_apart() -> None:
    weights = [WeightsOrigin(kind="file", source="w", sha256="ab" * 31 + end) for end in ("1", "2")]
    matrix = build_matrix([(w.sha256 or "", on("x", weights=w)) for w in weights])
    labels = [row.label for row in matrix.rows]
    assert len(labels) == len(set(labels)) == 4


def test_models_stand_together_with_their_original_first() -> None:
    reports = [on("x"), on("x", model="deit_s"), on("y", recipe=recipe(seed=1))]
    rows = build_matrix([(str(i), report) for i, report in enumerate(reports)]).rows
    assert [row.model for row in rows] == ["shvit_s4"] * 3 + ["deit_s"] * 2
    assert [row.artifact for row in rows] == [
        "original", "compressed", "compressed", "original", "compressed",
    ]  # fmt: skip


def test_files_that_nothing_timed_have_a_column_of_their_own() -> None:
    matrix = build_matrix([("a", on("x")), ("b", make_report(measurements=[]))])
    assert [column.target for column in matrix.columns] == ["cpu-onnxruntime", ""]
    assert matrix.at(1, 1)[0].p50_ms is None
    assert "not timed" in render_matrix_markdown(matrix)


def test_what_can_be_compared_is_checked() -> None:
    other = make_accuracy(data="imagenette val", images=100)
    assert any(n.startswith("accuracy on different images") for n in
               notes(on("x"), on("y", accuracy=[other])))  # fmt: skip
    assert notes(on("x"), on("y", model="deit_s")) == ["different models: shvit_s4 [1]; deit_s [2]"]
    assert notes(on("x"), on("y", weights=WeightsOrigin(kind="untrained", source="-"))) == [
        "untrained weights, so no accuracy: [2]",
        "shvit_s4 with different weights: abababababab [1]; untrained [2]",
    ]
    moved = make_accuracy(top1_original=78.0)
    assert notes(on("x"), on("y", accuracy=[moved])) == [
        "shvit_s4: the original's own top-1 differs on the same images, so preprocessing or "
        "runtime do: 79.40 % [1]; 78.00 % [2]"
    ]
    assert "accuracy was not measured: [2]" in notes(on("x"), on("y", accuracy=[]))
    assert "made by different versions of deploykit: 0.1.0 [1]; 0.2.0 [2]" in notes(
        on("x"), on("y", deploykit_version="0.2.0")
    )
    assert "timed at different batches: 1 [1]; 8 [2]" in notes(
        on("x"), on("x", measurements=[make_measurement(batch=8)])
    )


def test_other_versions_of_a_runtime_in_one_column_are_noted() -> None:
    device = make_measurement().device.model_copy(update={"runtime": "onnxruntime 2"})
    newer = make_report(measurements=[make_measurement(device=device)])
    assert notes(make_report(), newer) == [
        "cpu-onnxruntime in different versions: onnxruntime 1.23.0 [1]; onnxruntime 2 [2]"
    ]


def stars(matrix: Matrix) -> list[str]:
    return [matrix.rows[cell.row].precision for cell in matrix.cells if cell.best]


def test_the_front_of_a_column() -> None:
    small = on("x", artifacts=artifacts("w4a4"), recipe=recipe(seed=1),
               accuracy=[make_accuracy(top1=70.0)])  # fmt: skip
    worse = on(
        "x", artifacts=artifacts("w2a2"), recipe=recipe(seed=2), accuracy=[make_accuracy(top1=60)]
    )
    noisy = on("x", recipe=recipe(seed=3), measurements=[make_measurement(noisy=True, p50_ms=1.0)])
    matrix = build_matrix([("a", on("x")), ("b", small), ("c", worse), ("d", noisy)])
    # The same size and time as w4a8, but less accurate: beaten. The original is the most accurate.
    assert stars(matrix) == ["fp32", "w4a8", "fp32", "fp32"]
    # On other images top-1 says nothing, so time and size alone decide.
    other = on("x", artifacts=artifacts("w4a4"), recipe=recipe(seed=1),
               accuracy=[make_accuracy(top1=70.0, data="others")])  # fmt: skip
    matrix = build_matrix([("a", on("x")), ("b", other)])
    assert not matrix.comparable
    assert stars(matrix) == ["w4a8", "w4a4"]
    assert "no front is drawn" in render_matrix_html(matrix)


def test_a_file_does_not_beat_itself_by_being_timed_twice() -> None:
    again = on("x", measurements=[make_measurement(p50_ms=4.45)])  # 1 % around each
    matrix = build_matrix([("a", on("x", measurements=[make_measurement()])), ("b", again)])
    assert stars(matrix) == ["w4a8", "w4a8"]
    slower = on("x", measurements=[make_measurement(p50_ms=4.6)])
    matrix = build_matrix([("a", on("x", measurements=[make_measurement()])), ("b", slower)])
    assert stars(matrix) == ["w4a8"]


def test_front_against_its_definition() -> None:
    assert front([(1, 5), (2, 4), (3, 4), (2, 6), (4, 1), (1, 5)]) == [0, 1, 4, 5]
    assert front([]) == []
    assert front([(float("inf"), 1)]) == [0]


def test_attacks_are_shown_as_text() -> None:
    evil = make_report(
        model=EVIL,
        bits=EVIL,
        calibration=EVIL,
        deploykit_version=EVIL,
        weights=WeightsOrigin(kind="file", source=EVIL),
        measurements=[make_measurement(target=EVIL)],
        artifacts=[make_artifact(precision=EVIL, algorithm=EVIL)],
        recipe={"quantize": {EVIL: EVIL}},
    )
    matrix = build_matrix([(EVIL, evil), ("b", on("x"))])
    page = render_matrix_html(matrix)
    assert "script" not in Page(page).tags
    assert "&lt;script&gt;" in page
    markdown = render_matrix_markdown(matrix)
    for text in (page, markdown):
        assert "\x1b" not in text
        assert "\u202e" not in text
    assert "<script" not in markdown
    assert "https://" not in markdown


def test_untrained_weights_have_no_accuracy_anywhere() -> None:
    weights = WeightsOrigin(kind="random", source="seed 0")
    matrix = build_matrix([("a", on("x", weights=weights)), ("b", on("y", weights=weights))])
    assert {cell.top1 for cell in matrix.cells} == {cell.drop for cell in matrix.cells} == {None}
    page = said(render_matrix_html(matrix))
    assert "79.05" not in page
    assert "size against latency" in page


def test_the_command_shows_and_writes_the_matrix(
    tmp_path: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    for name in ("laptop", "phone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(on(name).to_json(), encoding="utf-8")
    folders = [str(tmp_path / name) for name in ("laptop", "phone")]
    out = tmp_path / "both"
    assert _main(["report", *folders, "-o", str(out)]) == 0
    text = capsys.readouterr().out
    for part in ("laptop", "phone", "2.36× faster", f"[2] {folders[1]}", "matrix.html"):
        assert part in text
    assert {path.name for path in out.iterdir()} == {
        "matrix.html", "matrix.md", "matrix.csv", "matrix.json",
    }  # fmt: skip
    rows = list(csv.DictReader((out / "matrix.csv").open(encoding="utf-8")))
    assert [row["source"] for row in rows] == [folders[0]] * 2 + [folders[1]] * 2
    assert (
        Matrix.model_validate_json((out / "matrix.json").read_text()).columns[1].device == "phone"
    )
    assert _main(["report", *folders, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema_version"] == 1
    assert _main(["report", *folders, "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if line.startswith("|")]
    assert [line.count("|") for line in heads] == [4, 4, 4, 4]
