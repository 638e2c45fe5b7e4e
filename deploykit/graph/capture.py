"""nn.Module to captured graph, by torch.export."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from deploykit.errors import DeploykitError
from deploykit.graph.attention import decompose_attention
from deploykit.graph.edit import clean, functionalize, remove_dropout
from deploykit.types import Backbone

__all__ = ["CapturedModel", "capture", "with_shapes"]


@dataclass(frozen=True)
class CapturedModel:
    """An inference graph of ATen operators with one image input and one logits output.

    Attributes:
        graph_module: input ``(N, 3, S, S)`` float32, output ``(N, classes)`` float32, or joined
            feature maps where the backbone has ``levels`` (``levels.py``). Tensors
            are reached by get_attr nodes. Passes copy it before they change it.
        backbone: what it was captured from.
        dynamic_batch: False where the model itself fixes the batch size it was traced with.
    """

    graph_module: fx.GraphModule
    backbone: Backbone
    dynamic_batch: bool

    def copy(self) -> CapturedModel:
        """The same model over its own graph and tensors."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own pytree warns about itself when copied
            return replace(self, graph_module=copy.deepcopy(self.graph_module))

    @property
    def example(self) -> Tensor:
        """A zero input with batch 2, the smallest that isn't specialised away."""
        size = self.backbone.preprocessing.size
        return torch.zeros(2, 3, size, size)


def export_program(module: nn.Module, example: Tensor) -> tuple[torch.export.ExportedProgram, bool]:
    """Export with a dynamic batch; where the model forbids it, with the batch of ``example``.

    Returns:
        The program and whether its batch is dynamic.
    """
    try:
        dynamic = ({0: torch.export.Dim.DYNAMIC},)
        return torch.export.export(module, (example,), dynamic_shapes=dynamic), True
    except Exception as dynamic_error:  # torch.export raises many unrelated types
        try:
            return torch.export.export(module, (example[:1],)), False
        except Exception as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
            message = (
                f"the model can't be captured by torch.export: {type(error).__name__}: {first_line}"
            )
            raise DeploykitError(message) from dynamic_error


def capture(backbone: Backbone) -> CapturedModel:
    """Capture a backbone as an ATen graph for inference.

    Fused attention is rewritten as matmul, softmax, matmul, so that no matmul hides from the
    quantiser; dropout and identity operators are removed.

    Raises:
        DeploykitError: torch.export can't capture the module.
    """
    size = backbone.preprocessing.size
    module = copy.deepcopy(backbone.module)  # some models cache tensors in their first forward
    module.train()  # leaving eval mode drops such caches: weights may have changed since
    module.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's notes to its own developers
        program, dynamic = export_program(module, torch.zeros(2, 3, size, size))
        graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    wrapper = getattr(backbone.module, "wraps", None)
    if isinstance(wrapper, str):
        _unwrap(graph_module, wrapper)
    decompose_attention(graph_module)
    remove_dropout(graph_module)
    functionalize(graph_module)
    clean(graph_module)
    return CapturedModel(graph_module, backbone, dynamic)


def _unwrap(graph_module: fx.GraphModule, wrapper: str) -> None:
    """Call layers and tensors what they are called without the wrapper: take the name under
    which it holds the network (``model`` in ``FeatureMaps``) off theirs."""
    inner = graph_module.get_submodule(wrapper)
    delattr(graph_module, wrapper)
    for name, child in inner.named_modules(remove_duplicate=False):
        if name and "." not in name:
            graph_module.add_module(name, child)
    for name, parameter in inner.named_parameters(recurse=False, remove_duplicate=False):
        graph_module.register_parameter(name, parameter)
    for name, buffer in inner.named_buffers(recurse=False, remove_duplicate=False):
        graph_module.register_buffer(name, buffer)
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            node.target = str(node.target).removeprefix(f"{wrapper}.")
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["nn_module_stack"] = {
            key: (path.removeprefix(wrapper).removeprefix("."), kind)
            for key, (path, kind) in stack.items()
        }


def with_shapes(captured: CapturedModel) -> CapturedModel:
    """The same model, each node knowing its value's shape (``meta["val"]``), as after a capture.

    A graph read from a file doesn't; passes look there.
    """
    image = captured.example if captured.dynamic_batch else captured.example[:1]
    FakeTensorProp(captured.graph_module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(
        image
    )
    return captured
