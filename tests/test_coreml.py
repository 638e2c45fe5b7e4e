"""Core ML packages compute what their graphs compute, from the graphs' own codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

pytest.importorskip("coremltools")

from deploykit.errors import DeploykitError, TargetMissingError, UsageError
from deploykit.export.coreml import INPUT_NAME, MAX_BATCH, OUTPUT_NAME, Coreml
from deploykit.export.coreml_package import load_program, load_spec
from deploykit.export.coreml_program import computed_in_float32, weight_codes
from deploykit.export.mil_evaluate import MilProgram
from deploykit.export.parity import FLOAT_SQNR_DB, compare, make_reference
from deploykit.export.registry import get_exporter, list_exporters
from deploykit.export.rounding import FLOOR_MARGIN_DB, half_floor_db
from deploykit.graph.edit import constant
from deploykit.graph.signal import sqnr_db
from tests.coreml_models import (
    FULL,
    HALF,
    MODELS,
    Package,
    graph_of,
    model_of,
    package,
    package_of,
    write,
)
from tests.factories import make_artifact
from tests.graphs import SIZE, captured, images, nodes_of

OPS = torch.ops.deploykit
HALF_CASES = [(name, precision) for precision in ("w8a8", "w4a16") for name in MODELS]
FULL_CASES = [("cnn", "fp32"), ("cnn", "w4a4"), ("vit", "w4a4"), ("hybrid", "w4a4")]
CASES = [(*case, "fp16") for case in HALF_CASES] + [(*case, "fp32") for case in FULL_CASES[1:]]


def run(path: Path, batch: Tensor) -> Tensor:
    return Coreml().reader(path)[1](batch)


def weights_of(graph_module: fx.GraphModule) -> dict[str, tuple[np.ndarray[Any, Any], int]]:
    """Codes (out, ...) and bits of each quantised weight of a graph, by name."""
    found = {}
    for node in nodes_of(graph_module, OPS.dequantize.default):
        codes = constant(graph_module, node.args[0])
        assert codes is not None
        _, _, axis, bits = node.args
        if bits <= 8:
            name = str(node.args[0].target).removesuffix("_codes")
            name = f"op_{name}" if name[0].isdigit() else name  # names in MIL begin with a letter
            found[name] = (codes.transpose(0, axis).numpy(), bits)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_float16_package_is_as_near_as_float16_allows(name: str) -> None:
    made = package(name)
    batch = images(6)
    found = sqnr_db(made.graph_module(batch), run(made.path, batch))
    assert found >= half_floor_db(made.graph_module, batch) - FLOOR_MARGIN_DB
    assert made.exported.precision == "fp16"
    assert made.exported.dynamic_batch
    assert computed_in_float32(load_program(made.path)[1].functions["main"]) == {}


@pytest.mark.parametrize(("name", "precision"), FULL_CASES)
def test_float32_package_equals_the_graph(name: str, precision: str) -> None:
    made = package(name, precision, "fp32")
    batch = images(6)
    assert sqnr_db(made.graph_module(batch), run(made.path, batch)) >= FLOAT_SQNR_DB
    assert made.exported.precision == precision


@pytest.mark.parametrize(("name", "precision"), HALF_CASES)
def test_quantised_package_passes_parity(name: str, precision: str) -> None:
    made = package(name, precision)
    batch = images(24)
    found = run(made.path, batch)
    if precision.endswith("a16"):
        floor = half_floor_db(made.graph_module, batch)
        assert sqnr_db(made.graph_module(batch), found) >= floor - FLOOR_MARGIN_DB
        return
    floats = model_of(name).graph_module(batch)
    reference = make_reference("simulation", made.graph_module, batch, floats, seed=0)
    row = compare(make_artifact(half=True), "mil", len(batch), found, reference, "random")
    assert row.passed, row


@pytest.mark.parametrize(("name", "precision", "floats"), CASES)
def test_the_package_holds_our_weight_codes(name: str, precision: str, floats: str) -> None:
    made = package(name, precision, floats)
    wanted = weights_of(made.graph_module)
    spec, program = load_program(made.path)
    found, stored = weight_codes(program.functions["main"])
    assert found.keys() == wanted.keys()
    assert len(wanted) >= 4
    for key, (codes, bits) in wanted.items():
        np.testing.assert_array_equal(found[key], codes, err_msg=key)
        if precision != "w8a8":
            assert stored[key] == ("int4" if bits <= 4 else "int8"), key
    assert spec.specificationVersion == {"w8a8": 8, "w4a16": 9, "w4a4": 9}[precision]


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_the_package_holds_our_scales_and_zero_points(name: str) -> None:
    made = package(name, "w4a4", "fp32")
    nodes = nodes_of(made.graph_module, OPS.fake_quantize.default)
    wanted = Counter((np.float32(node.args[1]), node.args[2]) for node in nodes)
    function = load_program(made.path)[1].functions["main"]
    found: Counter[tuple[np.float32, int]] = Counter()
    for op in function.find_ops(op_type="quantize"):
        stored = 0 if op.zero_point is None else int(op.zero_point.val)
        moved = 128 if op.output_dtype.val == "int8" else 0
        found[np.float32(op.scale.val), stored + moved] += 1
    assert found == wanted


def test_bits_are_paid_for_once() -> None:
    """Four-bit codes are packed: the file is little more than half that of eight-bit ones."""
    counts = Counter[int]()
    for codes, bits in weights_of(graph_of("vit", "w4a16")).values():
        counts[bits] += codes.size
    weights = package("vit", "w4a16").path / "Data/com.apple.CoreML/weights/weight.bin"
    function = load_program(package("vit", "w4a16").path)[1].functions["main"]
    others = sum(
        np.asarray(op.outputs[0].val).nbytes
        for op in function.find_ops(op_type="const")
        if np.asarray(op.outputs[0].val).dtype == np.float16
    )
    alignment = 128 * len(function.find_ops(op_type="const"))
    assert weights.stat().st_size <= counts[4] // 2 + counts[8] + others + alignment


def test_a_symmetric_quantiser_becomes_signed_codes_without_zero_point(tmp_path: Path) -> None:
    class Symmetric(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            wide = OPS.fake_quantize(x, 0.02, 128, 8)
            return wide.flatten(2).mean(2) + OPS.fake_quantize(x, 0.25, 8, 4).flatten(2).amax(2)

    made = package_of(Symmetric(), FULL, tmp_path)
    function = load_program(made.path)[1].functions["main"]
    kinds = {op.output_dtype.val: op.zero_point for op in function.find_ops(op_type="quantize")}
    assert kinds["int8"] is None
    batch = images(4)
    assert sqnr_db(made.graph_module(batch), run(made.path, batch)) >= 120


class Tables(nn.Module):
    """A logarithmic and a twin grid, their values on an 8-bit grid or not."""

    def __init__(self, step: float, shift: float) -> None:
        super().__init__()
        codes = [255, 180, 128, 90, 64, 45, 32, 23, 16, 11, 8, 6, 4, 3, 2, 0]
        scale = step or 1 / 255
        self.values = [scale * code for code in codes]
        self.twins = [scale * (code - 128) for code in sorted(codes)]
        self.step, self.shift = step, shift

    def forward(self, x: Tensor) -> Tensor:
        step, shift = self.step, self.shift
        part = OPS.fake_quantize_log(x.softmax(-1), shift, 2.0, 0.25, self.values, step, 0)
        twin = OPS.fake_quantize_twin(x, shift, 0.03125, 0.25, self.twins, step, 128)
        return (part + twin).flatten(1)


@pytest.mark.parametrize("step", [0.0, 0.0078125])
@pytest.mark.parametrize("shift", [0.0, 0.01])
@pytest.mark.parametrize("exporter", [FULL, HALF], ids=["fp32", "fp16"])
def test_grids_without_equal_steps_are_exact(
    step: float, shift: float, exporter: Coreml, tmp_path: Path
) -> None:
    """Also in a float16 file: the codes are computed in float32, of what float16 holds."""
    made = package_of(Tables(step, float(np.float32(shift))), exporter, tmp_path)
    batch = images(2).half().float()
    wanted, found = made.graph_module(batch), run(made.path, batch)
    if exporter.floats == "fp16":
        # softmax is float16 before it is coded, so a few of its codes are the neighbour's
        assert ((wanted - found).abs() > 2e-3).double().mean() < 0.01
    else:
        assert (wanted != found).double().mean() < 0.001
    assert any("table" in note for note in made.exported.notes)
    assert len(load_program(made.path)[1].functions["main"].find_ops(op_type="gather")) == 2


def test_scales_that_float16_cannot_hold_stay_float32(tmp_path: Path) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            codes = torch.randint(-127, 128, (8, 3, 3, 3), generator=generator)
            codes[3] = 0  # its scale doesn't matter
            self.register_buffer("codes", codes.to(torch.int8))
            self.register_buffer("scale", torch.full((8,), 2.2e-6))

        def forward(self, x: Tensor) -> Tensor:
            weight = OPS.dequantize(self.codes, self.scale, 0, 8)
            return nn.functional.conv2d(x, weight).flatten(2).amax(2) * 1e3

    made = package_of(Small(), HALF, tmp_path)
    assert any("stays float32" in note and "conv" in note for note in made.exported.notes)
    batch = images(4)
    assert sqnr_db(made.graph_module(batch), run(made.path, batch)) >= 55


def test_names_types_and_batches() -> None:
    made = package("cnn")
    spec = load_spec(made.path)
    (given,), (answer,) = spec.description.input, spec.description.output
    assert (given.name, answer.name) == (INPUT_NAME, OUTPUT_NAME)
    float32 = 65568  # MLMultiArrayDataTypeFloat32
    assert given.type.multiArrayType.dataType == answer.type.multiArrayType.dataType == float32
    assert list(given.type.multiArrayType.shape) == [1, 3, SIZE, SIZE]
    first = given.type.multiArrayType.shapeRange.sizeRanges[0]
    assert (first.lowerBound, first.upperBound) == (1, MAX_BATCH)
    program = MilProgram(made.path)
    batch = images(5)
    assert torch.allclose(program(batch)[3:4], program(batch[3:4]), atol=2e-3)
    assert spec.specificationVersion == 7


def test_fixed_batch() -> None:
    made = package("vit", dynamic=False)
    assert not made.exported.dynamic_batch
    description = load_spec(made.path).description.input[0]
    assert list(description.type.multiArrayType.shape) == [1, 3, SIZE, SIZE]
    assert not description.type.multiArrayType.shapeRange.sizeRanges
    batch = images(1)
    wanted = half_floor_db(made.graph_module, batch) - FLOOR_MARGIN_DB
    assert sqnr_db(made.graph_module(batch), run(made.path, batch)) >= wanted


class Reversed(nn.Module):
    """Six axes in an order in which none stays beside its neighbour."""

    def forward(self, x: Tensor) -> Tensor:
        parts = x.reshape(-1, 3, 4, 8, 4, 8).permute(0, 5, 4, 3, 2, 1)
        return parts.reshape(x.shape[0], 8, -1).mean(2)


def test_a_batch_that_cannot_be_dynamic_is_fixed_and_said(tmp_path: Path) -> None:
    made = package_of(Reversed(), FULL, tmp_path)
    assert not made.exported.dynamic_batch
    assert any("batch fixed at 1" in note and "rank" in note for note in made.exported.notes)
    batch = images(1)
    assert sqnr_db(made.graph_module(batch), run(made.path, batch)) >= 120


def test_equal_graphs_give_equal_bytes_that_say_nothing_of_the_maker(tmp_path: Path) -> None:
    made = package("cnn", "w8a8")
    again = tmp_path / "again.partial"  # any name will do
    write(made.graph_module, again, Coreml(), "w8a8")

    def contents(path: Path) -> dict[str, bytes]:
        files = (file for file in path.rglob("*") if file.is_file())
        return {str(file.relative_to(path)): file.read_bytes() for file in files}

    assert contents(made.path) == contents(again)
    assert len(contents(again)) == 3
    for name, data in contents(again).items():
        for private in (str(Path.cwd()), str(Path.home()), "site-packages", "conversion_date"):
            assert private.encode() not in data, name


def test_metadata_is_in_the_package() -> None:
    about = load_spec(package("cnn", "w8a8").path).description.metadata
    assert about.shortDescription == "tiny"
    assert about.userDefined["deploykit.precision"] == "w8a8"
    assert about.userDefined["weights"] == "untrained"


def test_what_became_of_the_layers() -> None:
    assert package("cnn").exported.layers == {"float": 5}
    assert package("cnn", "w8a8").exported.layers == {"int8": 5}
    layers = package("vit", "w4a16").exported.layers
    assert layers == {"float": 4, "int4 weights": 8, "int8 weights": 2}


def test_palettes(tmp_path: Path) -> None:
    exporter = Coreml(palettize_bits=4)
    graph_module = graph_of("vit", "fp32")
    path = tmp_path / "x"
    made = Package(graph_module, path, write(graph_module, path, exporter))
    assert "palette weights" in made.exported.layers
    assert "palettes of 16" in made.exported.precision
    assert any("coremltools" in note for note in made.exported.notes)
    batch = images(6)
    found = sqnr_db(made.graph_module(batch), run(made.path, batch))
    assert 5 < found < half_floor_db(made.graph_module, batch) - FLOOR_MARGIN_DB
    for weight in (
        load_program(made.path)[1].functions["main"].find_ops(op_type="constexpr_lut_to_dense")
    ):
        assert len(np.unique(weight.materialized_val_inference())) <= 16


def test_palettes_are_refused_for_codes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="w8a8 has codes already"):
        write(graph_of("cnn", "w8a8"), tmp_path / "x", Coreml(palettize_bits=4), "w8a8")


def test_the_registry_knows_the_format() -> None:
    assert "coreml" in list_exporters()
    exporter = get_exporter("coreml")
    assert (exporter.suffix, exporter.profile) == (".mlpackage", "asymmetric")
    assert exporter.available() is None


def test_coremltools_is_left_as_it_was(tmp_path: Path) -> None:
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    before = dict(_TORCH_OPS_REGISTRY.name_to_func_mapping)
    write(graph_of("cnn", "w8a8"), tmp_path / "good", Coreml(), "w8a8")
    with pytest.raises(DeploykitError):
        package_of(Unknown(), HALF, tmp_path)
    assert before == _TORCH_OPS_REGISTRY.name_to_func_mapping


class Unknown(nn.Module):
    """Has an operator that coremltools can't translate."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x).mean((2, 3))


def test_a_graph_that_cannot_be_converted_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        DeploykitError, match=r"tiny can't be exported to Core ML: .*bessel"
    ) as info:
        write(captured(Unknown()).graph_module, tmp_path / "x", Coreml())
    assert "\n" not in str(info.value)
    assert not (tmp_path / "x").exists()


def test_missing_coremltools_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    graph_module = graph_of("cnn", "fp32")
    monkeypatch.setitem(sys.modules, "coremltools", None)
    assert r"deploykit-vision[coreml]" in (Coreml().available() or "")
    with pytest.raises(TargetMissingError, match="pip install"):
        write(graph_module, tmp_path / "x", Coreml())
    with pytest.raises(TargetMissingError, match="pip install"):
        Coreml().reader(tmp_path)


def test_missing_scikit_learn_is_only_missed_for_palettes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    assert Coreml().available() is None
    assert "scikit-learn" in (Coreml(palettize_bits=4).available() or "")
    with pytest.raises(TargetMissingError, match="scikit-learn"):
        write(graph_of("cnn", "fp32"), tmp_path / "x", Coreml(palettize_bits=4))


def test_nothing_is_printed_and_listing_imports_nothing(tmp_path: Path) -> None:
    """In a fresh process: coremltools talks when it is imported and when it converts."""
    script = f"""
import sys
from deploykit.export.registry import get_exporter, list_exporters
get_exporter(list_exporters()[0])
assert "coremltools" not in sys.modules
from pathlib import Path
from tests.coreml_models import package
made = package("cnn")
get_exporter("coreml").reader(made.path)
print("quiet", file=open({str(tmp_path / "done")!r}, "w"))
"""
    done = subprocess.run([sys.executable, "-W", "error::UserWarning:coremltools", "-c", script],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "oremltools" not in done.stderr
    assert "%|" not in done.stderr
    assert (tmp_path / "done").exists()


def test_damaged_weights_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.mlpackage"
    shutil.copytree(package("cnn").path, path)
    weights = path / "Data/com.apple.CoreML/weights/weight.bin"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(DeploykitError, match=r"x\.mlpackage: its program can't be read: ") as info:
        Coreml().reader(path)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("harm", ["none", "manifest", "garbage", "network"])
def test_what_is_no_package_is_one_line(harm: str, tmp_path: Path) -> None:
    import coremltools

    path = tmp_path / "x.mlpackage"
    if harm != "none":
        (path / "Data").mkdir(parents=True)
        (path / "Manifest.json").write_text("{}")
    if harm in ("garbage", "network"):
        items = {"a": {"path": "model.mlmodel"}}
        manifest = {"itemInfoEntries": items, "rootModelIdentifier": "a"}
        (path / "Manifest.json").write_text(json.dumps(manifest))
        spec = coremltools.proto.Model_pb2.Model()
        spec.neuralNetwork.layers.add()
        data = b"\xff" * 64 if harm == "garbage" else spec.SerializeToString()
        (path / "Data" / "model.mlmodel").write_bytes(data)
    with pytest.raises(DeploykitError, match=r"x\.mlpackage: wanted") as info:
        Coreml().reader(path)
    assert "\n" not in str(info.value)
