"""What is special about the families that rest on plain products and convolutions."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploykit.backbones.checkpoint import load_strictly
from deploykit.backbones.families import nat as nat_family
from deploykit.backbones.families import raftmlp as raftmlp_family
from deploykit.backbones.families import spectformer as spectformer_family
from deploykit.backbones.families import sret as sret_family
from deploykit.backbones.families.crate import Crate, SparseCode
from deploykit.backbones.families.illama import CausalAttention, ILlama, rotary_tables, turned
from deploykit.backbones.families.lookupvit import LookupViT
from deploykit.backbones.registry import own_builder, plugin_failures
from deploykit.backbones.resolve import resolve
from deploykit.errors import UsageError

# GMACs counted on the official code at 224 pixels (attention's products are in it)
GMACS = {"crate_t": 2.16, "illama_t": 1.25, "raftmlp_s": 2.09, "sret_t": 1.11}


def on_meta(name: str, size: int | None = None) -> nn.Module:
    plugin_failures()  # imports the families
    variant, build = own_builder(name)
    with torch.device("meta"):
        return build(name, num_classes=1000, img_size=size or variant.input)


@pytest.mark.parametrize(("name", "gmacs"), GMACS.items())
def test_multiply_adds_are_those_of_the_official_code(name: str, gmacs: float) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    module = on_meta(name).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize("name", ["crate_t", "dinat_mini", "raftmlp_s", "sret_t"])
def test_an_odd_size_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="multiple of"):
        on_meta(name, 250)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("SReT-LT", "sret_lt"),
        ("iLLaMA-S", "illama_s"),
        ("DeepMAD-29M 288", "deepmad_29m_288"),
        ("DeepMAD R18", "deepmad_r18"),
        ("DiNAT-Tiny", "dinat_tiny"),
        ("SpectFormer-H-S", "spectformer_h_s"),
        ("RaftMLP-L", "raftmlp_l"),
        ("crate", "crate_t"),
        ("ConvViT", "convvit_b"),
    ],
)
def test_spellings(typed: str, name: str) -> None:
    assert resolve(typed).name == name


def test_a_neighbourhood_is_shifted_at_the_border_and_keeps_to_its_line() -> None:
    places, offsets = nat_family.neighbours(15, 2)
    assert places[0].tolist() == [0, 2, 4, 6, 8, 10, 12]  # even line, pushed to the right
    assert places[13].tolist() == [1, 3, 5, 7, 9, 11, 13]  # odd line, pushed to the left
    assert places[8].tolist() == [2, 4, 6, 8, 10, 12, 14]
    assert offsets[0].tolist() == [6, 7, 8, 9, 10, 11, 12]
    assert offsets[13].tolist() == [0, 1, 2, 3, 4, 5, 6]
    for position in range(15):
        itself = (places[position] == position).nonzero().item()
        assert offsets[position, int(itself)] == 6


@pytest.mark.parametrize(("side", "dilation"), [(8, 1), (14, 2), (7, 1)])
def test_neighbourhood_attention_is_attention_under_a_mask(side: int, dilation: int) -> None:
    """Against dense attention in which everything outside the window is masked."""
    torch.manual_seed(0)
    layer = nat_family.NeighborhoodAttention(8, 2, side, dilation)
    nn.init.normal_(layer.rpb)
    x = torch.randn(2, side, side, 8)
    q, k, v = layer.qkv(x.flatten(1, 2)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    where, offset = nat_family.neighbours(side, dilation)
    bias = torch.full((2, side, side, side, side), -torch.inf)
    for i in range(side):
        for j in range(side):
            for row, down in zip(where[i], offset[i], strict=True):
                bias[:, i, j, row, where[j]] = layer.rpb[:, down, offset[j]]
    scores = q @ k.transpose(-2, -1) / 4**0.5 + bias.reshape(2, side**2, side**2)
    wanted = layer.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(layer(x).flatten(1, 2), wanted, atol=1e-5)


def test_a_network_with_unpadded_windows_refuses_a_small_image() -> None:
    with pytest.raises(UsageError, match="at least 224"):
        on_meta("nat_mini", 192)


@pytest.mark.parametrize("side", [14, 7])
def test_a_spectral_gate_is_the_fourier_filter(side: int) -> None:
    torch.manual_seed(0)
    gate = spectformer_family.SpectralGating(3, side)
    nn.init.normal_(gate.complex_weight)
    x = torch.randn(2, side**2, 3)
    spectrum = torch.fft.rfft2(x.unflatten(1, (side, side)), dim=(1, 2), norm="ortho")
    spectrum = spectrum * torch.view_as_complex(gate.complex_weight)
    wanted = torch.fft.irfft2(spectrum, (side, side), dim=(1, 2), norm="ortho").flatten(1, 2)
    assert torch.allclose(gate(x), wanted, atol=1e-5)


def test_filters_of_another_size_and_a_training_head_are_dealt_with() -> None:
    _, build = own_builder("spectformer_ti")
    source = build("spectformer_ti", num_classes=5, img_size=64)
    target = build("spectformer_ti", num_classes=5, img_size=96)
    state = {**source.state_dict(), "aux_head.weight": torch.zeros(5, 256)}
    notes = load_strictly(target, state, "file")
    assert "converted" in notes[0]
    assert target.get_parameter("blocks.0.mixer.complex_weight").shape[:2] == (6, 4)


def test_rotary_positions_turn_pairs_as_complex_numbers_do() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    cosines, sines = rotary_tables(5, 8)
    rates = 1e4 ** (-torch.arange(0, 8, 2) / 8)
    unit = torch.polar(torch.ones(5, 4), torch.arange(5)[:, None] * rates)
    wanted = torch.view_as_real(torch.view_as_complex(x.reshape(5, 4, 2)) * unit).flatten(1)
    assert torch.allclose(x * cosines + turned(x) * sines, wanted, atol=1e-6)


def test_the_causal_mask_multiplies_and_rows_arent_normalised_again() -> None:
    torch.manual_seed(0)
    layer = CausalAttention(8, 2, 5)
    x = torch.randn(1, 5, 8)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    q, k = (t * layer.cosines + turned(t) * layer.sines for t in (q, k))
    weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
    wanted = torch.zeros(1, 2, 5, 4)
    for query in range(5):
        for key in range(query + 1):
            wanted[:, :, query] += weights[:, :, query, key, None] * v[:, :, key]
    assert torch.allclose(layer(x), layer.proj(wanted.transpose(1, 2).flatten(2)), atol=1e-6)


def test_the_last_token_is_the_class_token() -> None:
    torch.manual_seed(0)
    module = ILlama(16, 1, 2, 3, 32).eval()
    seen: list[Tensor] = []
    module.blocks.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module(torch.randn(2, 3, 32, 32))
    first = module.cls_token + module.pos_embed[:, -1:]
    assert torch.equal(seen[0][:, -1:], first.expand(2, -1, -1))


def test_a_sparse_code_is_one_step_of_ista() -> None:
    torch.manual_seed(0)
    layer = SparseCode(6)
    z = torch.randn(2, 3, 6)
    d, points = layer.weight.detach().double().numpy(), z.double().numpy()
    step = points @ d - points @ d.T @ d  # D^T z and D^T D z, for rows
    wanted = np.maximum(points + 0.1 * step - 0.1 * 0.1, 0)
    np.testing.assert_allclose(layer(z).detach().numpy(), wanted, atol=1e-5)
    layer.reparameterize()
    np.testing.assert_allclose(layer(z).detach().numpy(), wanted, atol=1e-5)
    assert len(list(layer.parameters())) == 2


def test_an_official_crate_checkpoint_of_another_size_loads() -> None:
    source, target = Crate(24, 2, 2, 5, 32), Crate(24, 2, 2, 5, 64)
    state = source.state_dict()
    assert "transformer.layers.1.0.fn.to_out.0.weight" in state
    assert "transformer.layers.0.1.fn.weight" in state and "mlp_head.1.weight" in state
    assert load_strictly(copy.deepcopy(source), state, "file") == []
    assert "converted" in load_strictly(target, state, "file")[0]
    assert torch.equal(target.pos_embedding[:, 0], source.pos_embedding[:, 0])


def test_official_names_of_nat_and_convvit() -> None:
    names = dict(on_meta("dinat_base").state_dict())
    assert names["levels.0.blocks.1.attn.rpb"].shape == (4, 13, 13)
    assert names["levels.2.downsample.reduction.weight"].shape == (1024, 512, 3, 3)
    assert {"patch_embed.proj.1.bias", "levels.3.blocks.4.gamma2", "norm.bias"} <= set(names)
    assert not any(part in name for name in names for part in ("keys", "places"))
    names = dict(on_meta("convvit_b").state_dict())
    assert names["blocks1.0.attn.weight"].shape == (256, 1, 5, 5)
    assert {"patch_embed4.weight", "blocks3.10.mlp.fc2.bias", "fc_norm.weight"} <= set(names)


def test_a_raft_mixes_half_of_the_channels_along_an_axis() -> None:
    """Written out with an index for each of raft, channel, row and column."""
    torch.manual_seed(0)
    for vertical in (True, False):
        layer = raftmlp_family.RaftMixing(4, 3, vertical=vertical)
        x = torch.randn(2, 3, 3, 4)
        y = layer.norm(x)
        wanted = x.clone()
        for other in range(3):
            for channel in range(2):
                line = y[:, :, other] if vertical else y[:, other]  # (N, side, C)
                raft = torch.cat([line[:, :, channel], line[:, :, 2 + channel]], dim=1)
                out = layer.mlp(raft)
                for group in range(2):
                    part = out[:, 3 * group : 3 * group + 3]
                    if vertical:
                        wanted[:, :, other, 2 * group + channel] += part
                    else:
                        wanted[:, other, :, 2 * group + channel] += part
        assert torch.allclose(layer(x), wanted, atol=1e-6)


def test_a_multi_scale_embedding_is_a_linear_layer_over_all_patches() -> None:
    torch.manual_seed(0)
    layer = raftmlp_family.MultiScaleEmbed(3, 5, 2, (2, 4))
    x = torch.randn(2, 3, 8, 8)
    patches = torch.cat(
        [
            nn.functional.unfold(x, 2, stride=2),
            nn.functional.unfold(x, 4, stride=2, padding=1),
        ],
        dim=1,
    )
    kernels = [scale.get_parameter("weight").flatten(1) for scale in layer.scales]
    wanted = torch.cat(kernels, 1) @ patches + layer.scales[0].get_parameter("bias")[:, None]
    assert torch.allclose(layer(x).flatten(1, 2).transpose(1, 2), wanted, atol=1e-5)


def test_a_recursion_uses_its_block_twice_and_answers_the_same_twice() -> None:
    torch.manual_seed(0)
    size = sret_family._Size(8, (2, 2, 2), 2.0, 1)
    order = torch.randperm(16)
    layer = sret_family.Recursion(8, 2, size, (4, 2), order).eval()
    x = torch.randn(1, 16, 8)
    assert torch.equal(layer(x), layer(x))
    once = layer.projections[0](layer.block(x, 4))
    again = torch.empty_like(once)
    again[:, order] = layer.block(once[:, order], 2)
    assert torch.allclose(layer(x), layer.projections[1](again), atol=1e-6)


def test_groups_of_tokens_dont_see_each_other() -> None:
    torch.manual_seed(0)
    layer = sret_family.GroupAttention(8, 2)
    x = torch.randn(1, 8, 8)
    parts = torch.cat([layer(x[:, :4], 1), layer(x[:, 4:], 1)], dim=1)
    assert torch.allclose(layer(x, 2), parts, atol=1e-6)


def test_one_checkpoint_serves_every_number_of_lookup_tokens() -> None:
    torch.manual_seed(0)
    few, many = LookupViT(16, 2, 2, 2, 4, 64).eval(), LookupViT(16, 2, 2, 3, 4, 64).eval()
    assert load_strictly(many, few.state_dict(), "file") == []
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(few(x), many(x))


def test_writing_back_reuses_the_scores_of_reading() -> None:
    torch.manual_seed(0)
    block = LookupViT(16, 1, 2, 2, 4, 64).blocks[0]
    lookup = block.get_submodule("lookup")
    compressed, image = torch.randn(1, 4, 16), torch.randn(1, 16, 16)
    _, scores = lookup.read(compressed, image)  # type: ignore[operator]
    assert scores.shape == (1, 2, 4, 16)
    written = lookup.write(compressed, scores)  # type: ignore[operator]
    assert written.shape == image.shape
    assert not any("back_q" in name or "back_k" in name for name, _ in block.named_parameters())
