"""The quantised graph: the one object that is both simulated and lowered."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from deploykit.types import Backbone, PassRecord

__all__ = ["FLOAT", "LayerPlan", "QuantizedModel"]

FLOAT = 16


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer or attention matmul.

    Attributes:
        node: the node's name in the graph.
        layer: dotted module name.
        op: ``conv2d``, ``linear`` or ``matmul``.
        weight_bits: FLOAT leaves the weight alone; None for a matmul of two activations.
        input_bits: width of the input(s); FLOAT leaves them alone.
        softmax_input: the first input of a matmul is a softmax output.
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
