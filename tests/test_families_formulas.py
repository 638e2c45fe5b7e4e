"""Own families whose blocks have a formula: the block against the formula, written out."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.families.cswin import LePEAttention
from deploykit.backbones.families.efficientvmamba import AtrousScan
from deploykit.backbones.families.efficientvmamba import PatchMerging as Merging
from deploykit.backbones.families.fcaformer import CrossAttention, FcaFormer
from deploykit.backbones.families.fcaformer import checkpoint_filter_fn as resize_fcaformer
from deploykit.backbones.families.hornet import GlobalLocalFilter, GnConv
from deploykit.backbones.families.l2vit import LinearAttention, WindowAttention
from deploykit.backbones.families.rmt import ManhattanAttention
from deploykit.backbones.families.t2t_vit import TokenPerformer, t2t_vit
from deploykit.backbones.families.transnext import AggregatedAttention, _geometry, transnext
from deploykit.backbones.families.unireplknet import UniRepLKNet
from deploykit.backbones.families.vmamba import SS2D
from deploykit.backbones.layers.selective_scan import selective_scan
from deploykit.backbones.registry import own_builder
from deploykit.backbones.untrained import make_testable
from deploykit.backbones.weights import load_strictly


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(N, L, C) to (N, heads, L, d)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.normal_(0, 0.3)


# ── HorNet ────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
@pytest.mark.parametrize("spectrum", [(6, 4), (14, 8)])
def test_hornets_filter_is_a_product_of_spectra(spectrum: tuple[int, int]) -> None:
    layer = GlobalLocalFilter(8, 6, spectrum)
    randomise(layer)
    image = torch.randn(2, 8, 6, 6)
    local, everywhere = layer.pre_norm(image).chunk(2, dim=1)
    weight = layer.complex_weight.permute(3, 0, 1, 2)
    weight = F.interpolate(weight, (6, 4), mode="bilinear", align_corners=True)
    kernel = torch.complex(weight[0], weight[1])
    spectra = torch.fft.rfft2(everywhere, norm="ortho") * kernel
    everywhere = torch.fft.irfft2(spectra, s=(6, 6), norm="ortho")
    mixed = torch.empty(2, 8, 6, 6)
    mixed[:, 0::2], mixed[:, 1::2] = layer.dw(local), everywhere  # channel by channel
    close(layer(image), layer.post_norm(mixed))


@torch.no_grad()
def test_hornets_recursion_of_order_three() -> None:
    layer = GnConv(8, 3, nn.Conv2d(14, 14, 7, padding=3, groups=14))
    randomise(layer)
    image = torch.randn(2, 8, 5, 5)
    p, q0, q1, q2 = layer.proj_in(image).split((2, 2, 4, 8), dim=1)
    q0, q1, q2 = (layer.dwconv(torch.cat((q0, q1, q2), 1)) / 3).split((2, 4, 8), dim=1)
    wanted = layer.proj_out(layer.pws[1](layer.pws[0](p * q0) * q1) * q2)
    close(layer(image), wanted)


# ── CSWin ─────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
@pytest.mark.parametrize("stripe", [(6, 2), (3, 6), (6, 6)])
def test_cswins_stripes_attend_within_themselves_only(stripe: tuple[int, int]) -> None:
    side, heads, dim = 6, 2, 8
    layer = LePEAttention(dim, heads, side, stripe)
    q, k, v = torch.randn(3, 2, side * side, dim)
    place = [(y // stripe[0], x // stripe[1]) for y, x in product(range(side), repeat=2)]
    same = torch.tensor([[a == b for b in place] for a in place])
    scores = heads_of(q, heads) @ heads_of(k, heads).transpose(-2, -1) * (dim // heads) ** -0.5
    attention = scores.masked_fill(~same, -math.inf).softmax(-1)
    wanted = (attention @ heads_of(v, heads)).transpose(1, 2).flatten(2)
    image = v.transpose(1, 2).reshape(2, dim, side, side)
    local = torch.empty_like(image)
    for top, left in product(range(0, side, stripe[0]), range(0, side, stripe[1])):
        window = (..., slice(top, top + stripe[0]), slice(left, left + stripe[1]))
        local[window] = layer.get_v(image[window])  # zero padding at the stripe's own border
    close(layer(q, k, v), wanted + local.flatten(2).transpose(1, 2))


# ── UniRepLKNet ───────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def test_unireplknet_deployed_gives_what_it_gave_in_training_form() -> None:
    module = UniRepLKNet(8, (1, 1, 2, 1), (13, 3), 5).eval()
    make_testable(module, 3, 64)
    images = torch.randn(2, 3, 64, 64)
    wanted = module(images)
    deployed = timm.utils.reparameterize_model(module)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.modules())
    got = deployed(images)
    assert (got - wanted).norm() <= 1e-4 * wanted.norm()
    again = timm.utils.reparameterize_model(deployed)  # nothing is left to fold
    assert torch.equal(again(images), got)


@pytest.mark.parametrize(
    ("size", "millions", "digits"), [("a", 4.4, 1), ("n", 18.3, 1), ("t", 31, 0), ("b", 98, 0)]
)
def test_unireplknet_deployed_is_as_large_as_the_paper_says(
    size: str, millions: float, digits: int
) -> None:
    name = f"unireplknet_{size}"
    with torch.device("meta"):
        module = own_builder(name)[1](name, num_classes=1000, img_size=224)
        deployed = timm.utils.reparameterize_model(module, inplace=True)
    count = sum(p.numel() for p in deployed.parameters()) / 1e6
    assert round(count, digits) == millions


# ── Scans ─────────────────────────────────────────────────────────────────────────────────────


def scan_sequences(layer: AtrousScan | SS2D, sequences: Tensor) -> Tensor:
    """Four sequences, (N, 4, D, L), each by its own state space."""
    rank = layer.rank
    parts = torch.einsum("nkdl,kcd->nkcl", sequences, layer.x_proj_weight)
    state = (parts.shape[2] - rank) // 2
    step, b, c = parts.split((rank, state, state), dim=2)
    step = torch.einsum("nkrl,kdr->nkdl", step, layer.dt_projs_weight)
    step = F.softplus(step + layer.dt_projs_bias.unsqueeze(-1))
    a = -layer.A_logs.exp().view(4, -1, state)
    return selective_scan(sequences, step, a, b, c, layer.Ds.view(4, -1))


@torch.no_grad()
def test_the_atrous_scan_reads_four_sub_grids() -> None:
    layer = AtrousScan(4)
    randomise(layer)
    image = torch.randn(2, 8, 6, 4)
    grids = [image[:, :, 0::2, 0::2], image[:, :, 1::2, 0::2].transpose(2, 3)]
    grids += [image[:, :, 0::2, 1::2], image[:, :, 1::2, 1::2].transpose(2, 3)]
    y = scan_sequences(layer, torch.stack([g.flatten(2) for g in grids], dim=1))
    wanted = torch.empty_like(image)
    wanted[:, :, 0::2, 0::2] = y[:, 0].view(2, 8, 3, 2)
    wanted[:, :, 1::2, 0::2] = y[:, 1].view(2, 8, 2, 3).transpose(2, 3)
    wanted[:, :, 0::2, 1::2] = y[:, 2].view(2, 8, 3, 2)
    wanted[:, :, 1::2, 1::2] = y[:, 3].view(2, 8, 2, 3).transpose(2, 3)
    close(layer._scan(image), wanted)


@torch.no_grad()
def test_vmambas_scan_reads_four_directions() -> None:
    layer = SS2D(4, 2)
    randomise(layer)
    image = torch.randn(2, 8, 3, 5)
    rows, columns = image.flatten(2), image.transpose(2, 3).flatten(2)
    orders = [rows, columns, rows.flip(-1), columns.flip(-1)]
    y = scan_sequences(layer, torch.stack(orders, dim=1))
    along = (y[:, 0] + y[:, 2].flip(-1)).view(2, 8, 3, 5)
    across = (y[:, 1] + y[:, 3].flip(-1)).view(2, 8, 5, 3).transpose(2, 3)
    close(layer._scan(image), along + across)


@torch.no_grad()
def test_patches_merge_in_swins_order() -> None:
    layer, image = Merging(3), torch.randn(2, 4, 6, 3)
    parts = [image[:, y::2, x::2] for x, y in product((0, 1), repeat=2)]  # rows change first
    close(layer(image), layer.reduction(layer.norm(torch.cat(parts, dim=-1))))


# ── T2T-ViT ───────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def test_t2ts_performer_weighs_values_by_its_features() -> None:
    layer = TokenPerformer(12, 8)
    x = torch.randn(2, 5, 12)
    k, q, v = layer.kqv(layer.norm1(x)).split(8, dim=-1)

    def features(t: Tensor) -> Tensor:
        return torch.exp(t @ layer.w.T - (t**2).sum(-1, keepdim=True) / 2) / math.sqrt(4)

    weights = features(q) @ features(k).transpose(1, 2)  # T x T, as attention would have it
    y = v + layer.proj(weights @ v / (weights.sum(-1, keepdim=True) + 1e-8))
    close(layer(x), y + layer.mlp(layer.norm2(y)))
    close(layer.w @ layer.w.T, 4 * torch.eye(4))  # orthogonal rows of length sqrt(m)
    assert not layer.w.requires_grad


def test_t2ts_position_table_follows_the_image_size() -> None:
    small = t2t_vit("t2t_vit_7", num_classes=3, img_size=64)
    large = t2t_vit("t2t_vit_7", num_classes=3, img_size=96)
    table = small.pos_embed
    assert torch.equal(table, large.pos_embed[:, :17])  # a position's row is the same
    close(table[0, 3, :2], torch.tensor([math.sin(3), math.cos(3)]))
    state = {**small.state_dict(), "pos_embed": torch.full_like(table, 0.25)}
    assert load_strictly(large, state, "a test")
    close(large.pos_embed, torch.full_like(large.pos_embed, 0.25))


# ── RMT ───────────────────────────────────────────────────────────────────────────────────────


def rotated(x: Tensor, side: int) -> Tensor:
    """Pairs of channels of (N, heads, HW, d) as complex numbers, turned by their position."""
    half = x.shape[-1] // 2
    rate = torch.tensor([10000.0 ** -(i / (half - 1)) for i in range(half)])
    turn = torch.polar(torch.ones(side**2, half), torch.outer(torch.arange(side**2).float(), rate))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (half, 2))) * turn).flatten(-2)


@torch.no_grad()
def test_rmts_attention_decays_with_manhattan_distance() -> None:
    side, heads, dim = 4, 2, 8
    layer = ManhattanAttention(dim, heads, side, 4, along_axes=False)
    randomise(layer)
    x = torch.randn(2, side, side, dim)
    flat = x.flatten(1, 2)
    q, k, v = (heads_of(f(flat), heads) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    scores = rotated(q, side) @ rotated(k * (dim // heads) ** -0.5, side).transpose(-2, -1)
    place = torch.tensor(list(product(range(side), repeat=2)))
    distance = (place.unsqueeze(1) - place).abs().sum(-1)
    gamma = torch.tensor([1 - 2**-2.0, 1 - 2**-4.0]).view(2, 1, 1)  # 2 + 4 · head / heads
    y = ((scores + torch.log(gamma**distance)).softmax(-1) @ v).transpose(1, 2).flatten(2)
    wanted = layer.out_proj(y.view(x.shape) + layer.lepe(layer.v_proj(x)))
    close(layer(x), wanted)


@torch.no_grad()
def test_rmt_along_axes_is_two_attentions() -> None:
    side, heads, dim = 3, 2, 8
    layer = ManhattanAttention(dim, heads, side, 4, along_axes=True)
    randomise(layer)
    x = torch.randn(1, side, side, dim)
    q, k, v = layer.q_proj(x), layer.k_proj(x) * (dim // heads) ** -0.5, layer.v_proj(x)
    q, k = (rotated(heads_of(t.flatten(1, 2), heads), side) for t in (q, k))
    q, k, v = (t[0].view(heads, side, side, -1) for t in (q, k, heads_of(v.flatten(1, 2), heads)))
    distance = (torch.arange(side).unsqueeze(1) - torch.arange(side)).abs()
    gamma = torch.tensor([1 - 2**-2.0, 1 - 2**-4.0])
    out = torch.empty_like(v)
    for h in range(heads):
        decay = torch.log(gamma[h] ** distance)
        mixed = torch.stack(
            [(q[h, y] @ k[h, y].T + decay).softmax(-1) @ v[h, y] for y in range(side)]
        )
        for c in range(side):
            out[h, :, c] = (q[h, :, c] @ k[h, :, c].T + decay).softmax(-1) @ mixed[:, c]
    y = out.permute(1, 2, 0, 3).flatten(2).unsqueeze(0)
    close(layer(x), layer.out_proj(y + layer.lepe(layer.v_proj(x))))


# ── TransNeXt ─────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def test_transnext_attends_to_neighbours_and_to_a_pooled_map() -> None:
    side, heads, dim = 4, 2, 8
    layer = AggregatedAttention(dim, heads, _geometry(side, 2, 56))
    randomise(layer)
    x = torch.randn(1, side**2, dim)
    q = F.normalize(heads_of(layer.q(x), heads), dim=-1)[0]
    k, v = (heads_of(t, heads)[0] for t in layer.kv(x).chunk(2, dim=-1))
    pooled = F.gelu(layer.sr(x.transpose(1, 2).reshape(1, dim, side, side)))
    pooled = layer.norm(F.avg_pool2d(pooled, 2).flatten(2).transpose(1, 2))
    far_k, far_v = (heads_of(t, heads)[0] for t in layer.kv(pooled).chunk(2, dim=-1))
    k, far_k = F.normalize(k, dim=-1), F.normalize(far_k, dim=-1)
    out = torch.empty(heads, side**2, dim // heads)
    for h, (y, x0) in product(range(heads), product(range(side), repeat=2)):
        here = y * side + x0
        near = [
            (i, (y + dy) * side + x0 + dx)
            for i, (dy, dx) in enumerate(product((-1, 0, 1), repeat=2))
            if 0 <= y + dy < side and 0 <= x0 + dx < side
        ]
        slots, places = [i for i, _ in near], [j for _, j in near]
        scale = F.softplus(layer.temperature[h, 0, 0]) * math.log(len(near) + 4)
        query = (q[h, here] + layer.query_embedding[h, 0]) * scale
        close_scores = k[h, places] @ query + layer.relative_pos_bias_local[h, slots]
        far_place = torch.tensor(list(product((0.5, 2.5), repeat=2)))
        step = (torch.tensor([float(y), float(x0)]) - far_place) / 55 * 8
        log_step = step.sign() * torch.log2(step.abs() + 1) / math.log2(8)
        bias = layer.cpb_fc2(F.relu(layer.cpb_fc1(log_step)))[:, h]
        weights = torch.cat((close_scores, far_k[h] @ query + bias)).softmax(-1)
        learned = q[h, here] @ layer.learnable_tokens[h] + layer.learnable_bias[h, 0]
        local = (weights[: len(near)] + learned[slots]) @ v[h, places]
        out[h, here] = local + weights[len(near) :] @ far_v[h]
    wanted = layer.proj(out.transpose(0, 1).flatten(1)).unsqueeze(0)
    close(layer(x), wanted)


@torch.no_grad()
def test_transnexts_bias_is_computed_once_when_deployed() -> None:
    module = transnext("transnext_micro", num_classes=3, img_size=32).eval()
    make_testable(module, 1, 32)
    images = torch.randn(2, 3, 32, 32)
    wanted = module(images)
    deployed = timm.utils.reparameterize_model(module)
    assert not any("cpb" in name for name in deployed.state_dict())
    assert torch.equal(deployed(images), wanted)


# ── FcaFormer ─────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def test_fcaformer_sees_earlier_tokens_as_further_keys() -> None:
    side, heads, dim, earlier = 3, 2, 8, 5
    layer = CrossAttention(dim, heads, side, earlier)
    randomise(layer)
    x, before = torch.randn(1, 9, dim), torch.randn(1, earlier, dim)
    q, k, v = (
        t[0]
        for t in (heads_of(s, heads) for s in layer.qkv(torch.cat((x, before), 1)).chunk(3, -1))
    )
    out = torch.empty(heads, 9, dim // heads)
    for h, i in product(range(heads), range(9)):
        scores = k[h] @ q[h, i] * (dim // heads) ** -0.5
        for j in range(9):
            dy, dx = abs(i // 3 - j // 3), abs(i % 3 - j % 3)
            scores[j] += layer.attention_biases[h, dy * 3 + dx]
        scores[9:] += layer.earlier_biases[h, 0]
        out[h, i] = scores.softmax(-1) @ v[h]
    close(layer(x, before), layer.proj(out.transpose(0, 1).flatten(1)).unsqueeze(0))


def test_fcaformers_tables_follow_the_image_size() -> None:
    size = ((8, 8, 8, 8), (1, 1, 3, 2), (2, 2))
    small, large = FcaFormer(*size, 3, 128), FcaFormer(*size, 3, 256)
    state = {k: torch.full_like(v, 0.25) for k, v in small.state_dict().items()}
    resized = resize_fcaformer(state, large)
    assert {k: v.shape for k, v in resized.items()} == {
        k: v.shape for k, v in large.state_dict().items()
    }
    for name, tensor in resized.items():
        assert (tensor == 0.25).all() or not tensor.is_floating_point(), name


# ── L2ViT ─────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
@pytest.mark.parametrize("spread", [0.3, 6.0])  # the normaliser at its floor, and above it
def test_l2vits_linear_attention_is_the_quadratic_one(spread: float) -> None:
    layer = LinearAttention(8, 2)
    randomise(layer)
    x = torch.randn(2, 30, 8) * spread
    q, k, v = (heads_of(t, 2) for t in layer.qkv(x).chunk(3, dim=-1))
    weights = q.relu() @ k.relu().transpose(-2, -1)
    sums = weights.sum(-1, keepdim=True)
    assert (sums.max() > 100) == (spread > 1)
    y = weights / sums.clamp(min=100) @ v * layer.tau
    close(layer(x), layer.proj(y.transpose(1, 2).flatten(2)))


@torch.no_grad()
def test_l2vits_windows_attend_within_themselves_only() -> None:
    layer = WindowAttention(8, 2, 4, 2)
    x = torch.randn(2, 16, 8)
    q, k, v = (heads_of(t, 2) for t in layer.qkv(x).chunk(3, dim=-1))
    window = torch.tensor([(i // 8) * 2 + (i % 4) // 2 for i in range(16)])
    scores = (q @ k.transpose(-2, -1) / 2).masked_fill(window != window.unsqueeze(1), -math.inf)
    close(layer(x), layer.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
