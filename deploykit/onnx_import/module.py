"""An ONNX graph as a torch module: run as it is, or captured by ``torch.export``."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from deploykit.errors import UsageError, one_line
from deploykit.onnx_import import operators_shapes, operators_tensors  # noqa: F401  fill the table
from deploykit.onnx_import.fuse import fuse
from deploykit.onnx_import.graph import Array, Graph, Node
from deploykit.onnx_import.operators import OPERATORS, UnsupportedError, Value, apply, fold
from deploykit.onnx_import.operators_layers import make_layer, padded

__all__ = ["OnnxModule", "build_module"]

_FOLDED_ELEMENTS = 2**28  # of all constants computed when the file is read


@dataclass(frozen=True)
class _Step:
    """One call.

    Attributes:
        layer: path of the sub-module that does it, or "".
        inputs: names of values; the constants among them are ``placed``.
        placed: per input, the module's own tensor that it is, or "".
        spent: values nothing reads any more afterwards.
    """

    node: Node
    layer: str
    inputs: tuple[str, ...]
    placed: tuple[str, ...]
    spent: tuple[str, ...]


class OnnxModule(nn.Module):
    """Images float32 (N, 3, S, S) to logits float32 (N, classes).

    Convolutions, linear and norm layers with constant weights are torch's own layers, named after
    the file's weights or nodes. A file with a fixed batch takes that batch only.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.batch = graph.batch
        self._image, self._result = graph.input, graph.output
        self._arrays: dict[str, Array] = {}
        self._steps = _steps(self, graph)

    def forward(self, image: Tensor) -> Tensor:
        if self.batch is not None and image.shape[0] != self.batch:
            raise ValueError(f"the file fixes the batch at {self.batch}, got {image.shape[0]}")
        values: dict[str, Value] = {self._image: image, "": None}
        for step in self._steps:
            inputs = [
                getattr(self, own) if own else values.get(name, self._arrays.get(name))
                for name, own in zip(step.inputs, step.placed, strict=True)
            ]
            for name, value in zip(step.node.outputs, self._call(step, inputs), strict=False):
                if name:
                    values[name] = value
            for name in step.spent:
                values.pop(name, None)
        result = values[self._result]
        if not isinstance(result, Tensor):
            raise UnsupportedError("the output doesn't depend on the image")
        return result

    def _call(self, step: _Step, inputs: list[Value]) -> tuple[Value, ...]:
        if not step.layer:
            return apply(step.node, inputs)
        layer, x = self.get_submodule(step.layer), inputs[0]
        if not isinstance(x, Tensor):
            raise UnsupportedError(f"operator {step.node.op} on a shape")
        if isinstance(layer, nn.Conv2d):
            x = padded(step.node, x, list(layer.kernel_size))
        if isinstance(layer, nn.BatchNorm2d):
            return (_batch_norm(layer, x),)
        return (layer(x),)


def build_module(graph: Graph, path: object) -> OnnxModule:
    """The graph as a module in eval mode, without gradients. ``graph`` is used up.

    Raises:
        UsageError: an operator, or a use of one, that isn't known; constants that are too large.
    """
    try:
        with torch.no_grad():
            _check_operators(graph)
            _fold_constants(graph)
            fuse(graph)
            return OnnxModule(graph).eval().requires_grad_(False)
    except UnsupportedError as error:
        raise UsageError(f"--model {path}: {error}") from error
    except (ValueError, IndexError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        # an operator given what its definition forbids: each library says so in its own way
        message = f"--model {path}: a graph that can't be run ({one_line(error, 160)})"
        raise UsageError(message) from error


def _check_operators(graph: Graph) -> None:
    unknown = sorted({node.op[:40] for node in graph.nodes} - set(OPERATORS))
    if unknown:
        raise UnsupportedError(f"operators that are not read: {', '.join(unknown[:5])}")


def _fold_constants(graph: Graph) -> None:
    """Compute what depends on constants alone."""
    kept, total = [], 0
    for node in graph.nodes:
        if not node.inputs or any(name and name not in graph.constants for name in node.inputs):
            kept.append(node)
            continue
        arrays = [graph.constants[name] if name else None for name in node.inputs]
        for name, value in zip(node.outputs, fold(node, arrays), strict=False):
            total += value.size
            if total > _FOLDED_ELEMENTS:
                raise UnsupportedError("constants that grow beyond all bounds when computed")
            if name:
                graph.constants[name] = value
    graph.nodes = kept
    graph.drop_dead()


def _steps(module: OnnxModule, graph: Graph) -> list[_Step]:
    last = {name: at for at, node in enumerate(graph.nodes) for name in node.inputs}
    steps, names, stored = [], _Names(), dict[str, str]()
    for at, node in enumerate(graph.nodes):
        layer = make_layer(node, graph)
        spent = tuple(n for n in {*node.inputs, *node.outputs} if last.get(n, -1) <= at)
        spent = tuple(name for name in spent if name and name != graph.output)
        if layer is not None:
            path = names.path(_layer_path(node, graph))
            _add_layer(module, path, layer)
            steps.append(_Step(node, path, node.inputs[:1], ("",), spent))
            continue
        described = OPERATORS[node.op].described
        placed = []
        for position, name in enumerate(node.inputs):
            value = graph.constants.get(name)
            if value is None:
                placed.append("")
            elif position in described or value.size == 1 or _on_shapes_only(node):
                module._arrays[name] = value
                placed.append("")
            else:
                if name not in stored:
                    stored[name] = names.path([_plain(name)])
                    _add_tensor(module, stored[name], value, name in graph.parameters)
                placed.append(stored[name])
        steps.append(_Step(node, "", node.inputs, tuple(placed), spent))
    return steps


def _on_shapes_only(node: Node) -> bool:
    return OPERATORS[node.op].on_tensors is None


def _add_tensor(module: nn.Module, name: str, value: Array, parameter: bool) -> None:
    tensor = torch.from_numpy(np.array(value, order="C"))
    if parameter and tensor.is_floating_point():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    else:
        module.register_buffer(name, tensor)


def _add_layer(module: nn.Module, path: str, layer: nn.Module) -> None:
    *folders, leaf = path.split(".")
    for folder in folders:
        if folder not in dict(module.named_children()):
            module.add_module(folder, nn.Module())
        module = module.get_submodule(folder)
    module.add_module(leaf, layer)


def _batch_norm(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """BatchNorm2d looks at the rank; ONNX has one operator for all ranks."""
    if x.ndim == 4:
        result: Tensor = layer(x)
        return result
    return nn.functional.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps
    )


class _Names:
    """Paths of sub-modules and tensors, each once, none below another."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._folders: set[str] = set()

    def path(self, parts: list[str]) -> str:
        clean = [_plain(part) for part in parts]
        stem, count = ".".join(clean), 1
        while (name := stem if count == 1 else f"{stem}_{count}") in self._taken | self._folders:
            count += 1
        parents = {".".join(clean[:end]) for end in range(1, len(clean))}
        if parents & self._taken:
            return self.path(["_".join(clean)])
        self._taken.add(name)
        self._folders |= parents
        return name


def _plain(part: str) -> str:
    """A name that an attribute of a module can have, whatever the file says."""
    name = re.sub(r"\W", "_", part, flags=re.ASCII).strip("_")[:80] or "value"
    return f"at_{name}" if hasattr(OnnxModule, name) or name in _RESERVED else name


_RESERVED = frozenset(dir(nn.Module())) | {"batch"}


def _layer_path(node: Node, graph: Graph) -> list[str]:
    """From the weights' names (``blocks.0.qkv.weight``), else from the node's."""
    for name in node.inputs[1:]:
        stem, _, leaf = name.partition("/")[0].rpartition(".")
        if leaf in ("weight", "bias") and stem and name.partition("/")[0] in graph.parameters:
            return stem.split(".")
    # the TorchScript exporter: /blocks/blocks.0/attn/qkv/MatMul
    if node.name.startswith("/") and node.name.count("/") > 1:
        scopes = node.name.strip("/").split("/")[:-1]
        kept = [
            scope
            for scope, inner in zip(scopes, [*scopes[1:], ""], strict=True)
            if not inner.startswith(f"{scope}.")
        ]
        return [part for scope in kept for part in scope.split(".")]
    return [node.op.lower()]
