"""Attention is found by what it does, and scales move into the weights around it exactly."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn

from deploykit._compat import timm
from deploykit.graph.capture import CapturedModel
from deploykit.graph.edit import clean
from deploykit.quant.folds.attention import AttentionGroup, find_attention
from deploykit.quant.folds.batch_norm import fold_batch_norm
from deploykit.quant.folds.head_scale import (
    balance_query_key,
    fold_head_scales,
    fold_query_key,
    fold_value_channels,
)
from tests.graphs import aten, captured, images, nodes_of, shake

# Folded in float64 and stored in float32, a fold rounds every weight once more: an error of a few
# float32 epsilons (1.2e-7), grown a little by the layers behind. A wrong channel is off by 1e-2.
EXACT = 1e-5

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def vit(**options: object) -> nn.Module:
    return timm.models.VisionTransformer(**VIT, num_classes=10, **options)


def create(name: str, **options: object) -> nn.Module:
    return timm.create_model(name, num_classes=10, **options)


class MultiQuery(nn.Module):
    """Keys and values that all heads share, on feature maps (MobileNetV4)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.attention = timm.layers.MultiQueryAttention2d(16, num_heads=4, key_dim=8, value_dim=8)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.attention(x)).mean((2, 3)))


# name: (module, image side, attentions, heads of the first)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "vit with registers and layer scale": (lambda: vit(reg_tokens=2, init_values=0.1), 32, 2, 2),
    "distilled deit": (lambda: create("deit_tiny_distilled_patch16_224", **VIT), 32, 2, 2),
    "swin": (
        lambda: create(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16,
            depths=(2, 1), num_heads=(2, 4),
        ),
        32, 3, 2,
    ),
    "q/k-norm vit": (lambda: vit(qk_norm=True), 32, 2, 2),
    "shvit": (
        lambda: create(
            "shvit_s1", embed_dim=(16, 24, 32), partial_dim=(8, 10, 12), depth=(1, 1, 1)
        ),
        64, 2, 1,
    ),
    "nextvit": (lambda: create("nextvit_small", depths=(1, 1, 5, 1)), 64, 3, 6),
    "rotary eva": (lambda: create("eva02_tiny_patch14_224", **VIT), 32, 2, 2),
    "talking heads": (
        lambda: create("cait_xxs24_224", img_size=32, embed_dim=32, depth=1, num_heads=2),
        32, 3, 2,
    ),
    "multi-query": (MultiQuery, 32, 1, 4),
}  # fmt: skip


@cache
def _family(name: str) -> tuple[CapturedModel, int]:
    make, size, _, _ = FAMILIES[name]
    model = captured(shake(make()), size)
    fold_batch_norm(model.graph_module)
    return model, size


def family(name: str) -> tuple[fx.GraphModule, Tensor]:
    model, size = _family(name)
    return model.copy().graph_module, images(2, size)


def error(result: Tensor, expected: Tensor) -> float:
    """Largest difference beside the largest value."""
    return float((result - expected).abs().max() / expected.abs().max())


def record(graph_module: fx.GraphModule, x: Tensor, *names: str) -> list[Tensor]:
    found: dict[str, Tensor] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n.name in names:
                found[n.name] = result
            return result

    Keep(graph_module).run(x)
    return [found[name] for name in names]


def random_positive(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator).mul(2).sub(1).exp2()  # 1/2 to 2


def foldable(group: AttentionGroup, heads_only: bool = True) -> dict[str, Tensor]:
    """Random scales for the operands whose heads may differ, equal ones for the others."""
    result = {}
    for seed, (name, part) in enumerate((("q", group.query), ("k", group.key), ("v", group.value))):
        if part.declined is None:
            values = random_positive(group.heads, seed=seed)
            result[name] = values[:1].expand(group.heads) if part.shared else values
    return result


@pytest.mark.parametrize("name", FAMILIES)
def test_every_attention_of_a_family_is_found_and_can_be_folded(name: str) -> None:
    graph_module, _ = family(name)
    groups = find_attention(graph_module)
    _, _, count, heads = FAMILIES[name]
    assert len(groups) == count
    assert groups[0].heads == heads
    for group in groups:
        assert group.declined is None
        assert [group.query.declined, group.key.declined, group.value.declined] == [None] * 3
        assert group.query.shared == (name == "q/k-norm vit")
        assert bool(len(group.query.mixed)) == (name == "rotary eva")
        assert group.projection is not None


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_head_scales_is_exact_in_float(name: str) -> None:
    graph_module, x = family(name)
    expected = graph_module(x)
    groups = find_attention(graph_module)
    before = record(graph_module, x, *(g.value.node.name for g in groups))
    for group in groups:
        scales = foldable(group)
        assert len(scales) == 3
        fold_head_scales(graph_module, group, **scales)
    clean(graph_module)
    assert error(graph_module(x), expected) < EXACT
    after = record(graph_module, x, *(g.value.node.name for g in groups))
    if groups[0].heads > 1 and not groups[0].value.shared:  # else rho is 1
        assert all(error(a, b) > 0.01 for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_value_channels_is_exact_in_float(name: str) -> None:
    graph_module, x = family(name)
    expected = graph_module(x)
    groups = find_attention(graph_module)
    before = record(graph_module, x, *(g.value.node.name for g in groups))
    wanted = []
    for group, value in zip(groups, before, strict=True):
        heads, dims = group.value.channels.shape
        rows = 1 if group.value.shared else heads
        scale = random_positive(rows, dims).expand(heads, dims)
        shift = random_positive(rows, dims, seed=1).sub(1).expand(heads, dims)
        if group.value.shift_declined is not None:
            shift = torch.zeros_like(shift)
        fold_value_channels(
            graph_module, group, scale, None if group.value.shift_declined else shift
        )
        per_channel = [
            part[: value.shape[group.head_axis]] if group.head_axis is not None else part[0]
            for part in (scale, shift)
        ]
        shape = [-1, 1, dims] if group.head_axis is not None else [1, dims]
        ratio, move = (part.reshape(shape) for part in per_channel)
        if group.value_axis == -2:
            ratio, move = ratio.mT, move.mT
        wanted.append((value + move) / ratio)
    clean(graph_module)
    assert error(graph_module(x), expected) < EXACT
    after = record(graph_module, x, *(g.value.node.name for g in groups))
    for result, one in zip(after, wanted, strict=True):
        assert error(result, one) < EXACT


def test_which_values_take_a_shift() -> None:
    taken = {name: find_attention(family(name)[0])[0].value.shift_declined for name in FAMILIES}
    assert taken["shvit"] is not None and "nonlinear" in taken["shvit"]  # a ReLU comes before
    assert taken["talking heads"] is not None and "after the softmax" in taken["talking heads"]
    others = {n: reason for n, reason in taken.items() if n not in ("shvit", "talking heads")}
    assert set(others.values()) == {None}
    graph_module, _ = family("shvit")
    group = find_attention(graph_module)[0]
    ones = torch.ones(group.value.channels.shape)
    with pytest.raises(ValueError, match="nonlinear"):
        fold_value_channels(graph_module, group, ones, ones)


@pytest.mark.parametrize("name", FAMILIES)
def test_equalising_query_and_key_leaves_the_logits(name: str) -> None:
    graph_module, x = family(name)
    expected = graph_module(x)
    groups = find_attention(graph_module)
    logits = record(graph_module, x, *(g.logits.name for g in groups))
    for group in groups:
        heads, dims = group.query.channels.shape
        shared = group.query.shared or group.key.shared
        factor = random_positive(1 if shared else heads, dims).expand(heads, dims)
        if len(group.query.mixed):
            with pytest.raises(ValueError, match="added together"):
                fold_query_key(graph_module, group, factor)
            factor = factor[:, :1].expand(heads, dims)
        fold_query_key(graph_module, group, factor)
    clean(graph_module)
    assert error(graph_module(x), expected) < EXACT
    for result, one in zip(
        record(graph_module, x, *(g.logits.name for g in groups)), logits, strict=True
    ):
        assert error(result, one) < EXACT


@pytest.mark.parametrize("name", ["vit with registers and layer scale", "swin"])
def test_codes_per_head_before_are_the_codes_per_tensor_after(name: str) -> None:
    """In float64, where no code changes by rounding; the grid is symmetric with 8 bits."""
    graph_module, x = family(name)
    graph_module.double()
    x = x.double()
    group = find_attention(graph_module)[-1]
    nodes = [part.node.name for part in (group.query, group.key, group.value)]
    before = record(graph_module, x, *nodes)
    scales = [value.abs().amax((0, 2, 3)).float().double() / 127 for value in before]
    assert min(float(s.max() / s.min()) for s in scales) > 1.01
    common = fold_head_scales(graph_module, group, *scales)
    after = record(graph_module, x, *nodes)
    for old, new, scale, one in zip(before, after, scales, common, strict=True):
        assert one == pytest.approx(float(scale.mean()))
        alone = torch.round(old / scale[:, None, None]).clamp(-128, 127)
        assert torch.equal(torch.round(new / one).clamp(-128, 127), alone)
        assert len(alone.unique()) > 100


def test_folds_follow_each_other() -> None:
    graph_module, x = family("swin")
    expected = graph_module(x)
    for group in find_attention(graph_module):
        shape = tuple(group.value.channels.shape)
        fold_head_scales(graph_module, group, **foldable(group))
        fold_query_key(graph_module, group, random_positive(*shape, seed=5))
        fold_value_channels(graph_module, group, random_positive(*shape, seed=6), torch.ones(shape))
        fold_head_scales(graph_module, group, k=random_positive(group.heads, seed=7))
    clean(graph_module)
    assert error(graph_module(x), expected) < EXACT


def test_the_logits_are_multiplied_once() -> None:
    """A scaling that is there takes the constant; where q was scaled before, one is put in."""
    for name, more in (("vit with registers and layer scale", 2), ("talking heads", 3)):
        graph_module, _ = family(name)
        products = len(nodes_of(graph_module, aten.mul.Tensor))
        for _ in range(2):
            for group in find_attention(graph_module):
                fold_head_scales(graph_module, group, q=random_positive(group.heads))
        clean(graph_module)
        assert len(nodes_of(graph_module, aten.mul.Tensor)) == products + more


def test_a_per_head_scaling_after_the_product_takes_the_constant() -> None:
    graph_module, x = written(lambda q, k, v: ((q @ k.mT) * 0.4).softmax(-1) @ v)
    expected = graph_module(x)
    (group,) = find_attention(graph_module)
    products = len(nodes_of(graph_module, aten.mul.Tensor))
    fold_head_scales(graph_module, group, **foldable(group))
    clean(graph_module)
    assert len(nodes_of(graph_module, aten.mul.Tensor)) == products
    assert error(graph_module(x), expected) < EXACT


@pytest.mark.parametrize("name", ["swin", "shvit", "rotary eva", "q/k-norm vit"])
def test_no_name_matters(name: str) -> None:
    graph_module, _ = family(name)

    def found() -> list[tuple[object, ...]]:
        order = {node: at for at, node in enumerate(
            n for n in graph_module.graph.nodes if n.op != "get_attr"
        )}  # fmt: skip
        return [
            (order[g.query.node], order[g.key.node], order[g.value.node], order[g.logits],
             order[g.context], order[g.projection], g.heads, g.query.channels.tolist(),
             g.value.channels.tolist(), g.columns.tolist())
            for g in find_attention(graph_module)
        ]  # fmt: skip

    named = found()
    for at, node in enumerate(list(graph_module.graph.nodes)):
        node.meta = {"val": node.meta["val"]} if node.op == "placeholder" else {}
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(graph_module)
            graph_module.register_buffer(f"t{at}", value.detach())
            node.target = f"t{at}"
        if node.op != "output":
            node._rename(f"n{at}")
    clean(graph_module)
    assert found() == named


# ── Attention written by hand, for what families do now and then ──────────────────────────────


class Written(nn.Module):
    """Tokens, three layers, an attention given as a function of q, k, v, and a projection."""

    def __init__(self, attend: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(48, 32) for _ in range(3))
        self.projection = nn.Linear(32, 10)
        self.layers = nn.ModuleDict(layers)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        x = x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3).transpose(1, 2).flatten(2)
        q, k, v = (f(x).unflatten(2, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = self.attend(q, k, v, **self.layers)
        return self.projection(y.transpose(1, 2).flatten(2)).mean(1)


def written(attend: Callable[..., Tensor], **layers: nn.Module) -> tuple[fx.GraphModule, Tensor]:
    return captured(shake(Written(attend, **layers))).graph_module, images(2)


def softmax(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1)


def with_lepe(q: Tensor, k: Tensor, v: Tensor, conv: nn.Module) -> Tensor:
    """A depthwise convolution of v beside the attention, as in CSWin."""
    side = v.transpose(2, 3).flatten(0, 1).unflatten(2, (8, 8))
    return softmax(q, k) @ v + conv(side).flatten(2).transpose(1, 2).reshape(v.shape)


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.flatten(0, 1) for part in (q, k, v))
    return (softmax(q, k) @ v).unflatten(0, (-1, 4))


DECLINED: dict[str, tuple[Callable[..., Tensor], dict[str, nn.Module], tuple[str | None, ...]]] = {
    "a convolution beside": (
        with_lepe, {"conv": nn.Conv2d(8, 8, 3, 1, 1, groups=8)},
        (None, None, "conv2d reads its channels too"),
    ),
    "an activation before the projection": (
        lambda q, k, v: nn.functional.hardswish(softmax(q, k) @ v), {},
        (None, None, "after it, hardswish stands between"),
    ),
    "normalised queries and keys": (
        lambda q, k, v: softmax(nn.functional.normalize(q, dim=-1),
                                nn.functional.normalize(k, dim=-1)) @ v, {},
        ("two activations stands between", "two activations stands between", None),
    ),
    "a norm without weight": (
        lambda q, k, v, norm: softmax(norm(q), k) @ v,
        {"norm": nn.LayerNorm(8, elementwise_affine=False)},
        ("layer_norm stands between", None, None),
    ),
    "heads in the batch": (merged, {}, ("merged with the batch",) * 3),
    "queries used twice": (
        lambda q, k, v: softmax(q, k) @ v + q, {}, ("add reads its channels too", None,
                                                    "added to something else"),
    ),
    "one tensor as query and key": (
        lambda q, _, v: softmax(q, q) @ v, {},
        ("key reads the same channels", "query reads the same channels", None),
    ),
    "key and value of the same channels": (
        lambda q, _, v: softmax(q, v * 2) @ v, {},
        (None, "value reads the same channels", "key reads the same channels"),
    ),
    "a constant added": (
        lambda q, k, v: softmax(q + 1, k) @ v, {}, ("a constant is added", None, None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_what_cannot_be_folded_is_declined_with_a_reason_and_the_rest_is_exact(name: str) -> None:
    attend, layers, reasons = DECLINED[name]
    graph_module, x = written(attend, **layers)
    expected = graph_module(x)
    (group,) = find_attention(graph_module)
    parts = {"q": group.query, "k": group.key, "v": group.value}
    ones = torch.ones(group.heads)
    for (letter, part), reason in zip(parts.items(), reasons, strict=True):
        if reason is None:
            assert part.declined is None
        else:
            assert part.declined is not None and reason in part.declined
            with pytest.raises(ValueError, match=part.declined.split()[0]):
                fold_head_scales(graph_module, group, **{letter: ones})
    assert (group.declined is None) == (None in reasons)
    scales = foldable(group)
    assert len(scales) == reasons.count(None)
    fold_head_scales(graph_module, group, **scales)
    clean(graph_module)
    assert error(graph_module(x), expected) < EXACT


def test_weights_that_do_not_sum_to_one_take_no_shift() -> None:
    for attend in (
        lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
        lambda q, k, v: (q @ k.mT).softmax(-1)[..., :32] @ v[:, :, :32],
        lambda q, k, v: ((q @ k.mT).softmax(-1) * 2) @ v,
    ):
        graph_module, x = written(attend)
        expected = graph_module(x)
        (group,) = find_attention(graph_module)
        assert group.value.declined is None and group.value.shift_declined is not None
        fold_value_channels(graph_module, group, random_positive(*group.value.channels.shape))
        assert error(graph_module(x), expected) < EXACT


def test_shared_heads_and_wrong_arguments_change_nothing() -> None:
    graph_module, x = family("q/k-norm vit")
    expected = graph_module(x)
    group = find_attention(graph_module)[0]
    scales = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match="share channels"):
        fold_head_scales(graph_module, group, q=scales, v=scales)
    with pytest.raises(ValueError, match="2 scales are wanted"):
        fold_head_scales(graph_module, group, v=torch.ones(3))
    with pytest.raises(ValueError, match="positive"):
        fold_head_scales(graph_module, group, v=torch.tensor([3.0, -1.0]))
    with pytest.raises(ValueError, match="values are wanted"):
        fold_value_channels(graph_module, group, torch.ones(3))
    clean(graph_module)
    assert torch.equal(graph_module(x), expected)


def test_a_softmax_that_is_no_attention_is_left_out() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10), nn.Softmax(-1))
    assert find_attention(captured(shake(module)).graph_module) == []


def test_balancing_gives_query_and_key_one_range() -> None:
    factor = balance_query_key(torch.tensor([1.0, 4.0, 0.0, 2.0]), torch.tensor([4.0, 1.0, 3.0, 0]))
    assert factor.tolist() == [2.0, 0.5, 1.0, 1.0]
