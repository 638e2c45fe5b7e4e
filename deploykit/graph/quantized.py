"""The quantised graph: the one object that is both simulated and lowered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from deploykit.graph import ops as _registered  # noqa: F401  makes torch.ops.deploykit
from deploykit.graph.edit import is_op
from deploykit.types import Backbone, PassRecord

__all__ = ["FLOAT", "LayerPlan", "QuantizedModel", "has_activation_quantizers"]

FLOAT = 16
_OPS = torch.ops.deploykit
_TABLE_QUANTIZE = (_OPS.fake_quantize_log.default, _OPS.fake_quantize_twin.default)
_FAKE_QUANTIZE = (_OPS.fake_quantize.default, *_TABLE_QUANTIZE)


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer or attention matmul.

    Attributes:
        node: the node's name in the graph.
        layer: dotted module name.
        op: ``conv2d``, ``linear`` or ``matmul``.
        weight_bits: FLOAT leaves the weight alone; None for a matmul of two activations.
        input_bits: width of the input(s); FLOAT leaves them alone.
        softmax_input: one input of a matmul is a softmax output.
        note: why it isn't at the asked widths, or "".
    """

    node: str
    layer: str
    op: str
    weight_bits: int | None
    input_bits: int
    softmax_input: bool = False
    note: str = ""

    @property
    def inputs(self) -> int:
        """How many of its arguments, from the first, are activations."""
        return 2 if self.op == "matmul" else 1

    @property
    def is_float(self) -> bool:
        return self.weight_bits in (None, FLOAT) and self.input_bits == FLOAT

    @property
    def bits(self) -> str:
        weights = self.input_bits if self.weight_bits is None else self.weight_bits
        return f"w{weights}a{self.input_bits}"


@dataclass(frozen=True)
class QuantizedModel:
    """A graph whose weights are integer codes and whose activations pass quantisers.

    Running it in torch is the simulation; exporters lower the same codes.

    Attributes:
        graph_module: input (N, 3, S, S) float32, output (N, classes) float32.
        plans: every layer and attention matmul, quantised or not.
        records: what the passes did.
        layer_sqnr_db: per planned layer, the SQNR of its output when only it is quantised and
            its input is the float model's.
    """

    graph_module: fx.GraphModule
    backbone: Backbone
    bits: str
    dynamic_batch: bool
    plans: tuple[LayerPlan, ...]
    records: tuple[PassRecord, ...]
    layer_sqnr_db: dict[str, float]

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of the simulation."""
        result = self.graph_module(images)
        assert isinstance(result, Tensor)
        return result

    def how_it_runs(self) -> dict[str, list[str]]:
        """Which parts are integers in the file, narrower on disk than computed, or simulated.

        What a runtime makes of them is in each measurement's ``kernels``.
        """
        layers = [plan for plan in self.plans if plan.weight_bits is not None]
        integer = [p for p in layers if FLOAT not in (p.weight_bits, p.input_bits)]
        weight_only = [p for p in layers if p.weight_bits != FLOAT and p.input_bits == FLOAT]
        matmuls = [p for p in self.plans if p.weight_bits is None and p.input_bits != FLOAT]
        narrow = [p for p in integer if min(p.weight_bits or 8, p.input_bits) < 8]
        tables = [node for node in self.graph_module.graph.nodes if is_op(node, *_TABLE_QUANTIZE)]
        # Argument 5 is the step of the 8-bit grid the values lie on, 0.0 if they are any floats.
        on_bytes = [node for node in tables if node.args[5] > 0]
        as_floats = [node for node in tables if node.args[5] == 0]
        readers = {user for node in as_floats for user in node.users}
        float_layers = sum(_second_is(user, _OPS.dequantize.default) for user in readers)
        float_matmuls = sum(_second_is(user, *_FAKE_QUANTIZE) for user in readers)
        found: dict[str, list[str]] = {"integer": [], "wider": [], "simulated": []}
        if len(integer) > float_layers:
            found["integer"].append(
                f"{len(integer) - float_layers} of {len(layers)} layers have integer weights "
                "and inputs"
            )
        if len(matmuls) > float_matmuls:
            count = len(matmuls) - float_matmuls
            found["integer"].append(f"{count} attention matmuls have integer inputs")
        if narrow:
            text = f"codes below 8 bits of {len(narrow)} layers are carried in 8-bit kernels"
            found["wider"].append(text)
        if on_bytes:
            text = (
                f"codes of {len(on_bytes)} activations without equal steps become 8-bit integers "
                "by a table"
            )
            found["wider"].append(text)
        if weight_only:
            text = f"weights of {len(weight_only)} layers are dequantised to float when computed"
            found["wider"].append(text)
        if as_floats:
            text = (
                f"codes of {len(as_floats)} activations without equal steps: "
                "their values are multiplied as floats"
            )
            found["simulated"].append(text)
        return found


def has_activation_quantizers(graph_module: fx.GraphModule) -> bool:
    """Whether values are rounded while the graph runs, not only its weights before."""
    return any(is_op(node, *_FAKE_QUANTIZE) for node in graph_module.graph.nodes)


def _second_is(node: fx.Node, *targets: Callable[..., object]) -> bool:
    """Whether a product's second factor is a weight's, or another activation's, operator."""
    return len(node.args) > 1 and is_op(node.args[1], *targets)
