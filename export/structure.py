"""Compressed models on disk: the graph as JSON, its tensors as safetensors. No pickle.

``structure.json`` lists the graph's operators by name, from a fixed list, with plain arguments;
``model.safetensors`` beside it holds the tensors: weights, or the codes of a quantised graph, at
half their values where they are 2:4 sparse.
Both together are the model, whatever was pruned or merged in it: reading them needs neither the
source of the original nor trust in the file. The loaded graph gives the same outputs bit for bit
and can be exported again.
"""

from __future__ import annotations

import hashlib
import json
import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save as save_tensors
from torch import Tensor, fx, nn

from deploykit.errors import DeploykitError, UsageError, one_line
from deploykit.export.structure_args import BadArgumentError, decode, encode
from deploykit.export.structure_check import check_shapes
from deploykit.export.structure_ops import SIZE_OPS, find_op, name_of
from deploykit.export.structure_tensors import (
    DTYPES,
    TensorEntry,
    describe,
    dtype_name,
    pack,
    read_tensors,
)
from deploykit.graph.edit import layer_name
from deploykit.types import Backbone, FeatureLevel, Preprocessing, WeightsOrigin

__all__ = [
    "STRUCTURE_NAME",
    "TENSORS_NAME",
    "SavedModel",
    "load_model",
    "model_bytes",
    "save_model",
]

STRUCTURE_NAME, TENSORS_NAME = "structure.json", "model.safetensors"
_MOST_JSON = 64 * 2**20
_MOST_NODES = 50_000
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}")
_PATH = re.compile(r"[A-Za-z0-9_]{1,200}(\.[A-Za-z0-9_]{1,200}){0,30}")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Node(_Strict):
    name: str
    op: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    tensor: str | None = None
    layer: str = Field(default="", max_length=500)
    quantizes: str = Field(default="", max_length=500)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(max_length=500)
    num_classes: int = Field(ge=0)
    family: str = ""
    paper: str = ""
    preprocessing: Preprocessing
    weights: WeightsOrigin
    precision: str = Field(max_length=40)
    dynamic_batch: bool
    levels: tuple[FeatureLevel, ...] = Field(default=(), max_length=1000)


class _Structure(_Strict):
    format: Literal["deploykit structure"]
    version: Literal[1]
    model: _Model
    tensors_sha256: str
    tensors: dict[str, TensorEntry]
    nodes: list[_Node] = Field(max_length=_MOST_NODES)
    output: str


@dataclass(frozen=True)
class SavedModel:
    """A model that was loaded.

    Attributes:
        graph_module: input (N, 3, S, S) float32, output (N, classes) float32.
        backbone: with ``graph_module`` as its module; its weights' origin is the original's.
        precision: ``fp32`` or ``w4a8`` …
        dynamic_batch: whether it takes any number of images.
    """

    graph_module: fx.GraphModule
    backbone: Backbone
    precision: str
    dynamic_batch: bool


def save_model(
    graph_module: fx.GraphModule,
    backbone: Backbone,
    folder: Path,
    *,
    precision: str,
    dynamic_batch: bool = True,
) -> tuple[Path, Path]:
    """Write both files of ``model_bytes`` to ``folder`` (not atomically) and return their paths."""
    structure, tensors = model_bytes(
        graph_module, backbone, precision=precision, dynamic_batch=dynamic_batch
    )
    paths = folder / STRUCTURE_NAME, folder / TENSORS_NAME
    paths[1].write_bytes(tensors)
    paths[0].write_bytes(structure)
    return paths


def model_bytes(
    graph_module: fx.GraphModule,
    backbone: Backbone,
    *,
    precision: str,
    dynamic_batch: bool = True,
) -> tuple[bytes, bytes]:
    """``structure.json`` and ``model.safetensors`` of a captured or quantised graph.

    Equal graphs give equal bytes.

    Raises:
        DeploykitError: the graph holds an operator or an argument that can't be saved.
    """
    stored: dict[str, Tensor] = {}
    parameters = {name for name, _ in graph_module.named_parameters(remove_duplicate=False)}
    nodes, output = [], ""
    for node in graph_module.graph.nodes:
        if node.op == "output":
            (result,) = torch.utils._pytree.tree_leaves(node.args)
            output = result.name
            continue
        try:
            nodes.append(_saved(node, graph_module, stored))
        except BadArgumentError as error:
            message = f"{backbone.name} can't be saved: {error} at {node.name}"
            raise DeploykitError(message) from error
    table = describe(stored, parameters)
    tensors = save_tensors(pack(stored, table))
    structure = _Structure(
        format="deploykit structure",
        version=1,
        model=_Model(
            name=backbone.name,
            num_classes=backbone.num_classes,
            family=backbone.family,
            paper=backbone.paper,
            preprocessing=backbone.preprocessing,
            weights=backbone.weights,
            precision=precision,
            dynamic_batch=dynamic_batch,
            levels=backbone.levels,
        ),
        tensors_sha256=hashlib.sha256(tensors).hexdigest(),
        tensors=table,
        nodes=nodes,
        output=output,
    )
    plain = structure.model_dump(mode="json", exclude_defaults=True)
    lines = ",\n".join(f"    {json.dumps(node, allow_nan=False)}" for node in plain.pop("nodes"))
    head = json.dumps(plain, indent=1, allow_nan=False).rstrip("}\n")
    return f'{head},\n "nodes": [\n{lines}\n ]\n}}\n'.encode("ascii"), tensors


def _saved(node: fx.Node, graph_module: fx.GraphModule, stored: dict[str, Tensor]) -> _Node:
    if node.op == "placeholder":
        return _Node(name=node.name, op="input")
    layer = "" if "nn_module_stack" not in node.meta else layer_name(node)
    if node.op == "get_attr":
        path = str(node.target)
        value = _tensor_at(graph_module, path)
        stored.setdefault(path, value.detach().contiguous().clone())
        return _Node(name=node.name, op="tensor", tensor=path)
    op = name_of(node.target)
    if op is None:
        raise BadArgumentError(f"operator {node.target} is not in the list")
    return _Node(
        name=node.name,
        op=op,
        args=[encode(a) for a in node.args],
        kwargs={key: encode(a) for key, a in sorted(node.kwargs.items())},
        layer="" if layer == node.name else layer,
        quantizes=str(node.meta.get("quantizes", "")),
    )


def _tensor_at(graph_module: fx.GraphModule, path: str) -> Tensor:
    owner, _, leaf = path.rpartition(".")
    value = getattr(graph_module.get_submodule(owner), leaf)
    if not isinstance(value, Tensor) or _PATH.fullmatch(path) is None:
        raise BadArgumentError(f"{path} is no tensor with a plain name")
    if dtype_name(value) not in DTYPES:
        raise BadArgumentError(f"tensor {path} is {dtype_name(value)}")
    return value


def load_model(path: Path) -> SavedModel:
    """Read ``structure.json`` (or the folder it is in) and the tensors beside it.

    Nothing in the files is run or imported: operators come from a fixed list, and every size is
    checked against what is stored.

    Raises:
        UsageError: what is missing, unknown, or doesn't agree, in one line.
    """
    path = path / STRUCTURE_NAME if path.is_dir() else path
    try:
        structure = _read_structure(path)
        tensors = read_tensors(
            path.with_name(TENSORS_NAME), structure.tensors, structure.tensors_sha256
        )
        graph_module = _build(structure, tensors)
    except BadArgumentError as error:
        raise UsageError(f"{path}: {error}") from error
    model = structure.model
    backbone = Backbone(
        name=model.name,
        module=graph_module,
        preprocessing=model.preprocessing,
        weights=model.weights,
        num_classes=model.num_classes,
        family=model.family,
        paper=model.paper,
        levels=model.levels,
    )
    return SavedModel(graph_module, backbone, model.precision, model.dynamic_batch)


def _read_structure(path: Path) -> _Structure:
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a folder that holds {STRUCTURE_NAME}")
    if path.stat().st_size > _MOST_JSON:
        raise UsageError(f"{path}: larger than the {_MOST_JSON} bytes a structure may have")
    try:
        data = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not readable as JSON ({one_line(error, 160)})") from error
    version = data.get("version") if isinstance(data, dict) else None
    if version != 1:
        raise UsageError(f"{path}: wanted a deploykit structure of version 1, got {version!r:.40}")
    try:
        return _Structure.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:100]
        raise UsageError(f"{path}: {where}: {first['msg']}") from error


def _build(structure: _Structure, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    root = nn.Module()
    for name, tensor in tensors.items():
        _place(root, name, tensor, structure.tensors[name].parameter)
    graph, made = fx.Graph(), dict[str, fx.Node]()
    sizes: set[str] = set()
    for saved in structure.nodes:
        if not _is_name(saved.name) or saved.name in made:
            raise BadArgumentError(f"a value called {saved.name[:60]!r} (twice, or no plain name)")
        made[saved.name] = _make(graph, saved, made, structure, sizes)
    inputs = [saved for saved in structure.nodes if saved.op == "input"]
    if len(inputs) != 1 or structure.output not in made:
        raise BadArgumentError("one input and an output that is made are wanted")
    graph.output(made[structure.output])
    try:
        graph.lint()
        graph_module = fx.GraphModule(root, graph).eval()
    except (RuntimeError, SyntaxError) as error:
        raise BadArgumentError(f"a graph that can't be built ({one_line(error, 160)})") from error
    model = structure.model
    check_shapes(graph_module, model.preprocessing.size, model.levels)
    return graph_module


def _place(root: nn.Module, name: str, tensor: Tensor, parameter: bool) -> None:
    if _PATH.fullmatch(name) is None:
        raise BadArgumentError(f"a tensor called {name[:60]!r}")
    *folders, leaf = name.split(".")
    module = root
    try:
        for folder in folders:
            if folder not in dict(module.named_children()):
                module.add_module(folder, nn.Module())
            module = module.get_submodule(folder)
        if parameter and tensor.is_floating_point():
            module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            module.register_buffer(leaf, tensor)
    except (KeyError, AttributeError, TypeError) as error:
        raise BadArgumentError(f"a tensor called {name[:60]!r}") from error


def _make(
    graph: fx.Graph,
    saved: _Node,
    made: Mapping[str, fx.Node],
    structure: _Structure,
    sizes: set[str],
) -> fx.Node:
    if saved.op == "input":
        return graph.placeholder(saved.name)
    if saved.op == "tensor":
        if saved.tensor not in structure.tensors:
            raise BadArgumentError(f"tensor {str(saved.tensor)[:60]!r} is not in the list")
        return graph.create_node("get_attr", str(saved.tensor), name=saved.name)
    target = find_op(saved.op)
    if target is None:
        raise BadArgumentError(f"operator {saved.op[:60]!r} is not allowed")
    if saved.op.startswith("aten.sym_"):
        sizes.add(saved.name)
    elif saved.op in SIZE_OPS:
        _check_sizes(saved, sizes)
        sizes.add(saved.name)
    if not all(map(_is_name, saved.kwargs)):
        raise BadArgumentError(f"an option without a plain name at {saved.name}")
    args = tuple(decode(value, made) for value in saved.args)
    kwargs = {key: decode(value, made) for key, value in saved.kwargs.items()}
    node = graph.create_node("call_function", target, args, kwargs, name=saved.name)
    if saved.layer:
        node.meta["nn_module_stack"] = {saved.layer: (saved.layer, nn.Module)}
    if saved.quantizes:
        node.meta["quantizes"] = saved.quantizes
    return node


def _is_name(text: str) -> bool:
    """Torch writes names into the code it makes of a graph: nothing but names may get there."""
    return _IDENTIFIER.fullmatch(text) is not None and not keyword.iskeyword(text)


def _check_sizes(saved: _Node, sizes: set[str]) -> None:
    for value in saved.args:
        number = isinstance(value, (int, float))
        if not number and not (isinstance(value, dict) and value.get("node") in sizes):
            raise BadArgumentError(f"{saved.op} of something that is no size at {saved.name}")
