"""Reports as CSV and JUnit XML, the published schema, and the command that writes them."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from deploykit.cli import _main
from deploykit.report.gates import evaluate_gates
from deploykit.report.junit import junit_text, write_junit
from deploykit.report.model import schema_text
from deploykit.report.spreadsheet import COLUMNS, csv_text
from deploykit.types import MachineState, WeightsOrigin
from tests.factories import make_artifact, make_measurement, make_parity, make_report

ROOT = Path(__file__).resolve().parent.parent
EVIL = '=cmd|"/c calc"!A1<script>\x1b[31m\n, "x"'


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def cases(text: str) -> dict[str, ET.Element]:
    return {case.get("name", ""): case for case in ET.fromstring(text).iter("testcase")}


def test_a_row_for_each_file_target_and_batch() -> None:
    report = make_report(
        measurements=[
            make_measurement(artifact="original", precision="fp32", p50_ms=10.4, ratio=None),
            make_measurement(),
            make_measurement(batch=8, p50_ms=20.0),
            make_measurement(target="cpu-openvino", noisy=True),
        ]
    )
    rows = table(csv_text([("a", report)]))
    places = [(row["artifact"], row["target"], row["batch_images"]) for row in rows]
    assert places == [
        ("original", "cpu-onnxruntime", "1"),
        ("compressed", "cpu-onnxruntime", "1"),
        ("compressed", "cpu-onnxruntime", "8"),
        ("compressed", "cpu-openvino", "1"),
    ]
    assert rows[0]["top1_percent"] == "79.4"
    assert rows[0]["drop_points"] == rows[0]["time_ratio"] == ""
    assert (rows[1]["top1_percent"], rows[1]["drop_points"]) == ("79.05", "0.35")
    assert float(rows[2]["throughput_images_per_s"]) == pytest.approx(8 / 0.020)
    assert [row["noisy"] for row in rows] == ["false", "false", "false", "true"]
    assert rows[1]["parity_passed"] == "true"
    assert float(rows[1]["parity_min_sqnr_db"]) == 71.3


def test_files_that_nothing_timed_are_in_the_table() -> None:
    rows = table(csv_text([("a", make_report(measurements=[]))]))
    assert [row["artifact"] for row in rows] == ["original", "compressed"]
    assert {row["p50_ms"] for row in rows} == {""}


def test_a_row_says_all_that_was_measured() -> None:
    states = {
        "before": MachineState(
            cpu_mhz=2100.0, temperature_c=50.5, throttled=3, gpu_throttled=["power cap"]
        ),
        "after": MachineState(
            cpu_mhz=1900.0, throttled=5, gpu_mhz=1500.0, gpu_throttled=["power cap", "heat"]
        ),
        "accelerator": "=GPU",
    }
    plain = make_measurement(ratio_noisy=True)
    full = make_measurement(
        device=plain.device.model_copy(update=states), device_memory_bytes=7, first_call_ms=90.5,
        energy_mj=12.5, energy="RAPL", ran_as="int8", kernels={"int8": 5, "float": 2},
    )  # fmt: skip
    rows = table(csv_text([("a", make_report(measurements=[plain, full]))]))
    first, second = (row for row in rows if row["target"])
    wanted = {
        "accelerator": "'=GPU", "ran_as": "int8", "kernels": "2 float, 5 int8",
        "withheld": "p99 needs 662 samples, got 300", "time_ratio_noisy": "false",
        "device_memory_bytes": "7", "load_ms": "84.0", "first_call_ms": "90.5",
        "energy_mj": "12.5", "energy_source": "RAPL", "governor": "",
        "cpu_mhz_before": "2100.0", "cpu_mhz_after": "1900.0", "temperature_c_before": "50.5",
        "temperature_c_after": "", "throttled_times": "2", "gpu_mhz_after": "1500.0",
        "gpu_temperature_c_after": "", "gpu_throttled": "power cap, heat",
    }  # fmt: skip
    assert {name: second[name] for name in wanted} == wanted
    unknown = {name: value for name, value in first.items() if name in wanted and value}
    kept = {name: wanted[name] for name in ("withheld", "load_ms")}
    assert unknown == {**kept, "time_ratio_noisy": "true"}


def test_csv_has_no_accuracy_of_untrained_weights() -> None:
    report = make_report(weights=WeightsOrigin(kind="random", source="seed 0"))
    for row in table(csv_text([("a", report)])):
        assert row["top1_percent"] == row["drop_points"] == row["accuracy_images"] == ""
        assert row["weights"] == "untrained"


def test_names_are_no_formulas_and_break_no_rows() -> None:
    report = make_report(model=EVIL, artifacts=[make_artifact(algorithm=EVIL)])
    rows = table(csv_text([(EVIL, report), ("-1", report)]))
    assert len(rows) == 2
    for row in rows:
        assert row["model"].startswith("'=cmd")
        assert row["algorithm"].startswith("'=")
        assert "\x1b" not in "".join(row.values())
        assert len(row) == len(COLUMNS)
    assert rows[1]["source"] == "'-1"


def test_every_column_is_documented() -> None:
    documented = re.findall(
        r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs/reports.md").read_text(encoding="utf-8"), re.M
    )
    assert dict(documented) == COLUMNS


def test_junit_tells_failures_from_what_cannot_be_judged() -> None:
    report = make_report(
        parity=[make_parity(), make_parity(batch=8, passed=False),
                make_parity(artifact="nncf", passed=False)],
        measurements=[make_measurement(noisy=True)],
    )  # fmt: skip
    gates = evaluate_gates(report, max_drop=0.1, max_latency_ms=9.0)
    text = junit_text([("", report, gates)])
    found = cases(text)
    kinds = {name: [child.tag for child in case] for name, case in found.items()}
    assert kinds == {
        "parity": ["failure"],
        "max_drop": ["failure"],
        "max_latency_ms": ["error"],
        "compressed onnx on onnxruntime, batch 1": ["system-out"],
        "compressed onnx on onnxruntime, batch 8": ["failure"],
        "nncf onnx on onnxruntime, batch 1": ["skipped"],
    }
    drop = found["max_drop"][0]
    assert drop.get("type") == "accuracy"
    assert "beyond the limit of 0.1 points" in str(drop.get("message"))
    assert found["max_latency_ms"][0].get("type") == "measurement"
    root = ET.fromstring(text)
    counts = [root.get(name) for name in ("tests", "failures", "errors", "skipped")]
    assert counts == ["6", "3", "1", "1"]
    suites = [suite.get("tests") for suite in root]
    assert suites == ["3", "3"]


def test_junit_is_xml_whatever_the_names(tmp_path: Path) -> None:
    report = make_report(model=EVIL + "]]>\ufffe", parity=[make_parity(runtime=EVIL)])
    write_junit(report, None, tmp_path / "j.xml")
    raw = (tmp_path / "j.xml").read_text(encoding="utf-8")
    assert "<script" not in raw
    assert len(cases(raw)) == 2


def test_the_schema_that_is_published_is_the_one_of_the_code() -> None:
    committed = (ROOT / "docs/report.schema.json").read_text(encoding="utf-8")
    assert committed == schema_text(), "deploykit report --schema > docs/report.schema.json"
    assert json.loads(committed)["$id"] == "urn:deploykit:report:1"


def test_the_command_writes_what_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    report = make_report()
    (tmp_path / "report.json").write_text(report.to_json(), encoding="utf-8")
    options = ["--csv", str(tmp_path / "t.csv"), "--junit", str(tmp_path / "t.xml")]
    assert _main(["report", str(tmp_path), *options]) == 0
    assert "shvit_s4 w4a8" in capsys.readouterr().out
    assert len(table((tmp_path / "t.csv").read_text(encoding="utf-8"))) == 2
    assert "max_drop" in cases((tmp_path / "t.xml").read_text(encoding="utf-8"))
    assert _main(["report", "--schema"]) == 0
    assert capsys.readouterr().out == schema_text()


@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["here", "nowhere"]])
def test_reports_that_are_not_there_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[Any],
    arguments: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    Path("here/report.json").write_text(make_report().to_json(), encoding="utf-8")
    assert _main(["report", *arguments, "--csv", "t.csv", "-o", "out"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("deploykit: error: ")
    assert said.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here"]
