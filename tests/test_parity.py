"""How many changed answers chance explains, and how near a float file must be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import fisher_exact
from torch import Tensor, nn

from deploykit.export.parity import compare, make_reference, most_flips
from deploykit.export.rounding import single_floor_db
from deploykit.types import Artifact, ParityRow
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


def judged(share: float, noise: float) -> tuple[float, ParityRow]:
    """The graph's own floor, and what is said of a file that differs by ``noise`` of its values."""
    torch.manual_seed(0)
    model = captured(Cancels(share).eval())
    x = images(8)
    reference = make_reference("model", model.graph_module, x, None, 0, model.graph_module)
    logits = reference.logits * (1 + noise * torch.randn(reference.logits.shape))
    artifact = Artifact(
        name="original", format="onnx", path=Path("model.onnx"), bytes=1, sha256="",
        precision="fp32", weights="untrained", dynamic_batch=True,
    )  # fmt: skip
    row = compare(artifact, "a runtime", 8, logits, reference, "synthetic")
    return single_floor_db(model.graph_module, x), row


def test_a_network_that_amplifies_rounding_is_held_to_its_own() -> None:
    floor, near = judged(share=1e-5, noise=1e-3)
    assert 40 < floor < 80
    assert near.passed
    assert f"within 6 dB of the graph in float32 (it is {floor:.1f} dB)" in near.tolerance
    _, far = judged(share=1e-5, noise=1e-1)
    assert not far.passed


def test_others_must_reach_80_db() -> None:
    floor, near = judged(share=1.0, noise=1e-6)
    assert floor > 100
    assert near.passed and near.tolerance == "SQNR >= 80 dB"
    _, far = judged(share=1.0, noise=1e-3)
    assert not far.passed and far.tolerance == "SQNR >= 80 dB"


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
    x = images(64)
    reference = make_reference("model", model.graph_module, x, None, 0, model.graph_module)
    logits = reference.logits
    other = logits + wrong * logits.std() * torch.randn(logits.shape)
    artifact = Artifact(
        name="original", format="onnx", path=Path("model.onnx"), bytes=1, sha256="",
        precision="fp32", weights="untrained", dynamic_batch=True,
    )  # fmt: skip
    return compare(artifact, "a runtime", 64, other, reference, "synthetic")


def test_a_float_network_of_spikes_may_move_as_far_as_a_rerun() -> None:
    nearest, near, far = spiking(wrong=1e-5), spiking(wrong=2e-3), spiking(wrong=0.3)
    assert nearest.passed and nearest.tolerance == "SQNR >= 80 dB"
    assert near.passed and "of the graph in float32" in near.tolerance
    assert not far.passed
