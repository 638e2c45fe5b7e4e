"""Merging inside MLPs only: any layout survives."""

from __future__ import annotations

from dataclasses import replace

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.errors import UsageError
from deploykit.export.onnx import onnx_bytes
from deploykit.graph.edit import add_tensor
from deploykit.prune.merge_emit import Emitter
from deploykit.prune.merge_match import match, merge, unmerge
from deploykit.prune.merge_options import MergeOptions
from deploykit.prune.merge_scorers import Halves, TokenView, tome
from deploykit.prune.merge_tokens import merge_tokens
from deploykit.prune.tokens_shapes import ShapeRunner
from tests.graphs import captured, images, shake, tiny_cnn

LOCAL = MergeOptions(place="local", least_tokens=0, schedule="fast", ratio=0.4)


def swin() -> nn.Module:
    """Windows of 4 x 4 tokens, shifted in the second block; 64 tokens in all."""
    return shake(
        timm.models.SwinTransformer(
            img_size=32, patch_size=4, embed_dim=32, depths=(2,), num_heads=(2,), window_size=4,
            num_classes=10, mlp_ratio=8.0,
        )
    )  # fmt: skip


def block_of(x: Tensor, norm: nn.Module, mlp: nn.Module, r: int) -> Tensor:
    """x + MLP, image by image: r even tokens get the MLP of what they merged into."""
    results = []
    for image in x:
        unit = image / image.norm(dim=-1, keepdim=True)
        scores = unit[0::2] @ unit[1::2].T
        score, best = scores.max(1)
        goes = score.argsort(descending=True)[:r]
        into = {2 * int(i): 2 * int(best[i]) + 1 for i in goes}
        merged = image.clone()
        for target in set(into.values()):
            group = [target, *(i for i, to in into.items() if to == target)]
            merged[target] = image[group].mean(0)
        result = mlp(norm(merged))
        for i, target in into.items():
            result[i] = result[target]
        results.append(image + result)
    return torch.stack(results)


def test_a_windowed_model_merges_in_its_mlps() -> None:
    net = swin().eval()
    source, x = captured(net), images(3)
    merged, record = merge_tokens(source, replace(LOCAL, schedule="constant", r=20))
    assert list(record.details["tokens"].values()) == [[64, 44]] * 2
    assert record.details["macs_after"] < record.details["macs_before"]
    with torch.no_grad():
        tokens = net.patch_embed(x)
        for block in net.layers[0].blocks:
            tokens = tokens + block._attn(block.norm1(tokens))
            flat = tokens.reshape(3, 64, 32)
            tokens = block_of(flat, block.norm2, block.mlp, 20).reshape(tokens.shape)
        wanted = net.head(net.norm(tokens))
    torch.testing.assert_close(merged.graph_module(x), wanted, atol=2e-5, rtol=1e-4)
    data = onnx_bytes(merged.graph_module, merged.backbone)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        (logits,) = session.run(None, {"image": x[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), wanted[:count], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("protected", "count"), [(0, 9), (0, 10), (1, 10), (1, 9), (2, 9), (5, 14)]
)
def test_unmerge_puts_every_token_where_it_was(protected: int, count: int) -> None:
    """Tokens in equal pairs lose nothing: merged and unmerged they are as before."""
    source = captured(tiny_cnn())
    graph_module = source.graph_module
    rows = torch.randn(1, count, 8, generator=torch.Generator().manual_seed(count))
    halves = Halves(protected, count)
    a, b = rows[:, halves.first_a :: 2], rows[:, halves.first_b :: 2]
    a[:, :2] = b[:, :2]
    first = next(iter(graph_module.graph.nodes))
    x = add_tensor(graph_module, "rows", rows, first)
    runner = ShapeRunner(graph_module)
    values = runner.all(source.example)
    emit = Emitter(runner, values, source.example, first, "test")
    found = match(emit, TokenView(x, None, None), halves, 2, tome)
    merged, sizes = merge(emit, found, x, None)
    back = unmerge(emit, found, merged)
    assert emit.shape(merged) == (1, count - 2, 8)
    results: dict[torch.fx.Node, Tensor] = {}
    for node in graph_module.graph.nodes:
        if node is first:
            break
        results[node] = _run(graph_module, node, results)
    torch.testing.assert_close(results[back], rows)
    assert float(results[sizes].sum()) == count
    assert torch.equal(results[merged][:, :protected], rows[:, :protected])


def _run(graph_module, node, results):  # type: ignore[no-untyped-def]
    if node.op == "get_attr":
        return getattr(graph_module, node.target)
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), results.__getitem__)
    return node.target(*args, **kwargs)


def test_what_cannot_pay_is_refused_with_numbers() -> None:
    with pytest.raises(UsageError, match="64 tokens, under 65"):
        merge_tokens(captured(swin()), replace(LOCAL, least_tokens=65))
    with pytest.raises(UsageError, match=r"merging 1 of 64 tokens costs \d+ more MACs"):
        merge_tokens(captured(swin()), replace(LOCAL, schedule="constant", r=1))
    with pytest.raises(UsageError, match="no MLP"):
        merge_tokens(captured(tiny_cnn()), LOCAL)
