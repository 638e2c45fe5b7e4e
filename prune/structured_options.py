"""What structured pruning can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deploykit.errors import UsageError
from deploykit.prune.importance import find_importance
from deploykit.prune.structured_groups import KINDS
from deploykit.prune.structured_search import Fairness

__all__ = ["Budget", "StructureOptions"]

Budget = Literal["macs", "parameters", "latency"]
_MOST = 0.95


@dataclass(frozen=True)
class StructureOptions:
    """How much goes, where from, and by what rule.

    Attributes:
        ratio: share of the budget to remove, above 0 and up to 0.95; None: only ``blocks`` go.
        budget: what the ratio is a share of: multiply-adds, parameters, or time predicted from
            the target's own times.
        scope: kinds of channels that may go (``structured_groups.KINDS``).
        importance: a name registered in ``importance``.
        fairness: importances are compared within a ``kind``, within a ``layer``, or as they
            are (``none``); ``auto``: what suits the importance.
        round_to: widths are multiples of it; whole heads and widths that stay full aren't.
        layer_limit: the largest share of its units that any layer may lose.
        blocks: how many residual blocks go first, those that change the answers least.
        images: calibration images that are read at most.
    """

    ratio: float | None = 0.3
    budget: Budget = "macs"
    scope: tuple[str, ...] = ("mlp", "heads", "conv")
    importance: str = "hessian"
    fairness: Fairness | Literal["auto"] = "auto"
    round_to: int = 8
    layer_limit: float = 0.75
    blocks: int = 0
    images: int = 128
    seed: int = 0

    def check(self) -> None:
        """Refuse what can't be done with any network.

        Raises:
            UsageError: in one line, what was given and what is allowed.
        """
        if self.ratio is None and self.blocks == 0:
            raise UsageError("nothing to prune: wanted a ratio or a number of blocks")
        if self.ratio is not None and not 0 < self.ratio <= _MOST:
            message = f"ratio of structured pruning: wanted above 0, to {_MOST}, got {self.ratio:g}"
            raise UsageError(message)
        unknown = [kind for kind in self.scope if kind not in KINDS]
        if unknown or (self.ratio is not None and not self.scope):
            got = ", ".join(unknown) or "none"
            raise UsageError(f"scope of pruning: wanted some of {', '.join(KINDS)}, got {got}")
        for name, value, allowed in (
            ("budget", self.budget, ("macs", "parameters", "latency")),
            ("fairness", self.fairness, ("auto", "kind", "layer", "none")),
        ):
            if value not in allowed:
                raise UsageError(f"{name}: wanted one of {', '.join(allowed)}, got {value!r:.40}")
        if not 0 < self.layer_limit <= 1:
            message = f"layer_limit: wanted above 0, to 1, got {self.layer_limit:g}"
            raise UsageError(message)
        if self.round_to < 1 or self.images < 1 or self.blocks < 0:
            raise UsageError("wanted round_to and images of 1 or more, and blocks of 0 or more")
        find_importance(self.importance)

    @property
    def comparison(self) -> Fairness:
        """The fairness, decided."""
        chosen = find_importance(self.importance).fairness
        return chosen if self.fairness == "auto" else self.fairness
