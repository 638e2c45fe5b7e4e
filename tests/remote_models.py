"""Models that devices load in a moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SHAPE = (3, 8, 8)
CLASSES = 4


def tiny_onnx(path: Path, seed: int = 0) -> Path:
    """Images (N, 3, 8, 8) to logits (N, 4): one linear layer with random weights."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((int(np.prod(SHAPE)), CLASSES)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes, "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", CLASSES])],
        [numpy_helper.from_array(weight, "weight"),
         numpy_helper.from_array(rng.standard_normal(CLASSES).astype(np.float32), "bias")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path
