"""Structured pruning: channels, heads and blocks taken out of a network for good."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from deploykit.errors import DeploykitError, UsageError, one_line
from deploykit.graph.capture import capture
from deploykit.graph.macs import count_macs
from deploykit.progress import Steps, silent
from deploykit.prune.importance import find_importance
from deploykit.prune.importance_gradients import map_vector, measured_scores, score_vector
from deploykit.prune.latency import LayerShape, MeasureLayers, latency_terms
from deploykit.prune.structured_blocks import remove_blocks
from deploykit.prune.structured_convert import slim_copy
from deploykit.prune.structured_cost import Cost, Term, mac_terms, parameter_terms
from deploykit.prune.structured_groups import Group, remove_units
from deploykit.prune.structured_layers import layers_of
from deploykit.prune.structured_options import StructureOptions
from deploykit.prune.structured_ports import attention_groups
from deploykit.prune.structured_search import Choice, choose_widths, options_of
from deploykit.prune.structured_trace import channel_groups
from deploykit.prune.structured_trial import reliable_groups
from deploykit.types import Backbone, PassRecord

__all__ = ["StructureOptions", "prune_structure"]

_TRACED = {"mlp", "conv", "embedding"}
_UNITS = {"macs": "multiply-adds", "parameters": "parameters", "latency": "predicted time"}


def prune_structure(
    backbone: Backbone,
    options: StructureOptions,
    batches: Callable[[], Iterable[Tensor]],
    *,
    measure: MeasureLayers | None = None,
    steps: Steps = silent,
) -> tuple[Backbone, PassRecord]:
    """A copy of a backbone with narrower layers, fewer heads or fewer blocks.

    The result is an ordinary network: nothing is masked, and its graph can be captured, saved
    and exported. Accuracy falls until it is recovered by training.

    Args:
        backbone: left unchanged.
        batches: gives a fresh iterator of calibration batches, float32 (N, 3, S, S), each time.
        measure: times layers on the target; needed for the budget ``latency``.
        steps: shows progress.

    Raises:
        UsageError: the options can't be met with this network; nothing was done.
        DeploykitError: the pruned network doesn't run or can't be captured.
    """
    options.check()
    if options.budget == "latency" and measure is None:
        raise UsageError("budget latency: no target is there to time layers on; try budget macs")
    size = backbone.preprocessing.size
    draw = map_vector if backbone.levels else score_vector
    job = _Job(options, batches, _remembered(measure), torch.zeros(1, 3, size, size), draw)
    with steps("find what can be pruned"):
        module, declined = slim_copy(backbone.module, job.example)
        before, before_macs = _count(module), count_macs(module, size)
        job.find(module, declined)
        full_cost = job.cost().total(np.ones(len(job.groups)))
        job.refuse_impossible(full_cost)
    with steps("remove blocks", total=None) as advance:
        blocks = (
            remove_blocks(module, options.blocks, batches, options.images, job.example, advance)
            if options.blocks
            else {}
        )
    if blocks:
        job.find(module, declined)
    widths: dict[str, list[int]] = {}
    predicted = full_cost
    if options.ratio is not None:
        with steps("score channels", total=options.images) as advance:
            choices, ordered = job.score(module, advance)
        with steps("choose widths"):
            target = (1 - options.ratio) * full_cost
            widths, predicted = job.narrow(choices, ordered, target)
    module.requires_grad_(False)
    with steps("check the pruned network"):
        pruned = replace(backbone, module=module)
        _check(pruned)
    after, after_macs = _count(module), count_macs(module, size)
    record = _record(
        options, (before, after), (before_macs, after_macs), (full_cost, predicted),
        widths, blocks, job.declined,
    )  # fmt: skip
    return pruned, record


@dataclass
class _Job:
    """One pruning past its input checks."""

    options: StructureOptions
    batches: Callable[[], Iterable[Tensor]]
    measure: MeasureLayers | None
    example: Tensor
    draw: Callable[[Tensor, torch.Generator], Tensor]

    def find(self, module: nn.Module, declined: dict[str, str]) -> None:
        """Find the groups in the scope that can be relied on."""
        scope = set(self.options.scope)
        self.module, self.declined = module, dict(declined)
        groups: list[Group] = []
        for name, part in module.named_modules():
            groups += [g for g in attention_groups(name, part) if g.kind in scope]
        if scope & _TRACED:
            fixed = _layers_inside(module, declined)
            traced, refused = channel_groups(module, self.example, fixed)
            groups += [g for g in traced if g.kind in scope]
            self.declined |= refused
        self.groups, refused = reliable_groups(module, groups, self.example, self.options.round_to)
        self.declined |= refused

    def cost(self) -> Cost:
        """The budget's cost of the network as it stands."""
        return Cost(self._terms(), len(self.groups))

    def _terms(self) -> list[Term]:
        if self.options.budget == "parameters":
            return parameter_terms(self.module, self.groups)
        layers = layers_of(self.module, self.groups, self.example)
        if self.options.budget == "latency":
            assert self.measure is not None
            return latency_terms(layers, len(self.groups), self.measure)
        return mac_terms(layers)

    def _choices(self, scores: Sequence[Tensor]) -> list[Choice]:
        options = self.options
        return [
            options_of(group, score, options.round_to, options.layer_limit)
            for group, score in zip(self.groups, scores, strict=True)
        ]

    def refuse_impossible(self, full: float) -> None:
        """Raise a UsageError where even the narrowest widths miss the ratio."""
        if self.options.ratio is None:
            return
        scope = ", ".join(self.options.scope)
        if not self.groups:
            message = f"structured pruning: nothing in the scope ({scope}) can go here"
            reasons = [f"{name}: {reason}" for name, reason in self.declined.items()]
            message += f"; {reasons[0]}" if reasons else ""
            message += f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
            raise UsageError(message)
        narrowest = self._choices([torch.zeros(group.units) for group in self.groups])
        least = self.cost().total(np.array([choice.shares[-1] for choice in narrowest]))
        if self.options.blocks == 0 and least > (1 - self.options.ratio) * full:
            message = (
                f"structured pruning: wanted {self.options.ratio:.0%} of the "
                f"{_UNITS[self.options.budget]} to go; {scope} reaches {1 - least / full:.0%}: "
                "widen the scope or raise layer_limit"
            )
            raise UsageError(message)

    def score(
        self, module: nn.Module, advance: Callable[[float], None]
    ) -> tuple[list[Choice], list[Tensor]]:
        """Each group's choices of width, and its units in the order in which they go."""
        options = self.options
        importance = find_importance(options.importance)
        scores = measured_scores(
            module, self.groups, importance, self.batches, options.images,
            seed=options.seed, advance=advance, draw=self.draw,
        )  # fmt: skip
        for index, group in enumerate(self.groups):
            if group.free:  # each copy's units in its own order, least important first
                scores[index], order = scores[index].sort(dim=1, stable=True)
                self.groups[index] = group.reordered(order)
        rising = [score.sum(0).sort(stable=True) for score in scores]
        return self._choices([score.values for score in rising]), [r.indices for r in rising]

    def narrow(
        self, choices: Sequence[Choice], order: Sequence[Tensor], target: float
    ) -> tuple[dict[str, list[int]], float]:
        """Choose widths for the target and take the rest away.

        Returns:
            Per group, units before and after; and the cost that is left.
        """
        cost = self.cost()
        kinds = [group.kind for group in self.groups]
        picked = choose_widths(choices, kinds, cost, target, self.options.comparison)
        shares = np.array([c.shares[i] for c, i in zip(choices, picked, strict=True)])
        kept, widths = {}, {}
        for group, choice, index, rising in zip(self.groups, choices, picked, order, strict=True):
            mask = torch.ones(group.units, dtype=torch.bool)
            mask[rising[: group.units - choice.kept[index]]] = False
            kept[group.key] = mask
            widths[group.key] = [group.units, choice.kept[index]]
        remove_units(self.groups, kept)
        return widths, cost.total(shares)


def _remembered(measure: MeasureLayers | None) -> MeasureLayers | None:
    """The same, asking for each layer once."""
    if measure is None:
        return None
    known: dict[LayerShape, float] = {}

    def ask(shapes: Sequence[LayerShape]) -> list[float]:
        new = [shape for shape in shapes if shape not in known]
        if new:
            known.update(zip(new, measure(new), strict=True))
        return [known[shape] for shape in shapes]

    return ask


def _layers_inside(module: nn.Module, names: Iterable[str]) -> frozenset[nn.Module]:
    """Layers of attention nobody knows whose outputs are no plain channels.

    Where a whole block is its own attention, as CSWin's is, its MLP is not part of that.
    """
    found: set[nn.Module] = set()
    for name in names:
        attention = module.get_submodule(name)
        mlps = [part for part in attention.modules() if hasattr(part, "fc1")]
        apart = {layer for mlp in mlps for layer in mlp.modules()}
        found |= {
            child
            for child_name, child in attention.named_modules()
            if isinstance(child, nn.Linear | nn.Conv2d) and child_name != "proj"
        } - apart
    return frozenset(found)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _check(backbone: Backbone) -> None:
    """The pruned network runs at batch 1 and 2, gives finite answers, and can be captured."""
    size = backbone.preprocessing.size
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2):
        try:
            with torch.no_grad():
                result = copy.deepcopy(backbone.module)(
                    torch.randn(count, 3, size, size, generator=generator)
                )
        except Exception as error:
            message = f"the pruned network doesn't run at batch {count}: {one_line(error)}"
            raise DeploykitError(message) from error
        if result.shape[0] != count or not bool(torch.isfinite(result).all()):
            raise DeploykitError(f"the pruned network gives no finite answers at batch {count}")
    capture(backbone)


def _record(
    options: StructureOptions,
    parameters: tuple[int, int],
    macs: tuple[int, int],
    cost: tuple[float, float],
    widths: dict[str, list[int]],
    blocks: dict[str, float],
    declined: dict[str, str],
) -> PassRecord:
    changed = {name: pair for name, pair in widths.items() if pair[0] != pair[1]}
    gone = [f"{1 - macs[1] / macs[0]:.0%} of the multiply-adds"]
    gone.append(f"{1 - parameters[1] / parameters[0]:.0%} of the parameters")
    how = f"{len(changed)} of {len(widths)} widths by {options.importance}" if widths else ""
    parts = [part for part in (how, f"{len(blocks)} blocks" if blocks else "") if part]
    details: dict[str, object] = {
        "importance": options.importance,
        "fairness": options.comparison,
        "budget": options.budget,
        "ratio_asked": options.ratio,
        "scope": list(options.scope),
        "macs": list(macs),
        "parameters": list(parameters),
        "widths": widths,
        "blocks_removed": blocks,
        "cost": list(cost),
        "declined": declined,
    }
    return PassRecord(
        name="prune_structure",
        summary=f"{gone[0]} and {gone[1]} removed ({', '.join(parts)})",
        details=details,
    )
