"""Which layer of the file each kernel belongs to.

A kernel that computes is the layer whose operator it replaced. Runtimes name it after that
operator, or after the last of those merged into it, or after a value between them. Any other
kernel belongs to the layer it works for: the next one that reads what it makes; where the runtime
made the kernel up (a reorder, a merged norm) and the file doesn't know it, the next layer to run.
What follows the last layer belongs to that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["SourceGraph", "SourceNode", "owners", "plain_layer"]


@dataclass(frozen=True)
class SourceNode:
    """An operator of the file.

    Attributes:
        layer: the layer's name if it computes one, else "".
        inputs: names of the nodes whose values it reads.
        values: names of the values it makes.
    """

    name: str
    layer: str
    inputs: tuple[str, ...]
    values: tuple[str, ...] = ()


@dataclass
class SourceGraph:
    """A file's operators in order, and the ways between them."""

    nodes: Sequence[SourceNode]
    order: dict[str, int] = field(init=False)
    makers: dict[str, str] = field(init=False)
    readers: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.order = {node.name: index for index, node in enumerate(self.nodes)}
        self.makers = {value: node.name for node in self.nodes for value in node.values}
        self.readers = {}
        for node in self.nodes:
            for source in node.inputs:
                self.readers.setdefault(source, []).append(node.name)

    @property
    def layers(self) -> list[str]:
        """Names of the layers, in order; a layer that runs twice comes twice."""
        return [node.layer for node in self.nodes if node.layer]

    def node(self, name: str) -> SourceNode:
        return self.nodes[self.order[name]]

    def find(self, kernel: str, bare: Iterable[str]) -> SourceNode | None:
        """The operator, or the maker of the value, that a kernel is named after."""
        for name in (kernel, *bare):
            if name in self.order:
                return self.node(name)
            if name in self.makers:
                return self.node(self.makers[name])
        return None

    def before(self, start: SourceNode, free: set[str]) -> SourceNode | None:
        """The last free computing operator at or before a node, with no other between."""
        return self._nearest(start, free, last=True)

    def after(self, start: SourceNode) -> SourceNode | None:
        """The first computing operator at or after a node."""
        computing = {node.name for node in self.nodes if node.layer}
        return self._nearest(start, computing, last=False)

    def _nearest(self, start: SourceNode, wanted: set[str], *, last: bool) -> SourceNode | None:
        found: list[SourceNode] = []
        seen, todo = {start.name}, deque([start])
        while todo:
            node = todo.popleft()
            if node.layer:
                if node.name in wanted:
                    found.append(node)
                continue
            for name in node.inputs if last else self.readers.get(node.name, ()):
                if name in self.order and name not in seen:
                    seen.add(name)
                    todo.append(self.node(name))
        if not found:
            return None
        pick = max if last else min
        return pick(found, key=lambda node: self.order[node.name])


def plain_layer(name: str) -> str:
    """A layer's name without the number that tells its second operator from its first."""
    stem, mark, number = name.rpartition("#")
    return stem if mark and number.isdigit() else name


def owners(
    graph: SourceGraph,
    kernels: Sequence[tuple[str, Sequence[str], bool]],
) -> list[str]:
    """Name of the computing operator each kernel belongs to; "" where that can't be told.

    Args:
        kernels: (name, the name without each of the runtime's decorations, whether it computes),
            in the order of running.
    """
    free = {node.name for node in graph.nodes if node.layer}
    found: list[str | None] = [None] * len(kernels)
    for index, (name, bare, computes) in enumerate(kernels):
        node = graph.find(name, bare)
        if computes and node is not None:
            layer = graph.before(node, free)
            if layer is not None:
                free.discard(layer.name)
                found[index] = layer.name
    rest = [i for i, (_, _, computes) in enumerate(kernels) if computes and found[i] is None]
    if len(rest) == len(free):  # the only ones left, in their order
        left = sorted(free, key=lambda name: graph.order[name])
        for index, layer_name in zip(rest, left, strict=True):
            found[index] = layer_name
    else:
        for index in rest:
            found[index] = ""
    own = {node.layer: node.name for node in graph.nodes if node.layer}
    for index, (name, bare, computes) in enumerate(kernels):
        if computes:
            continue
        if name in own:  # a bias that wasn't merged into its layer bears the layer's name
            found[index] = own[name]
        elif (node := graph.find(name, bare)) is not None:
            layer = graph.after(node)
            found[index] = layer.name if layer is not None else None
    return _in_order(found, [computes for _, _, computes in kernels])


def _in_order(found: list[str | None], computes: Sequence[bool]) -> list[str]:
    """Kernels of no known place go to the next computing one, and at the end to the last."""
    result = list(found)
    following: str | None = None
    for index in reversed(range(len(result))):
        if computes[index]:
            following = result[index]
        elif result[index] is None:
            result[index] = following
    last = next((n for n, c in zip(reversed(result), reversed(computes), strict=True) if c), "")
    return [last or "" if name is None else name for name in result]
