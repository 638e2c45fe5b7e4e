"""A saved structure as a backbone: ``--model OUT`` or ``--model OUT/structure.json``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from deploykit.backbones.checkpoint import sha256_of
from deploykit.backbones.given_file import refuse_options
from deploykit.errors import UsageError
from deploykit.export.structure import STRUCTURE_NAME, TENSORS_NAME, SavedModel, load_model
from deploykit.graph.edit import constant, is_op, layer_name
from deploykit.recipe import ModelSection
from deploykit.types import Backbone, WeightsOrigin

__all__ = ["build_structure_file"]

aten = torch.ops.aten


def build_structure_file(path: Path, model: ModelSection, notes: list[str]) -> Backbone:
    """Load a float model for further compression. Adds to ``notes`` what it is.

    Raises:
        UsageError: the files can't be read, hold a quantised model, or the recipe asks for what
            they don't hold.
    """
    refuse_options(path, model)
    path = path / STRUCTURE_NAME if path.is_dir() else path
    saved = load_model(path)
    if saved.precision != "fp32":
        message = f"--model {path} holds a quantised model ({saved.precision})"
        raise UsageError(f"{message}; give the float model it was made from")
    refuse_options(path, model, saved.backbone.num_classes)
    size = saved.backbone.preprocessing.size
    if model.img_size not in (None, size):
        message = f"--model {path} takes images of {size} pixels, not {model.img_size}"
        raise UsageError(f"{message}; leave img_size out")
    origin = saved.backbone.weights
    notes.append(f"{path} is a saved {saved.backbone.name}; its weights: {origin.label}")
    if origin.trained:
        digest = sha256_of(path.with_name(TENSORS_NAME))
        origin = WeightsOrigin(kind="file", source=str(path), sha256=digest)
    return replace(
        saved.backbone,
        module=_as_module(saved),
        preprocessing=model.preprocessing or saved.backbone.preprocessing,
        weights=origin,
    )


def _as_module(saved: SavedModel) -> nn.Module:
    """The graph with torch's own layers in it, so that capturing it finds their names again."""
    graph_module = saved.graph_module
    graph = graph_module.graph
    made: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        name = layer_name(node)
        layer = None if name in (node.name, *made) else _layer(node, graph_module)
        if layer is None or not _replaceable(node, graph_module, name):
            continue
        made[name] = layer
        with graph.inserting_before(node):
            # a path without a module yet: it gets one below
            new = graph.create_node("call_module", name, (node.args[0],))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    for name, layer in made.items():
        graph_module.add_submodule(name, layer.eval().requires_grad_(False))
    if not saved.dynamic_batch:
        image = next(node for node in graph.nodes if node.op == "placeholder")
        with graph.inserting_after(image):
            checked = graph.call_function(_one_image, (image,))
        image.replace_all_uses_with(checked, delete_user_cb=lambda user: user is not checked)
    graph_module.recompile()
    return graph_module


def _one_image(images: Tensor) -> Tensor:
    if images.shape[0] != 1:
        raise ValueError(f"the model fixes the batch at 1, got {images.shape[0]}")
    return images


def _replaceable(node: fx.Node, graph_module: fx.GraphModule, name: str) -> bool:
    """Nothing but this node's own tensors is at the layer's path."""
    own = [arg for arg in node.args[1:] if isinstance(arg, fx.Node)]
    if any(len(arg.users) > 1 for arg in own):
        return False
    paths = {str(arg.target) for arg in own}
    tensors = dict(graph_module.named_parameters()) | dict(graph_module.named_buffers())
    inside = {path for path in tensors if path.startswith(f"{name}.") or path == name}
    parents = name.split(".")[:-1]
    above = {".".join(parents[: end + 1]) for end in range(len(parents))}
    return inside <= paths and not above & set(tensors) and all(_plain(p) for p in name.split("."))


def _plain(part: str) -> bool:
    return part.replace("_", "a").isalnum() and part.isascii() and not hasattr(nn.Module, part)


def _layer(node: fx.Node, graph_module: fx.GraphModule) -> nn.Module | None:
    """The layer that does what a linear or convolution node does, or None."""
    if not is_op(node, aten.linear.default, aten.conv2d.default) or node.kwargs:
        return None
    weight = constant(graph_module, node.args[1])
    bias = constant(graph_module, node.args[2]) if len(node.args) > 2 else None
    if weight is None or (bias is None and len(node.args) > 2 and node.args[2] is not None):
        return None
    outputs, inputs, *kernel = weight.shape
    has_bias = bias is not None
    layer: Any
    if is_op(node, aten.linear.default):
        layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=has_bias)
    else:
        rest: list[Any] = [*node.args[3:], *([1, 1], [0, 0], [1, 1], 1)[len(node.args[3:]) :]]
        stride, padding, dilation = (_pair(value) for value in rest[:3])
        layer = nn.utils.skip_init(
            nn.Conv2d,
            inputs * rest[3],
            outputs,
            tuple(kernel),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=rest[3],
            bias=has_bias,
        )
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    result: nn.Module = layer
    return result


def _pair(value: Any) -> tuple[int, int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return (values[0], values[-1])
