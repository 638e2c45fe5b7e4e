"""Scores of single layers, against the formulas and against running the whole model again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from deploykit.errors import DeploykitError
from deploykit.graph.capture import CapturedModel
from deploykit.graph.edit import constant
from deploykit.quant import sensitivity_scores
from deploykit.quant.options import QuantizeOptions
from deploykit.quant.sensitivity import LayerScores, Metric, measure_sensitivity
from deploykit.quant.sensitivity_collapse import find_collapse
from deploykit.quant.sensitivity_scores import Tally, score_layers
from deploykit.quant.sensitivity_setup import calibrate, prepare
from deploykit.quant.weights import quantize_weight
from tests.graphs import batches, captured, images, tiny_cnn, tiny_vit

PLAIN = QuantizeOptions(8, 8, keep_8bit=(), norm_fold="off", equalize=False)
DEFAULT = QuantizeOptions(8, 8)
FREE = QuantizeOptions(8, 8, keep_8bit=())
WEIGHT_ONLY = [(4, 16)]


class Two(nn.Module):
    """Two linear layers without biases and a ReLU between them: everything by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4, bias=False)
        self.second = nn.Linear(4, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x.mean((2, 3)) * 100)))


class Split(nn.Module):
    """A norm that three layers read, as where q, k and v are layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 8)
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x.mean((2, 3))))
        return self.head(self.q(y) * self.k(y) + self.v(y))


def two() -> Two:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Two().eval()


def rows(
    model: CapturedModel,
    metric: Metric,
    candidates: list[tuple[int, int]],
    options: QuantizeOptions = PLAIN,
) -> dict[str, LayerScores]:
    found = measure_sensitivity(model, options, candidates, batches(), metric)
    return {row.layer: row for row in found}


def rounded(weight: Tensor) -> Tensor:
    return quantize_weight(weight.detach(), 4, "mse").dequantize()


def test_kl_of_a_layer_is_that_of_the_model_with_its_weight_replaced() -> None:
    model = captured(tiny_vit())
    name = "blocks.0.mlp.fc1"
    row = rows(model, "kl", WEIGHT_ONLY)[name]
    changed = model.copy().graph_module
    node = next(n for n in changed.graph.nodes if n.name == row.nodes[0])
    weight = constant(changed, node.args[1])
    assert weight is not None
    expected = 0.0
    with torch.no_grad():
        weight.copy_(rounded(weight))
        for batch in batches()():
            p = model.graph_module(batch).double().softmax(-1)
            expected += float((p * (p.log() - changed(batch).double().log_softmax(-1))).sum())
    assert expected > 0
    assert row.scores["w4a16"] == pytest.approx(expected / 8, rel=1e-4)


def test_fisher_is_half_the_squared_error_times_the_squared_gradient() -> None:
    """At the logits the gradient of -log p(y) is p - onehot(y)."""
    module = two()
    row = rows(captured(module), "fisher", WEIGHT_ONLY)["second"]
    generator, expected = torch.Generator().manual_seed(0), 0.0
    with torch.no_grad():
        for batch in batches()():
            hidden = F.relu(module.first(batch.mean((2, 3)) * 100))
            logits = module.second(hidden).double()
            p = logits.softmax(-1)
            drawn = torch.multinomial(p, 1, generator=generator)[:, 0]
            change = logits - (hidden @ rounded(module.second.weight).T).double()
            gradient = p - F.one_hot(drawn, 5)
            expected += 0.5 * float((change * gradient).square().sum())
    assert row.scores["w4a16"] == pytest.approx(expected / 8, rel=1e-4)


def test_fisher_estimates_kl() -> None:
    """Small errors, many images: the diagonal at the logits is off by the rest of the matrix."""
    model = captured(tiny_vit())
    many = [images(16, seed=seed) for seed in range(4)]
    found = {
        metric: measure_sensitivity(model, PLAIN, [(8, 8)], lambda: many, metric)
        for metric in ("kl", "fisher")
    }
    totals = {k: sum(row.scores["w8a8"] for row in v) for k, v in found.items()}
    assert 0.3 < totals["fisher"] / totals["kl"] < 3


def test_lrp_is_the_share_of_relevance_times_the_noise() -> None:
    """In a network of ReLUs without biases relevance is passed on whole: its sum is the logit."""
    module = two()
    found = rows(captured(module), "lrp", WEIGHT_ONLY)
    relevance, noise = {"first": 0.0, "second": 0.0}, {}
    with torch.no_grad():
        inputs = torch.cat(list(batches()())).mean((2, 3)) * 100
        hidden = F.relu(module.first(inputs))
        logits = module.second(hidden)
        best = logits.max(-1)
        parts = hidden * module.second.weight[best.indices]
        assert torch.allclose(parts.sum(-1), best.values, atol=1e-4)
        relevance["first"], relevance["second"] = (
            float(parts.abs().sum()),
            float(best.values.abs().sum()),
        )
        for name, x, layer in (("first", inputs, module.first), ("second", hidden, module.second)):
            exact = layer(x)
            error = exact - x @ rounded(layer.weight).T
            noise[name] = float(error.square().sum() / exact.square().sum())
    total = sum(relevance.values())
    for name, row in found.items():
        expected = relevance[name] / total * noise[name]
        assert row.scores["w4a16"] == pytest.approx(expected, rel=1e-3)


def test_sqnr_scores_noise_over_signal() -> None:
    for row in rows(captured(tiny_cnn()), "sqnr", [(6, 6)]).values():
        (bits,) = row.scores
        assert row.sqnr_db[bits] == pytest.approx(-10 * math.log10(row.scores[bits]))


@pytest.mark.parametrize("make", [tiny_vit, tiny_cnn])
def test_every_layer_is_scored_and_narrower_is_worse(make: Callable[[], nn.Module]) -> None:
    found = rows(captured(make()), "kl", [(8, 8), (4, 4)], FREE)
    for row in found.values():
        assert min(row.scores.values()) >= 0
        wide, narrow = row.takes["w8a8"], row.takes["w4a4"]
        assert row.sqnr_db[wide] > row.sqnr_db[narrow] + 10
        assert row.scores[wide] < row.scores[narrow]


def test_forks_leave_the_float_walk_and_one_another_alone() -> None:
    """All layers in one walk give what each gives in a walk of its own."""
    calibrated = calibrate(captured(tiny_vit()), PLAIN, batches())
    prepared = prepare(calibrated, PLAIN, 4, 4)
    layers = {plan.layer: (plan.node,) for plan in prepared.state.plans.values()}
    together = score_layers(prepared, layers, batches()(), "kl")
    for name, nodes in layers.items():
        alone = score_layers(prepared, {name: nodes}, batches()(), "kl")
        assert alone[name] == together[name]


def test_a_fork_starts_at_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer runs twice, once in float and once quantised; the k-th k + 1 times."""
    calibrated = calibrate(captured(tiny_cnn()), PLAIN, batches())
    prepared = prepare(calibrated, PLAIN, 4, 4)
    ran: Counter[str] = Counter()
    original = sensitivity_scores._Walk.run_node

    def counted(self: fx.Interpreter, n: fx.Node) -> object:
        ran[n.name] += 1
        return original(self, n)  # type: ignore[arg-type]

    monkeypatch.setattr(sensitivity_scores._Walk, "run_node", counted)
    layers = {plan.layer: (plan.node,) for plan in prepared.state.plans.values()}
    score_layers(prepared, layers, [images(2)], "kl")
    assert [ran[node] for (node,) in layers.values()] == [2, 3, 4, 5, 6]


def test_layers_kept_wider_are_scored_only_at_what_they_get() -> None:
    found = rows(captured(tiny_cnn()), "kl", [(8, 8), (4, 4)], DEFAULT)
    assert list(found["stem"].scores) == ["w8a8"]
    assert found["stem"].takes == {"w8a8": "w8a8", "w4a4": "w8a8"}
    assert list(found["narrow"].scores) == ["w8a8", "w4a4"]


def test_float_costs_nothing_and_float_layers_are_left_out() -> None:
    options = QuantizeOptions(8, 8, float_layers=("narrow",))
    found = rows(captured(tiny_cnn()), "kl", [(16, 16), (8, 8)], options)
    assert "narrow" not in found
    assert found["wide"].scores["float"] == 0
    assert found["wide"].sqnr_db["float"] == math.inf


def test_layers_behind_one_norm_are_one_group() -> None:
    found = rows(captured(Split()), "kl", [(8, 8)], FREE)
    groups = {name: row.group for name, row in found.items()}
    assert groups["q"] == groups["k"] == groups["v"]
    assert len(set(groups.values())) == 3


def test_logits_that_are_not_finite_are_refused() -> None:
    module = two()
    with torch.no_grad():
        module.second.weight[0, 0] = float("nan")
    model = captured(module)
    with pytest.raises(DeploykitError, match="not finite"):
        measure_sensitivity(model, DEFAULT, [(8, 8)], batches(), "kl")


def test_an_output_of_zeros_has_a_finite_score() -> None:
    assert Tally(signal=0.0, noise=0.0).noise_ratio == 0
    assert Tally(signal=0.0, noise=1.0).noise_ratio == 1e6
    assert Tally(signal=0.0, noise=1.0).sqnr_db == pytest.approx(-60)


def layer(name: str, wide: float, narrow: float, wide_db: float, narrow_db: float) -> LayerScores:
    return LayerScores(
        layer=name, op="linear", nodes=(name,), group=name, weights=10, channels=2,
        scores={"w8a8": wide, "w4a4": narrow}, sqnr_db={"w8a8": wide_db, "w4a4": narrow_db},
    )  # fmt: skip


def test_collapse_names_the_worst_first_and_what_to_keep() -> None:
    fine = [layer(f"fine{i}", 0.001, 0.01, 40, 20) for i in range(6)]
    noisy = layer("noisy", 0.002, 0.02, 30, 5)
    broken = layer("broken", 0.9, 3.0, 8, 4)
    found = find_collapse([*fine, noisy, broken], "w4a4")
    assert [(one.layer, one.keep) for one in found] == [("broken", "float"), ("noisy", "w8a8")]
    assert "97% of all layers' loss" in found[0].reason
    assert "5.0 dB" in found[1].reason
    assert found[0].share == pytest.approx(3.0 / 3.08)


def test_equal_layers_do_not_collapse() -> None:
    """In a small network each has a large share of the loss."""
    assert find_collapse([layer("a", 1, 2, 40, 20), layer("b", 1, 2, 40, 20)], "w4a4") == []
