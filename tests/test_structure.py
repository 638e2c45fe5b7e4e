"""Models on disk without pickle: equal outputs, equal exports, and files that mean harm."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import safetensors.torch
import torch
from torch import nn

from deploykit.backbones.build import build_backbone
from deploykit.errors import DeploykitError, UsageError
from deploykit.export.onnx import onnx_bytes
from deploykit.export.structure import (
    STRUCTURE_NAME,
    TENSORS_NAME,
    load_model,
    model_bytes,
    save_model,
)
from deploykit.export.structure_ops import find_op, name_of
from deploykit.graph.capture import CapturedModel, capture
from deploykit.graph.edit import layer_name
from deploykit.quant.options import QuantizeOptions
from deploykit.quant.quantize import quantize
from deploykit.recipe import ModelSection
from deploykit.types import WeightsOrigin
from tests.graphs import batches, captured, images, make_backbone, nodes_of, tiny_cnn, tiny_vit
from tests.tiny_models import tiny_hybrid

aten = torch.ops.aten


def pruned_cnn() -> nn.Module:
    """The narrow convolution of the tiny CNN with 24 - 7 channels."""
    network = tiny_cnn()
    narrow, wide = network.narrow, network.wide
    keep = torch.arange(24)[torch.arange(24) % 4 != 1][:17]
    slim, after = nn.Conv2d(16, 17, 1), nn.Conv2d(17, 24, 3, 2, 1)
    with torch.no_grad():
        slim.weight.copy_(narrow.weight[keep])
        slim.bias.copy_(narrow.bias[keep])
        after.weight.copy_(wide.weight[:, keep])
        after.bias.copy_(wide.bias)
    network.narrow, network.wide = slim, after
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cnn": tiny_cnn,
    "hybrid": tiny_hybrid,
    "pruned": pruned_cnn,
    "vit": tiny_vit,
}


def run_onnx(data: bytes, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


@pytest.mark.parametrize("network", NETWORKS)
def test_a_float_model_comes_back_bit_for_bit(network: str, tmp_path: Path) -> None:
    model = captured(NETWORKS[network]())
    save_model(model.graph_module, model.backbone, tmp_path, precision="fp32")
    saved = load_model(tmp_path)
    x = images(3)
    assert torch.equal(saved.graph_module(x), model.graph_module(x))
    assert saved.backbone.preprocessing == model.backbone.preprocessing
    assert (saved.precision, saved.dynamic_batch) == ("fp32", True)
    again = onnx_bytes(saved.graph_module, saved.backbone)
    wanted = onnx_bytes(model.graph_module, model.backbone)
    assert torch.equal(run_onnx(again, x), run_onnx(wanted, x))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_positions_resized_for_another_size_are_saved(mode: str, tmp_path: Path) -> None:
    """As timm's ViTs resize theirs, when the input isn't of the size they were trained at."""

    class Resized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 10, 8, 8)
            self.positions = nn.Parameter(torch.arange(490.0).reshape(1, 10, 7, 7).sin())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            resize = nn.functional.interpolate
            positions = resize(self.positions, size=(4, 4), mode=mode, antialias=True)
            return (self.conv(x) + positions).mean((2, 3))

    model = captured(Resized())
    save_model(model.graph_module, model.backbone, tmp_path, precision="fp32")
    x = images(3)
    assert torch.equal(load_model(tmp_path).graph_module(x), model.graph_module(x))


@pytest.mark.parametrize("bits", [(4, 4), (8, 8)])
@pytest.mark.parametrize("network", ["hybrid", "pruned", "vit"])
def test_a_quantised_model_comes_back_bit_for_bit(
    network: str, bits: tuple[int, int], tmp_path: Path
) -> None:
    model = captured(NETWORKS[network]())
    options = QuantizeOptions(weight_bits=bits[0], input_bits=bits[1])
    made = quantize(model, options, batches())
    save_model(made.graph_module, made.backbone, tmp_path, precision=made.bits)
    saved, x = load_model(tmp_path), images(3)
    assert torch.equal(saved.graph_module(x), made(x))
    assert saved.precision == made.bits
    for op in (torch.ops.deploykit.fake_quantize.default, torch.ops.deploykit.dequantize.default):
        nodes, wanted = nodes_of(saved.graph_module, op), nodes_of(made.graph_module, op)
        assert [layer_name(n) for n in nodes] == [layer_name(n) for n in wanted]
        assert [n.meta.get("quantizes") for n in nodes] == [n.meta.get("quantizes") for n in wanted]
    again = onnx_bytes(saved.graph_module, saved.backbone)
    wanted_file = onnx_bytes(made.graph_module, made.backbone)
    assert torch.equal(run_onnx(again, x), run_onnx(wanted_file, x))


def test_a_fresh_process_needs_no_source_of_the_model(tmp_path: Path) -> None:
    """The network's class is defined in the tests, which the other process cannot import."""
    model = captured(tiny_hybrid())
    save_model(model.graph_module, model.backbone, tmp_path, precision="fp32")
    x = images(2)
    safetensors.torch.save_file({"x": x}, tmp_path / "x.safetensors")
    code = (
        "import sys, safetensors.torch as s\n"
        "from pathlib import Path\n"
        "from deploykit.export.structure import load_model\n"
        "folder = Path(sys.argv[1])\n"
        "saved = load_model(folder)\n"
        "y = saved.graph_module(s.load_file(folder / 'x.safetensors')['x'])\n"
        "s.save_file({'y': y.contiguous()}, folder / 'y.safetensors')\n"
        "assert not any(name.split('.')[0] in ('tests', 'timm') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=tmp_path)
    y = safetensors.torch.load_file(tmp_path / "y.safetensors")["y"]
    assert torch.equal(y, model.graph_module(x))


def test_equal_graphs_give_equal_bytes() -> None:
    first, second = (
        model_bytes(m.graph_module, m.backbone, precision="fp32")
        for m in (captured(tiny_vit()), captured(tiny_vit()))
    )
    assert first == second


def test_no_operator_of_the_list_writes() -> None:
    assert find_op("aten.add.Tensor") is aten.add.Tensor
    assert name_of(aten.add.Tensor) == "aten.add.Tensor"
    for name in (
        "aten.add_.Tensor",
        "aten.add.out",
        "aten.from_file.default",
        "aten.relu_.default",
    ):
        assert find_op(name) is None, name
    for target in (aten.add_.Tensor, aten.from_file.default, print, torch.load):
        assert name_of(target) is None, target


def test_an_operator_outside_the_list_is_not_saved() -> None:
    model = captured(tiny_cnn())
    node = nodes_of(model.graph_module, aten.relu.default)[0]
    node.target = aten.relu_.default
    with pytest.raises(DeploykitError, match=r"aten\.relu_\.default is not in the list"):
        model_bytes(model.graph_module, model.backbone, precision="fp32")


def saved_cnn(folder: Path) -> CapturedModel:
    model = captured(tiny_cnn())
    save_model(model.graph_module, model.backbone, folder, precision="fp32")
    return model


def first(structure: dict[str, Any], op: str) -> dict[str, Any]:
    return next(node for node in structure["nodes"] if node["op"].startswith(op))


def _rename(structure: dict[str, Any], old: str, new: str) -> None:
    text = json.dumps(structure).replace(json.dumps(old), json.dumps(new))
    structure.clear()
    structure.update(json.loads(text))


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version": (lambda s: s.update(version=2), "version 1"),
    "no version": (lambda s: s.pop("version"), "version 1"),
    "unknown key": (lambda s: s.update(pickle="x"), "pickle"),
    "unknown key of a node": (lambda s: s["nodes"][3].update(code="x"), "code"),
    "missing key": (lambda s: s.pop("output"), "output"),
    "unknown operator": (lambda s: first(s, "aten.relu").update(op="aten.nope.default"), "allowed"),
    "operator that writes": (
        lambda s: first(s, "aten.relu").update(op="aten.relu_.default"),
        "aten.relu_.default",
    ),
    "operator that opens files": (
        lambda s: first(s, "aten.relu").update(op="aten.from_file.default", args=["/etc/passwd"]),
        "aten.from_file.default",
    ),
    "python function": (lambda s: first(s, "aten.relu").update(op="os.system"), "os.system"),
    "dunder": (lambda s: first(s, "aten.relu").update(op="aten.__class__.mro"), "allowed"),
    "value before it is made": (
        lambda s: first(s, "aten.conv2d").update(args=[{"node": s["output"]}]),
        "before it is made",
    ),
    "value made twice": (lambda s: s["nodes"].append(s["nodes"][-1]), "twice"),
    "name with code in it": (
        lambda s: _rename(s, s["nodes"][0]["name"], "x); import os; print(os"),
        "plain name",
    ),
    "reserved word": (lambda s: _rename(s, s["nodes"][0]["name"], "class"), "plain name"),
    "keyword with code in it": (
        lambda s: first(s, "aten.relu").update(kwargs={"x=print(1), y": 1}),
        "plain name",
    ),
    "tensor not in the list": (lambda s: first(s, "tensor").update(tensor="other"), "other"),
    "extra tensor": (
        lambda s: s["tensors"].update(
            {"more": {"dtype": "int8", "shape": [1], "parameter": False}}
        ),
        "more",
    ),
    "missing tensor": (lambda s: s["tensors"].pop("head.bias"), "head.bias"),
    "wrong shape": (lambda s: s["tensors"]["head.bias"].update(shape=[11]), "head.bias"),
    "wrong type": (lambda s: s["tensors"]["head.bias"].update(dtype="int32"), "head.bias"),
    "checksum": (lambda s: s.update(tensors_sha256="0" * 64), "SHA-256"),
    "nested arguments": (
        lambda s: first(s, "aten.relu").update(args=[[[[[[[1]]]]]]]),
        "too deep",
    ),
    "huge integer": (lambda s: first(s, "aten.conv2d")["args"].append(10**30), "64 bits"),
    "strange argument": (lambda s: first(s, "aten.relu").update(args=[{"eval": "1"}]), "stands"),
    "memory": (
        lambda s: s["nodes"].append(
            {"name": "big", "op": "aten.zeros.default", "args": [[2**20, 2**20]]}
        ),
        "elements",
    ),
    "list repeated": (
        lambda s: s["nodes"].extend(
            [
                {"name": "parts", "op": "aten.split.Tensor", "args": [{"node": s["output"]}, 1, 1]},
                {"name": "many", "op": "python.mul", "args": [{"node": "parts"}, 10**12]},
            ]
        ),
        "no size",
    ),
    "wrong arguments": (lambda s: first(s, "aten.conv2d").update(args=[1, 2, 3]), "can't be run"),
    "no output": (lambda s: s.update(output="nothing"), "output"),
    "strange output": (lambda s: s.update(output=s["nodes"][0]["name"]), "output"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_bent_structure_is_refused(case: str, tmp_path: Path) -> None:
    saved_cnn(tmp_path)
    path = tmp_path / STRUCTURE_NAME
    structure = json.loads(path.read_text())
    bend, words = HOSTILE[case]
    bend(structure)
    path.write_text(json.dumps(structure))
    with pytest.raises(UsageError) as caught:
        load_model(path)
    text = str(caught.value)
    assert words in text
    assert "\n" not in text
    assert caught.value.exit_code == 2


def test_files_that_are_no_structure(tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(UsageError) as caught:
            load_model(tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such file" in refusal()
    path = tmp_path / STRUCTURE_NAME
    for text in ("", "{", "[1]", "[" * 100_000, '{"version": 1}', "\xff"):
        path.write_text(text, encoding="latin-1")
        refusal()
    saved_cnn(tmp_path)
    tensors = tmp_path / TENSORS_NAME
    data = tensors.read_bytes()
    tensors.write_bytes(data[: len(data) // 2])
    assert "safetensors" in refusal()
    tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "SHA-256" in refusal()
    tensors.unlink()
    assert "no such file" in refusal()


def test_a_tensors_name_cannot_hide_a_modules_own(tmp_path: Path) -> None:
    saved_cnn(tmp_path)
    path, tensors = tmp_path / STRUCTURE_NAME, tmp_path / TENSORS_NAME
    for name in ("forward", 'a"); import os', "__class__", "a..b"):
        structure = json.loads(path.read_text())
        stored = safetensors.torch.load_file(tensors)
        old = next(n for n in sorted(stored) if n not in ("head.weight",))
        stored[name] = stored.pop(old)
        data = safetensors.torch.save(stored)
        _rename(structure, old, name)
        structure["tensors_sha256"] = hashlib.sha256(data).hexdigest()
        folder = tmp_path / "bent"
        folder.mkdir(exist_ok=True)
        (folder / STRUCTURE_NAME).write_text(json.dumps(structure))
        (folder / TENSORS_NAME).write_bytes(data)
        with pytest.raises(UsageError, match="a tensor called"):
            load_model(folder)


@pytest.mark.parametrize("network", ["hybrid", "vit"])
def test_a_saved_model_is_a_backbone_again(network: str, tmp_path: Path) -> None:
    model = captured(NETWORKS[network]())
    save_model(model.graph_module, model.backbone, tmp_path, precision="fp32")
    for name in (tmp_path, tmp_path / STRUCTURE_NAME):
        backbone, _ = build_backbone(ModelSection(name=str(name)), seed=0)
    found, x = capture(backbone), images(3)
    assert found.dynamic_batch
    assert torch.equal(found.graph_module(x), model.graph_module(x))
    layers = (aten.linear.default, aten.conv2d.default)
    names, wanted = (
        [layer_name(node) for node in nodes_of(m.graph_module, *layers)] for m in (found, model)
    )
    assert names == wanted
    options = QuantizeOptions(weight_bits=8, input_bits=8)
    again, once = quantize(found, options, batches()), quantize(model, options, batches())
    assert torch.equal(again(x), once(x))


def test_what_a_saved_model_says_of_its_weights(tmp_path: Path) -> None:
    model = captured(tiny_cnn())
    save_model(model.graph_module, model.backbone, tmp_path, precision="fp32")
    backbone, _ = build_backbone(ModelSection(name=str(tmp_path)), seed=0)
    assert not backbone.weights.trained
    trained = replace(model.backbone, weights=WeightsOrigin(kind="hub", source="hub/cnn"))
    save_model(model.graph_module, trained, tmp_path, precision="fp32")
    backbone, notes = build_backbone(ModelSection(name=str(tmp_path)), seed=0)
    digest = hashlib.sha256((tmp_path / TENSORS_NAME).read_bytes()).hexdigest()
    assert (backbone.weights.kind, backbone.weights.sha256) == ("file", digest)
    assert any("hub/cnn" in note for note in notes)


def test_a_quantised_model_is_not_compressed_again(tmp_path: Path) -> None:
    made = quantize(captured(tiny_cnn()), QuantizeOptions(weight_bits=8, input_bits=8), batches())
    save_model(made.graph_module, made.backbone, tmp_path, precision=made.bits)
    with pytest.raises(UsageError, match="quantised model"):
        build_backbone(ModelSection(name=str(tmp_path)), seed=0)


def test_a_fixed_batch_stays_fixed(tmp_path: Path) -> None:
    model = captured(tiny_cnn())
    save_model(model.graph_module, model.backbone, tmp_path, precision="fp32", dynamic_batch=False)
    assert not load_model(tmp_path).dynamic_batch
    backbone, _ = build_backbone(ModelSection(name=str(tmp_path)), seed=0)
    found = capture(make_backbone(backbone.module))
    assert not found.dynamic_batch
    assert torch.equal(found.graph_module(images(1)), model.graph_module(images(1)))
