"""What quantising one layer alone does to the network: scores by KL, SQNR, Fisher and relevance.

The float graph is walked once a batch. At each layer the walk forks: the layer is computed with
its quantised inputs and weight and, for KL, the rest of the network after it, from the values
that are alive at that point. Nothing before a layer is ever computed twice, and memory holds at
most the live values of the float walk and of one fork: twice the activations that running one
batch needs. The gradient scores keep all activations of one batch, as training would.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from deploykit.errors import DeploykitError
from deploykit.quant.sensitivity_setup import Prepared

__all__ = ["Metric", "Tally", "score_layers"]

Metric = Literal["kl", "sqnr", "fisher", "lrp"]

_MOST_NOISE = 1e6  # of noise to signal, -60 dB: the noise of an output that should be all zero


@dataclass
class Tally:
    """Sums over the images seen, of one layer at one pair of widths.

    Attributes:
        signal, noise: squared float output, squared difference of the quantised one.
        loss: KL divergence or its Fisher estimate, nats.
        relevance: absolute relevance of the output.
    """

    images: int = 0
    signal: float = 0.0
    noise: float = 0.0
    loss: float = 0.0
    relevance: float = 0.0

    @property
    def noise_ratio(self) -> float:
        """Noise over signal: 0 where nothing is lost, at most 1e6."""
        if self.noise == 0:
            return 0.0
        return min(self.noise / self.signal, _MOST_NOISE) if self.signal > 0 else _MOST_NOISE

    @property
    def sqnr_db(self) -> float:
        """Of the layer's own output, inf where nothing is lost."""
        return math.inf if self.noise_ratio == 0 else -10 * math.log10(self.noise_ratio)


def score_layers(
    prepared: Prepared,
    layers: Mapping[str, Sequence[str]],
    batches: Iterable[Tensor],
    metric: Metric,
    *,
    seed: int = 0,
) -> dict[str, Tally]:
    """Score each layer, quantised alone in an otherwise float network.

    * ``kl``: mean KL(softmax of the float logits || of the logits with this layer quantised).
    * ``sqnr``: the error of the layer's own output only.
    * ``fisher``: ``1/2 sum_i d_i^2 g_i^2``, d the change of the layer's output and g the gradient
      of -log p(y) there, y drawn from the float model's own softmax: to second order the KL of
      the network is ``1/2 d^T F d`` with F the Fisher information matrix, of which this is the
      diagonal by one sample an image, from one backward pass (the Fisher of FIMA-Q, its
      diagonal only).
    * ``lrp``: relevance reaching the layer's output from the predicted class, by gradient times
      input, which in a network of ReLUs without biases is LRP-0 (Ancona et al., 2018, prop. 1).
      LRP-QViT ranks layers by such a relevance. It knows nothing of widths.

    Args:
        layers: layer name to the nodes quantised together.
        batches: float32 (N, 3, S, S).
        seed: of the labels that ``fisher`` draws.

    Raises:
        DeploykitError: the float model's logits aren't finite on these images.
    """
    walk = _Walk(prepared)
    tallies = {name: Tally() for name in layers}
    generator = torch.Generator().manual_seed(seed)
    for images in batches:
        if metric in ("fisher", "lrp"):
            _with_gradients(walk, layers, tallies, images, metric, generator)
        else:
            _with_forks(walk, layers, tallies, images, metric)
    return tallies


@dataclass
class _Kept:
    """A planned node's arguments and results, in a walk that will be differentiated."""

    args: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    results: dict[str, Tensor] = field(default_factory=dict)


class _Walk(fx.Interpreter):
    """Runs a graph node by node, some layers quantised; forgets each value after its last use."""

    def __init__(self, prepared: Prepared) -> None:
        super().__init__(prepared.graph_module)
        self.prepared = prepared
        self.order = list(prepared.graph_module.graph.nodes)
        self.position = {node.name: index for index, node in enumerate(self.order)}
        self.quantized: frozenset[str] = frozenset()

    def begin(self, images: Tensor) -> None:
        self.env = {}
        self.args_iter = iter([images])

    def step(self, node: fx.Node, *, forget: bool = True) -> None:
        self.env[node] = self.run_node(node)
        for spent in self.user_to_last_uses.get(node, []) if forget else []:
            del self.env[spent]

    def run_node(self, n: fx.Node) -> Any:
        return self.run_quantized(n) if n.name in self.quantized else super().run_node(n)

    def run_quantized(self, node: fx.Node) -> Any:
        """The node's result with quantised inputs and weight."""
        return self.prepared.state.layer(node, self.fetch_args_kwargs_from_env(node)[0])

    def fork(self, start: int, quantized: Iterable[str]) -> Tensor:
        """Logits with some layers quantised, from the present values on; these stay as they are."""
        kept, self.env = self.env, dict(self.env)
        self.quantized = frozenset(quantized)
        try:
            for node in self.order[start:]:
                self.step(node)
            return _logits(self.env[self.order[-1]])
        finally:
            self.env, self.quantized = kept, frozenset()


def _logits(output: Any) -> Tensor:
    """The one tensor a graph gives, bare or in a tuple."""
    logits = pytree.tree_leaves(output)[0]
    assert isinstance(logits, Tensor)
    return logits


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)


@torch.no_grad()
def _with_forks(
    walk: _Walk,
    layers: Mapping[str, Sequence[str]],
    tallies: Mapping[str, Tally],
    images: Tensor,
    metric: Metric,
) -> None:
    first = {min(nodes, key=walk.position.__getitem__): name for name, nodes in layers.items()}
    owner = {node: name for name, nodes in layers.items() for node in nodes}
    answers: dict[str, Tensor] = {}
    walk.begin(images)
    for index, node in enumerate(walk.order):
        if node.name in owner:
            # Before the step: it forgets the values that only this layer reads.
            quantized = walk.run_quantized(node)
            if metric == "kl" and node.name in first:
                name = first[node.name]
                answers[name] = walk.fork(index, layers[name])
            walk.step(node)
            _add_noise(tallies[owner[node.name]], walk.env[node], quantized)
        else:
            walk.step(node)
    expected = _log_softmax(_logits(walk.env[walk.order[-1]]))
    _demand_finite(expected)
    for tally in tallies.values():
        tally.images += len(images)
    for name, logits in answers.items():
        # KL(p || q); rounding can take the KL of equal distributions a hair below nought.
        divergence = F.kl_div(_log_softmax(logits), expected, reduction="sum", log_target=True)
        tallies[name].loss += max(float(divergence), 0.0)


def _add_noise(tally: Tally, result: Tensor, quantized: Tensor) -> None:
    tally.signal += float(result.double().square().sum())
    tally.noise += float((result.double() - quantized.double()).square().sum())


def _with_gradients(
    walk: _Walk,
    layers: Mapping[str, Sequence[str]],
    tallies: Mapping[str, Tally],
    images: Tensor,
    metric: Metric,
    generator: torch.Generator,
) -> None:
    names = {node for nodes in layers.values() for node in nodes}
    kept = _Kept()
    with torch.enable_grad():
        walk.begin(images.detach().requires_grad_())
        for node in walk.order:
            if node.name in names:
                kept.args[node.name] = walk.fetch_args_kwargs_from_env(node)[0]
            walk.step(node)
            if node.name in names:
                kept.results[node.name] = walk.env[node]
        logits = _logits(walk.env[walk.order[-1]])
        _demand_finite(logits)
        loss = _loss(logits, metric, generator)
        # A layer that the logits don't depend on has no gradient: zeros.
        gradients = dict(
            zip(
                kept.results,
                torch.autograd.grad(
                    loss, list(kept.results.values()), allow_unused=True, materialize_grads=True
                ),
                strict=True,
            )
        )
    nodes = {node.name: node for node in walk.order}
    with torch.no_grad():
        for layer, members in layers.items():
            tally = tallies[layer]
            tally.images += len(images)
            for name in members:
                result, gradient = kept.results[name], gradients[name]
                args = [a.detach() if isinstance(a, Tensor) else a for a in kept.args[name]]
                quantized = walk.prepared.state.layer(nodes[name], args)
                _add_noise(tally, result, quantized)
                if metric == "fisher":
                    squares = (result.double() - quantized.double()) * gradient.double()
                    tally.loss += 0.5 * float(squares.square().sum())
                else:
                    tally.relevance += float((result.double() * gradient.double()).abs().sum())


def _loss(logits: Tensor, metric: Metric, generator: torch.Generator) -> Tensor:
    """What is differentiated: one image's part doesn't depend on the others'."""
    if metric == "lrp":
        return logits.max(-1).values.sum()
    drawn = torch.multinomial(logits.detach().double().softmax(-1), 1, generator=generator)
    return F.cross_entropy(logits, drawn[:, 0], reduction="sum")


def _demand_finite(logits: Tensor) -> None:
    if not torch.isfinite(logits).all():
        message = (
            "the float model's logits are not finite on the calibration images: "
            "check the weights and the preprocessing"
        )
        raise DeploykitError(message)
