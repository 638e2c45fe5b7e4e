"""Every format in the registry, on models small enough for all of them."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor

from deploykit.errors import DeploykitError, UsageError
from deploykit.export import onnx_exporters
from deploykit.export.onnx import lower_onnx
from deploykit.export.parity import compare, make_reference
from deploykit.export.registry import Source, get_exporter, list_exporters
from deploykit.graph.capture import CapturedModel
from deploykit.graph.quantized import QuantizedModel
from deploykit.quant.quantize import QuantizeOptions, quantize
from deploykit.quantizing import SYMMETRY
from deploykit.targets.registry import get_target, list_targets
from deploykit.types import Artifact
from tests.graphs import captured, images
from tests.test_units import HOSTS

MOBILE = ("executorch", "litert", "ncnn")  # each in an environment of its own
FORMATS = [
    pytest.param(name, marks=pytest.mark.mobile if name in MOBILE else ())
    for name in list_exporters()
]
BITS = {"fp32": None, "w8a8": (8, 8), "w4a8": (4, 8)}


def model_at(name: str, bits: str, symmetry: str) -> tuple[CapturedModel, QuantizedModel | None]:
    make, size = HOSTS[name]
    model = captured(make(), size)
    widths = BITS[bits]
    if widths is None:
        return model, None
    options = QuantizeOptions(*widths, symmetry=symmetry)  # type: ignore[arg-type]
    return model, quantize(model, options, lambda: [images(16, size, seed=1)])


def test_an_unknown_format_is_one_line() -> None:
    with pytest.raises(UsageError, match="unknown format 'onx'; did you mean: onnx"):
        get_exporter("onx")


@pytest.mark.parametrize("target", list_targets())
def test_every_target_has_an_exporter_whose_files_it_loads(target: str) -> None:
    chosen = get_target(target)
    assert get_exporter(chosen.exporter).suffix.lstrip(".") in chosen.formats


@pytest.mark.parametrize(
    ("host", "bits"), [("vit", "fp32"), ("vit", "w8a8"), ("vit", "w4a8"), ("cnn", "w8a8")]
)
@pytest.mark.parametrize("name", FORMATS)
def test_the_file_computes_what_the_graph_computes(
    name: str, host: str, bits: str, tmp_path: Path
) -> None:
    exporter = get_exporter(name)
    if (reason := exporter.available()) is not None:
        pytest.skip(reason)
    model, quantized = model_at(host, bits, SYMMETRY[exporter.profile])
    lowered = quantized or model
    source = Source(lowered.graph_module, model.backbone, bits)
    path = tmp_path / f"model{exporter.suffix}"
    try:
        made = exporter.export(source, path)
    except DeploykitError as error:
        assert "\n" not in str(error)
        pytest.skip(f"the format refuses it: {error}")
    assert path.exists()
    pixels = images(8, HOSTS[host][1], seed=3)
    runs = dict([reader] if (reader := exporter.reader(path)) else [])
    for target in map(get_target, list_targets()):
        if target.name == "cpu-torch-compiled":
            continue  # its compiler takes minutes for all of these: tests/test_torch_targets.py
        if target.exporter == name and target.available() is None:
            session = target.load(path, 1)
            runs[target.name] = lambda x, run=session: torch.from_numpy(run(x.numpy()))
    assert runs, "nothing here runs it"
    floats = model.graph_module(pixels)
    graph_module = lowered.graph_module
    rounds = bits in ("w8a8", "w4a8")
    reference = make_reference(
        "graph", graph_module, pixels, floats if rounds else None, 0, graph_module
    )
    artifact = Artifact(
        name="compressed", format=name, path=path, bytes=1, sha256="", weights="",
        precision=made.precision, half=made.half,
    )  # fmt: skip
    for runtime, run in runs.items():
        for batch in (1, 8) if made.dynamic_batch else (1,):
            logits = torch.cat([run(part) for part in pixels.split(batch)])
            row = compare(artifact, runtime, batch, logits, reference, "noise")
            assert row.passed, row.model_dump_json()


def run_onnx(data: bytes, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


@pytest.mark.parametrize("bits", [(16, 16), (4, 4), (8, 8)])
@pytest.mark.parametrize("host", ["cnn", "vit"])
def test_the_other_exporter_makes_the_same_file(
    host: str, bits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, size = HOSTS[host]
    model, x = captured(make(), size), images(5, size, seed=2)
    graph_module = model.graph_module
    if bits != (16, 16):
        options = QuantizeOptions(*bits, symmetry="matmul")
        graph_module = quantize(model, options, lambda: [x]).graph_module
    expected, notes = lower_onnx(graph_module, model.backbone, signed=True)
    assert notes == []

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("not today")

    monkeypatch.setattr(onnx_exporters, "_by_dynamo", refuse)
    found, notes = lower_onnx(graph_module, model.backbone, signed=True)
    assert notes == ["written by the TorchScript exporter; the first refused: not today"]
    for batch in (x, x[:3]):  # neither is the size it was traced with
        torch.testing.assert_close(run_onnx(found, batch), run_onnx(expected, batch))


def test_when_no_exporter_can_the_first_ones_reason_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, size = HOSTS["cnn"]
    model = captured(make(), size)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(onnx_exporters, "_by_dynamo", refuse)
    monkeypatch.setattr(onnx_exporters, "_by_torchscript", lambda *_: 1 / 0)
    with pytest.raises(DeploykitError, match="can't be exported to ONNX: first second"):
        lower_onnx(model.graph_module, model.backbone)


def test_grids_around_zero_hold_what_they_held() -> None:
    _, around = model_at("vit", "w8a8", "all")
    _, free = model_at("vit", "w8a8", "none")
    assert around is not None and free is not None
    wanted = torch.ops.deploykit.fake_quantize.default
    for ours, theirs in zip(
        *([n for n in q.graph_module.graph.nodes if n.target is wanted] for q in (around, free)),
        strict=True,
    ):
        _, scale, zero_point, bits = ours.args
        assert zero_point == 2 ** (bits - 1)
        _, old, old_zero, _ = theirs.args
        assert scale * 127 == pytest.approx(old * max(old_zero, 255 - old_zero), rel=0.02)
