"""Sparsifying captured graphs: which layers, how many zeros, and that the rest is left alone."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deploykit.errors import DeploykitError, UsageError
from deploykit.export.onnx import onnx_bytes
from deploykit.graph.capture import CapturedModel
from deploykit.graph.edit import constant, is_op
from deploykit.prune.sparsity import SparsityOptions, sparsify
from deploykit.prune.sparsity_layers import LAYER_OPS, eligible_layers
from deploykit.prune.sparsity_methods import METHODS
from deploykit.prune.sparsity_patterns import PatternKind, to_matrix
from tests.graphs import batches, captured, images, shake, tiny_cnn, tiny_vit

PATTERNS: dict[PatternKind, str] = {
    "n:m": "2:4",
    "block": "block16",
    "unstructured": "unstructured",
}
PAIRS = [(name, kind) for name, method in METHODS.items() for kind in sorted(method.patterns)]


class Mixed(nn.Module):
    """Convolutions of every kind, linear layers, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 4, 4)
        self.depthwise = nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.wide = nn.Conv2d(32, 64, 3, 2, padding=1, bias=False)
        self.same = nn.Conv2d(64, 64, (2, 3), padding="same")
        self.mlp = nn.Linear(64, 64)
        self.shared = nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(torch.relu(self.depthwise(torch.relu(self.stem(x)))))
        x = self.mlp(self.same(torch.relu(x)).flatten(2).transpose(1, 2))
        return self.head(self.shared(torch.relu(self.shared(x))).mean(1))


@cache
def mixed() -> CapturedModel:
    """Captured once: ``sparsify`` leaves its input alone, as a test says."""
    return captured(shake(Mixed()).eval())


def weights(model: CapturedModel) -> dict[str, Tensor]:
    graph = model.graph_module
    found = {n.name: constant(graph, n.args[1]) for n in graph.graph.nodes if is_op(n, *LAYER_OPS)}
    return {name: weight for name, weight in found.items() if weight is not None}


def logits_error(model: CapturedModel, other: CapturedModel) -> float:
    x = images(16, seed=9)
    with torch.no_grad():
        return float((model.graph_module(x) - other.graph_module(x)).square().mean())


def test_eligible_by_shape_and_the_others_say_why() -> None:
    rows = {(row.layer, row.node): row for row in eligible_layers(mixed(), "2:4")}
    by_layer = {layer: row for (layer, _), row in rows.items()}
    assert len(rows) == 8, "the shared layer is called twice"
    assert {layer for layer, row in by_layer.items() if row.eligible} == {"wide", "same", "mlp"}
    assert by_layer["stem"].reason == "3 inputs, 32 outputs: 2:4 wants inputs / 16, outputs / 8"
    assert by_layer["depthwise"].reason == "grouped convolution"
    assert by_layer["shared"].reason == "its weight is read by another operator, too"
    assert by_layer["head"].reason.startswith("64 inputs, 10 outputs")
    assert (by_layer["wide"].kernel, by_layer["mlp"].kernel) == ((3, 3), ())
    assert by_layer["wide"].tensorrt and not by_layer["wide"].cusparselt  # no linear layer
    assert by_layer["mlp"].tensorrt and by_layer["mlp"].cusparselt and not by_layer["mlp"].gains


def test_only_two_of_four_on_large_layers_can_gain() -> None:
    model = captured(nn.Sequential(nn.Flatten(), nn.Linear(3 * 1024, 256), nn.Linear(256, 8)))
    large, small = eligible_layers(model, "2:4")
    assert large.gains and large.tensorrt and large.cusparselt
    assert small.eligible and small.tensorrt and not (small.cusparselt or small.gains)
    for pattern in ("4:8", "block16", "unstructured"):
        for row in eligible_layers(model, pattern):
            assert not (row.gains or row.tensorrt or row.cusparselt)


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_every_method_makes_its_patterns_exactly(method: str, kind: PatternKind) -> None:
    model, options = mixed(), SparsityOptions(PATTERNS[kind], method, sparsity=0.3)
    if kind == "n:m":
        options = replace(options, sparsity=None)
    before = weights(model)
    copies = {name: weight.clone() for name, weight in before.items()}
    sparse, record = sparsify(model, options, batches())
    assert all(torch.equal(before[name], copies[name]) for name in before), "the input changed"
    after = weights(sparse)
    rows = eligible_layers(model, options.pattern)
    for row in rows:
        new, zeros = after[row.node], after[row.node] == 0
        if not row.eligible:
            assert torch.equal(new, before[row.node]), f"{row.layer} was to be left alone"
        elif kind == "n:m":
            assert bool((to_matrix(zeros).reshape(len(new), -1, 4).sum(-1) == 2).all())
        elif kind == "unstructured":
            assert int(zeros.sum()) == round(0.3 * new.numel())
        else:
            blocks = to_matrix(zeros).reshape(len(new) // 16, 16, -1, 16).transpose(1, 2)
            whole = blocks.flatten(2).float().mean(-1)
            assert bool(((whole == 0) | (whole == 1)).all())
            assert int(whole.sum()) == round(0.3 * whole.numel())
    assert record.details["zeros"] == sum(
        int((after[row.node] == 0).sum()) for row in rows if row.eligible
    )
    assert record.details["size_only"] is (kind != "n:m")
    assert json.loads(json.dumps(record.details)) == record.details


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_doing_it_twice_changes_nothing_and_is_the_same_each_time(
    method: str, kind: PatternKind
) -> None:
    options = SparsityOptions(PATTERNS[kind], method)
    once, _ = sparsify(mixed(), options, batches())
    again, _ = sparsify(mixed(), options, batches())
    twice, _ = sparsify(once, options, batches())
    for name, weight in weights(once).items():
        assert torch.equal(weight, weights(again)[name])
        assert torch.allclose(weight, weights(twice)[name], atol=1e-6)
        assert torch.equal(weight == 0, weights(twice)[name] == 0)


@pytest.mark.parametrize(("method", "kind"), [pair for pair in PAIRS if pair[1] != "n:m"])
def test_global_shares_are_exact_and_leave_no_layer_empty(method: str, kind: PatternKind) -> None:
    model = mixed()
    options = SparsityOptions(PATTERNS[kind], method, sparsity=0.7, allocation="global")
    sparse, record = sparsify(model, options, batches())
    rows = [row for row in eligible_layers(model, options.pattern) if row.eligible]
    unit = 256 if kind == "block" else 1
    units = sum(row.weights for row in rows) // unit
    assert record.details["zeros"] == round(0.7 * units) * unit
    shares = [float((weights(sparse)[row.node] == 0).float().mean()) for row in rows]
    assert len({round(share, 3) for share in shares}) > 1, "every layer lost the same part"
    assert max(shares) < 1


def test_second_order_beats_magnitude_on_a_network() -> None:
    """Outputs on images that weren't calibrated on; also each layer's own output error."""
    model = captured(tiny_vit())
    many = [images(64, seed=seed) for seed in (1, 2)]
    errors, layers = {}, {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        sparse, record = sparsify(model, SparsityOptions("2:4", method), lambda: many)
        errors[method] = logits_error(model, sparse)
        layers[method] = [row["output_error"] for row in record.details["layers"] if
                          "output_error" in row]  # fmt: skip
    assert errors["sparsegpt"] < 0.8 * errors["magnitude"]
    assert all(0 < error < 1 for error in layers["sparsegpt"])
    assert layers["magnitude"] == [], "no Gram matrix, no figure"


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_corrected_bias_takes_the_mean_error_away(method: str) -> None:
    model = captured(nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.ReLU(), nn.Conv2d(16, 8, 1)))
    options = SparsityOptions("2:4", method, bias_correction=True)
    sparse, _ = sparsify(model, options, batches())
    x = torch.cat(list(batches()()))
    drift = (sparse.graph_module(x) - model.graph_module(x)).mean((0, 2, 3))
    plain, _ = sparsify(model, replace(options, bias_correction=False), batches())
    before = (plain.graph_module(x) - model.graph_module(x)).mean((0, 2, 3))
    assert float(drift.abs().max()) < 1e-5 < float(before.abs().max())


def test_a_layer_without_a_bias_gets_one_where_it_is_corrected() -> None:
    sparse, _ = sparsify(mixed(), SparsityOptions(bias_correction=True), batches())
    wide = [n for n in sparse.graph_module.graph.nodes if is_op(n, *LAYER_OPS)][2]
    bias = constant(sparse.graph_module, wide.args[2])
    assert bias is not None and float(bias.abs().max()) > 0
    assert logits_error(mixed(), sparse) < logits_error(mixed(), sparsify(mixed(),
        SparsityOptions())[0])  # fmt: skip


class Joined(nn.Module):
    """A bias made of two while the model runs, as BEiT's is of three."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 48))
        self.left, self.right = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(x, 8).flatten(1)
        return self.head(nn.functional.linear(x, self.weight, torch.cat([self.left, self.right])))


def test_a_bias_that_is_computed_stays() -> None:
    torch.manual_seed(0)
    model = captured(Joined())
    for method in ("magnitude", "sparsegpt"):
        sparse, record = sparsify(model, SparsityOptions("2:4", method, bias_correction=True),
            batches())  # fmt: skip
        assert record.details["biases_corrected"] == 1
        first = next(n for n in sparse.graph_module.graph.nodes if is_op(n, *LAYER_OPS))
        assert is_op(first.args[2], torch.ops.aten.cat.default)
        assert record.details["zeros"] == 16 * 24 + 8 * 8


def test_inputs_come_from_the_layers_that_are_sparse_already() -> None:
    """The second layer sees what the sparse first one gives: its own error is measured there."""
    first, second = nn.Linear(64, 64), nn.Linear(64, 16)
    net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 64), first, second)
    model = captured(shake(net).eval())
    sparse, _ = sparsify(model, SparsityOptions("2:4", "wanda"), batches())
    names = list(weights(model))
    x = torch.cat(list(batches()()))
    with torch.no_grad():
        hidden = nn.functional.avg_pool2d(x, 4).flatten(1)
        for name in names[:2]:
            node = next(n for n in sparse.graph_module.graph.nodes if n.name == name)
            bias = constant(sparse.graph_module, node.args[2])
            hidden = nn.functional.linear(hidden, weights(sparse)[name], bias)
    norms = hidden.square().mean(0).sqrt()
    scores = (weights(model)[names[2]].abs() * norms).reshape(16, -1, 4)
    kept = (weights(sparse)[names[2]] != 0).reshape(16, -1, 4)
    lowest_kept = scores.masked_fill(~kept, torch.inf).amin(-1)
    highest_gone = scores.masked_fill(kept, 0).amax(-1)
    assert bool((lowest_kept >= highest_gone).all())


def test_excluded_layers_stay_dense() -> None:
    model = mixed()
    sparse, record = sparsify(model, SparsityOptions(exclude=("m*",)))
    assert record.details["declined"]["mlp"] == "excluded by 'm*'"
    changed = [n for n, w in weights(sparse).items() if not torch.equal(w, weights(model)[n])]
    assert len(changed) == 2


def test_a_sparse_graph_exports_with_a_free_batch() -> None:
    sparse, _ = sparsify(mixed(), SparsityOptions("2:4", "sparsegpt"), batches())
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(onnx_bytes(sparse.graph_module, sparse.backbone))
    for count in (1, 5):
        x = images(count)
        (found,) = session.run(None, {"image": x.numpy()})
        assert torch.allclose(torch.from_numpy(found), sparse.graph_module(x), atol=1e-4)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"pattern": "4:2"}, "wanted n:m with 0 < n < m"),
    ({"pattern": "0:4"}, "wanted n:m with 0 < n < m"),
    ({"pattern": "block1"}, "wanted n:m"),
    ({"pattern": "stripes"}, "wanted n:m"),
    ({"method": "guess"}, "there are magnitude, wanda"),
    ({"method": "distortion"}, "makes no 2:4 zeros; use magnitude or wanda or sparsegpt"),
    ({"pattern": "block16", "method": "wanda"}, "use magnitude or distortion"),
    ({"pattern": "8:16", "method": "sparsegpt"}, "groups of 8 at most"),
    ({"sparsity": 0.5}, "which says it"),
    ({"allocation": "global"}, "allocation is uniform"),
    ({"pattern": "unstructured", "sparsity": 1.0}, "less than 1"),
    ({"pattern": "unstructured", "sparsity": float("nan")}, "less than 1"),
    ({"images": 0}, "must be more than 0"),
    ({"damping": -1.0}, "must be more than 0"),
    ({"exclude": ("nothing*",)}, "no layer's name matches 'nothing\\*'"),
    ({"exclude": ("*",)}, "no layer can take 2:4 zeros"),
    ({"pattern": "block64", "exclude": ("mlp", "same")}, "no layer can take block64 zeros"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_cannot_be_done_is_refused_before_images_are_read(
    options: dict[str, Any], message: str
) -> None:
    def never() -> list[Tensor]:
        raise AssertionError("images were asked for")

    with pytest.raises(UsageError, match=message) as caught:
        sparsify(mixed(), SparsityOptions(**options), never)
    assert "\n" not in str(caught.value)


def test_methods_that_look_at_images_want_some() -> None:
    for options in (SparsityOptions(method="wanda"), SparsityOptions(bias_correction=True)):
        with pytest.raises(UsageError, match="needs calibration images"):
            sparsify(mixed(), options)
        with pytest.raises(UsageError, match="no calibration images came"):
            sparsify(mixed(), options, list)


def test_values_that_are_not_finite_are_named() -> None:
    bad = images(2)
    bad[0, 0, 0, 0] = torch.nan
    with pytest.raises(DeploykitError, match="wide reads values that aren't finite"):
        sparsify(mixed(), SparsityOptions(method="sparsegpt"), lambda: [bad])


def test_only_the_images_asked_for_are_read() -> None:
    options = SparsityOptions(method="wanda", images=5)
    _, record = sparsify(mixed(), options, batches())
    assert record.details["images"] == 5


def test_a_small_memory_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where little may be kept, runs begin a unit anew and convolutions are unfolded in parts."""
    model, options = captured(tiny_cnn()), SparsityOptions("4:8", "sparsegpt")
    usual, _ = sparsify(model, options, batches())
    monkeypatch.setattr("deploykit.prune.sparsity_walk.LIVE_BYTES", 1)
    monkeypatch.setattr("deploykit.prune.sparsity_statistics._ROW_BYTES", 1)
    frugal, _ = sparsify(model, options, batches())
    for name, weight in weights(usual).items():
        assert torch.allclose(weight, weights(frugal)[name], atol=1e-4)
