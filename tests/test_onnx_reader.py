"""The ONNX reader against ONNX Runtime and against the networks the files came from."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from deploykit.backbones.build import build_backbone
from deploykit.export.onnx import onnx_bytes
from deploykit.graph.capture import capture
from deploykit.graph.edit import layer_name
from deploykit.graph.signal import sqnr_db
from deploykit.onnx_import.graph import read_graph
from deploykit.onnx_import.limits import Limits, check_model, parse
from deploykit.onnx_import.module import OnnxModule, build_module
from deploykit.recipe import ModelSection
from tests.graphs import captured, images, make_backbone, nodes_of, tiny_cnn, tiny_vit
from tests.onnx_files import constant, head, make_model, tiny_model, write
from tests.tiny_models import tiny_hybrid

aten = torch.ops.aten
PATH = Path("model.onnx")


def read(data: bytes) -> OnnxModule:
    """The reader alone, without the process that guards it."""
    proto = parse(data, PATH)
    check_model(proto, PATH, Limits())
    return build_module(read_graph(proto, PATH), PATH)


def by_onnxruntime(data: bytes, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def by_torchscript(module: nn.Module, opset: int, size: int = 32, fixed: bool = False) -> bytes:
    file = io.BytesIO()
    axes = {} if fixed else {"image": {0: "batch"}}
    example = torch.zeros(1 if fixed else 2, 3, size, size)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (example,), file, dynamo=False, opset_version=opset,
            input_names=["image"], dynamic_axes=axes,
        )  # fmt: skip
    return file.getvalue()


def by_dynamo(module: nn.Module, size: int = 32) -> bytes:
    file = io.BytesIO()
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        example = (torch.zeros(2, 3, size, size),)
        program = torch.onnx.export(
            module, example, dynamo=True, dynamic_shapes=shapes, verbose=False
        )
        assert program is not None
        program.save(file)
    return file.getvalue()


def by_deploykit(module: nn.Module, size: int = 32) -> bytes:
    model = captured(module, size)
    return onnx_bytes(model.graph_module, model.backbone)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cnn": tiny_cnn,
    "hybrid": tiny_hybrid,
    "vit": tiny_vit,
}
WRITERS: dict[str, Callable[[nn.Module], bytes]] = {
    "torchscript-17": lambda module: by_torchscript(module, 17),
    "torchscript-14": lambda module: by_torchscript(module, 14),
    "dynamo": by_dynamo,
    "deploykit": by_deploykit,
}
LAYERS = (aten.linear.default, aten.conv2d.default, aten.matmul.default, aten.softmax.int)
NORMS = (aten.layer_norm.default, aten.group_norm.default, aten.gelu.default)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_files_of_each_exporter_become_the_network_again(network: str, writer: str) -> None:
    original = NETWORKS[network]()
    data = WRITERS[writer](original)
    module, x = read(data), images(3)
    assert sqnr_db(by_onnxruntime(data, x), module(x)) >= 80
    wanted = captured(original)
    found = capture(make_backbone(module))
    assert found.dynamic_batch
    assert torch.equal(found.graph_module(x), module(x))
    for op in (*LAYERS, *NORMS):
        count = len(nodes_of(found.graph_module, op))
        assert count == len(nodes_of(wanted.graph_module, op)), op
    layers = (aten.linear.default, aten.conv2d.default)
    names = [layer_name(node) for node in nodes_of(found.graph_module, *layers)]
    assert names == [layer_name(node) for node in nodes_of(wanted.graph_module, *layers)]


def test_a_fixed_batch_is_kept() -> None:
    data = by_torchscript(tiny_cnn(), 13, fixed=True)
    module, x = read(data), images(1)
    assert module.batch == 1
    with pytest.raises(ValueError, match="fixes the batch at 1"):
        module(images(2))
    found = capture(make_backbone(module))
    assert not found.dynamic_batch
    assert sqnr_db(by_onnxruntime(data, x), found.graph_module(x)) >= 80


def test_a_decomposed_layer_norm_is_one_again() -> None:
    """As torch wrote it before opset 17."""
    network = tiny_vit()
    data = by_torchscript(network, 14)
    operators = {node.op_type for node in onnx.load_from_string(data).graph.node}
    assert "LayerNormalization" not in operators
    assert "Erf" in operators
    norms = [m for m in read(data).modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == sum(isinstance(m, nn.LayerNorm) for m in network.modules())


def _one(op: str, inputs: list[str], *, channels: int = 3, **attributes: Any) -> list[Any]:
    node = helper.make_node(op, ["image", *inputs], ["features"], **attributes)
    nodes, weights = head("features", channels)
    return [[node, *nodes], weights]


CASES: dict[str, tuple[int, list[Any], list[onnx.TensorProto]]] = {
    "conv uneven pads": (
        17,
        _one("Conv", ["w"], channels=4, pads=[0, 1, 2, 1], strides=[2, 2]),
        [constant("w", np.random.default_rng(0).standard_normal((4, 3, 3, 3)))],
    ),
    "conv same lower": (
        17,
        _one("Conv", ["w"], channels=4, auto_pad="SAME_LOWER", strides=[2, 2]),
        [constant("w", np.random.default_rng(0).standard_normal((4, 3, 3, 3)))],
    ),
    "average pool": (
        17,
        _one("AveragePool", [], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        [],
    ),
    "max pool ceil": (
        17,
        _one("MaxPool", [], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
        [],
    ),
    "max pool uneven": (17, _one("MaxPool", [], kernel_shape=[2, 2], pads=[0, 0, 1, 1]), []),
    "softmax of old": (11, _one("Softmax", [], axis=1), []),
    "softmax of new": (13, _one("Softmax", [], axis=1), []),
    "clip": (17, _one("Clip", ["lo", "hi"]), [constant("lo", -0.5), constant("hi", 0.25)]),
    "clip at 6": (17, _one("Clip", ["lo", "hi"]), [constant("lo", 0), constant("hi", 6)]),
    "hard sigmoid": (17, _one("HardSigmoid", [], alpha=0.3), []),
    "tanh gelu": (20, _one("Gelu", [], approximate="tanh"), []),
    "subtracted from": (17, _one("Neg", []), []),
    "power": (17, _one("Pow", ["two"]), [constant("two", 2)]),
    "prelu": (17, _one("PRelu", ["s"]), [constant("s", [[[0.1]], [[0.2]], [[0.3]]])]),
    "pad by axes": (
        18,
        _one("Pad", ["pads", "", "axes"], mode="edge"),
        [constant("pads", [1, 2], np.int64), constant("axes", [3], np.int64)],
    ),
    "backward slice": (
        17,
        _one("Slice", ["s", "e", "a", "t"]),
        [constant(n, [v], np.int64) for n, v in zip("seat", (-1, -(2**31), 3, -1), strict=True)],
    ),
    "resize": (
        17,
        _one("Resize", ["", "scales"], mode="linear", coordinate_transformation_mode="half_pixel"),
        [constant("scales", [1, 1, 2, 2])],
    ),
    "instance norm": (
        17,
        _one("InstanceNormalization", ["w", "b"]),
        [constant("w", [1, 2, 3]), constant("b", [0.1, 0.2, 0.3])],
    ),
    "batch norm": (
        17,
        _one("BatchNormalization", ["w", "b", "m", "v"]),
        [constant(n, [1, 2, 3]) for n in "wbmv"],
    ),
    "gather": (17, _one("Gather", ["i"], axis=1), [constant("i", [2, 0, -2], np.int64)]),
    "max": (17, _one("Max", ["c"]), [constant("c", 0.2)]),
    "reduce by attribute": (11, _one("ReduceMax", [], axes=[3]), []),
    "reduce by input": (18, _one("ReduceL2", ["axes"]), [constant("axes", [3], np.int64)]),
}


@pytest.mark.parametrize("case", CASES)
def test_an_operator_means_what_onnxruntime_says(case: str) -> None:
    opset, (nodes, weights), more = CASES[case]
    data = make_model(nodes, [*weights, *more], opset=opset).SerializeToString()
    x = images(3, 8)
    wanted = by_onnxruntime(data, x)
    assert wanted.std() > 1e-3
    assert sqnr_db(wanted, read(data)(x)) >= 80


@pytest.mark.parametrize("shape", [(3,), (1, 3), (6, 1)])
def test_only_a_vector_as_long_as_the_output_is_a_bias(shape: tuple[int, ...]) -> None:
    """(6, 1) would be added along another dimension."""
    rng = np.random.default_rng(1)
    weights = [
        constant("w", rng.standard_normal((8, 3))),
        constant("b", rng.standard_normal(shape)),
    ]
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["rows"], axes=[2], keepdims=0),
        helper.make_node("ReduceMean", ["rows"], ["flat"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["flat", "w"], ["product"]),
        helper.make_node("Add", ["b", "product"], ["logits"]),
    ]
    data = make_model(nodes, weights).SerializeToString()
    module, x = read(data), images(6, 8)
    assert sqnr_db(by_onnxruntime(data, x), module(x)) >= 80
    (layer,) = (m for m in module.modules() if isinstance(m, nn.Linear))
    assert (layer.bias is not None) == (shape == (3,))


def test_a_layer_like_pattern_with_another_constant_is_left_alone() -> None:
    """x / 2 * (1 + erf(x / 1.5)) is no GELU."""
    nodes, weights = head("features", 3)
    chain = [
        helper.make_node("Div", ["image", "c"], ["d"]),
        helper.make_node("Erf", ["d"], ["e"]),
        helper.make_node("Add", ["e", "one"], ["a"]),
        helper.make_node("Mul", ["image", "a"], ["m"]),
        helper.make_node("Mul", ["m", "half"], ["features"]),
    ]
    x = images(2, 8)
    for divisor, fused in ((2**0.5, True), (1.5, False)):
        more = [constant("c", divisor), constant("one", 1), constant("half", 0.5)]
        data = make_model([*chain, *nodes], [*weights, *more]).SerializeToString()
        module = read(data)
        assert sqnr_db(by_onnxruntime(data, x), module(x)) >= 80
        graph = capture(make_backbone(module, 8)).graph_module
        assert len(nodes_of(graph, aten.gelu.default)) == int(fused)


def test_names_from_a_file_cannot_hide_a_modules_own() -> None:
    model = tiny_model()
    for tensor, name in zip(
        model.graph.initializer, ("forward", "__class__.x", "a.weight"), strict=True
    ):
        for node in model.graph.node:
            for at, given in enumerate(node.input):
                if given == tensor.name:
                    node.input[at] = name
        tensor.name = name
    data, x = model.SerializeToString(), images(2, 8)
    assert sqnr_db(by_onnxruntime(data, x), read(data)(x)) >= 80


def test_a_path_builds_a_backbone(tmp_path: Path) -> None:
    path = write(tmp_path, tiny_model())
    backbone, notes = build_backbone(ModelSection(name=str(path)), seed=0)
    assert (backbone.name, backbone.num_classes, backbone.preprocessing.size) == ("model", 4, 8)
    assert backbone.weights.kind == "file"
    assert backbone.weights.trained
    assert any("ImageNet's mean and std" in note for note in notes)
    assert not any(p.requires_grad for p in backbone.module.parameters())
    assert {"stem", "head"} <= dict(backbone.module.named_modules()).keys()


REAL = {
    "shvit_s4": 256,
    "deit_tiny_patch16_224": 224,
    "swin_tiny_patch4_window7_224": 224,
    "convnext_tiny": 224,
    "mobilenetv2_100": 224,
}


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["torchscript", "dynamo", "deploykit"])
@pytest.mark.parametrize("name", REAL)
def test_real_backbones(name: str, writer: str, tmp_path: Path) -> None:
    """Random weights; the whole way, the guarding process included."""
    size = REAL[name]
    original, _ = build_backbone(ModelSection(name=name, weights="random"), seed=0)
    write_ = {
        "torchscript": lambda: by_torchscript(original.module, 17, size),
        "dynamo": lambda: by_dynamo(original.module, size),
        "deploykit": lambda: by_deploykit(original.module, size),
    }[writer]
    path = write(tmp_path, write_())
    backbone, _ = build_backbone(ModelSection(name=str(path)), seed=0)
    found = capture(backbone)
    x = images(3, size)
    wanted = original.module(x)
    assert found.dynamic_batch
    assert sqnr_db(wanted, found.graph_module(x)) >= 80
    reference = capture(original).graph_module
    for op in LAYERS:
        assert len(nodes_of(found.graph_module, op)) == len(nodes_of(reference, op)), op
