"""When a recovery has done enough: judged on held-out images, never on the user's own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["EarlyStop", "Judgement"]


@dataclass(frozen=True)
class Judgement:
    """A student beside its teacher on the same held-out images.

    Attributes:
        drop: percentage points. With ``labels``, top-1 of the teacher less that of the student;
            else 100 less the agreement.
        agreement: share of images with the same first class, percent.
        kl: ``KL(teacher || student)`` of the probabilities, mean, nats.
        by: what ``drop`` was measured by.
        nll: cross entropy with the labels, mean, nats, where every image has one.
    """

    images: int
    drop: float
    agreement: float
    kl: float
    by: str = "agreement"
    nll: float | None = None

    def better_than(self, other: Judgement) -> bool:
        """Nearer to the labels where there are some, else to the teacher.

        Not by the drop: it is a count of few images, whose chance alone would end a training that
        gets on.
        """
        if self.nll is not None and other.nll is not None:
            return self.nll < other.nll
        return self.kl < other.kl


@dataclass
class EarlyStop:
    """Remembers the best judgement, and says when to end.

    Attributes:
        stale: evaluations since the best.
        reason: why to end; "" to go on.
    """

    patience: int
    target_drop: float | None
    best: Judgement | None = None
    stale: int = 0
    reason: str = ""

    def update(self, judgement: Judgement) -> bool:
        """Take an evaluation in; whether it is the best so far."""
        improved = self.best is None or judgement.better_than(self.best)
        if improved:
            self.best, self.stale = judgement, 0
        else:
            self.stale += 1
        assert self.best is not None
        if self.target_drop is not None and self.best.drop <= self.target_drop:
            self.reason = f"held-out drop is at most {self.target_drop:g} points"
        elif self.stale >= self.patience:
            self.reason = f"no better in {self.stale} evaluations"
        return improved

    def state(self) -> dict[str, Any]:
        """As plain data, for a checkpoint."""
        best = None if self.best is None else asdict(self.best)
        return {"best": best, "stale": self.stale, "reason": self.reason}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state()``."""
        best = state["best"]
        self.best = None if best is None else Judgement(**best)
        self.stale, self.reason = int(state["stale"]), str(state["reason"])
