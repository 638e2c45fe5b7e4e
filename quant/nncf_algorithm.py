"""NNCF as another quantiser: its own post-training quantisation of an exported float model.

Here NNCF decides everything that ``quantize.py`` decides for us: what is quantised, to which
ranges, how weights are rounded, and how the result is written. It works on the ONNX file, so
there is no quantised graph of ours and no simulation: the file is the model. NNCF is imported
only when it is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from torch import Tensor, fx

from deploykit.errors import DeploykitError, TargetMissingError, one_line
from deploykit.quant.plan import plan_layers
from deploykit.types import PassRecord

__all__ = ["NncfFile", "has_attention", "import_nncf", "nncf_onnx"]

_TELEMETRY = "openvino_telemetry"
_LAYERS = ("Conv", "Gemm", "MatMul")
_SHAPES = ("Transpose", "Reshape", "Identity", "Cast")
_FOUR_BIT = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


@dataclass(frozen=True)
class NncfFile:
    """An ONNX file that NNCF made.

    Attributes:
        data: the file.
        made_by: ``nncf`` and its version.
        bits: what came out: ``w8a16`` where ``w4a16`` was asked and no layer got 4 bits.
        record: what was called, with which parameters, and what came of it.
        how_it_runs: parts that are ``integer``, or ``wider`` when computed than on disk.
    """

    data: bytes
    made_by: str
    bits: str
    record: PassRecord
    how_it_runs: dict[str, list[str]]


def import_nncf() -> Any:
    """The nncf module with its ONNX backend, imported without telemetry.

    NNCF reports each call through OpenVINO's telemetry package, and importing it imports
    openvino, which reports too; both fall back to a stub where that package cannot be imported.
    Its ONNX backend runs models in ONNX Runtime, which has telemetry of its own.

    Raises:
        TargetMissingError: nncf is not installed.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    hidden = _TELEMETRY not in sys.modules
    if hidden:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # makes its import fail
    logger_class = logging.getLoggerClass()
    try:
        nncf = importlib.import_module("nncf")
        importlib.import_module("nncf.onnx.quantization.quantize_model")
    except ImportError as error:
        message = (
            f"nncf cannot be imported ({one_line(error)}); pip install 'deploykit-vision[nncf]'"
        )
        raise TargetMissingError(message) from error
    finally:
        logging.setLoggerClass(logger_class)  # it would make every later logger one of its own
        if hidden:
            sys.modules.pop(_TELEMETRY, None)
    return nncf


def has_attention(graph_module: fx.GraphModule) -> bool:
    """Two activations are multiplied somewhere in a captured graph."""
    return any(plan.op == "matmul" for plan in plan_layers(graph_module, 8, 8))


def nncf_onnx(
    model: bytes,
    bits: str,
    batches: Callable[[], Iterable[Tensor]],
    images: int,
    *,
    attention: bool,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> NncfFile:
    """Quantise a float ONNX model with NNCF.

    ``w8a8`` is ``nncf.quantize``; ``w8a16`` and ``w4a16`` are ``nncf.compress_weights``, which
    reads no images. Its ONNX backend puts only matrix products at 4 bits; convolutions, the last
    layer, and layers whose input channels no group size from 32 to 128 divides get 8. The same
    input gives the same bytes.

    Args:
        model: ONNX file with one input (batch, 3, S, S) float32.
        bits: ``w8a8``, ``w8a16`` or ``w4a16``.
        batches: a fresh iterator of calibration batches, float32 (N, 3, S, S), each time; NNCF
            takes the images one by one, in one or more passes.
        images: how many there are.
        attention: tell NNCF that the model is a transformer.
        metadata: written to the file's metadata properties, with ``algorithm`` and
            ``precision``, sorted.
        progress: called with the number of images read, over all passes.

    Raises:
        TargetMissingError: nncf is not installed.
        DeploykitError: NNCF failed on the model, or can't make these widths.
    """
    nncf = import_nncf()
    made_by = f"nncf {nncf.__version__}"
    proto = onnx.load_model_from_string(model)
    call, parameters = _call(nncf, bits, images, attention)
    arguments = dict(parameters)
    if call == "quantize":
        singles = _Singles(proto.graph.input[0].name, batches, progress or (lambda _: None))
        arguments["calibration_dataset"] = nncf.Dataset(singles)
    try:
        with _quiet(nncf.nncf_logger) as heard:
            result = getattr(nncf, call)(proto, **arguments)
            repairs = _repair(result.graph)
            onnx.checker.check_model(result)
    except Exception as error:  # its own errors share no base with those of its libraries
        message = f"{made_by} can't quantise this model to {bits}: {one_line(error)}"
        raise DeploykitError(message) from error
    how, counts = _how_it_runs(result.graph)
    if bits == "w4a16" and "four_bit_layers" not in counts:
        bits = "w8a16"
        heard.append("asked for 4-bit weights, nncf put no layer at 4 bits, only at 8")
    del result.metadata_props[:]
    facts = {**(metadata or {}), "algorithm": made_by, "precision": bits}
    for key, value in sorted(facts.items()):
        result.metadata_props.add(key=key, value=value)
    record = PassRecord(
        name=f"nncf.{call}",
        summary=f"{made_by}, {bits}: " + "; ".join(how["integer"] + how["wider"]),
        details={
            "version": nncf.__version__,
            "parameters": {name: _plain(value) for name, value in parameters.items()},
            **counts,
            **({"repairs": repairs} if repairs else {}),
            **({"warnings": heard} if heard else {}),
        },
    )
    return NncfFile(result.SerializeToString(deterministic=True), made_by, bits, record, how)


def _call(nncf: Any, bits: str, images: int, attention: bool) -> tuple[str, dict[str, Any]]:
    """The function of NNCF and its parameters. What isn't named keeps NNCF's default."""
    if bits == "w8a8":
        return "quantize", {
            "preset": nncf.QuantizationPreset.MIXED,
            "model_type": nncf.ModelType.TRANSFORMER if attention else None,
            "subset_size": images,
            "fast_bias_correction": True,
        }
    if bits == "w8a16":
        return "compress_weights", {"mode": nncf.CompressWeightsMode.INT8_ASYM}
    if bits == "w4a16":
        # By default a layer whose channels the group size of 128 doesn't divide is an error.
        adjust = nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
        )
        mode = nncf.CompressWeightsMode.INT4_SYM
        return "compress_weights", {"mode": mode, "advanced_parameters": adjust}
    message = f"nncf quantises to w8a8, w8a16 or w4a16, got {bits}"
    raise DeploykitError(message)


class _Singles:
    """The images one by one, named as the model's input, as often as they are asked for."""

    def __init__(
        self, name: str, batches: Callable[[], Iterable[Tensor]], progress: Callable[[int], None]
    ) -> None:
        self._name = name
        self._batches = batches
        self._progress = progress

    def __iter__(self) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        for batch in self._batches():
            for image in batch.split(1):
                self._progress(1)  # before: NNCF doesn't come back after the last one
                yield {self._name: image.numpy()}


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(" ".join(record.getMessage().split()))


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[list[str]]:
    """Keep NNCF's bars and log lines off standard output; yields the warnings it logs."""
    heard, handlers, level = _Heard(), logger.handlers, logger.level
    logger.handlers = [heard]
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield heard.lines
    finally:
        logger.handlers = handlers
        logger.setLevel(level)


def _plain(value: Any) -> str | int | float | bool | None:
    """A parameter as the report shows it."""
    if hasattr(value, "group_size_fallback_mode"):
        return f"group_size_fallback_mode={value.group_size_fallback_mode.value}"
    value = getattr(value, "value", value)
    return value if isinstance(value, int | float | None) else str(value)


def _repair(graph: onnx.GraphProto) -> dict[str, int]:
    """Write what NNCF 3.4 writes in a way ONNX Runtime loads; no value changes.

    Activation codes become unsigned, codes and zero point 128 higher: ONNX Runtime does so
    itself, but fails where it first moves a quantiser over a reshape. The scales of a
    convolution's weights, (channels, 1, 1), become the vector that the format wants.

    Returns:
        how often either was done.
    """
    del graph.value_info[:]  # every runtime infers them; these would still say signed
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    codes = {name for n in graph.node if n.op_type == "QuantizeLinear" for name in n.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    done: Counter[str] = Counter()
    for node in graph.node:
        grouped = any(a.name == "block_size" and a.i for a in node.attribute)
        if node.op_type == "DequantizeLinear" and not grouped:
            for name in node.input[1:]:
                tensor = tensors[name]
                if len(tensor.dims) > 1:
                    array = onnx.numpy_helper.to_array(tensor)
                    tensor.CopyFrom(onnx.numpy_helper.from_array(array.reshape(-1), name))
                    done["scales_flattened"] += 1
        if node.op_type == "QuantizeLinear" and len(node.input) > 2:
            tensor = tensors[node.input[2]]
            both = all(
                user.op_type == "QuantizeLinear" or user.input[0] in codes
                for user in users[tensor.name]
            )
            if tensor.data_type == onnx.TensorProto.INT8 and both:
                zero_point = onnx.numpy_helper.to_array(tensor).astype(np.int16) + 128
                unsigned = zero_point.astype(np.uint8)
                tensor.CopyFrom(onnx.numpy_helper.from_array(unsigned, tensor.name))
                done["activations_made_unsigned"] += 1
    return dict(sorted(done.items()))


def _how_it_runs(graph: onnx.GraphProto) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Which layers have integer weights and inputs, or only weights; and the same as counts."""
    made_by = {name: node for node in graph.node for name in node.output}
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}

    def codes(name: str) -> tuple[bool, int | None]:
        """Whether a value is dequantised, and the type of the constant behind it, if one is."""
        dequantised = False
        while (node := made_by.get(name)) is not None:
            if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
                dequantised = True
            elif node.op_type not in _SHAPES:
                break
            name = node.input[0]
        return dequantised, types.get(name)

    counts: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type not in _LAYERS:
            continue
        (first, _), (second, constant) = codes(node.input[0]), codes(node.input[1])
        if constant is None:
            counts["matmuls"] += 1
            counts["integer_matmuls"] += first and second
            continue
        counts["layers"] += 1
        counts["integer_layers"] += first and second
        counts["weight_only_layers"] += second and not first
        counts["four_bit_layers"] += constant in _FOUR_BIT
    how: dict[str, list[str]] = {"integer": [], "wider": []}
    layers = counts["layers"]
    if found := counts["integer_layers"]:
        how["integer"].append(f"{found} of {layers} layers have integer weights and inputs")
    if found := counts["integer_matmuls"]:
        how["integer"].append(f"{found} attention matmuls have integer inputs")
    if found := counts["weight_only_layers"]:
        narrow = counts["four_bit_layers"]
        widths = f"{narrow} of them 4-bit on disk, the others 8-bit" if narrow else "8-bit on disk"
        text = f"weights of {found} of {layers} layers ({widths}) are dequantised to float"
        how["wider"].append(f"{text} when computed")
    return how, {name: int(count) for name, count in sorted(counts.items()) if count}
