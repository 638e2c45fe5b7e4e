"""What is special in families with attention of their own: layers, names, official tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploykit.backbones.checkpoint import load_strictly
from deploykit.backbones.families.cas_vit import CasViT
from deploykit.backbones.families.cvt import ConvAttention
from deploykit.backbones.families.dualtoken_vit import DualTokenViT
from deploykit.backbones.families.dualtoken_vit import _Size as DualTokenSize
from deploykit.backbones.families.elasticvit import TokenAttention
from deploykit.backbones.families.litv2 import HiLo
from deploykit.backbones.families.moat import Moat, SameConv
from deploykit.backbones.families.pvt_v1 import PyramidVisionTransformer, SpatialReductionAttention
from deploykit.backbones.families.stvit import MapAttention, SuperTokenAttention
from deploykit.backbones.families.uniformer_light import EvolvingBlock
from deploykit.backbones.layers.deformable import DeformablePatches
from deploykit.backbones.layers.neighbours import gather_neighbours, sum_neighbours
from deploykit.backbones.layers.relative_bias import relative_index, resized_bias
from deploykit.backbones.registry import own_builder
from tests.graphs import captured


@pytest.fixture(autouse=True)
def no_gradients() -> object:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def drawn(module: nn.Module) -> nn.Module:
    """The module in eval mode, with nothing left at zero or one."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.normal_(layer.running_mean, std=0.2)
    return module.eval()


# ── Layers ────────────────────────────────────────────────────────────────────────────────────


def bilinear(map_: Tensor, y: float, x: float) -> Tensor:
    """The value of (C, H, W) between positions; zero outside, as in deformable convolution."""
    result = torch.zeros(map_.shape[0])
    top, left = int(y // 1), int(x // 1)
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < map_.shape[1] and 0 <= column < map_.shape[2]:
                weight = (1 - abs(y - row)) * (1 - abs(x - column))
                result += weight * map_[:, row, column]
    return result


def test_deformable_patches_follow_the_formula() -> None:
    layer = DeformablePatches(3, 5, (4, 6))
    drawn(layer)
    x = torch.randn(2, 3, 4, 6)
    offset = layer.offset(x)
    assert offset.abs().max() > 1  # some points leave their patch, some the map
    got = layer(x)
    for n in range(2):
        for i in range(2):
            for j in range(3):
                wanted = torch.zeros(5)
                for k in range(4):
                    dy, dx = offset[n, 2 * k : 2 * k + 2, i, j].tolist()
                    point = bilinear(x[n], 2 * i + k // 2 + dy, 2 * j + k % 2 + dx)
                    wanted += layer.conv.weight[:, :, k, 0] @ point
                torch.testing.assert_close(got[n, :, i, j], wanted, rtol=1e-4, atol=1e-5)


def test_deformable_patches_start_as_a_plain_convolution() -> None:
    layer = DeformablePatches(3, 5, (4, 6))
    x = torch.randn(1, 3, 4, 6)
    wanted = F.conv2d(x, layer.conv.weight.unflatten(2, (2, 2)).squeeze(-1), stride=2)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


def test_neighbours_are_those_of_unfold_and_fold() -> None:
    x = torch.randn(2, 3, 4, 5)
    wanted = F.unfold(x, 3, padding=1).unflatten(1, (3, 9)).unflatten(3, (4, 5)).transpose(1, 2)
    assert torch.equal(gather_neighbours(x), wanted)
    given = torch.randn(2, 9, 3, 4, 5)
    columns = given.transpose(1, 2).flatten(1, 2).flatten(2)
    folded = F.fold(columns, (4, 5), 3, padding=1)
    torch.testing.assert_close(sum_neighbours(given), folded)


def test_relative_index_tells_the_distance() -> None:
    side = 3
    index = relative_index(side)
    for p in range(side * side):
        for q in range(side * side):
            down, right = q // side - p // side, q % side - p % side
            assert index[p, q] == (down + side - 1) * (2 * side - 1) + right + side - 1
    assert len(index.unique()) == (2 * side - 1) ** 2
    table = torch.arange(25.0).reshape(1, 5, 5)
    assert resized_bias(table, 3) is table
    assert resized_bias(table, 5).shape == (1, 9, 9)
    assert float(resized_bias(table, 5)[0, 4, 4]) == pytest.approx(12.0)  # no distance stays so


# ── Attention ─────────────────────────────────────────────────────────────────────────────────


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """(N, L, C), (N, M, C), (N, M, C) to (N, L, C), head by head."""
    parts = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        parts.append((a @ b.transpose(1, 2) * scale).softmax(-1) @ c)
    return torch.cat(parts, -1)


def test_hilo_attends_in_windows_and_to_means() -> None:
    layer = HiLo(40, 10, 2, 4)
    drawn(layer)
    assert (layer.low_heads, layer.high_heads) == (9, 1)
    x = torch.randn(2, 16, 40)
    got = layer(x)
    cells = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    high = torch.zeros(2, 16, 4)
    for cell in cells:
        q, k, v = layer.h_qkv(x[:, cell]).chunk(3, -1)
        high[:, cell] = plain_attention(q, k, v, 1, 0.5)
    means = torch.stack([x[:, cell].mean(1) for cell in cells], 1)
    k, v = layer.l_kv(means).chunk(2, -1)
    low = plain_attention(layer.l_q(x), k, v, 9, 0.5)
    wanted = torch.cat((layer.h_proj(high), layer.l_proj(low)), -1)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_super_token_attention_follows_the_paper() -> None:
    cell, dim = 2, 8
    layer = SuperTokenAttention(dim, 2, cell)
    drawn(layer)
    x = torch.randn(1, dim, 4, 6)
    means = F.avg_pool2d(x, cell)[0]  # (C, 2, 3)
    padded = F.pad(means, (1, 1, 1, 1))
    given, weight = torch.zeros_like(padded), torch.zeros_like(padded[0])
    affinities = {}
    for row in range(4):
        for column in range(6):
            i, j, pixel = row // cell, column // cell, x[0, :, row, column]
            near = padded[:, i : i + 3, j : j + 3].flatten(1)
            affinity = (pixel @ near * dim**-0.5).softmax(0)
            affinities[row, column] = affinity
            given[:, i : i + 3, j : j + 3] += (pixel[:, None] * affinity).unflatten(1, (3, 3))
            weight[i : i + 3, j : j + 3] += affinity.unflatten(0, (3, 3))
    tokens = (given / weight)[:, 1:-1, 1:-1]
    refined = F.pad(layer.stoken_refine(tokens[None])[0], (1, 1, 1, 1))
    got = layer(x)[0]
    for (row, column), affinity in affinities.items():
        i, j = row // cell, column // cell
        wanted = refined[:, i : i + 3, j : j + 3].flatten(1) @ affinity
        torch.testing.assert_close(got[:, row, column], wanted, rtol=1e-4, atol=1e-4)


def test_map_attention_takes_its_heads_one_after_another() -> None:
    layer = MapAttention(8, 2)
    drawn(layer)
    x = torch.randn(2, 8, 3, 4)
    qkv = layer.qkv(x).flatten(2).transpose(1, 2)
    first, second = qkv.chunk(2, -1)
    parts = [plain_attention(*part.chunk(3, -1), 1, 0.5) for part in (first, second)]
    wanted = layer.proj(torch.cat(parts, -1).transpose(1, 2).unflatten(2, (3, 4)))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


def test_pvt_attention_asks_a_smaller_map() -> None:
    layer = SpatialReductionAttention(8, 2, 2, 4)
    drawn(layer)
    x = torch.randn(2, 16, 8)
    small = layer.sr(x.transpose(1, 2).unflatten(2, (4, 4))).flatten(2).transpose(1, 2)
    k, v = layer.kv(layer.norm(small)).chunk(2, -1)
    wanted = layer.proj(plain_attention(layer.q(x), k, v, 2, 0.5))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


def test_cvt_attention_scales_by_the_whole_width_and_spares_the_class_token() -> None:
    layer = ConvAttention(8, 2, has_class_token=True, side=4)
    drawn(layer)
    x = torch.randn(2, 17, 8)
    image = x[:, 1:].transpose(1, 2).unflatten(2, (4, 4))

    def project(conv: nn.Module, linear: nn.Module) -> Tensor:
        tokens = conv.bn(conv.conv(image)).flatten(2).transpose(1, 2)
        return linear(torch.cat((x[:, :1], tokens), 1))

    q = project(layer.conv_proj_q, layer.proj_q)
    k = project(layer.conv_proj_k, layer.proj_k)
    v = project(layer.conv_proj_v, layer.proj_v)
    assert k.shape[1] == 1 + 4
    wanted = layer.proj(plain_attention(q, k, v, 2, 8**-0.5))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


def test_elasticvit_attention_cuts_heads_after_joining_queries_keys_and_values() -> None:
    layer = TokenAttention(32, 2, 3)
    drawn(layer)
    x = torch.randn(2, 9, 32)
    parts, values = [], []
    for head in layer.qkv(x).split(64, -1):
        q, k, v = head.split([16, 16, 32], -1)
        parts.append((q, k))
        values.append(v)
    v = torch.cat(values, -1).transpose(1, 2).unflatten(2, (3, 3))
    v = layer.local(v).flatten(2).transpose(1, 2)
    out = []
    for i, (q, k) in enumerate(parts):
        bias = layer.bias_table[relative_index(3)][..., i]
        out.append((q @ k.transpose(1, 2) / 4 + bias).softmax(-1) @ v[..., 32 * i : 32 * i + 32])
    wanted = layer.proj(F.hardswish(torch.cat(out, -1)))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


def test_slow_and_fast_tokens() -> None:
    block = EvolvingBlock(8, 2, 2, 2)
    drawn(block)
    nn.init.zeros_(block.pos_embed.weight)
    nn.init.zeros_(block.pos_embed.bias)
    first, x = torch.randn(1, 1, 8), torch.randn(1, 8, 2, 2)
    ranks = torch.tensor([[0.1, 0.5, 0.1, 0.3]])
    tokens = x.flatten(2).transpose(1, 2)
    summary = (tokens[:, [0]] + tokens[:, [2]]) / 2  # of the two least, by equal ranks
    y = torch.cat((first, tokens[:, [1, 3]], summary), 1)
    attended, seen = block.attn(block.norm1(y))
    y = y + attended
    y = y + block.mlp(block.norm2(y))
    change = y[:, 3] - summary[:, 0]
    got_first, got, got_ranks = block(first, x, ranks)
    got = got.flatten(2).transpose(1, 2)
    torch.testing.assert_close(got_first, y[:, :1])
    for place, wanted in enumerate(
        (tokens[:, 0] + change, y[:, 1], tokens[:, 2] + change, y[:, 2])
    ):
        torch.testing.assert_close(got[:, place], wanted)
    wanted_ranks = [0.1, 0.25 + seen[0, 0].item() / 2, 0.1, 0.15 + seen[0, 1].item() / 2]
    torch.testing.assert_close(got_ranks, torch.tensor([wanted_ranks]))


# ── Whole networks, tiny ──────────────────────────────────────────────────────────────────────


def test_strided_convolutions_pad_as_tensorflow_does() -> None:
    conv = SameConv(1, 1, 2, bias=False)
    nn.init.ones_(conv.weight)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    wanted = torch.tensor([[0.0 + 1 + 2 + 4 + 5 + 6 + 8 + 9 + 10, 2.0 + 3 + 6 + 7 + 10 + 11]])
    assert torch.equal(conv(x)[0, 0, :1], wanted)
    assert conv(x)[0, 0, 1, 1] == 10 + 11 + 14 + 15


@pytest.mark.parametrize(
    "net",
    [
        lambda: CasViT((8, 12, 16, 24), (1, 1, 1, 1), 10),
        lambda: DualTokenViT(
            DualTokenSize((16, 32, 32), (1, 1, 1), (2, 2, 2), has_mixing=True), 10, 64
        ),
    ],
    ids=["casvit", "dualtoken"],
)
def test_tiny_networks_capture_with_any_batch(net: object) -> None:
    module = drawn(net())  # type: ignore[operator]
    model = captured(module, 64)
    assert model.dynamic_batch
    for batch in (1, 3):
        x = torch.randn(batch, 3, 64, 64)
        torch.testing.assert_close(model.graph_module(x), module(x), rtol=1e-4, atol=1e-4)


def test_casvit_answers_with_the_mean_of_two_heads() -> None:
    net = drawn(CasViT((8, 12, 16, 24), (1, 1, 1, 1), 10))
    x = torch.randn(2, 3, 64, 64)
    both = net(x)
    state = net.state_dict()
    for name in ("weight", "bias"):
        state[f"head.{name}"], state[f"dist_head.{name}"] = (
            state[f"dist_head.{name}"].clone(),
            state[f"head.{name}"].clone(),
        )
    net.load_state_dict(state)
    torch.testing.assert_close(net(x), both)
    nn.init.zeros_(net.head.weight)
    assert not torch.allclose(net(x), both)


def test_checkpoints_of_224_pixels_load_at_another_size() -> None:
    small = drawn(PyramidVisionTransformer((1, 1, 1, 1), 10, 64))
    large = PyramidVisionTransformer((1, 1, 1, 1), 10, 128)
    assert load_strictly(large, small.state_dict(), "file")
    table = small.get_parameter("pos_embed4")[:, 1:].transpose(1, 2).unflatten(2, (2, 2))
    wanted = F.interpolate(table, (4, 4), mode="bicubic", align_corners=False)
    got = large.get_parameter("pos_embed4")
    torch.testing.assert_close(got[:, :1], small.get_parameter("pos_embed4")[:, :1])
    torch.testing.assert_close(got[:, 1:].transpose(1, 2).flatten(2), wanted.flatten(2))
    sizes = (8, (8, 8, 32, 32), (1, 1, 1, 1), 10)
    moat, larger = drawn(Moat(*sizes, img_size=64)), Moat(*sizes, img_size=128)
    assert load_strictly(larger, moat.state_dict(), "file")
    middle = moat.stages[2][0].attn.bias_table[:, 3, 3]
    torch.testing.assert_close(larger.stages[2][0].attn.bias_table[:, 7, 7], middle)


# Tensors of the official checkpoints, as far as their names are known.
OFFICIAL = {
    "casvit_xs": (
        "patch_embed.3.weight",
        "network.0.1.local_perception.network.2.weight",
        "network.1.proj.weight",
        "network.2.0.attn.oper_q.0.block.3.weight",
        "network.6.1.attn.oper_k.1.block.1.weight",
        "network.6.0.mlp.fc1.weight",
        "dist_head.weight",
    ),
    "cvt_13": (
        "stage0.patch_embed.proj.weight",
        "stage2.cls_token",
        "stage1.blocks.1.attn.conv_proj_q.bn.running_mean",
        "stage2.blocks.9.attn.proj_k.bias",
        "stage2.blocks.9.mlp.fc2.weight",
        "norm.weight",
    ),
    "pvt_v1_tiny": (
        "pos_embed4",
        "cls_token",
        "patch_embed2.proj.weight",
        "block1.1.attn.sr.weight",
        "block3.0.attn.norm.bias",
        "block4.1.attn.kv.weight",
    ),
    "uniformer_s_plus": (
        "patch_embed1.proj.3.weight",
        "patch_embed2.proj.1.running_var",
        "blocks1.2.conv1.weight",
        "blocks2.4.attn.weight",
        "blocks3.8.attn.qkv.bias",
        "blocks4.0.pos_embed.weight",
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_tensors_are_named_as_in_official_checkpoints(name: str) -> None:
    with torch.device("meta"):
        state = own_builder(name)[1](name, num_classes=1000, img_size=224).state_dict()
    assert set(OFFICIAL[name]) <= set(state)
