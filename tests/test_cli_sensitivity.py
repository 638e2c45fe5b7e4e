"""``deploykit sensitivity`` from its options to its files."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import Console

from deploykit.cli import _main
from deploykit.errors import ExitCode, UsageError
from deploykit.export.onnx import onnx_bytes
from deploykit.latency_table import load_latency_table
from deploykit.quant.quantize import QuantizeOptions, quantize
from deploykit.quant.sensitivity import measure_sensitivity
from deploykit.recipe_io import load_recipe
from deploykit.report.sensitivity_model import SensitivityReport
from deploykit.report.sensitivity_page import print_sensitivity, render_page
from deploykit.sensitivity import parse_widths
from deploykit.sensitivity_budget import BudgetAsked, allocate_bits, parse_bytes
from deploykit.types import WeightsOrigin
from tests.graphs import batches, captured, tiny_cnn, tiny_vit

TINY = "tests.tiny_models:tiny_hybrid"
COMMAND = ["sensitivity", "--model", TINY, "--images", "8", "--set", "calibration.batch_size=4"]
FREE = ["--set", "quantize.keep_8bit=[]"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent))


def run(capfd: pytest.CaptureFixture[str], *options: str) -> dict[str, object]:
    code = _main([*COMMAND, "-o", "out", "--json", *options])
    output = capfd.readouterr()
    assert code == 0, output.err
    (line,) = output.out.splitlines()
    return json.loads(line)


def bits_of(found: dict[str, object]) -> dict[str, str]:
    return {row["layer"]: row["chosen"] for row in found["layers"]}  # type: ignore[attr-defined, index]


def average(found: dict[str, object]) -> float:
    rows = [row for row in found["layers"] if row["weights"]]  # type: ignore[attr-defined, index]
    spent = sum(row["weights"] * int(row["chosen"][1]) for row in rows)
    return spent / sum(row["weights"] for row in rows)


@pytest.mark.parametrize("method", ["ilp", "greedy"])
def test_a_budget_becomes_a_recipe(method: str, capfd: pytest.CaptureFixture[str]) -> None:
    found = run(capfd, "--avg-bits", "5", "--method", method, *FREE)
    assert found["schema_version"] == 1
    assert average(found) <= 5
    assert found["budget"]["spent"] == pytest.approx(average(found))  # type: ignore[index]
    recipe = load_recipe(Path("out/recipe.yaml"))
    assert recipe.quantize.bits == found["base_bits"]
    assert recipe.quantize.layer_bits == found["layer_bits"]
    # A layer's bits are those of its own, or the base's.
    for name, bits in bits_of(found).items():
        expected = recipe.quantize.layer_bits.get(name, recipe.quantize.bits)
        assert bits == expected or (name == "0" and bits.endswith("a8"))  # the image keeps 8
    page = Path("out/sensitivity.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "<svg" in page
    assert "$" not in page  # no formula that isn't typeset
    assert all(f'<code title="{name}">' in page for name in bits_of(found))
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "recipe.yaml", "sensitivity.html", "sensitivity.json",
    ]  # fmt: skip


def test_without_a_budget_every_layer_has_the_base_but_those_that_collapse(
    capfd: pytest.CaptureFixture[str],
) -> None:
    found = run(capfd, "--bits", "8,3", "--set", "quantize.bits=3", *FREE)
    at_base = {c["layer"]: c["keep"] for c in found["collapse"] if c["bits"] in ("w3a3", "w3a8")}  # type: ignore[attr-defined, index]
    assert found["base_bits"] == "w3a3"
    assert at_base, "3 bits ought to ruin a layer of a random network"
    assert found["layer_bits"] == at_base


def test_compress_carries_the_recipe_out(capfd: pytest.CaptureFixture[str]) -> None:
    found = run(capfd, "--avg-bits", "5", *FREE)
    fast = ["--set", "measure.min_seconds=0.05", "--set", "measure.max_seconds=0.3",
            "--set", "measure.min_samples=16", "--set", "verify.images=8"]  # fmt: skip
    assert _main(["compress", "--recipe", "out/recipe.yaml", "-o", "made", "--json", *fast]) == 0
    report = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert {row["layer"]: row["bits"] for row in report["layers"]} == bits_of(found)


def test_a_latency_budget_with_a_table_takes_the_fast_layers(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Float costs nothing but time: only as many layers as must leave it do."""
    found = run(capfd, "--bits", "float,8")
    layers = [row["layer"] for row in found["layers"]]  # type: ignore[attr-defined, index]
    table = {name: {"float": 2.0, "w8a8": 1.0} for name in layers}
    Path("times.json").write_text(json.dumps({"version": 1, "layers": table}))
    limit = str(2.0 * len(layers) - 1)
    found = run(capfd, "--bits", "float,8", "--max-latency-ms", limit,
                "--latency-table", "times.json", "--overwrite")  # fmt: skip
    chosen = list(bits_of(found).values())
    assert chosen.count("w8a8") == 1
    scores = {r["layer"]: r["scores"]["w8a8"] for r in found["layers"]}  # type: ignore[attr-defined, index]
    assert bits_of(found)[min(scores, key=scores.__getitem__)] == "w8a8"


def test_a_latency_budget_measures_its_table_if_none_is_given(
    capfd: pytest.CaptureFixture[str],
) -> None:
    found = run(capfd, "--bits", "float,8", "--max-latency-ms", "1e6",
                "--set", "measure.min_seconds=0.1")  # fmt: skip
    table = load_latency_table(Path("out/latency.json"))
    assert set(table) == set(bits_of(found))
    assert all(set(row) == {"float", "w8a8"} and min(row.values()) > 0 for row in table.values())
    assert set(bits_of(found).values()) == {"float"}


def test_bytes_are_those_of_the_file_that_compress_writes() -> None:
    model = captured(tiny_vit())
    layers = measure_sensitivity(model, QuantizeOptions(8, 8), [(4, 8)], batches(), "sqnr")
    _, budget = allocate_bits(BudgetAsked("max-bytes", 1e9, "ilp"), layers, model.graph_module)
    made = quantize(model, QuantizeOptions(4, 8), batches())
    proto = onnx.load_from_string(onnx_bytes(made.graph_module, model.backbone))
    bits = {onnx.TensorProto.INT4: 4, onnx.TensorProto.INT8: 8}
    stored = sum(
        int(np.prod(t.dims)) * bits.get(t.data_type, 32) / 8
        for t in proto.graph.initializer
        if t.data_type != onnx.TensorProto.INT64
    )
    assert budget.spent == pytest.approx(stored, rel=0.05)


def test_the_size_of_narrow_codes_is_that_of_their_container() -> None:
    """6-bit codes are stored as bytes, so they save nothing in the file."""
    model = captured(tiny_cnn())
    layers = measure_sensitivity(model, QuantizeOptions(8, 8), [(8, 8), (6, 6)], batches(), "sqnr")
    asked = BudgetAsked("max-bytes", 1e9, "ilp")
    chosen, budget = allocate_bits(asked, layers, model.graph_module)
    assert set(chosen.values()) == {"w8a8"}
    with pytest.raises(UsageError, match=f"least these widths can come to is {budget.spent:,.10g}"):
        allocate_bits(
            dataclasses.replace(asked, limit=budget.spent - 1), layers, model.graph_module
        )


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--avg-bits", "2"], "least these widths can come to is"),
        (["--avg-bits", "5", "--max-bytes", "6MB"], "one budget"),
        (["--avg-bits", "0"], "--avg-bits must be a positive number"),
        (["--max-bytes", "six"], "6MB"),
        (["--latency-table", "x.json"], "--max-latency-ms"),
        (
            ["--max-latency-ms", "1", "--latency-table", "x.json"],
            "cannot read latency table x.json",
        ),
        (["--bits", "8,99"], "bits '99'"),
        (["--bits", "float"], "at least one width"),
        (["--metric", "hessian"], "hessian"),
        (["--images", "0"], "images"),
        (["--calib", "missing"], "no such file or folder"),
        (["-o", "/proc/nowhere"], "/proc/nowhere"),
        (["-o", "taken"], "isn't empty"),
        (["-o", "taken", "--overwrite"], "no run of this command made"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    options: list[str], wanted: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("taken").mkdir()
    Path("taken/theirs.txt").write_text("keep me")
    before = sorted(Path().rglob("*"))
    assert _main([*COMMAND, "--bits", "8,4", *options]) == ExitCode.USAGE
    output = capfd.readouterr()
    (error,) = [line for line in output.err.splitlines() if line.startswith("deploykit: error:")]
    assert wanted in error
    made = {Path("out")}  # the folder of the default output stays
    assert set(Path().rglob("*")) - made == set(before)


@pytest.mark.parametrize(
    ("text", "size"),
    [("6MB", 6_000_000), ("1.5 kB", 1500), ("4MiB", 4 * 2**20), ("123", 123), ("2GB", 2 * 10**9)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_widths_are_read_widest_first() -> None:
    assert parse_widths("4, 8,w4a8,float,4") == ("float", "w8a8", "w4a8", "w4a4")


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"a": 1}', '{"a": {"w8a8": -1}}', '{"a": {"w8a8": true}}']
)
def test_a_latency_table_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"times\.json"):
        load_latency_table(path)


def untrained(kind: str) -> SensitivityReport:
    return SensitivityReport(
        deploykit_version="0", command="", started="", seconds=0, model="<b>m</b>",
        weights=WeightsOrigin(kind=kind, source="x"), metric="kl", metric_text="KL",
        calibration="", images=1, bits=["float", "w8a8"], base_bits="w8a8", layer_bits={},
        layers=[{"layer": "a", "op": "linear", "weights": 1, "scores": {"float": 0, "w8a8": 1.0},
                 "sqnr_db": {"float": float("inf"), "w8a8": 3.0}}],
    )  # fmt: skip


def test_untrained_weights_are_said_loudly_and_names_are_escaped() -> None:
    report = untrained("random")
    stream = io.StringIO()
    print_sensitivity(report, Console(file=stream, width=100), Path("out"))
    assert "UNTRAINED WEIGHTS" in stream.getvalue()
    page = render_page(report)
    assert "Untrained weights" in page
    assert "<b>m</b>" not in page
    assert '"Infinity"' in report.to_json()
    assert SensitivityReport.model_validate_json(report.to_json()) == report


def test_untrained_weights_nobody_asked_for_are_exit_8(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from deploykit import sensitivity

    real = sensitivity.build_backbone

    def untrained_backbone(*arguments: object) -> object:
        backbone, notes = real(*arguments)  # type: ignore[arg-type]
        origin = WeightsOrigin(kind="untrained", source="no weights were found")
        return dataclasses.replace(backbone, weights=origin), notes

    monkeypatch.setattr(sensitivity, "build_backbone", untrained_backbone)
    assert _main([*COMMAND, "--bits", "8", "-o", "out"]) == ExitCode.UNTRAINED
    assert "UNTRAINED WEIGHTS" in capfd.readouterr().out
