"""What TensorRT-RTX made of the layers, read from the program inside an engine.

The library's inspector wants a loaded engine, and loading wants a GPU. But an engine of RTX holds
its program as text: a line for each tensor with its type, a line for each kernel with its inputs
and the ONNX nodes it came from. The text is not documented: where it is not as expected, nothing
is found, and the caller says what it knows from the network instead.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection

__all__ = ["kernel_types"]

_RECORD = re.compile(r"\n {2}(\w+)=\{ (.*?)(?=\n {2}\w+=\{|\n \w|\n\}|\Z)", re.DOTALL)
_TENSOR = re.compile(r'\bname="([^"]+)".*\btype=(\w+)', re.DOTALL)
_INPUTS = re.compile(r"\binput(?:_args)?=\{([^}]*)\}")
_NAME = re.compile(r'\bname="?(\w+)')
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")

_PRODUCTS = ("corrltn", "fully_connected")
_FUSED_PRODUCT = re.compile(r"__myl_Fc|_gemm")
_CALLED = {"int8": "int8", "fp8_e4m3": "fp8", "half": "float16", "float": "float32"}


def kernel_types(engine: bytes, layers: Collection[str]) -> dict[str, int]:
    """How many of the layers are computed in which type, on every GPU the engine is for.

    Args:
        engine: the file.
        layers: names of the ONNX nodes to look for.

    Returns:
        Such as ``{"int8": 40, "float16": 3}``; a layer whose kernel isn't found, or whose type
        differs between GPUs, isn't counted. Empty where the program can't be read.
    """
    text = engine.decode("latin-1")
    records = [(match[1], match[2]) for match in _RECORD.finditer(text)]
    tensors: dict[str, str] = {}
    for kind, body in records:
        if kind in ("tensor", "sub_tensor") and (found := _TENSOR.search(body)):
            tensors[found[1]] = found[2]
    wanted = set(layers)
    types: defaultdict[str, set[str]] = defaultdict(set)
    for kind, body in records:
        computed = _type_of(kind, body, tensors)
        if computed is not None:
            for layer in wanted.intersection(_LAYER.findall(body)):
                types[layer].add(computed)
    return dict(Counter(found.pop() for found in types.values() if len(found) == 1))


def _type_of(kind: str, body: str, tensors: dict[str, str]) -> str | None:
    """The type a kernel multiplies in, or None for one that multiplies nothing."""
    name, inputs = _NAME.search(body), _INPUTS.search(body)
    if name is None or inputs is None:
        return None
    if kind not in _PRODUCTS and not (kind in ("runtime_fusion", "function") and "layers" in body):
        return None
    read = [tensors.get(one) for one in re.findall(r'"([^"]+)"', inputs[1])]
    if kind in _PRODUCTS or _FUSED_PRODUCT.match(name[1]):
        kinds = {one for one in read[:2] if one}
        if len(kinds) == 1:
            return _CALLED.get(kinds.copy().pop())
        return next((_CALLED[one] for one in ("half", "float") if one in kinds), None)
    if name[1].startswith("__myl_") and "Fc" in name[1]:
        # a cast stands before the product: codes are made floats inside the kernel
        return "float16" if "half" in read else "float32"
    return None
