"""In ExecuTorch's environment: from a ``torch.export`` archive to a ``.pte`` file."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["write"]

_PRODUCTS = ("convolution", "linear", "addmm", "mm", "bmm")


def write(program: str, path: str) -> dict[str, int]:
    """Lower the archive at ``program`` with XNNPACK's delegate and write ``path``.

    Returns:
        Layers and matrix products by what computes them: ``int8``, ``int8 dynamic``,
        ``int4 dynamic`` and ``float`` in XNNPACK, ``portable`` outside it; and ``delegates``.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch
    import torch.ao.quantization.fx._decomposed  # the operators in the archive
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    exported = torch.export.load(program)
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    layers = _count(edge.exported_program().graph_module)
    with Path(path).open("wb") as file:
        edge.to_executorch().write_to_file(file)
    _try(path, exported.example_inputs[0])
    return layers


def _try(path: str, example: Any) -> None:
    """Load and run the file once: an operator that the runtime lacks shows only then."""
    from executorch.runtime import Runtime, Verification

    program = Runtime.get().load_program(path, verification=Verification.Minimal)
    try:
        program.load_method("forward").execute(example)
    except Exception as error:
        text = " ".join(str(error).split())
        message = f"the runtime lacks an operator, or fails on an image: {text}"
        raise ValueError(message) from error


def _count(graph_module: Any) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.name.startswith("lowered_module"):
            counts["delegates"] += 1
            delegate = getattr(graph_module, node.target)
            for inner in delegate.original_module.graph.nodes:
                if _is_product(inner):
                    counts[_kind(inner)] += 1
        elif _is_product(node):
            counts["portable"] += 1
    return dict(counts)


def _is_product(node: Any) -> bool:
    return node.op == "call_function" and _name(node) in _PRODUCTS


def _kind(node: Any) -> str:
    """By the operators that its factors come from."""
    sources = [one for one in node.all_input_nodes if one.op == "call_function"]
    names = {_name(one): one for one in sources}
    weight = names.get("dequantize_per_channel")
    if weight is None:
        return "float"
    bits = 4 if weight.args[5] <= 7 else 8
    dynamic = not any(name == "dequantize_per_tensor" and _fixed(names[name]) for name in names)
    return f"int{bits} dynamic" if dynamic else "int8"


def _fixed(node: Any) -> bool:
    return isinstance(node.args[1], float)


def _name(node: Any) -> str:
    return str(node.target.__name__).split(".")[-2] if "." in node.target.__name__ else ""
