"""Which channels of a network belong together, by torch-pruning's dependency graph.

Attention and Swin's patch merging are stood in for while the graph is traced: its reshapes are
what breaks such tracing, and their own channels are known anyway (``structured_ports``).

Source: Fang et al., DepGraph: Towards Any Structural Pruning (CVPR 2023).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch_pruning
from torch import Tensor, nn
from torch_pruning.dependency import index_mapping

from deploykit.errors import one_line
from deploykit.prune.structured_groups import Group, Slice
from deploykit.prune.structured_ports import is_leaf, ports_of

__all__ = ["channel_groups"]


class _Item(NamedTuple):
    """One node's part in a group: its positions, each with the unit it belongs to."""

    node: Any
    position: Tensor
    unit: Tensor
    is_output: bool


class _Opaque(torch.autograd.Function):
    """Something of a given shape that depends on its input: a module nobody looks into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: torch.Size) -> Tensor:  # noqa: ARG004
        return x.new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        raise NotImplementedError("the graph is only walked")


class _LeafPruner(torch_pruning.BasePruningFunc):  # type: ignore[misc]
    """Tells the dependency graph how many channels a leaf has; nothing is pruned through it."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:  # noqa: ARG002
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:  # noqa: ARG002
        return layer

    def get_out_channels(self, layer: nn.Module) -> int | None:
        ports = ports_of(layer)
        return None if ports is None else ports.channels_out

    def get_in_channels(self, layer: nn.Module) -> int | None:
        ports = ports_of(layer)
        return None if ports is None else ports.channels_in


_MOST_CHANNELS = 2**16


class _Flattening(index_mapping._FlattenIndexMapping):  # type: ignore[misc]
    """torch-pruning's own, which gives up where channels multiply beyond any layer's.

    It guesses what a reshape flattens from the layers around it. Around windows the guesses are
    wrong, each multiplies the last one's indices, and a network such as MaxViT takes hours.
    """

    def __call__(self, idxs: Sequence[Any]) -> Any:
        if not self.reverse and len(idxs) * self._stride > _MOST_CHANNELS:
            raise ValueError("its reshapes can't be followed")
        return super().__call__(idxs)


_Shapes = dict[nn.Module, tuple[torch.Size, torch.Size]]


def channel_groups(
    module: nn.Module, example: Tensor, fixed: frozenset[nn.Module] = frozenset()
) -> tuple[list[Group], dict[str, str]]:
    """Every group of channels that can go, and why others can't.

    Args:
        module: in eval mode; its attention is slim already. Left as it was.
        example: float32 (1, 3, S, S).
        fixed: layers whose output must keep its width: those of attention nobody knows.

    Returns:
        Groups of the kinds ``mlp``, ``conv`` and ``embedding``; and name to reason of what was
        left out. A network that can't be traced as a whole is traced part by part, which finds
        the groups within each part.
    """
    groups: list[Group] = []
    declined: dict[str, str] = {}
    _trace_parts(module, "", _shapes(module, example), fixed, groups, declined)
    return groups, declined


def _trace_parts(
    module: nn.Module,
    name: str,
    shapes: _Shapes,
    fixed: frozenset[nn.Module],
    groups: list[Group],
    declined: dict[str, str],
) -> None:
    if module not in shapes or is_leaf(module):
        return
    try:
        found, refused = _trace(module, name, shapes, fixed)
    except Exception as error:  # the tracer's failures have no common type
        if name.count(".") > 8:
            return
        children = list(module.named_children())
        if children and not isinstance(module, nn.Linear | nn.Conv2d):
            label = name or "embedding"
            reason = f"can't be traced as a whole: {type(error).__name__}: {one_line(error, 120)}"
            declined[label] = reason
        for child_name, child in children:
            path = f"{name}.{child_name}" if name else child_name
            inside = [child] if child in shapes else list(child.children())
            for index, part in enumerate(inside):
                deeper = path if part is child else f"{path}.{index}"
                _trace_parts(part, deeper, shapes, fixed, groups, declined)
        return
    groups += found
    declined.update(refused)


def _shapes(module: nn.Module, example: Tensor) -> _Shapes:
    """Input and output shape of every module with one tensor in and one out, run once."""
    found: _Shapes = {}
    several: set[nn.Module] = set()

    def note(part: nn.Module, args: tuple[object, ...], output: object) -> None:
        if part in found:
            several.add(part)
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            found[part] = args[0].shape, output.shape

    hooks = [part.register_forward_hook(note) for part in module.modules()]
    try:
        with torch.no_grad():
            module(example)
    finally:
        for hook in hooks:
            hook.remove()
    return {part: shape for part, shape in found.items() if part not in several}


@contextlib.contextmanager
def _standing_in(module: nn.Module, shapes: _Shapes) -> Iterator[list[nn.Module]]:
    """Leaves give something of their output's shape; parameters want gradients."""
    leaves = [part for part in module.modules() if is_leaf(part) and part in shapes]
    wanted = [(p, p.requires_grad) for p in module.parameters()]
    for leaf in leaves:
        shape = shapes[leaf][1]

        def forward(x: Tensor, *_: object, _shape: torch.Size = shape, **__: object) -> Tensor:
            result: Tensor = _Opaque.apply(x, _shape)  # type: ignore[no-untyped-call]
            return result

        leaf.__dict__["forward"] = forward
    for parameter, _ in wanted:
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        yield leaves
    finally:
        for leaf in leaves:
            del leaf.__dict__["forward"]
        for parameter, before in wanted:
            parameter.requires_grad_(before)


def _trace(
    module: nn.Module, name: str, shapes: _Shapes, fixed: frozenset[nn.Module]
) -> tuple[list[Group], dict[str, str]]:
    names = {part: f"{name}.{n}".strip(".") for n, part in module.named_modules()}
    example = torch.zeros(shapes[module][0])
    groups: list[Group] = []
    declined: dict[str, str] = {}
    with (
        _standing_in(module, shapes) as leaves,
        mock.patch.object(index_mapping, "_FlattenIndexMapping", _Flattening),
        warnings.catch_warnings(),
        torch.enable_grad(),
    ):
        warnings.simplefilter("ignore")
        last = _last_layer(module, example)
        graph = torch_pruning.DependencyGraph()
        graph.build_dependency(
            module,
            example_inputs=example,
            customized_pruners={type(leaf): _LeafPruner() for leaf in leaves},
            verbose=False,
        )
        parameters = {
            parameter: (dotted, graph.module2node[parameter].pruning_dim)
            for parameter, dotted in graph._param_to_name.items()
            if parameter in graph.module2node
        }
        roots = [nn.Linear, nn.Conv2d, *{type(leaf) for leaf in leaves}]
        for found in graph.get_all_groups(root_module_types=roots):
            items = [
                _Item(
                    item.dep.target, torch.tensor(item.idxs), torch.tensor(item.root_idxs),
                    graph.is_out_channel_pruning_fn(item.dep.handler),
                )
                for item in found
            ]  # fmt: skip
            first = names.get(items[0].node.module, "")
            written = {item.node.module for item in items if item.is_output}
            if last in written:
                continue  # the network's output
            if written & fixed:
                declined[first] = "its attention's layout isn't known"
                continue
            made = _group(module, first, items, parameters)
            if isinstance(made, Group):
                groups.append(made)
            elif made:
                declined[first] = made
    return groups, declined


def _last_layer(module: nn.Module, example: Tensor) -> nn.Module | None:
    """The layer whose output is the network's, if one is."""
    outputs: dict[int, tuple[nn.Module, object]] = {}

    def note(part: nn.Module, _: object, output: object) -> None:
        outputs[id(output)] = part, output  # the output is kept, so no other gets its id

    hooks = [
        part.register_forward_hook(note)
        for part in module.modules()
        if is_leaf(part) or isinstance(part, nn.Linear | nn.Conv2d)
    ]
    try:
        found = outputs.get(id(module(example)))
    finally:
        for hook in hooks:
            hook.remove()
    return None if found is None else found[0]


def _group(
    model: nn.Module,
    name: str,
    items: list[_Item],
    parameters: dict[nn.Parameter, tuple[str, int]],
) -> Group | str:
    """A group from the dependency graph's items, or the reason why there is none ("": none)."""
    slices: list[Slice] = []
    read = spatial = residual = False
    for item in items:
        part = item.node.module
        if isinstance(part, nn.Parameter):
            dotted, axis = parameters[part]
            owner, _, leaf = dotted.rpartition(".")
            slices.append(
                Slice(
                    model.get_submodule(owner), leaf, axis, item.unit, item.position,
                    scored=False,
                )
            )  # fmt: skip
            residual = residual or (part.ndim > 1 and part.shape[axis] != part.numel())
            continue
        if type(part).__module__.startswith("torch_pruning"):
            if type(part).__name__ == "_OutputOp":
                return ""
            # Sums join writers of the residual stream; anything else has nothing of its own.
            summed = str(getattr(part, "_grad_fn", "")).startswith("AddBackward")
            residual = residual or (summed and len(item.node.inputs) > 1)
            continue
        ports = ports_of(part)
        if ports is None:
            if any(True for _ in part.parameters()):
                grouped = isinstance(part, nn.Conv2d)
                what = "grouped convolution" if grouped else type(part).__name__
                return f"holds a {what}, whose channels can't be taken away"
            continue
        spatial = spatial or (isinstance(part, nn.Conv2d) and max(part.kernel_size) > 1)
        read = read or not (item.is_output or ports.joined)
        chosen = ports.writes if item.is_output else ports.reads
        slices += _joined(chosen, item.position, item.unit)
    units = int(items[0].unit.max()) + 1
    fault = _fault(slices, units)
    if fault or not read:
        return fault or "nothing reads its channels"
    kind = "embedding" if residual else "conv" if spatial else "mlp"
    return Group(name, kind, units, tuple(slices))


def _joined(ports: tuple[Slice, ...], channel: Tensor, unit: Tensor) -> Iterator[Slice]:
    """A module's slices, renumbered from its own channels to the units of a group."""
    for part in ports:
        most = int(max(part.unit.max(), channel.max())) + 1 if part.unit.numel() else 1
        of_channel = torch.full((most,), -1)
        of_channel[channel] = unit
        units = of_channel[part.unit]
        used = units >= 0
        if bool(used.any()):
            yield Slice(
                part.owner, part.tensor, part.axis, units[used], part.position[used],
                produces=part.produces, scored=part.scored,
            )  # fmt: skip


def _fault(slices: list[Slice], units: int) -> str:
    """What is wrong with the indices of a group, or ""."""
    seen: dict[tuple[nn.Module, str, int], Tensor] = {}
    for part in slices:
        length = part.value.shape[part.axis]
        if int(part.position.max()) >= length or int(part.unit.max()) >= units:
            return "its channels can't be followed through a reshape"
        owner = seen.setdefault(part.key, torch.full((length,), -1))
        before = owner[part.position]
        if bool(((before >= 0) & (before != part.unit)).any()):
            return "one channel would belong to two"
        owner[part.position] = part.unit
    return ""
