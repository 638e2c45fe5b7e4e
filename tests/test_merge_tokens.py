"""Merged graphs against a plain ToMe in loops, and what must hold of any merge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

from deploykit._compat import timm
from deploykit.errors import UsageError
from deploykit.export.onnx import onnx_bytes
from deploykit.export.structure import load_model, save_model
from deploykit.graph.capture import CapturedModel, capture
from deploykit.graph.edit import is_kept_float
from deploykit.graph.signal import sqnr_db
from deploykit.prune.merge_options import SCHEDULES, MergeOptions, reductions
from deploykit.prune.merge_scorers import SCORERS
from deploykit.prune.merge_tokens import merge_tokens
from deploykit.quant.quantize import QuantizeOptions, quantize
from tests.graphs import batches, captured, images, make_backbone, shake, tiny_cnn
from tests.tiny_models import tiny_hybrid

aten = torch.ops.aten
ViT = timm.models.VisionTransformer
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
TINY = {"img_size": 32, "patch_size": 8, **SMALL}


def vit(**options: object) -> nn.Module:
    return shake(ViT(**{**TINY, **options}))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "class token": (vit, 1),
    "distilled": (lambda: shake(timm.models.deit.VisionTransformerDistilled(**TINY)), 2),
    "registers": (
        lambda: vit(reg_tokens=4, init_values=0.5, qk_norm=True, no_embed_class=True), 5
    ),
    "pooled": (lambda: vit(class_token=False, global_pool="avg"), 0),
    "pooled, class token": (lambda: vit(global_pool="avg"), 1),
    "pooled by attention": (lambda: vit(class_token=False, global_pool="map"), 0),
    "odd number": (lambda: vit(img_size=40, class_token=False, global_pool="avg"), 0),
}  # fmt: skip
OPTIONS = MergeOptions(r=3, least_tokens=0)


def size_of(network: str) -> int:
    return 40 if network == "odd number" else 32


def model(network: str) -> CapturedModel:
    return captured(NETWORKS[network][0](), size_of(network))


def run_onnx(data: bytes, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


def merge_one(x: Tensor, key: Tensor, sizes: Tensor, protected: int, r: int):  # type: ignore[no-untyped-def]
    """ToMe's merge of one image: x (N, C), key (N, D), sizes (N,). Loops, indices, no matrices."""
    count = len(x)
    unit = key / key.norm(dim=-1, keepdim=True)
    even = [i for i in range(protected, count) if i % 2 == 0]
    odd = [i for i in range(protected, count) if i % 2 == 1]
    best = {i: max(odd, key=lambda j, i=i: float(unit[i] @ unit[j])) for i in even}
    ranked = sorted(even, key=lambda i: float(-(unit[i] @ unit[best[i]])))
    goes, stays = ranked[:r], ranked[r:]
    summed, total = x * sizes[:, None], sizes.clone()
    for i in goes:
        summed[best[i]] += x[i] * sizes[i]
        total[best[i]] += sizes[i]
    order = [*range(protected), *stays, *odd]
    return (summed / total[:, None])[order], total[order]


def reference(net: nn.Module, x: Tensor, protected: int, r: int) -> Tensor:
    """A timm ViT with ToMe in it, image by image."""
    results = []
    for image in x:
        tokens = net.patch_embed(image[None])
        tokens = net.norm_pre(net._pos_embed(tokens))
        sizes = torch.ones(tokens.shape[1])
        for block in net.blocks:
            attn, y = block.attn, block.norm1(tokens)
            qkv = attn.qkv(y).reshape(1, y.shape[1], 3, attn.num_heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            q, k = attn.q_norm(q), attn.k_norm(k)
            logits = q @ k.transpose(-2, -1) * attn.scale + sizes.log()
            y = (logits.softmax(-1) @ v).transpose(1, 2).reshape(y.shape)
            tokens = tokens + block.ls1(attn.proj(y))
            merged, sizes = merge_one(tokens[0], k.mean(1)[0], sizes, protected, r)
            tokens = merged[None]
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        tokens = net.norm(tokens)
        if net.global_pool == "avg":
            weights = sizes[net.num_prefix_tokens :, None]
            tokens = tokens[:, net.num_prefix_tokens :]
            pooled = (tokens * weights).sum(1) / weights.sum()
            results.append(net.head(net.fc_norm(pooled)))
        elif hasattr(net, "head_dist"):
            results.append((net.head(tokens[:, 0]) + net.head_dist(tokens[:, 1])) / 2)
        else:
            results.append(net.head(net.fc_norm(tokens[:, 0])))
    return torch.cat(results)


@pytest.mark.parametrize("network", [n for n in NETWORKS if n != "pooled by attention"])
def test_a_merged_graph_is_tome(network: str) -> None:
    build, protected = NETWORKS[network]
    net, x = build().eval(), images(4, size_of(network))
    merged, record = merge_tokens(model(network), OPTIONS)
    with torch.no_grad():
        wanted = reference(net, x, protected, 3)
        plain = net(x)
    assert record.details["protected"] == protected
    torch.testing.assert_close(merged.graph_module(x), wanted, atol=2e-5, rtol=1e-4)
    assert sqnr_db(plain, wanted) < 40  # merging did change something


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("network", ["registers", "pooled by attention"])
def test_the_file_computes_what_the_graph_does_for_any_batch(network: str, scorer: str) -> None:
    merged, _ = merge_tokens(model(network), replace(OPTIONS, scorer=scorer))
    data = onnx_bytes(merged.graph_module, merged.backbone)
    kinds = {node.op_type for node in onnx.load_from_string(data).graph.node}
    assert not {kind for kind in kinds if "Scatter" in kind}
    assert "TopK" in kinds
    for count in (1, 5):
        x = images(count, size_of(network))
        torch.testing.assert_close(run_onnx(data, x), merged.graph_module(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_merged_graph_comes_back_bit_for_bit(network: str, tmp_path: Path) -> None:
    merged, _ = merge_tokens(model(network), OPTIONS)
    save_model(merged.graph_module, merged.backbone, tmp_path, precision="fp32")
    saved, x = load_model(tmp_path), images(3, size_of(network))
    assert torch.equal(saved.graph_module(x), merged.graph_module(x))
    marks = [
        sum(map(is_kept_float, m.graph.nodes)) for m in (saved.graph_module, merged.graph_module)
    ]
    assert marks[0] == marks[1] > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_to_merge_is_the_identity(schedule: str) -> None:
    source, x = model("class token"), images(2)
    options = replace(OPTIONS, schedule=schedule, r=0, ratio=0.0, per_layer=(0, 0))
    merged, record = merge_tokens(source, options)
    assert torch.equal(merged.graph_module(x), source.graph_module(x))
    assert record.details["macs_before"] == record.details["macs_after"]


def test_the_source_is_left_alone() -> None:
    source, x = model("class token"), images(2)
    before, nodes = source.graph_module(x), len(source.graph_module.graph.nodes)
    merge_tokens(source, OPTIONS)
    assert torch.equal(source.graph_module(x), before)
    assert len(source.graph_module.graph.nodes) == nodes


def flat(network: str) -> CapturedModel:
    """A ViT without position embedding."""
    net = NETWORKS[network][0]()
    with torch.no_grad():
        net.pos_embed.zero_()
    return captured(net)


@pytest.mark.parametrize("network", ["class token", "distilled", "pooled", "pooled, class token"])
def test_equal_tokens_merge_without_any_loss(network: str) -> None:
    """Every patch is equal: proportional attention and weighted means make merging exact."""
    source = flat(network)
    x = images(3)[:, :, :1, :1].expand(3, 3, 32, 32).contiguous()
    merged, record = merge_tokens(source, replace(OPTIONS, r=4))
    assert record.details["macs_after"] < record.details["macs_before"]
    wanted = source.graph_module(x)
    torch.testing.assert_close(merged.graph_module(x), wanted, atol=1e-5, rtol=1e-4)
    blind, _ = merge_tokens(source, replace(OPTIONS, r=4, proportional_attention=False))
    if network != "pooled":  # there all tokens are equal, and no weight changes their mean
        assert sqnr_db(wanted, blind.graph_module(x)) < 60


class _Keep(fx.Interpreter):
    """The values that the merges of a graph leave: each has one token axis less than before."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.merged: list[tuple[Tensor, Tensor]] = []

    def run_node(self, n: fx.Node):  # type: ignore[no-untyped-def]
        result = super().run_node(n)
        if n.op == "call_function" and n.target is aten.cat.default and is_kept_float(n):
            parts = [self.env[part] for part in n.args[0]]
            if result.shape[-1] == 32:
                self.merged.append((parts[0], result))
        return result


@pytest.mark.parametrize("network", ["class token", "distilled", "registers"])
def test_protected_tokens_stay_in_front(network: str) -> None:
    protected = NETWORKS[network][1]
    merged, _ = merge_tokens(model(network), replace(OPTIONS, schedule="list", per_layer=(7, 0)))
    runner = _Keep(merged.graph_module)
    runner.run(images(3))
    ((front, result),) = runner.merged
    assert front.shape[1] == protected
    assert torch.equal(result[:, :protected], front)


def test_a_schedule_takes_what_it_says() -> None:
    twelve = MergeOptions(r=8)
    assert reductions(twelve, 12) == [8] * 12
    assert reductions(replace(twelve, schedule="decreasing"), 5) == [16, 12, 8, 4, 0]
    fast = reductions(replace(twelve, schedule="fast"), 12)
    assert [i + 1 for i, share in enumerate(fast) if share] == [3, 6, 9]
    _, record = merge_tokens(model("class token"), replace(OPTIONS, r=100))
    # class token apart, at most half of the tokens merge, and one stays
    assert list(record.details["tokens"].values()) == [[17, 10], [10, 7]]


def test_the_record_counts_multiply_adds() -> None:
    source = model("pooled")
    merged, record = merge_tokens(source, replace(OPTIONS, schedule="list", per_layer=(0, 8)))
    attention_and_mlp = 7 * 2 * 32 * 128  # seven tokens fewer in the last MLP
    matching = 8 * 8 * 16 + (8 - 7) * 8 * 33 + 8 * 8 * 33  # scores; who stays; who goes, and sizes
    saved = record.details["macs_before"] - record.details["macs_after"]
    assert saved == attention_and_mlp - matching
    assert merged.graph_module(images(1)).shape == (1, 10)


class Position(nn.Module):
    """Adds a table with a row for every token, as relative positions and late embeddings do."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.table = nn.Parameter(torch.randn(1, 17, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.table


def test_a_block_before_a_fixed_number_of_tokens_is_declined() -> None:
    net = vit()
    net.blocks[0] = Position(net.blocks[0])
    merged, record = merge_tokens(captured(net), OPTIONS)
    assert list(record.details["tokens"]) == ["blocks.1.attn"]
    declined = record.details["declined"]
    assert set(declined) == {"blocks.0.block.attn"}
    assert all("fixed number of 17 tokens" in reason for reason in declined.values())
    assert merged.graph_module(images(2)).shape == (2, 10)


class Picks(nn.Module):
    """A ViT whose head reads something else than a protected token."""

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.vit, self.head = vit(), head

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.vit.forward_features(x)
        return self.vit.head(self.head(tokens))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no attention": (tiny_cnn, "it has no attention"),
    "attention on a map": (tiny_hybrid, "attention works on a map"),
    "a patch is picked": (lambda: Picks(lambda t: t[:, 3]), "token 3 is picked"),
    "the last is picked": (lambda: Picks(lambda t: t[:, -1]), "token 16 is picked"),
    "the largest": (lambda: Picks(lambda t: t.amax(1)), "amax over tokens"),
    "a map": (
        lambda: Picks(lambda t: t[:, 1:].reshape(-1, 4, 4, 32).mean((1, 2))), "tokens out anew"
    ),
    "a part": (lambda: Picks(lambda t: t[:, 5:9].mean(1)), "tokens 5 to 9 of 17"),
    "a convolution": (
        lambda: Picks(lambda t: nn.functional.avg_pool1d(t.mT, 3).mean(2)), "one by one"
    ),
    "every second": (lambda: Picks(lambda t: t[:, ::2].mean(1)), "are picked"),
    "windows": (
        lambda: timm.models.SwinTransformer(
            img_size=32, patch_size=4, embed_dim=16, depths=(2,), num_heads=(2,), window_size=4,
            num_classes=10,
        ),
        "windows of 16 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_merge_is_refused_in_one_line(case: str) -> None:
    build, words = REFUSED[case]
    with pytest.raises(UsageError, match=words) as caught:
        merge_tokens(captured(shake(build())), OPTIONS)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"least_tokens": 64}, "17 tokens, under 64"),
        ({"schedule": "nope"}, "no token schedule 'nope'"),
        ({"scorer": "nope"}, "no token scorer 'nope'"),
        ({"r": -1}, "fewer than 0"),
        ({"ratio": 0.7}, "0 to 0.5"),
        ({"schedule": "list", "per_layer": (1,)}, "the model has 2 blocks"),
        ({"protect": 17}, "can't be protected"),
        ({"protect": 0}, "token 0 is picked"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        merge_tokens(model("class token"), replace(OPTIONS, **options))


def test_a_merge_that_costs_more_than_it_saves_is_refused() -> None:
    net = vit(mlp_ratio=0.05, depth=1)
    with pytest.raises(UsageError, match="costs more than is saved"):
        merge_tokens(captured(net), replace(OPTIONS, r=1))


def test_matching_stays_float_when_quantised(tmp_path: Path) -> None:
    merged, _ = merge_tokens(model("class token"), OPTIONS)
    made = quantize(merged, QuantizeOptions(weight_bits=8, input_bits=8), batches())
    marked = [node for node in made.graph_module.graph.nodes if is_kept_float(node)]
    assert len([n for n in marked if n.target is aten.matmul.default]) > 3
    fake = torch.ops.deploykit.fake_quantize.default
    for node in marked:
        assert not [n for n in node.all_input_nodes if n.target is fake], node
    assert len([p for p in made.plans if p.op == "matmul"]) == 2 * 2
    x = images(4)
    assert sqnr_db(merged.graph_module(x), made(x)) > 15
    save_model(made.graph_module, made.backbone, tmp_path, precision=made.bits)
    assert torch.equal(load_model(tmp_path).graph_module(x), made(x))
    data = onnx_bytes(made.graph_module, made.backbone)
    assert sqnr_db(made(x), run_onnx(data, x)) > 15


def test_a_saved_merged_model_is_quantised_with_its_matching_in_float(tmp_path: Path) -> None:
    merged, _ = merge_tokens(model("class token"), OPTIONS)
    save_model(merged.graph_module, merged.backbone, tmp_path, precision="fp32")
    again = capture(make_backbone(load_model(tmp_path).graph_module))
    made = quantize(again, QuantizeOptions(weight_bits=8, input_bits=8), batches())
    assert len([p for p in made.plans if p.op == "matmul"]) == 2 * 2
