"""Names of own families as people type them, and figures that papers count in their own way."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deploykit.backbones.registry import own_builder
from deploykit.backbones.resolve import resolve
from deploykit.errors import UsageError


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("PVT-Tiny", "pvt_v1_tiny"),
        ("pvt", "pvt_v1_small"),
        ("hornet-t", "hornet_tiny_7x7"),
        ("HorNet-S GF", "hornet_small_gf"),
        ("cswin_tiny", "cswin_t"),
        ("TransNeXt-T", "transnext_tiny"),
        ("PVT v1", "pvt_v1_small"),
        ("pvt-l", "pvt_v1_large"),
        ("rcvit_xs", "casvit_xs"),
        ("STViT-B", "stvit_b"),
        ("SViT-L", "stvit_l"),
        ("uniformer_small_plus", "uniformer_s_plus"),
        ("ElasticViT-L1.5", "elasticvit_l1.5"),
        ("tinymoat0", "tiny_moat_0"),
        ("DualToken-ViT-S", "dualtoken_vit_s"),
    ],
)
def test_spellings(typed: str, name: str) -> None:
    assert resolve(typed).name == name


def test_a_way_to_drop_tokens_is_no_backbone() -> None:
    with pytest.raises(UsageError, match="semantic tokens"):
        resolve("STViT-R")


def test_a_side_that_does_not_fit_names_those_that_do() -> None:
    with pytest.raises(UsageError, match="100: use 96 or 128"):
        own_builder("litv2_s")[1]("litv2_s", num_classes=10, img_size=100)


def test_stvit_counts_the_official_constants_apart() -> None:
    for name, official in (("stvit_s", 25.50), ("stvit_b", 51.70), ("stvit_l", 94.98)):
        with torch.device("meta"):
            net = own_builder(name)[1](name, num_classes=1000, img_size=224)
        blocks = sum(len(stage) for stage in net.layers)
        count = sum(p.numel() for p in net.parameters()) + 162 * blocks
        assert round(count / 1e6, 2) == official


@pytest.mark.parametrize(
    ("name", "published", "head", "tolerance"),
    [
        ("elasticvit_t1", 0.062, 3 * 272 * 6 * 272, 0.03),
        ("elasticvit_s1", 0.219, 8 * 272 * 6 * 272, 0.03),
        ("dualtoken_vit_t", 0.5, 0, 0.1),
        ("dualtoken_vit_s", 1.0, 0, 0.1),
    ],
)
def test_multiply_adds_are_near_the_papers(
    name: str, published: float, head: int, tolerance: float
) -> None:
    """ElasticViT's are published with the first layer of the head counted for one token."""
    variant, build = own_builder(name)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = build(name, num_classes=1000, img_size=variant.input).eval()
        net(torch.empty(1, 3, variant.input, variant.input))
    count = counter.get_total_flops() / 2 - head
    assert count / 1e9 == pytest.approx(published, rel=tolerance)
