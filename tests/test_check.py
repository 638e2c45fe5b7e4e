"""``deploykit check`` with limits from a file, several targets, JUnit, Markdown and a history."""

from __future__ import annotations

import json
import multiprocessing
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from matplotlib.figure import Figure

from deploykit.cli import _main
from deploykit.errors import ExitCode, UsageError
from deploykit.history import append_history, history_entry, read_history
from deploykit.report import history_page
from deploykit.report.gates import TargetLimits, evaluate_gates
from deploykit.report.history_page import render_history, render_svg
from deploykit.report.model import Report
from tests.factories import make_accuracy, make_artifact, make_measurement, make_report

OPENVINO = "cpu-openvino"


def save(report: Report, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")


def two_targets(**openvino: Any) -> dict[str, Any]:
    """Reports on two targets, each with a file of its own."""
    ratio = openvino.pop("ratio", 0.6)
    slow = make_measurement(
        target=OPENVINO, format="openvino", ratio=ratio, ratio_low=ratio - 0.02,
        ratio_high=ratio + 0.02, **openvino,
    )  # fmt: skip
    files = [make_artifact(), make_artifact(format="openvino", bytes=9_500_000)]
    return {"measurements": [make_measurement(), slow], "artifacts": files}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save(make_report(**two_targets()), tmp_path / "run")
    return tmp_path / "run"


def test_every_target_has_gates_of_its_own() -> None:
    report = make_report(**two_targets())
    gates = {
        gate.name: gate
        for gate in evaluate_gates(
            report,
            max_latency_ratio=0.5,
            max_bytes=9_400_000,
            targets=["all"],
            baseline=make_report(**two_targets(ratio=0.5)),
        )
    }
    failed = {name for name, gate in gates.items() if not gate.passed}
    assert failed == {
        f"max_latency_ratio[{OPENVINO}]", "max_bytes[openvino]",
        f"baseline_latency_ratio[{OPENVINO}]",
    }  # fmt: skip
    assert gates["max_latency_ratio[cpu-onnxruntime]"].passed
    own = evaluate_gates(
        report, max_latency_ratio=0.5,
        targets={"cpu-onnxruntime": TargetLimits(), OPENVINO: TargetLimits(None, 0.7)},
    )  # fmt: skip
    assert all(gate.passed for gate in own)
    with pytest.raises(UsageError, match="either one target or several"):
        evaluate_gates(report, target=OPENVINO, targets=["all"])
    with pytest.raises(UsageError, match="did you mean cpu-openvino"):
        evaluate_gates(report, max_latency_ms=1, targets=["cpu-onnxruntime", "cpu-openvin"])


@pytest.mark.parametrize(
    ("ratio", "passed", "words"),
    [
        (0.424, True, "no difference that the intervals can't explain"),
        (0.44, True, "no difference that the intervals can't explain"),
        (0.46, False, "slower, and the intervals don't meet: noise can't explain it"),
        (0.40, True, "faster, and the intervals don't meet"),
    ],
)
def test_a_regression_is_what_the_intervals_cannot_explain(
    ratio: float, passed: bool, words: str
) -> None:
    m = make_measurement(ratio=ratio, ratio_low=ratio - 0.01, ratio_high=ratio + 0.01)
    gates = evaluate_gates(make_report(measurements=[m]), baseline=make_report())
    gate = next(g for g in gates if g.name == "baseline_latency_ratio")
    assert gate.passed is passed and gate.reason.endswith(words)
    assert gate.exit_code == (0 if passed else ExitCode.LATENCY)


def test_limits_come_from_a_file_and_options_win(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save(make_report(**two_targets()), run.parent / "main")
    limits = run.parent / "gates.yaml"
    limits.write_text(
        "max_drop: 1.0\nmax_latency_ratio: 0.5\nbaseline: main\n"
        f"targets:\n  cpu-onnxruntime:\n  {OPENVINO}: {{max_latency_ratio: 0.65}}\n"
    )
    assert _main(["check", str(run), "--limits", str(limits), "--json"]) == 0
    names = {gate["name"] for gate in json.loads(capfd.readouterr().out)}
    assert names >= {f"max_latency_ratio[{OPENVINO}]", "baseline_bytes[openvino]", "max_drop"}
    assert _main(["check", str(run), "--limits", str(limits), "--max-drop", "0.1"]) == 3
    assert _main(["check", str(run), "--limits", str(limits), "--max-bytes", "9"]) == 4
    assert _main(["check", str(run), "--max-ratio", "0.5", "--targets", "all"]) == 4
    assert OPENVINO in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_dorp: 1\n", "gates.yaml:1: max_dorp: unknown key; did you mean max_drop?"),
        ("max_drop: -1\n", "max_drop: wanted at least 0, got -1"),
        ("max_drop: yes\n", "max_drop: wanted a number"),
        ("targets:\n  a: {max_ms: 1}\n", "gates.yaml:2: targets.a.max_ms: unknown key"),
        ("- 1\n", "wanted a mapping"),
        ("max_drop: 1\nbaseline: nowhere\n", "nowhere"),
    ],
)
def test_a_wrong_limits_file_is_one_line(
    text: str, words: str, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (run.parent / "gates.yaml").write_text(text)
    code = _main(["check", str(run), "--limits", str(run.parent / "gates.yaml")])
    assert code == ExitCode.USAGE
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line


def test_junit_and_markdown_say_what_failed(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    junit = run.parent / "junit.xml"
    options = ["--max-bytes", "10", "--max-drop", "1", "--junit", str(junit), "--markdown"]
    assert _main(["check", str(run), *options]) == ExitCode.LATENCY
    cases = {case.get("name"): case for case in ET.parse(junit).getroot().iter("testcase")}
    failure = cases["max_bytes"].find("failure")
    assert failure is not None and "9120345" in (failure.get("message") or "")
    assert cases["max_drop"].find("failure") is None
    out = capfd.readouterr().out
    assert "❌ 1 of 3 gates failed (exit code 4)" in out
    assert re.search(r"\| max_bytes \| \*\*no\*\* \|", out)


def test_the_history_grows_and_names_what_is_damaged(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_SHA", "abc123" * 6)
    file = run.parent / "history.jsonl"
    command = ["check", str(run), "--history", str(file), "--max-drop", "1"]
    assert _main(command) == 0
    with file.open("a") as stream:
        stream.write('{"time": "20')  # cut off
    assert _main([*command, "--max-bytes", "10"]) == ExitCode.LATENCY
    entries, warnings = read_history(file)
    assert warnings == [f"{file}:2: skipped: not a whole line of JSON"]
    assert [e.exit_code for e in entries] == [0, ExitCode.LATENCY]
    first = entries[0]
    assert (first.commit, first.model, first.top1) == ("abc123" * 6, "shvit_s4", 79.05)
    assert [(t.target, t.ratio) for t in first.times] == [
        ("cpu-onnxruntime", 0.424), (OPENVINO, 0.6),
    ]  # fmt: skip
    capfd.readouterr()
    page = run.parent / "trend.html"
    assert _main(["history", str(file), "-o", str(page), "--json"]) == 0
    output = capfd.readouterr()
    assert len(json.loads(output.out)) == 2
    assert "skipped" in output.err and "max_bytes" in output.err
    text = page.read_text()
    assert text.count("<svg role=") == 4 and "://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)


def test_a_history_of_hostile_names_and_other_machines() -> None:
    evil = "<script>alert(1)</script>"
    other = make_measurement()
    device = other.device.model_copy(update={"device": "Another CPU"})
    moved = make_report(model=evil, measurements=[other.model_copy(update={"device": device})])
    entries = [history_entry(r, []) for r in (make_report(), make_report(model=evil), moved)]
    page, svg = render_history(entries, ["line 7 <b>"]), render_svg(entries)
    for text in (page, svg):
        assert "<script" not in text and "&lt;script&gt;" in text
    assert "run 3: another machine" in page and "run 2: another model" in page
    assert "line 7 &lt;b&gt;" in page
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg")
    assert set(re.findall(r"var\((--\w+)\)", svg)) <= set(re.findall(r"(--\w+):", svg))


def test_lines_join_what_compares_and_remarks_are_one_for_another_model() -> None:
    reports = [make_report(bits=bits) for bits in ("w8a8", "w8a8", "w4a8", "w8a8")]
    entries = [history_entry(report, []) for report in reports]
    axes = Figure().add_subplot()
    history_page._line(axes, entries, [1.0, 0.0, 2.0, None], history_page._what_is_rated)
    assert [list(zip(*line.get_data(), strict=True)) for line in axes.lines] == [
        [(1, 1.0), (2, 0.0)], [(3, 2.0)],
    ]  # fmt: skip
    remarks = history_page._changes(entries)
    assert [remark.split(" (")[0] for remark in remarks] == [
        "run 3: another model", "run 4: another model",
    ]  # fmt: skip
    headings, rows = history_page._headings(entries), history_page._rows(entries)
    assert "on cpu-onnxruntime" in headings[3] and rows[0][3].startswith("0.424")
    assert rows[0][:3] == (f"1: {entries[0].time.replace('T', ' ')[:16]}", "hold", "79.05 %")


def test_an_untrained_run_has_no_accuracy_in_its_history() -> None:
    from deploykit.types import WeightsOrigin

    report = make_report(weights=WeightsOrigin(kind="untrained", source="none"))
    entry = history_entry(report, [])
    assert entry.accuracy is None
    assert "Top-1" not in "".join(re.findall("<figcaption>.*?<", render_history([entry], [])))


def add_lines(file: Path, name: str) -> None:
    entry = history_entry(make_report(model=name * 5000), [])
    for _ in range(20):
        append_history(file, entry)


def test_two_jobs_at_once_lose_no_line(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=add_lines, args=(file, name)) for name in "ab"]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0]
    entries, warnings = read_history(file)
    assert not warnings
    assert sorted(e.model[0] for e in entries) == ["a"] * 20 + ["b"] * 20


@pytest.mark.parametrize("content", ["", "nonsense\n", '{"schema_version": 9}\n'])
def test_a_file_that_is_no_history(
    content: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "history.jsonl"
    file.write_text(content)
    assert _main(["history", str(file)]) == ExitCode.USAGE
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="choose another --history"):
        append_history(tmp_path / "file" / "history.jsonl", history_entry(make_report(), []))
    report = make_report(accuracy=[make_accuracy()])
    save(report, tmp_path / "run")
    code = _main(["check", str(tmp_path / "run"), "--junit", str(tmp_path / "file" / "j.xml")])
    assert code == ExitCode.USAGE
