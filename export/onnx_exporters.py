"""torch's two ONNX exporters, one after the other, and what each had to say."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import version_converter
from torch import Tensor, fx
from torch.onnx import symbolic_helper
from torch.onnx.utils import register_custom_op_symbolic, unregister_custom_op_symbolic

from deploykit.errors import one_line, root_cause
from deploykit.export.onnx_lowering import OPSET, Table, translation_table
from deploykit.graph import ops as _registered  # noqa: F401  makes torch.ops.deploykit
from deploykit.graph.edit import add_tensor, is_op

__all__ = ["INPUT_NAME", "OUTPUT_NAME", "to_onnx"]

INPUT_NAME, OUTPUT_NAME = "image", "logits"
_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor, torch.ops.aten.sub.Tensor)
_TINY = 1e-7  # onnxscript's 1e-8, and what rounding may make of it
_DOMAIN = "deploykit"
_KEPT = "deploykit.kept"  # not the operators' own: the exporter would look it up again
_SCRIPT_OPSET = 20  # the newest the TorchScript exporter writes
_KINDS = {"Tensor": "v", "float": "f", "int": "i", "bool": "b", "List[float]": "fs"}


def to_onnx(
    graph_module: fx.GraphModule,
    example: Tensor,
    *,
    dynamic_batch: bool,
    table: Table,
    outputs: Sequence[str] = (OUTPUT_NAME,),
) -> tuple[ir.Model, list[str]]:
    """A graph as an ONNX model of opset 21.

    The dynamo exporter is asked first, then again with the graph decomposed into core operators,
    then the TorchScript exporter.

    Args:
        example: (N, 3, S, S).
        table: lowerings of operators.
        outputs: names of the graph's outputs.

    Returns:
        The model, and a line for the report if it wasn't the first exporter that made it.

    Raises:
        Exception: none could; the first one's error.
    """
    ways: list[tuple[str, Callable[[], ir.Model]]] = [
        (
            "the dynamo exporter",
            lambda: _by_dynamo(graph_module, example, dynamic_batch, table, outputs),
        ),
        (
            "the dynamo exporter after run_decompositions",
            lambda: _by_dynamo(
                graph_module, example, dynamic_batch, table, outputs, decomposed=True
            ),
        ),
        (
            "the TorchScript exporter",
            lambda: _by_torchscript(graph_module, example, dynamic_batch, table, outputs),
        ),
    ]
    first: Exception | None = None
    for name, make in ways:
        try:
            with torch.no_grad(), _quiet():
                model = make()
        except Exception as error:  # the exporters raise many unrelated types
            first = first or error
            continue
        said = [] if first is None else [f"written by {name}; the first refused: {_gist(first)}"]
        return model, said
    assert first is not None
    raise first


def _gist(error: BaseException) -> str:
    """The first line of what the exporter stumbled over."""
    error = root_cause(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(Exception(lines[0] if lines else type(error).__name__), 120)


def _by_dynamo(
    graph_module: fx.GraphModule,
    example: Tensor,
    dynamic_batch: bool,
    table: Table,
    outputs: Sequence[str],
    *,
    decomposed: bool = False,
) -> ir.Model:
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},) if dynamic_batch else None
    program = torch.export.export(keep_tiny(graph_module), (example,), dynamic_shapes=shapes)
    if decomposed:
        program = program.run_decompositions()
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT_NAME],
        output_names=list(outputs),
        custom_translation_table=translation_table(table),
        optimize=True,
        verbose=False,
    )
    assert exported is not None
    return exported.model


def keep_tiny(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph over the same tensors, tiny numbers that are added as tensors of one element.

    onnxscript's optimiser takes any number up to 1e-8 for zero and drops the addition: an epsilon
    that keeps a quotient finite would be missing in the file (so it was in T2T-ViT's, whose 8-bit
    divisors are zero at times). It looks at numbers without dimensions only.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    copied = fx.GraphModule(graph_module, graph)
    for node in list(graph.nodes):
        if not is_op(node, *_SUMS):
            continue
        for at in (0, 1):
            number = node.args[at]
            if isinstance(number, int | float) and 0 < abs(number) <= _TINY:
                value = torch.tensor([float(number)])
                node.update_arg(at, add_tensor(copied, f"tiny.{node.name}", value, node))
    copied.recompile()
    return copied


def _by_torchscript(
    graph_module: fx.GraphModule,
    example: Tensor,
    dynamic_batch: bool,
    table: Table,
    outputs: Sequence[str],
) -> ir.Model:
    """Our operators go through as nodes of a domain of their own and are lowered afterwards."""
    ours = {
        _name(target): (target, lower)
        for target, lower in table.items()
        if target.namespace == _DOMAIN
    }
    for name, (target, _) in ours.items():
        register_custom_op_symbolic(f"{_DOMAIN}::{name}", _kept(target), _SCRIPT_OPSET)
    used = any(
        is_op(node, *(target for target, _ in ours.values())) for node in graph_module.graph.nodes
    )
    names = (INPUT_NAME, *outputs)
    axes = {name: {0: "batch"} for name in names} if dynamic_batch else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            torch.onnx.export(
                _traceable(graph_module),
                (example,),
                path,
                dynamo=False,
                opset_version=_SCRIPT_OPSET,
                input_names=[INPUT_NAME],
                output_names=list(outputs),
                dynamic_axes=axes,
                keep_initializers_as_inputs=False,
                custom_opsets={_KEPT: 1} if used else {},
            )
            model = ir.from_proto(onnx.load(path))
    finally:
        for name in ours:
            unregister_custom_op_symbolic(f"{_DOMAIN}::{name}", _SCRIPT_OPSET)
    for node in [node for node in model.graph if node.domain == _KEPT]:
        target, lower = ours[node.op_type]
        _replace(node, target, lower)
    model.opset_imports.pop(_KEPT, None)
    return version_converter.convert_version(model, OPSET, fallback=True) or model


def _traceable(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy for torch.jit.trace, which follows a size through methods of tensors only.

    An exported program's own module refuses to be told that it isn't in training.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    for node in graph.nodes:
        if node.target is torch.ops.aten.sym_size.int:
            node.op, node.target = "call_method", "size"
        elif isinstance(node.target, torch._ops.OpOverload) and any(
            isinstance(argument, (list, tuple)) and any(isinstance(n, fx.Node) for n in argument)
            for argument in node.args[1:]
        ):
            node.op, node.target = "call_method", _name(node.target)
    return fx.GraphModule(graph_module, graph)


def _name(target: Any) -> str:
    """Of an operator, without namespace and overload."""
    name: str = target.name().split("::")[1].split(".")[0]
    return name


def _kept(target: Any) -> Callable[..., Any]:
    """The symbolic function that keeps an operator: tensors as inputs, all else as attributes."""
    arguments = target._schema.arguments
    kinds = [_KINDS[str(argument.type)] for argument in arguments]

    def keep(graph: Any, *values: Any) -> Any:
        # parse_args can't: it wants as many named parameters as there are values
        plain = [
            value if kind == "v" else symbolic_helper._parse_arg(value, kind)  # type: ignore[arg-type]
            for kind, value in zip(kinds, values, strict=True)
        ]
        tensors = [value for kind, value in zip(kinds, plain, strict=True) if kind == "v"]
        attributes = {
            f"{argument.name}_{kind[0]}": value
            for argument, kind, value in zip(arguments, kinds, plain, strict=True)
            if kind != "v"
        }
        result = graph.op(f"{_KEPT}::{_name(target)}", *tensors, **attributes)
        result.setType(values[0].type().with_dtype(torch.float32))
        return result

    return keep


def _replace(node: ir.Node, target: Any, lower: Callable[..., Any]) -> None:
    """Lower a kept operator in its place."""
    builder = _Builder()
    inputs = iter(node.inputs)
    arguments = [
        node.attributes[argument.name].value if argument.name in node.attributes else next(inputs)
        for argument in target._schema.arguments
    ]
    result = lower(builder, *arguments)
    old = node.outputs[0]
    result.shape, result.dtype = old.shape, ir.DataType.FLOAT
    graph = node.graph
    assert graph is not None
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], list(builder.tape.nodes), [old], [result]
    )


class _Builder:
    """What the lowerings call ``op``: nodes of one output on a tape."""

    def __init__(self) -> None:
        self.tape = ir.tape.Tape()

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        def add(*inputs: ir.Value, **attributes: Any) -> ir.Value:
            return self.tape.op(op_type, inputs, attributes)

        return add


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress lines and warnings out of the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
