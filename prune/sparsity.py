"""Zeros in the weights of a captured graph: 2:4 and other n:m patterns, blocks, or anywhere.

2:4 is what NVIDIA's sparse tensor cores can skip. All other patterns only make a compressed file
smaller, and so does 2:4 on every CPU runtime. The record says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from torch import Tensor, fx

from deploykit.errors import UsageError
from deploykit.graph.capture import CapturedModel
from deploykit.graph.edit import add_tensor, clean, constant, layer_name
from deploykit.graph.execute import take
from deploykit.progress import Steps, silent
from deploykit.prune.sparsity_layers import LayerRow, eligible_layers
from deploykit.prune.sparsity_methods import LayerInputs, Method, find_method, prune_matrix
from deploykit.prune.sparsity_patterns import Pattern, from_matrix, parse_pattern, to_matrix
from deploykit.prune.sparsity_shares import global_zeros, uniform_zeros
from deploykit.prune.sparsity_statistics import InputStatistics
from deploykit.prune.sparsity_walk import walk_layers
from deploykit.types import PassRecord

__all__ = ["SparsityOptions", "sparsify"]

Batches = Callable[[], Iterable[Tensor]]

GAINS = {
    True: (
        "NVIDIA sparse tensor cores only (Ampere and later), where TensorRT or cuSPARSELt picks "
        "them: layers of 256 channels and more, 15 % end to end at most as a rule. No CPU runtime "
        "gains time"
    ),
    False: "size only: no runtime skips these zeros, a compressed file is smaller",
}


@dataclass(frozen=True)
class SparsityOptions:
    """What is zeroed, how it is chosen, and on how many images.

    Attributes:
        pattern: ``2:4`` (two of four stay) or another n:m; ``block16``, ``block32``;
            ``unstructured``. Only 2:4 can run faster anywhere.
        method: ``magnitude``, ``wanda``, ``sparsegpt`` or, for blocks, ``distortion``.
        sparsity: part of the weights of eligible layers that is zeroed, for blocks and
            unstructured zeros; None there means a half. n:m has it in its name.
        allocation: every layer the same part, or ``global``: what costs least over all layers
            (LAMP). Not for n:m.
        exclude: globs of layer names that stay dense.
        images: calibration images read at most.
        damping: ridge on a Gram matrix, a part of its mean diagonal; to it comes ``inputs /
            input vectors``, since few vectors leave directions unseen.
        bias_correction: let the bias make up for the mean error of the output. Needs images.
    """

    pattern: str = "2:4"
    method: str = "magnitude"
    sparsity: float | None = None
    allocation: Literal["uniform", "global"] = "uniform"
    exclude: tuple[str, ...] = ()
    images: int = 128
    damping: float = 0.01
    bias_correction: bool = False

    @property
    def needs_images(self) -> bool:
        """Whether ``sparsify`` wants calibration images.

        Raises:
            UsageError: no such method.
        """
        return self.bias_correction or find_method(self.method).needs != "nothing"


def sparsify(
    captured: CapturedModel,
    options: SparsityOptions,
    batches: Batches | None = None,
    *,
    steps: Steps = silent,
) -> tuple[CapturedModel, PassRecord]:
    """A copy of the model with zeros in the weights of every layer that can take the pattern.

    Methods that look at images see each layer's inputs as the layers before it, sparse already,
    make them: one pass of the images through the network. ``allocation="global"`` takes another
    one before that, through the dense network, for methods that need images. The result depends
    on nothing random.

    Args:
        captured: a float graph, left unchanged.
        batches: gives a fresh iterator of batches, float32 (N, 3, S, S); for methods that need
            images.

    Raises:
        UsageError: the request can't be carried out; nothing was computed.
        DeploykitError: a layer reads values that aren't finite.
    """
    pattern, method, rows = _checked(captured, options, batches is not None)
    model = captured.copy()
    graph_module = model.graph_module
    images = take(batches(), options.images) if batches and options.needs_images else []
    if options.needs_images and not images:
        raise UsageError("no calibration images came")
    chosen = [row for row in rows if row.eligible]
    work = _Work(graph_module, options, pattern, method, chosen)
    if options.bias_correction:
        work.own_biases()
    before = {row.node: _zeros_of(graph_module, row) for row in chosen}
    if options.allocation == "global":
        with steps("score weights of all layers", total=len(chosen)) as advance:
            work.share_out(images, advance)
    with steps(f"sparsify {pattern} by {method.name}", total=len(chosen)) as advance:
        work.prune(images, advance)
    clean(graph_module)
    return model, _record(options, work, rows, before, sum(map(len, images)))


def _checked(
    captured: CapturedModel, options: SparsityOptions, with_images: bool
) -> tuple[Pattern, Method, list[LayerRow]]:
    """Refuse what can't be done."""
    pattern, method = parse_pattern(options.pattern), find_method(options.method)
    method.check(pattern)
    if pattern.kind == "n:m" and options.sparsity is not None:
        message = f"sparsity {options.sparsity} can't be chosen with {pattern}, which says it"
        raise UsageError(message)
    if pattern.kind == "n:m" and options.allocation != "uniform":
        raise UsageError(f"{pattern} zeroes the same part of every layer: allocation is uniform")
    if options.sparsity is not None and not 0 < options.sparsity < 1:
        raise UsageError(f"sparsity {options.sparsity}: wanted more than 0 and less than 1")
    if options.images < 1 or options.damping <= 0:
        raise UsageError("images and damping must be more than 0")
    if options.needs_images and not with_images:
        why = "bias correction" if method.needs == "nothing" else f"method {method.name}"
        raise UsageError(f"{why} needs calibration images")
    rows = eligible_layers(captured, options.pattern)
    for glob in options.exclude:
        if not any(fnmatch(row.layer, glob) for row in rows):
            names = ", ".join(row.layer for row in rows[:3])
            raise UsageError(f"exclude: no layer's name matches {glob[:60]!r}; such are {names}")
    rows = [_excluded(row, options.exclude) for row in rows]
    if not any(row.eligible for row in rows):
        reason = rows[0].reason if rows else "there are none"
        message = f"no layer can take {pattern} zeros; the first: {reason}"
        raise UsageError(message)
    return pattern, method, rows


def _excluded(row: LayerRow, globs: tuple[str, ...]) -> LayerRow:
    for glob in globs:
        if row.eligible and fnmatch(row.layer, glob):
            return row.declined(f"excluded by {glob!r}")
    return row


class _Work:
    """The copy of the graph that is being changed.

    Attributes:
        zeros: weights or blocks to zero, by layer node name.
        output_errors: of each layer, by node name, where Gram matrices are known.
        corrected: names of the layers whose bias makes up for the mean error.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        options: SparsityOptions,
        pattern: Pattern,
        method: Method,
        layers: list[LayerRow],
    ) -> None:
        self.graph_module, self.options = graph_module, options
        self.pattern, self.method = pattern, method
        self.layers = {row.node: row for row in layers}
        self.nodes = {n.name: n for n in graph_module.graph.nodes if n.name in self.layers}
        self.sparsity = 0.5 if options.sparsity is None else options.sparsity
        units = {row.node: pattern.units(row.weights) for row in layers}
        self.zeros = uniform_zeros(units, self.sparsity)
        self.output_errors: dict[str, float] = {}
        self.corrected: set[str] = set()

    def own_biases(self) -> None:
        """Give every layer a bias that nothing else reads, zeros where it had none.

        One that is computed while the model runs (BEiT joins three) can't be changed, and that
        layer's isn't.
        """
        for node in self.nodes.values():
            weight, part = self._weight(node), [*node.args, None][2]
            old = constant(self.graph_module, part)
            if part is not None and old is None:
                continue
            self.corrected.add(node.name)
            value = weight.new_zeros(len(weight)) if old is None else old.clone()
            bias = add_tensor(self.graph_module, f"{layer_name(node)}.bias", value, node)
            node.args = (*node.args[:2], bias, *node.args[3:])

    def share_out(self, images: list[Tensor], advance: Callable[[float], None]) -> None:
        """Zeros of each layer by the scores of all, taken on the dense model.

        Memory: one float64 for every weight (or block) of the eligible layers.
        """
        scores: dict[str, Tensor] = {}

        def visit(node: fx.Node, weight: Tensor, statistics: InputStatistics | None) -> None:
            inputs = self._inputs(node, statistics)
            scores[node.name] = self.method.score(to_matrix(weight.float()), inputs, self.pattern)

        self._visit_all(images if self.method.needs != "nothing" else [], visit, advance)
        self.zeros = global_zeros(scores, self.sparsity)

    def prune(self, images: list[Tensor], advance: Callable[[float], None]) -> None:
        """Write every layer's new weight."""
        self._visit_all(images, self._prune_layer, advance)

    @torch.no_grad()
    def _prune_layer(
        self, node: fx.Node, weight: Tensor, statistics: InputStatistics | None
    ) -> None:
        old, inputs = to_matrix(weight.float()), self._inputs(node, statistics)
        new = prune_matrix(self.method, old, inputs, self.pattern, self.zeros[node.name])
        change = new - old
        if inputs.gram is not None:
            error = ((change @ inputs.gram) * change).sum(dtype=torch.float64)
            total = ((old @ inputs.gram) * old).sum(dtype=torch.float64)
            self.output_errors[node.name] = float(error / total.clamp(min=1e-30))
        if node.name in self.corrected and statistics is not None:
            bias = constant(self.graph_module, node.args[2])
            assert bias is not None
            bias.sub_((change.double() @ statistics.mean).to(bias))
        weight.copy_(from_matrix(new, weight))  # the copy's own: nothing else reads it

    def _inputs(self, node: fx.Node, statistics: InputStatistics | None) -> LayerInputs:
        if statistics is None or self.method.needs == "nothing":
            return LayerInputs()
        if self.method.needs == "norms":
            return LayerInputs(statistics.squares)
        gram = statistics.gram(centred=node.name in self.corrected)
        damping = self.options.damping + len(gram) / statistics.rows
        return LayerInputs(statistics.squares, gram, damping)

    def _visit_all(
        self,
        images: list[Tensor],
        visit: Callable[[fx.Node, Tensor, InputStatistics | None], None],
        advance: Callable[[float], None],
    ) -> None:
        if images:
            gram = self.method.needs == "gram"
            names = list(self.layers)
            walk_layers(self.graph_module, names, images, visit, gram=gram, advance=advance)
            return
        for node in self.nodes.values():
            visit(node, self._weight(node), None)
            advance(1)

    def _weight(self, node: fx.Node) -> Tensor:
        weight = constant(self.graph_module, node.args[1])
        assert weight is not None
        return weight


def _zeros_of(graph_module: fx.GraphModule, row: LayerRow) -> int:
    (node,) = [n for n in graph_module.graph.nodes if n.name == row.node]
    weight = constant(graph_module, node.args[1])
    assert weight is not None
    return int((weight == 0).sum())


def _record(
    options: SparsityOptions,
    work: _Work,
    rows: list[LayerRow],
    before: dict[str, int],
    images: int,
) -> PassRecord:
    total = sum(row.weights for row in rows)
    reached = sum(row.weights for row in work.layers.values())
    after = {row.node: _zeros_of(work.graph_module, row) for row in work.layers.values()}
    layers: list[dict[str, Any]] = []
    for row in rows:
        facts = row.plain()
        if row.node in after:
            facts["zeros"] = after[row.node] / row.weights
            if row.node in work.output_errors:
                facts["output_error"] = work.output_errors[row.node]
        layers.append(facts)
    on = f", {images} images" if images else ""
    faster = sum(row.gains for row in work.layers.values())
    gain = (
        f"{faster} layers large enough to gain on NVIDIA's sparse tensor cores, nothing on a CPU"
        if work.pattern.on_tensor_cores
        else "size only"
    )
    summary = (
        f"{work.pattern} zeros by {work.method.name}{on}: {len(work.layers)} of {len(rows)} layers "
        f"with {100 * reached / total:.0f} % of their weights, "
        f"{100 * sum(after.values()) / reached:.0f} % of those zero; {gain}"
    )
    details = {
        "pattern": str(work.pattern),
        "method": work.method.name,
        "source": work.method.source,
        "allocation": options.allocation,
        "biases_corrected": len(work.corrected),
        "images": images,
        "statistics": (
            "none" if not images else "one pass, each layer's inputs as the sparse layers before "
            "it make them"
        ),
        "weights": total,
        "weights_reached": reached,
        "zeros_before": sum(before.values()),
        "zeros": sum(after.values()),
        "gains_on": GAINS[work.pattern.on_tensor_cores],
        "size_only": not work.pattern.on_tensor_cores,
        "layers": layers,
        "declined": {row.layer: row.reason for row in rows if not row.eligible},
    }  # fmt: skip
    return PassRecord(name="sparsify", summary=summary, details=details)
