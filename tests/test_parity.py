"""How many changed answers chance explains, and how near a float file must be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import fisher_exact
from torch import Tensor, nn

from deploykit.export.parity import compare, make_reference, most_flips
from deploykit.export.rounding import single_floor_db
from deploykit.graph.capture import CapturedModel
from deploykit.types import ParityRow
from tests.factories import make_artifact
from tests.graphs import captured, images


@given(count=st.integers(1, 200), share=st.floats(0, 0.5))
def test_the_limit_is_where_fishers_test_can_tell(count: int, share: float) -> None:
    among = 3 * count
    seen = int(share * among)
    limit = most_flips(count, seen, among)

    def chance(flips: int) -> float:
        table = [[flips, count - flips], [seen, among - seen]]
        return float(fisher_exact(table, alternative="greater").pvalue)

    assert limit == 0 or chance(limit) >= 0.01 * (1 - 1e-9)
    assert limit == count or chance(limit + 1) < 0.01 * (1 + 1e-9)


@pytest.mark.parametrize("count", [32, 1000])
def test_a_graph_that_never_changes_its_mind_allows_few(count: int) -> None:
    assert most_flips(count, 0, 3 * count) == 3


class Cancels(nn.Module):
    """A sum that cancels to a ``share`` of its terms: rounding weighs so much more."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.head = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(x.mean((2, 3)))
        return (scores + 1 / self.share) - 1 / self.share


def told(model: CapturedModel, x: Tensor, wrong: Callable[[Tensor], Tensor]) -> ParityRow:
    """What is said of a float file that answers ``wrong`` of the graph's own logits."""
    reference = make_reference("model", model.graph_module, x, None, 0, model.graph_module)
    artifact = make_artifact(name="original", precision="fp32", simulated=[])
    return compare(artifact, "a runtime", len(x), wrong(reference.logits), reference, "synthetic")


def judged(share: float, noise: float) -> tuple[float, ParityRow]:
    """The graph's own floor, and what is said of a file that differs by ``noise`` of its values."""
    torch.manual_seed(0)
    model = captured(Cancels(share).eval())
    x = images(8)
    row = told(model, x, lambda logits: logits * (1 + noise * torch.randn(logits.shape)))
    return single_floor_db(model.graph_module, x), row


class Spikes(nn.Module):
    """Every value is a spike or none: the last digit of a sum near the threshold decides."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.head = nn.Linear(192, 4096), nn.Linear(4096, 10)

    def forward(self, x: Tensor) -> Tensor:
        sums = self.wide(x[:, :, ::4, ::4].flatten(1)) + 1e4 - 1e4  # few digits are left
        scores: Tensor = self.head((sums >= 0).float())
        return scores


def spiking(wrong: float) -> ParityRow:
    """What is said of a float file of it that has ``wrong`` of its values wrong."""
    torch.manual_seed(0)
    model = captured(Spikes().eval())
    return told(
        model, images(64), lambda logits: logits + wrong * logits.std() * torch.randn(logits.shape)
    )


def test_a_float_network_of_spikes_may_move_as_far_as_a_rerun() -> None:
    nearest, near, far = spiking(wrong=1e-5), spiking(wrong=2e-3), spiking(wrong=0.3)
    assert nearest.passed and nearest.tolerance == "SQNR >= 80 dB"
    assert near.passed and "of the graph in float32" in near.tolerance
    assert not far.passed
