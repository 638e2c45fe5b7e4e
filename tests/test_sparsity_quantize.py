"""Quantising a 2:4 sparse model keeps its zeros, whatever changes weights on the way."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from deploykit.graph.capture import CapturedModel
from deploykit.graph.edit import constant
from deploykit.graph.two_four import is_two_of_four
from deploykit.prune.sparsity import SparsityOptions, sparsify
from deploykit.quant.options import QuantizeOptions
from deploykit.quant.quantize import quantize
from deploykit.quant.reconstruction.rounding import AdaRoundWeight
from deploykit.quant.rounding.closed_form import gptq_codes
from deploykit.quant.weights import quantize_weight
from tests.graphs import batches, captured, nodes_of, tiny_cnn, tiny_vit

NETWORKS = {"vit": (tiny_vit, "2:4", 8), "cnn": (tiny_cnn, "2:4", 1)}

WAYS: dict[str, dict[str, Any]] = {
    "nearest": {"rounding": "nearest", "bias_correction": False},
    "gptq": {"rounding": "gptq"},
    "erq": {"rounding": "erq"},
    "smooth": {"rounding": "erq", "norm_fold": "smooth"},
    "repq": {"rounding": "gptq", "norm_fold": "repq"},
    "reconstruction": {"reconstruction": "plain", "reconstruction_iterations": 20},
    "relu": {"relu_mlp": True, "rounding": "nearest"},
}


@cache
def sparse(network: str) -> CapturedModel:
    make, pattern, _ = NETWORKS[network]
    options = SparsityOptions(pattern, "sparsegpt", bias_correction=True)
    return sparsify(captured(make()), options, batches())[0]


def codes_of(model: Any) -> list[Tensor]:
    """Codes of weights, as the graph stores them."""
    dequantize = nodes_of(model.graph_module, torch.ops.deploykit.dequantize.default)
    found = [constant(model.graph_module, node.args[0]) for node in dequantize]
    return [codes for codes in found if codes is not None and codes.ndim > 1]


CASES = [
    (network, way, bits)
    for network in NETWORKS
    for way in WAYS
    for bits in (8, 4)
    if network == "vit" or way in ("nearest", "gptq", "erq", "reconstruction")
]


@pytest.mark.parametrize(("network", "way", "bits"), CASES)
def test_no_zero_is_filled_up(network: str, way: str, bits: int) -> None:
    made = quantize(sparse(network), QuantizeOptions(bits, bits, **WAYS[way]), batches())
    packed = [any(is_two_of_four(part, axis) for axis in (0, 1)) for part in codes_of(made)]
    assert sum(packed) == NETWORKS[network][2]


def test_a_dense_model_s_codes_are_dense() -> None:
    made = quantize(captured(tiny_vit()), QuantizeOptions(4, 4), batches())
    assert not any(is_two_of_four(part, axis) for part in codes_of(made) for axis in (0, 1))


def test_feedback_makes_up_for_kept_zeros() -> None:
    """GPTQ with a mask does better than GPTQ and the mask after it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    weight = torch.randn(1, 8, 16, generator=generator)
    keep = torch.rand(weight.shape, generator=generator) > 0.5
    covariance, scale = (x.t() @ x / 400)[None], torch.full((1, 8), 0.1)

    def error(codes: Tensor) -> float:
        return float((x @ (codes[0] * 0.1 - weight[0]).t()).square().mean())

    masked = gptq_codes(weight, scale, 8, covariance, keep=keep)
    assert not masked[~keep].any()
    assert error(masked) < 0.9 * error(gptq_codes(weight, scale, 8, covariance) * keep)
    everything = torch.ones_like(keep)
    plain = gptq_codes(weight, scale, 8, covariance)
    assert torch.equal(gptq_codes(weight, scale, 8, covariance, keep=everything), plain)


def test_learnt_rounding_starts_and_ends_with_the_zeros() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    weight[:, ::3] = 0
    learnt = AdaRoundWeight(weight, quantize_weight(weight, 4))
    with torch.no_grad():
        learnt.logits.fill_(5.0)  # everything up
    assert not learnt()[:, ::3].any() and not learnt.harden().codes[:, ::3].any()
    assert learnt.harden().codes[:, 1::3].any()
    learnt.penalty(2.0).backward()
    assert learnt.logits.grad is not None and not learnt.logits.grad[:, ::3].any()
