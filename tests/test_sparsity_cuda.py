"""cuSPARSELt's rules and refusals. Without a GPU its kernels aren't run; the last test does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

from deploykit.errors import TargetMissingError, UsageError
from deploykit.prune.masks import keep_n_of_m
from deploykit.prune.sparse_cuda import sparse_cuda_misfit, to_sparse_cuda


def network(*, sparse: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 64), nn.Linear(64, 10))
    if sparse:
        for layer in (net[0], net[2], net[3]):
            layer.weight.data *= keep_n_of_m(layer.weight.data.abs(), 2, 4)  # leaves minus zeros
    return net.eval()


def test_shapes_and_zeros_that_fit() -> None:
    net = network()
    assert [sparse_cuda_misfit(net[i].weight) for i in (0, 2)] == ["", ""]
    assert sparse_cuda_misfit(net[3].weight).startswith("64 inputs, 10 outputs: both must")
    assert sparse_cuda_misfit(torch.ones(16, 16)) == "its weight isn't 2:4 sparse"
    assert sparse_cuda_misfit(torch.ones(16, 16, 1, 1)) == "its weight has 4 axes"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_rule_is_torch_s_own(dtype: torch.dtype) -> None:
    rule: Any = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS[dtype]
    for side in (rule.sparse_min_rows, rule.sparse_min_cols):
        assert side == 16


def test_refusals_come_in_order_and_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="float16 and bfloat16, not"):
        to_sparse_cuda(network(), torch.float32)
    with pytest.raises(UsageError, match="0: its weight isn't 2:4 sparse"):
        to_sparse_cuda(network(sparse=False))
    with pytest.raises(UsageError, match="no linear layers"):
        to_sparse_cuda(nn.ReLU())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TargetMissingError, match="need an NVIDIA GPU, and torch sees none"):
        to_sparse_cuda(network())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(TargetMissingError, match=r"need compute capability 8\.0, this GPU has 7"):
        to_sparse_cuda(network())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_outputs_agree() -> None:
    net, x = network(), torch.randn(32, 64)
    found, record = to_sparse_cuda(net)
    assert record.details["layers"] == ["0", "2"]
    with torch.no_grad():
        output = found(x.to("cuda", torch.float16)).float().cpu()
        assert torch.allclose(output, net(x), atol=2e-2)
