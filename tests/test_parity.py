"""How many changed answers chance explains."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import fisher_exact

from deploykit.export.parity import most_flips


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
