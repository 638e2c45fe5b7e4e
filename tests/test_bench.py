"""``deploykit bench``: files of anybody's, measured over batches and threads."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from deploykit.bench import BenchGap, BenchReport, load_bench, run_bench
from deploykit.bench_output import bench_csv, print_bench
from deploykit.cli import main
from deploykit.errors import DeploykitError, TargetMissingError, UsageError
from deploykit.export.structure import save_model
from deploykit.file_input import FileInput, read_input
from deploykit.progress import silent
from deploykit.targets.device import allowed_cores
from tests.graphs import captured
from tests.tiny_models import SIZE, tiny_hybrid


def save(path: Path, dims: list[int | str], *, precision: str = "", width: int = 4) -> Path:
    """Convolution, mean over the image, done; and a weight that is listed as an input, too."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((width, 3, 3, 3)).astype(np.float32), "w")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Flatten", ["g"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [width, 3, 3, 3]),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, dims),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [dims[0], width])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    if precision:
        helper.set_model_props(model, {"precision": precision})
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def report(folder: Path) -> BenchReport:
    files = [
        save(folder / "first.onnx", ["n", 3, 8, 8], precision="fp32"),
        save(folder / "second.onnx", ["n", 3, "h", "w"], width=8),
    ]
    return run_bench(
        files, targets=["cpu-onnxruntime"], batches=[1, 4], min_seconds=0.05, max_seconds=0.3,
        command="deploykit bench", steps=silent,
    )  # fmt: skip


def test_every_combination_is_measured_beside_the_first_file(report: BenchReport) -> None:
    found = [(row.measurement.artifact, row.measurement.batch) for row in report.rows]
    assert found == [(f"{name}.onnx", batch) for batch in (1, 4) for name in ("first", "second")]
    for row in report.rows:
        m = row.measurement
        assert row.reference == "first.onnx"
        assert (m.ratio is None) == (m.artifact == "first.onnx")
        assert row.images_per_s == pytest.approx(1000 * m.batch / m.p50_ms)
        assert (m.format, m.device.threads) == ("onnx", 1)
        assert m.peak_rss_bytes
        assert m.load_ms
        assert m.kernels
    assert report.input_shape == (3, 8, 8)  # the second file leaves its size open
    assert [file.precision for file in report.files] == ["fp32", "as the file says"]
    assert report.exit_code == (7 if any(row.measurement.noisy for row in report.rows) else 0)


def test_the_report_comes_back_and_is_shown(
    report: BenchReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    path.write_text(report.to_json())
    assert load_bench(path) == report
    with pytest.raises(SystemExit) as ended:
        main(["report", str(path)])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "first.onnx" in shown
    assert "cpu-onnxruntime, 1 thread, batch 4" in shown
    assert "second.onnx ran as float32 (1 float Conv)" in shown
    with pytest.raises(SystemExit) as ended:
        main(["report", str(path), "--json"])
    assert json.loads(capsys.readouterr().out)["kind"] == "bench"
    with pytest.raises(SystemExit) as ended:
        main(["report", str(path), "--markdown"])
    assert ended.value.code == 2
    path.write_text(json.dumps(json.loads(report.to_json()) | {"rows": 1}))
    with pytest.raises(UsageError, match="not a valid bench report: rows"):
        load_bench(path)
    path.write_text('{"schema_version": 1}')
    assert load_bench(path) is None


def test_csv_has_a_line_for_every_row(report: BenchReport) -> None:
    rows = list(csv.DictReader(io.StringIO(bench_csv(report))))
    assert len(rows) == 4
    assert [row["batch"] for row in rows] == ["1", "1", "4", "4"]
    assert float(rows[0]["p50_ms"]) == report.rows[0].measurement.p50_ms
    assert rows[0]["ratio"] == ""
    assert int(rows[0]["bytes"]) == report.files[0].path.stat().st_size


def test_what_is_doubtful_or_missing_is_said(report: BenchReport) -> None:
    first = report.rows[0]
    noisy = first.measurement.model_copy(update={"noisy": True, "withheld": "too [busy]"})
    gap = BenchGap(target="t", threads=2, batch=16, files=["a"], reason="out of memory")
    bent = report.model_copy(
        update={"rows": [first.model_copy(update={"measurement": noisy})], "gaps": [gap]}
    )
    text = io.StringIO()
    print_bench(bent, Console(file=text, width=200))
    assert "noisy: first.onnx on cpu-onnxruntime, batch 1: too [busy]" in text.getvalue()
    assert "not measured: t, 2 threads, batch 16: out of memory" in text.getvalue()


def test_files_say_what_they_take(folder: Path, tmp_path: Path) -> None:
    fixed = save(tmp_path / "fixed.onnx", [2, 3, 8, 10], precision="w8a8")
    assert read_input(fixed) == FileInput((3, 8, 10), 2, "w8a8")
    model = captured(tiny_hybrid(), SIZE)
    save_model(model.graph_module, model.backbone, tmp_path, precision="fp32", dynamic_batch=False)
    assert read_input(tmp_path / "structure.json") == FileInput((3, SIZE, SIZE), 1, "fp32")
    unknown = tmp_path / "program.pte"
    unknown.write_bytes(b"x")
    assert read_input(unknown) == FileInput()


def test_openvino_files_say_what_they_take(tmp_path: Path) -> None:
    openvino = pytest.importorskip("deploykit.runtimes").import_openvino()
    model = openvino.convert_model(str(save(tmp_path / "a.onnx", ["n", 3, 8, 8])))
    model.set_rt_info("w4a8", ["deploykit", "precision"])
    openvino.save_model(model, str(tmp_path / "a.xml"))
    assert read_input(tmp_path / "a.xml") == FileInput((3, 8, 8), None, "w4a8")


def test_refusals_are_one_line(tmp_path: Path) -> None:
    any_size = save(tmp_path / "any.onnx", ["n", 3, "h", "w"])
    fixed = save(tmp_path / "fixed.onnx", [1, 3, 8, 8])
    other = save(tmp_path / "other.onnx", ["n", 3, 16, 16])
    flat = save(tmp_path / "flat.onnx", ["n", 3, 8, 8])
    model = onnx.load(flat)
    del model.graph.input[1].type.tensor_type.shape.dim[3]
    onnx.save(model, flat)
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"\xff\xffno model")
    odd = tmp_path / "model.txt"
    odd.write_text("x")
    program = tmp_path / "program.pte"
    program.write_text("x")
    cores = len(allowed_cores())
    ort = ["cpu-onnxruntime"]
    cases: list[tuple[list[Path], dict[str, object], type[DeploykitError], str]] = [
        ([fixed], {"batches": [1, 4]}, UsageError, "fixed at 1, so --batch 4 can't be run"),
        ([any_size], {}, UsageError, "give --img-size"),
        ([fixed, other], {}, UsageError, "fixed.onnx wants height 8 and .*other.onnx 16"),
        ([fixed], {"img_size": 32}, UsageError, "wants height 8 and --img-size 32"),
        ([fixed], {"threads": [cores + 1]}, UsageError, f"may run on {cores} cores"),
        ([fixed], {"batches": [0]}, UsageError, "1 or more"),
        ([fixed, fixed], {}, UsageError, "given twice"),
        ([flat], {}, UsageError, "wanted images"),
        ([garbage], {}, UsageError, "onnx cannot read it"),
        ([tmp_path / "gone.onnx"], {}, UsageError, "no such file"),
        ([odd], {"img_size": 8}, UsageError, "no target knows its suffix"),
        ([program], {"img_size": 8, "targets": ort}, UsageError, "--targets mobile-executorch"),
        ([fixed], {"targets": ["cpu-nothing"]}, UsageError, "unknown target"),
        ([fixed], {"targets": ["coreml"]}, TargetMissingError, "Core ML runs on macOS only"),
    ]
    for files, options, kind, pattern in cases:
        if "macOS" in pattern and sys.platform == "darwin":
            continue
        with pytest.raises(kind, match=pattern) as caught:
            run_bench(files, steps=silent, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_the_command_refuses_before_it_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = save(tmp_path / "fixed.onnx", [1, 3, 8, 8])
    there = tmp_path / "there.json"
    there.write_text("kept")
    for options, pattern in (
        (["--batch", "1,x"], "--batch wants whole numbers"),
        (["-o", str(there)], "there already"),
        (["--csv", str(tmp_path / "no" / "a.csv")], "make it first"),
        ([], ""),
    ):
        arguments = ["bench", *([str(fixed)] if pattern else []), *options]
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert pattern in said
        assert len(said.splitlines()) == 1
    assert there.read_text() == "kept"
