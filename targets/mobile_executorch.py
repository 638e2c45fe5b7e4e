"""ExecuTorch with XNNPACK on this CPU."""

from __future__ import annotations

import json
import logging
import re
import tempfile
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import MeasurementError, UsageError, one_line
from deploykit.targets.isolated import IsolatedTarget, one_by_one
from deploykit.targets.registry import FloatArray, Runner, register_target

__all__ = ["MobileExecutorch"]

_PRODUCTS = {
    "XNNFullyConnected": "FullyConnected",
    "XNNConv2d": "Conv",
    "XNNDepthwiseConv2d": "DepthwiseConv",
    "XNNConvTranspose2d": "ConvTranspose",
    "XNNBatchMatrixMultiply": "MatMul",
}
_OUTSIDE = ("convolution", "linear", "addmm", "mm", "bmm")


@register_target("mobile-executorch")
class MobileExecutorch(IsolatedTarget):
    """Programs as a phone runs them, on this machine's processor.

    A batch is its images one after another. The measured process holds torch too, which
    ExecuTorch's Python runtime imports: its memory is not that of the runtime alone.
    """

    name: str
    formats: tuple[str, ...] = ("pte",)
    exporter: str = "executorch"
    floats: str = "float32"
    environment: str = "executorch"

    def import_inside(self) -> None:
        """Import torch and the runtime."""
        _quiet()
        import executorch.runtime
        import torch  # noqa: F401

        executorch.runtime.Runtime.get()

    def runtime_inside(self) -> str:
        """Name, version and float precision."""
        return f"executorch {version('executorch')} with XNNPACK, float32"

    def kernels_inside(self, path: Path) -> dict[str, int]:
        """Layers and products by their operands' types, as the delegates' graphs in the file say.

        ``int8 dynamic`` and ``int4 dynamic`` layers choose their input's grid when they run.
        """
        _quiet()
        from executorch.exir._serialize._program import deserialize_pte_binary

        program = deserialize_pte_binary(path.read_bytes()).program
        counts: Counter[str] = Counter()
        for plan in program.execution_plan:
            for delegate in plan.delegates:
                stored = program.backend_delegate_data[delegate.processed.index].data
                counts.update(_products(_xnnpack_graph(bytes(stored))))
            for operator in plan.operators:
                name = operator.name.removeprefix("aten::")
                if name in _OUTSIDE:
                    counts[f"float portable {name}"] += 1
        return dict(counts)

    def load_inside(self, path: Path, threads: int) -> Runner:
        """A loaded program with XNNPACK's own pool of ``threads`` threads.

        Raises:
            UsageError: the runtime refuses the file.
        """
        _quiet()
        import torch
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime, Verification

        torch.set_num_threads(threads)
        try:
            portable_lib._unsafe_reset_threadpool(threads)
            program = Runtime.get().load_program(path, verification=Verification.Minimal)
            method = program.load_method("forward")
        except Exception as error:  # its exceptions share no base of their own
            message = f"{path}: executorch cannot load it: {one_line(error)}"
            raise UsageError(message) from error

        def run(image: FloatArray, /) -> FloatArray:
            try:
                (logits,) = method.execute((torch.from_numpy(image),))
            except Exception as error:
                message = f"{path}: executorch failed on {image.shape}: {one_line(error)}"
                raise MeasurementError(message) from error
            return np.asarray(logits.numpy(), dtype=np.float32)

        return one_by_one(run)


def _quiet() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _xnnpack_graph(payload: bytes) -> dict[str, Any]:
    """The graph in a delegate's payload; XNNPACK's own schema is in ExecuTorch's package."""
    from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize as xnnpack
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = xnnpack.XNNHeader.from_bytes(payload[: xnnpack.XNNHeader.EXPECTED_LENGTH])
    begin = header.flatbuffer_offset
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        place = Path(folder)
        (place / "schema.fbs").write_bytes(xnnpack._get_schema_bytes())
        (place / "graph.bin").write_bytes(payload[begin : begin + header.flatbuffer_size])
        _flatc_decompile(
            folder, str(place / "schema.fbs"), str(place / "graph.bin"), ["--raw-binary"]
        )
        text = (place / "graph.json").read_text(encoding="utf-8")
    graph = json.loads(re.sub(r":\s*(-?)inf\b", r": \1Infinity", text))
    assert isinstance(graph, dict)
    return graph


def _products(graph: dict[str, Any]) -> Counter[str]:
    """Layers and products of a graph by name, with the precision in front."""
    types: dict[int, str] = {}
    for value in graph["xvalues"]:
        union = value["xvalue_union"]
        tensor = union.get("tensor_value") or union
        types[tensor["id_out"]] = tensor["datatype"].removeprefix("xnn_datatype_")
    counts: Counter[str] = Counter()
    for node in graph["xnodes"]:
        kind = _PRODUCTS.get(node["xnode_union_type"])
        if kind is not None:
            union = node["xnode_union"]
            weight = types[union["filter_id"] if "filter_id" in union else union["input2_id"]]
            counts[f"{_precision(types[union['input1_id']], weight)} {kind}"] += 1
    return counts


def _precision(source: str, weight: str) -> str:
    if weight == "fp32":
        return "float"
    bits = "int4" if weight.endswith("int4") else "int8"
    return f"{bits} dynamic" if source == "qdint8" else bits
