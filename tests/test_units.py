"""Cutting graphs into units, and running them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.graph.capture import CapturedModel
from deploykit.graph.execute import Executor, Run
from deploykit.graph.units import Unit, activation_nodes, split_units
from deploykit.quant.plan import plan_layers
from tests.graphs import captured, images, shake, tiny_cnn, tiny_shvit, tiny_vit

SWIN = {
    "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2),
    "num_heads": (2, 4), "num_classes": 10,
}  # fmt: skip


def tiny_swin() -> nn.Module:
    return shake(timm.models.swin_transformer.SwinTransformer(**SWIN)).eval()


HOSTS = {
    "cnn": (tiny_cnn, 32),
    "vit": (tiny_vit, 32),
    "shvit": (tiny_shvit, 64),
    "swin": (tiny_swin, 32),
}


def host(name: str) -> tuple[CapturedModel, Tensor]:
    make, size = HOSTS[name]
    return captured(make(), size), images(3, size)


def units_of(model: CapturedModel) -> list[Unit]:
    return split_units(
        model.graph_module.graph, {p.node for p in plan_layers(model.graph_module, 4, 4)}
    )


@pytest.mark.parametrize("name", HOSTS)
def test_units_hold_every_operator_once_and_run_like_the_graph(name: str) -> None:
    model, x = host(name)
    units = units_of(model)
    together = [node for unit in units for node in unit.nodes]
    assert together == activation_nodes(model.graph_module.graph)
    planned = [name for unit in units for name in unit.layers]
    assert planned == [plan.node for plan in plan_layers(model.graph_module, 4, 4)]
    executor, value = Executor(model.graph_module), x
    executor.prepare(x)
    for unit, following in zip(units, [*units[1:], None], strict=True):
        value = executor.run(unit.nodes, unit.source, value, len(x))
        assert following is None or following.source is unit.output
    torch.testing.assert_close(value, model.graph_module(x), rtol=1e-5, atol=1e-6)


def test_a_transformer_block_is_one_unit() -> None:
    names = [unit.name for unit in units_of(captured(tiny_vit()))]
    assert names == ["patch_embed.proj", "blocks.0", "blocks.1", "head"]


def test_windowed_blocks_are_units_too() -> None:
    names = [unit.name for unit in units_of(captured(tiny_swin()))]
    assert [n for n in names if "blocks" in n] == [
        f"layers.{stage}.blocks.{block}" for stage in (0, 1) for block in (0, 1)
    ]


def test_running_part_of_a_graph_replaces_what_it_is_told_to() -> None:
    model, x = host("vit")
    executor = Executor(model.graph_module)
    executor.prepare(x)
    nodes = executor.activations
    (head,) = [node for node in nodes if node.name == "linear_8"]
    twice = executor.run(
        nodes,
        executor.image,
        x,
        len(x),
        {head.name: lambda n, a: 2 * n.target(*a)},  # type: ignore[operator]
    )
    torch.testing.assert_close(twice, 2 * model.graph_module(x), rtol=1e-5, atol=1e-6)


def test_a_run_stops_and_goes_on_or_begins_anew() -> None:
    model, x = host("vit")
    executor = Executor(model.graph_module)
    executor.prepare(x)
    nodes = executor.activations
    (head,) = [node for node in nodes if node.name == "linear_8"]
    run = Run(executor, nodes, executor.image, x, len(x))
    first = run.before(head, {})
    assert run.live_bytes >= first[0].nbytes
    torch.testing.assert_close(run.step({}), model.graph_module(x), rtol=1e-5, atol=1e-6)
    run.rewind()
    assert run.live_bytes == 0
    again = run.before(head, {})
    assert torch.equal(again[0], first[0])
    doubled = run.finish({head.name: lambda n, a: 2 * n.target(*a)})  # type: ignore[operator]
    torch.testing.assert_close(doubled, 2 * model.graph_module(x), rtol=1e-5, atol=1e-6)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y += 1
        torch.relu_(y)
        return (self.second(y) + y).mean((2, 3))


def test_operators_that_write_into_their_input_are_replaced() -> None:
    module = shake(InPlace()).eval()
    model, x = captured(module), images()
    targets = [n.target for n in model.graph_module.graph.nodes if n.op == "call_function"]
    assert not any(t._schema.is_mutable for t in targets if hasattr(t, "_schema"))
    torch.testing.assert_close(model.graph_module(x), module(x))


class FillsASlice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0].fill_(1.0)
        z = x + 1
        rows = z.flatten(1)
        torch.relu_(z)
        return y.mean((2, 3)) + rows[:, :3]


def test_writes_seen_through_another_name_are_not_lost() -> None:
    module, x = FillsASlice(), images()
    torch.testing.assert_close(captured(module).graph_module(x), module(x.clone()))
