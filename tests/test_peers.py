"""The parts of the peer benchmark that need no clone of a peer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peer_adalog import deviations, gram_weight_errors
from benchmarks.peer_common import accept_masks, attentions
from benchmarks.peers import markdown
from tests.graphs import tiny_vit


def test_gram_errors_are_the_errors_less_a_constant() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator)
    weight, bias = torch.randn(5, 12, generator=generator), torch.randn(5, generator=generator)
    wanted = F.linear(x + 0.1 * torch.randn(200, 12, generator=generator), weight, bias)
    scale = 0.1 + 0.3 * torch.rand(9, 5, 1, generator=generator)
    zero_point = torch.randint(5, 11, (9, 5, 1), generator=generator).float()
    direct = []
    for s, z in zip(scale, zero_point, strict=True):
        rounded = (torch.clamp(torch.round(weight / s) + z, 0, 15) - z) * s
        direct.append((wanted - F.linear(x, rounded, bias)).square().sum(0))
    residual = wanted - F.linear(x, weight, bias)
    got = gram_weight_errors(x, weight, residual, scale, zero_point, 16)
    assert torch.allclose(got + residual.square().sum(0), torch.stack(direct), rtol=1e-4)


def test_an_old_attention_takes_no_mask_but_no_mask_is_fine() -> None:
    attention = attentions(tiny_vit())[0]
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    before = attention(x)
    accept_masks(attention)
    assert torch.equal(attention(x, attn_mask=None, is_causal=False), before)
    with pytest.raises(ValueError, match="masks"):
        attention(x, attn_mask=torch.zeros(3, 3))


def test_deviations_are_named() -> None:
    assert deviations(gram=False, token_stride=1) == []
    assert "DEVIATION" in deviations(gram=True, token_stride=16)[1]


def test_simulations_and_files_are_told_apart() -> None:
    row = {
        "variant": "w4a4", "simulation": True, "calibration": "32 images", "top1": 50.0,
        "drop": 35.4, "drop_low": 32.0, "drop_high": 38.0, "top1_original": 85.4, "images": 1000,
        "calibration_seconds": 61.0, "peak_rss_bytes": 2**30,
    }  # fmt: skip
    machine = {"cpu": "a CPU", "packages": {"torch": "2.13", "onnxruntime": "1.31"}}
    entry = {"commit": "0123456789ab", "threads": 2, "environment": machine}
    text = markdown(
        {
            "repq": entry | {"rows": [row]},
            "onnxruntime": entry | {"commit": None, "rows": [row | {"simulation": False}]},
        }
    )
    assert "| RepQ-ViT | w4a4 | simulation | 50.00 % | 35.40 (32.00 … 38.00) | 61 s |" in text
    assert "| ONNX Runtime static, W8A8 | w4a4 | file |" in text
    assert "commit 0123456789" in text
