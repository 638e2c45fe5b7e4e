"""NNCF beside ours: its file goes the same way, and the report says whose file is whose."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import deploykit
from deploykit import latency, pipeline, verify
from deploykit.cli import _main
from deploykit.errors import DeploykitError, ExitCode, TargetMissingError, UsageError
from deploykit.pipeline import default_output
from deploykit.quant import nncf_algorithm
from deploykit.recipe_io import build_recipe
from deploykit.report.gates import evaluate_gates
from deploykit.report.markdown import render_markdown
from deploykit.report.model import Report, load_report
from deploykit.targets.registry import Target
from tests.factories import make_parity, make_report

nncf = pytest.importorskip("nncf")
MADE_BY = f"nncf {nncf.__version__}"
TINY = "tests.tiny_models:tiny_hybrid"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("compare") / "out"
    report = deploykit.compress(
        {
            "measure": {"min_samples": 16, "min_seconds": 0.05, "max_seconds": 0.3},
            "verify": {"images": 16, "batch_sizes": [1, 5]},
        },
        model=TINY,
        bits="w8a8",
        compare=["nncf"],
        calib=tiny_data,
        calib_images=32,
        data=tiny_data,
        targets=["cpu-onnxruntime", "cpu-openvino"],
        out=out,
    )
    return out, report


def test_a_comparison_is_one_more_row_everywhere(compared: tuple[Path, Report]) -> None:
    report = compared[1]
    assert [a.path.name for a in report.artifacts] == [
        *("original.onnx", "model.onnx"),
        *("original.xml", "model.xml"),
        "nncf.onnx",
    ]
    assert [(a.artifact, a.format) for a in report.accuracy] == [
        *(("compressed", "onnx"), ("nncf", "onnx")),
        ("compressed", "openvino"),
    ]
    assert all(a.top1_original == 100 and a.top1 >= 90 for a in report.accuracy)
    for target in ("cpu-onnxruntime", "cpu-openvino"):
        timed = report.find_measurement("nncf", target)
        assert timed is not None
        assert timed.ratio is not None
    assert report.layers, "ours are still compared layer by layer"
    assert report.exit_code == 0
    for artifact in report.artifacts:
        if artifact.format == "onnx":
            assert artifact.path.stat().st_size == artifact.bytes


def test_the_report_says_who_quantised_which_file(compared: tuple[Path, Report]) -> None:
    out, report = compared
    made_by = {a.name: a.algorithm for a in report.artifacts}
    ours = f"deploykit {report.deploykit_version}"
    assert made_by == {"original": "", "compressed": ours, "nncf": MADE_BY}
    assert f"by {MADE_BY}" in (out / "report.html").read_text(encoding="utf-8")
    assert f"nncf (w8a8, onnx, {MADE_BY})" in render_markdown(report)
    (record,) = [r for r in report.passes if r.name == "nncf.quantize"]
    assert record.details["version"] == nncf.__version__
    assert record.details["parameters"] == {
        "preset": "mixed",
        "model_type": "transformer",
        "subset_size": 32,
        "fast_bias_correction": True,
    }
    facts = {e.key: e.value for e in onnx.load(out / "nncf.onnx").metadata_props}
    assert (facts["algorithm"], facts["precision"]) == (MADE_BY, "w8a8")
    assert facts["weights"].startswith("module:")


def test_its_file_is_compared_with_itself_unoptimised(compared: tuple[Path, Report]) -> None:
    rows = [row for row in compared[1].parity if row.artifact == "nncf"]
    assert {(row.runtime, row.batch) for row in rows} == {
        (target, batch) for target in ("cpu-onnxruntime", "cpu-openvino") for batch in (1, 5)
    }
    assert {row.reference for row in rows} == {verify.UNOPTIMIZED}
    assert all(row.passed and row.noise_db is not None for row in rows)
    simulated = {row.reference for row in compared[1].parity if row.artifact == "compressed"}
    assert simulated == {"simulation (torch)"}


def test_nncf_alone_makes_the_file_that_ships(
    tiny_options: dict[str, Any], tmp_path: Path, compared: tuple[Path, Report]
) -> None:
    report = deploykit.compress(**tiny_options, algorithm="nncf", bits="w8a8", out=tmp_path / "out")
    assert report.compressed.algorithm == MADE_BY
    assert report.compressed.bytes < report.original.bytes
    assert report.verdict == "ok"
    assert report.layers == []
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "without a simulation its layers can't be compared" in html
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "recipe.yaml", "original.onnx", "model.onnx", "report.json", "report.md", "report.html",
        "environment.json",
    }  # fmt: skip
    # The same model, images and widths as in the comparison: the same codes.
    alone, beside = (
        {i.name: i for i in onnx.load(p).graph.initializer}
        for p in (tmp_path / "out" / "model.onnx", compared[0] / "nncf.onnx")
    )
    assert alone == beside


@pytest.mark.parametrize(("bits", "call"), [("w8a16", "w8a16"), ("w4a16", "w8a16")])
def test_weight_only(bits: str, call: str, tiny_options: dict[str, Any], tmp_path: Path) -> None:
    """The tiny model's only matrix product is its last layer, so nothing gets 4 bits."""
    report = deploykit.compress(
        **tiny_options, algorithm="nncf", bits=bits, targets=["cpu-openvino"], out=tmp_path / "out"
    )
    assert report.compressed.precision == report.bits == call
    assert report.compressed.integer == []
    assert "5 of 5 layers (8-bit on disk)" in report.compressed.wider[0]
    assert any("no layer at 4 bits" in line for line in report.warnings) == (bits == "w4a16")
    assert all(row.passed and row.noise_db is None for row in report.parity)
    assert [r.name for r in report.passes] == ["nncf.compress_weights"]


def test_four_bits_where_there_are_matrix_products() -> None:
    """Of three, the first has 48 inputs, which no group size divides, and the last keeps 8."""
    data = linear_onnx(64, 64, 64)
    found = nncf_algorithm.nncf_onnx(data, "w4a16", list, 0, attention=False)
    assert found.bits == "w4a16"
    assert found.record.details["four_bit_layers"] == 1
    types = [i.data_type for i in onnx.load_model_from_string(found.data).graph.initializer]
    assert types.count(TensorProto.INT4) == 1
    assert "1 of them 4-bit on disk" in found.how_it_runs["wider"][0]


def test_sparse_weights_stay_sparse(tiny_options: dict[str, Any], tmp_path: Path) -> None:
    report = deploykit.compress(
        **tiny_options, algorithm="nncf", bits="w8a8", sparsity="2:4", out=tmp_path / "out"
    )
    assert [r.name for r in report.passes] == ["sparsify", "nncf.quantize"]
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    shapes = {i.name: i for i in graph.initializer if list(i.dims) == [48, 16, 1, 1]}
    (qkv,) = shapes.values()
    groups = numpy_helper.to_array(qkv).reshape(48, 4, 4)
    assert int((groups != 0).sum(-1).max()) == 2


@pytest.mark.parametrize("bits", ["4", "w4a8", "w6a6"])
@pytest.mark.parametrize("how", [["--algorithm", "nncf"], ["--compare", "nncf"]])
def test_other_widths_are_refused_before_any_work(
    bits: str,
    how: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    def worked(*_: object, **__: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(pipeline, "build_backbone", worked)
    assert _main(["compress", "--model", TINY, "--bits", bits, *how]) == ExitCode.USAGE
    (line,) = capfd.readouterr().err.splitlines()
    assert "quantize.bits: must be w8a8, w8a16 or w4a16 for nncf" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"algorithm": "nncf", "preset": "best"}, "quantize.preset: is not for algorithm nncf"),
        ({"algorithm": "nncf", "edge_bits": 6}, "quantize.edge_bits: is not for"),
        ({"algorithm": "nncf", "float_layers": ["x"]}, "quantize.float_layers: is not for"),
        ({"algorithm": "nncf", "compare": ["nncf"]}, "quantize.compare: names nncf twice"),
        ({"algorithm": "ncnf"}, "did you mean nncf?"),
        ({"layer_bits": {"head": "w9a9"}}, "quantize.layer_bits.head: bits 'w9a9'"),
        ({"time_budget_s": 0}, "quantize.time_budget_s: wanted more than 0"),
    ],
)
def test_keys_that_cannot_be_together(section: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_recipe({"model": {"name": "x"}, "quantize": section})
    assert words in str(caught.value)


def test_layer_widths_are_spelled_one_way() -> None:
    widths: dict[str, Any] = {"*.qkv": 8, "head": "W4A16", "stem": "Float"}
    recipe = build_recipe({"model": {"name": "x"}, "quantize": {"layer_bits": widths}})
    assert recipe.quantize.layer_bits == {"*.qkv": "w8a8", "head": "w4a16", "stem": "float"}


def test_its_own_output_folder() -> None:
    recipe = build_recipe({"model": {"name": "x"}, "quantize": {"algorithm": "nncf"}})
    assert default_output(recipe) == Path("out/x-w8a8-nncf")


def test_a_missing_nncf_is_one_line_before_any_work(
    tiny_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)  # makes its import fail
    with pytest.raises(TargetMissingError, match=r"pip install 'deploykit-vision\[nncf\]'"):
        deploykit.compress(**tiny_options, compare=["nncf"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_json_is_the_only_line_on_stdout(
    tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = _main([
        "compress", "--model", TINY, "--compare", "nncf", "-o", str(tmp_path / "o"), "--json",
        "--calib", str(tiny_data), "--set", "measure.min_seconds=0.05",
        "--set", "measure.max_seconds=0.3", "--set", "measure.min_samples=16",
    ])  # fmt: skip
    output = capfd.readouterr()
    assert code == 0, output.err
    (line,) = output.out.splitlines()
    assert [a["name"] for a in json.loads(line)["artifacts"]][-1] == "nncf"
    assert "INFO:nncf" not in output.err


def test_importing_it_sends_nothing_and_leaves_logging_alone() -> None:
    """In a process of its own: NNCF is quiet by itself where pytest is loaded."""
    code = (
        "import logging, sys\n"
        "from deploykit.quant.nncf_algorithm import import_nncf\n"
        "assert 'nncf' not in sys.modules\n"
        "import_nncf()\n"
        "import nncf.telemetry, os\n"
        "assert type(nncf.telemetry.telemetry).__name__ == 'MagicMock'\n"
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'\n"
        "assert logging.getLoggerClass() is logging.Logger\n"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_the_pipeline_does_not_import_it_unasked() -> None:
    code = "import sys, deploykit.pipeline; sys.exit('nncf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_comparison_that_fails_does_not_fail_the_run(
    tiny_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(nncf, "quantize", fail)
    report = deploykit.compress(**tiny_options, compare=["nncf"], out=tmp_path / "beside")
    assert [a.name for a in report.artifacts] == ["original", "compressed"]
    assert any("can't quantise this model" in line for line in report.warnings)
    with pytest.raises(DeploykitError, match="w8a8: no such operator"):
        deploykit.compress(**tiny_options, algorithm="nncf", out=tmp_path / "alone")


def test_a_missed_parity_of_the_other_file_is_a_warning(
    tiny_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = verify.loaded

    def wrong(target: Target, path: Path, threads: int) -> Any:
        run = real(target, path, threads)
        return lambda images: run(images) * 1.5 if path.name == "nncf.onnx" else run(images)

    monkeypatch.setattr(verify, "loaded", wrong)
    report = deploykit.compress(**tiny_options, compare=["nncf"], out=tmp_path / "out")
    assert report.exit_code == 0
    assert any("nncf: its file missed parity" in line for line in report.warnings)
    assert {r.passed for r in report.parity if r.artifact == "nncf"} == {False}
    assert load_report(tmp_path / "out") == report


def test_gates_judge_the_files_a_run_answers_for() -> None:
    other = make_parity(artifact="nncf", passed=False)
    (gate,) = evaluate_gates(make_report(parity=[make_parity(), other]))
    assert gate.passed
    (gate,) = evaluate_gates(make_report(parity=[make_parity(passed=False), other]))
    assert (gate.passed, gate.value) == (False, 1)


def test_an_interrupted_run_does_not_quantise_again(
    tiny_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    options = {**tiny_options, "algorithm": "nncf", "out": tmp_path / "out"}
    with monkeypatch.context() as patch:
        patch.setattr(latency, "measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            deploykit.compress(**options)
    first = (tmp_path / "out" / "model.onnx").read_bytes()

    def again(*_: object, **__: object) -> None:
        raise AssertionError("done before the interruption, done again")

    monkeypatch.setattr(pipeline, "nncf_onnx", again)
    report = deploykit.compress(**options, resume=True)
    assert (tmp_path / "out" / "model.onnx").read_bytes() == first
    assert [r.name for r in report.passes] == ["nncf.quantize"]


def test_the_same_input_gives_the_same_bytes(tiny_data: Path) -> None:
    data = linear_onnx(16, 32, 8)
    images = torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    first, second = (
        nncf_algorithm.nncf_onnx(
            data, "w8a8", lambda size=size: images.split(size), 12, attention=False,
            progress=seen.append,
        ).data
        for size in (4, 5)
    )  # fmt: skip
    assert first == second
    assert sum(seen) % 12 == 0
    assert sum(seen) >= 24


def test_repairs_change_no_value() -> None:
    """Signed codes made unsigned and a convolution's scales flattened: the same reals."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-128, 128, (6, 3, 2, 2), dtype=np.int8)
    scales = rng.uniform(0.01, 0.1, 6).astype(np.float32)
    x = rng.normal(size=(2, 3, 5, 5)).astype(np.float32)

    def model(shape: tuple[int, ...]) -> onnx.ModelProto:
        tensors = {
            "s": np.float32(0.03), "z": np.int8(-17), "w": codes,
            "ws": scales.reshape(shape), "wz": np.zeros(shape, np.int8),
        }  # fmt: skip
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
            helper.make_node("Conv", ["d", "wd"], ["y"]),
        ]
        graph = helper.make_graph(
            nodes, "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 5, 5])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6, 4, 4])],
            [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
            value_info=[helper.make_tensor_value_info("q", TensorProto.INT8, ["n", 3, 5, 5])],
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    runtime = importlib.import_module("onnxruntime")

    def run(proto: onnx.ModelProto) -> np.ndarray[Any, Any]:
        options = runtime.SessionOptions()
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = runtime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        result: np.ndarray[Any, Any] = session.run(None, {"x": x})[0]
        return result

    wanted = run(model((6,)))
    repaired = model((6, 1, 1))
    done = nncf_algorithm._repair(repaired.graph)
    assert done == {"activations_made_unsigned": 1, "scales_flattened": 2}
    tensors = {i.name: numpy_helper.to_array(i) for i in repaired.graph.initializer}
    assert (tensors["z"].dtype, int(tensors["z"])) == (np.dtype(np.uint8), 111)
    np.testing.assert_array_equal(run(repaired), wanted)


def test_warnings_are_heard_and_handlers_come_back() -> None:
    logger = logging.getLogger("deploykit.tests.nncf")
    handler = logging.NullHandler()
    logger.addHandler(handler)
    with pytest.raises(RuntimeError), nncf_algorithm._quiet(logger) as heard:
        logger.warning("two\nlines")
        logger.info("noise")
        raise RuntimeError
    assert heard == ["two lines"]
    assert logger.handlers == [handler]


def linear_onnx(*widths: int) -> bytes:
    """A chain of matrix products with ReLU between, on the means of (n, 3, 4, 4) images."""
    rng = np.random.default_rng(1)
    sides = (48, *widths)
    nodes = [helper.make_node("Flatten", ["image"], ["h0"])]
    tensors = []
    for i, (rows, columns) in enumerate(pairwise(sides)):
        weight = rng.normal(size=(rows, columns)).astype(np.float32) / np.sqrt(rows)
        tensors.append(numpy_helper.from_array(weight.astype(np.float32), f"w{i}"))
        last = i == len(widths) - 1
        nodes.append(
            helper.make_node("MatMul", [f"h{i}", f"w{i}"], ["logits" if last else f"m{i}"])
        )
        if not last:
            nodes.append(helper.make_node("Relu", [f"m{i}"], [f"h{i + 1}"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", widths[-1]])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    data = model.SerializeToString(deterministic=True)
    assert isinstance(data, bytes)
    return data
