"""Small ONNX files, good and hostile, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]


def constant(name: str, value: Any, dtype: Any = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.array(value, dtype), name)


def make_model(
    nodes: Sequence[onnx.NodeProto],
    initializers: Sequence[TensorProto],
    *,
    opset: int = 17,
    batch: int | str = "batch",
    size: int | str = 8,
    output: str = "logits",
) -> onnx.ModelProto:
    """A graph from ``image`` (batch, 3, size, size) to ``logits``."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, size, size])
    logits = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", "classes"])
    graph = helper.make_graph(list(nodes), "tiny", [image], [logits], list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    return model


def head(source: str, features: int, classes: int = 4) -> tuple[list[Any], list[TensorProto]]:
    """Pool, flatten, and a linear layer to ``logits``."""
    rng = np.random.default_rng(5)
    nodes = [
        helper.make_node("GlobalAveragePool", [source], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["logits"], transB=1),
    ]
    weights = [
        constant("head.weight", rng.standard_normal((classes, features))),
        constant("head.bias", rng.standard_normal(classes)),
    ]
    return nodes, weights


def tiny_model(**options: Any) -> onnx.ModelProto:
    """One convolution and a head."""
    rng = np.random.default_rng(4)
    nodes, weights = head("features", 6)
    weights.append(constant("stem.weight", rng.standard_normal((6, 3, 3, 3))))
    stem = helper.make_node("Conv", ["image", "stem.weight"], ["features"], name="stem")
    return make_model([stem, *nodes], weights, **options)


def write(folder: Path, model: onnx.ModelProto | bytes, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path
