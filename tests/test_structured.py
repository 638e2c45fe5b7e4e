"""Structured pruning of tiny networks: what goes, what stays, and that both are right."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.errors import UsageError
from deploykit.export.onnx import onnx_bytes
from deploykit.export.structure import load_model, model_bytes
from deploykit.graph.capture import capture
from deploykit.graph.macs import count_macs
from deploykit.prune.importance import IMPORTANCES
from deploykit.prune.structured import StructureOptions, prune_structure
from deploykit.prune.structured_convert import slim_copy
from deploykit.prune.structured_groups import KINDS, Group, remove_units
from deploykit.prune.structured_kinds import ATTENTION_KINDS
from deploykit.prune.structured_slim import SlimAttention
from deploykit.prune.structured_trial import reliable_groups, silence
from deploykit.types import PassRecord
from tests.graphs import SIZE, batches, images, make_backbone, shake, tiny_cnn, tiny_vit
from tests.structured_models import FAMILIES, groups_of, tiny_distilled, tiny_swin

ALL = tuple(KINDS)
PLAIN = StructureOptions(importance="magnitude", fairness="layer", round_to=4)


def prune(module: nn.Module, size: int = SIZE, **options: Any) -> tuple[nn.Module, PassRecord]:
    backbone, record = prune_structure(
        make_backbone(module, size), replace(PLAIN, **options), batches(size)
    )
    return backbone.module, record


@torch.no_grad()
def answers(module: nn.Module, size: int = SIZE) -> Tensor:
    return module(images(size=size))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_shrinks_by_what_was_asked_and_ships(family: str, tmp_path: Path) -> None:
    make, size = FAMILIES[family]
    module = make()
    before = count_macs(slim_copy(module, torch.zeros(1, 3, size, size))[0], size)
    backbone, record = prune_structure(
        make_backbone(module, size), replace(PLAIN, scope=ALL, ratio=0.3), batches(size)
    )
    after = count_macs(backbone.module, size)
    assert record.details["macs"] == [before, after]
    assert 0.29 <= 1 - after / before <= 0.45
    # Exact, but where an axis holds part of a group's units (SHViT's attended channels): how
    # many of that part go is known only once they are chosen.
    rel = 0.02 if family == "shvit" else 1e-9
    assert record.details["cost"] == pytest.approx([before, after], rel=rel)
    parameters = sum(p.numel() for p in backbone.module.parameters())
    assert record.details["parameters"][1] == parameters < record.details["parameters"][0]

    captured = capture(backbone)
    assert captured.dynamic_batch
    structure, tensors = model_bytes(
        captured.graph_module, backbone, precision="fp32", dynamic_batch=True
    )
    (tmp_path / "structure.json").write_bytes(structure)
    (tmp_path / "model.safetensors").write_bytes(tensors)
    with torch.no_grad():
        expected = backbone.module(images(5, size))
        assert torch.allclose(captured.graph_module(images(5, size)), expected, atol=1e-4)
        loaded = load_model(tmp_path)
        assert torch.allclose(loaded.graph_module(images(5, size)), expected, atol=1e-4)


def test_a_pruned_network_is_an_onnx_file_of_any_batch() -> None:
    make, size = FAMILIES["swin"]
    backbone, _ = prune_structure(
        make_backbone(make(), size), replace(PLAIN, scope=ALL), batches(size)
    )
    captured = capture(backbone)
    data = onnx_bytes(captured.graph_module, backbone, dynamic_batch=captured.dynamic_batch)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        x = images(count, size)
        (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(result), backbone.module(x), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_units_that_nothing_reads_go_without_a_trace(family: str) -> None:
    """Every group: a third of its units silenced, or taken away; both networks answer alike."""
    make, size = FAMILIES[family]
    slim, groups = groups_of(make(), size)
    inner = [g for g in groups if g.kind != "embedding" and g.units > 1]
    assert inner
    generator = torch.Generator().manual_seed(3)
    gone = {g.key: torch.randperm(g.units, generator=generator) < (g.units + 2) // 3 for g in inner}
    kept = {key: ~mask for key, mask in gone.items()}
    silence(inner, kept)
    expected = answers(slim, size)
    remove_units(inner, kept)
    assert torch.allclose(answers(slim, size), expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_slim_attention_answers_as_the_original(family: str) -> None:
    make, size = FAMILIES[family]
    module = make()
    slim, _ = groups_of(module, size)
    assert torch.allclose(answers(slim, size), answers(module, size), atol=1e-4)


@pytest.mark.parametrize("kind", sorted(ATTENTION_KINDS))
def test_every_kind_of_attention_is_known_by_a_family(kind: str) -> None:
    maker = ATTENTION_KINDS[kind]
    modules = [part for make, _ in FAMILIES.values() for part in make().modules()]
    assert any(maker(part) is not None for part in modules)


def test_dead_channels_go_first_and_nothing_changes() -> None:
    module = tiny_vit()
    dead = torch.arange(128) % 4 == 1
    for block in module.blocks:
        with torch.no_grad():
            block.mlp.fc1.weight[dead] = 0
            block.mlp.fc1.bias[dead] = 0
            block.mlp.fc2.weight[:, dead] = 0
    expected = answers(module)
    all_macs = count_macs(slim_copy(module, torch.zeros(1, 3, SIZE, SIZE))[0], SIZE)
    dead_macs = 2 * 17 * 2 * 32 * int(dead.sum())  # blocks, tokens, layers, width, channels
    pruned, record = prune(module, scope=("mlp",), ratio=dead_macs / all_macs - 1e-6)
    assert record.details["widths"] == {f"blocks.{i}.mlp.fc1:mlp": [128, 96] for i in (1, 0)}
    assert torch.allclose(answers(pruned), expected, atol=1e-5)
    kept = pruned.blocks[0].mlp.fc1.weight
    assert torch.equal(kept, module.blocks[0].mlp.fc1.weight[~dead])


@pytest.mark.parametrize("importance", sorted(IMPORTANCES))
def test_every_importance_finds_the_dead_head(importance: str) -> None:
    module = tiny_vit()
    for block in module.blocks:
        with torch.no_grad():
            block.attn.proj.weight[:, :16] = 0  # head 0 of 2
            block.attn.qkv.weight.view(3, 2, 16, 32)[:, 0] = 0
            block.attn.qkv.bias.view(3, 2, 16)[:, 0] = 0
    expected = answers(module)
    pruned, record = prune(module, scope=("heads",), ratio=0.1, importance=importance)
    assert set(map(tuple, record.details["widths"].values())) == {(2, 1)}
    assert torch.allclose(answers(pruned), expected, atol=1e-5)
    assert pruned.blocks[0].attn.qkv.out_features == 48, "a head went whole"


def test_query_and_value_widths_are_independent_and_the_scale_stays() -> None:
    pruned, record = prune(tiny_vit(), scope=("qk", "v"), ratio=0.05)
    attention = pruned.blocks[0].attn
    assert isinstance(attention, SlimAttention)
    assert attention.scale == 16**-0.5
    assert attention.heads == 2
    widths = record.details["widths"]
    assert attention.qk == widths["blocks.0.attn:qk"][1]
    assert attention.v == widths["blocks.0.attn:v"][1]
    assert attention.qkv.out_features == 2 * (2 * attention.qk + attention.v)


def test_position_tables_lose_the_columns_of_heads_that_go() -> None:
    pruned, _ = prune(tiny_swin(), scope=("heads",), ratio=0.05)
    attentions = [m for m in pruned.modules() if isinstance(m, SlimAttention)]
    assert sum(a.heads for a in attentions) < 12
    for attention in attentions:
        assert attention.table is not None
        assert attention.table.shape == (attention.heads, 49)


def test_both_heads_of_a_distilled_network_and_its_scales_follow_the_width() -> None:
    pruned, _ = prune(tiny_distilled(), scope=("embedding",), ratio=0.2)
    width = pruned.head.in_features
    assert width < 32
    assert pruned.head_dist.in_features == width
    assert pruned.head.out_features == pruned.head_dist.out_features == 10
    assert pruned.blocks[0].ls1.gamma.shape == (width,)
    assert pruned.pos_embed.shape[-1] == pruned.cls_token.shape[-1] == width


def test_widths_are_rounded_and_no_layer_loses_more_than_the_limit() -> None:
    _, record = prune(tiny_vit(), scope=ALL, ratio=0.4, round_to=8, layer_limit=0.5)
    for name, (before, after) in record.details["widths"].items():
        assert after >= before / 2
        assert name.endswith(":heads") or after % 8 == 0


def test_fairness_by_layer_spreads_what_the_scale_of_one_layer_would_attract() -> None:
    module = tiny_vit()
    with torch.no_grad():
        module.blocks[0].mlp.fc1.weight *= 0.1
        module.blocks[0].mlp.fc2.weight *= 0.1
    widths = {}
    for fairness in ("none", "layer"):
        _, record = prune(module, scope=("mlp",), ratio=0.15, fairness=fairness)
        widths[fairness] = [record.details["widths"][f"blocks.{i}.mlp.fc1:mlp"][1] for i in (0, 1)]
    assert widths["none"][1] == 128, "all is taken from the small one"
    assert abs(widths["layer"][0] - widths["layer"][1]) <= 16


@pytest.mark.parametrize("importance", sorted(IMPORTANCES))
def test_the_same_seed_gives_the_same_network(importance: str) -> None:
    first, _ = prune(tiny_cnn(), importance=importance)
    second, _ = prune(tiny_cnn(), importance=importance)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_the_original_is_left_alone() -> None:
    module = tiny_vit()
    expected = answers(module)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    prune(module, importance="hessian")
    assert torch.equal(answers(module), expected)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert not any(p.requires_grad for p in module.parameters())


def test_parameters_are_a_budget_too() -> None:
    module = tiny_vit()
    _, record = prune(module, budget="parameters", ratio=0.25, scope=("mlp",))
    before, after = record.details["parameters"]
    assert record.details["cost"] == [before, after]
    assert 0.25 <= 1 - after / before < 0.3


def test_the_block_that_does_least_goes() -> None:
    module = tiny_vit()
    with torch.no_grad():
        module.blocks[1].attn.proj.weight.zero_()
        module.blocks[1].attn.proj.bias.zero_()
        module.blocks[1].mlp.fc2.weight.zero_()
        module.blocks[1].mlp.fc2.bias.zero_()
    expected = answers(module)
    pruned, record = prune(module, ratio=None, blocks=1)
    assert list(record.details["blocks_removed"]) == ["blocks.1"]
    assert record.details["blocks_removed"]["blocks.1"] == pytest.approx(0, abs=1e-6)
    assert torch.allclose(answers(pruned), expected, atol=1e-5)
    assert record.details["macs"][1] < 0.6 * record.details["macs"][0]


def test_a_group_whose_indices_are_wrong_is_declined() -> None:
    slim, groups = groups_of(tiny_vit(), SIZE)
    good = next(g for g in groups if g.kind == "mlp")
    shifted = [
        replace(part, position=(part.position + 1) % 128) if part.produces else part
        for part in good.slices
    ]
    short = [replace(good.slices[0])]
    bad = [
        Group("shifted", "mlp", good.units, tuple(shifted)),
        Group("short", "mlp", good.units, tuple(short)),
    ]
    kept, declined = reliable_groups(slim, [good, *bad], torch.zeros(1, 3, SIZE, SIZE), 8)
    assert [g.name for g in kept] == [good.name]
    assert "answers otherwise" in declined["shifted:mlp"]
    assert "doesn't run" in declined["short:mlp"]


class _Strange(nn.Module):
    """Attention of no known layout: values first, and no softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.num_heads = 2
        self.proj = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        v, q, k = self.qkv(x).chunk(3, dim=-1)
        return self.proj((q @ k.transpose(1, 2)).sigmoid() @ v)


class _StrangeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 8, 8)
        self.attn = _Strange()
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.attn(x)
        return self.head((x + self.mlp(x)).mean(1))


def test_attention_that_is_not_known_is_left_whole_and_said() -> None:
    scope = ("mlp", "heads", "qk", "v")
    pruned, record = prune(shake(_StrangeNet()), ratio=0.1, scope=scope)
    assert pruned.attn.qkv.out_features == 96
    assert pruned.mlp[0].out_features < 64
    assert "layout" in record.details["declined"]["attn"]


class _StrangeBlock(_Strange):
    """A whole block that is its own attention, as CSWin's is."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = timm.layers.Mlp(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + super().forward(x)
        return x + self.mlp(x)


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 8, 8)
        self.block = _StrangeBlock()
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def test_the_mlp_of_a_block_that_is_its_own_attention_goes() -> None:
    pruned, _ = prune(shake(_Blocks()), ratio=0.1, scope=("mlp",))
    assert pruned.block.qkv.out_features == 96
    assert pruned.block.mlp.fc1.out_features < 64


def test_why_nothing_can_go_is_said() -> None:
    with pytest.raises(UsageError, match="block: _StrangeBlock is no attention whose layout"):
        prune(shake(_Blocks()), ratio=0.1, scope=("heads",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "above 0"),
        ({"ratio": 0.99}, "to 0.95, got 0.99"),
        ({"ratio": None}, "a ratio or a number of blocks"),
        ({"scope": ("widths",)}, "wanted some of mlp"),
        ({"scope": ()}, "got none"),
        ({"importance": "luck"}, "there are dimap"),
        ({"budget": "joules"}, "budget: wanted one of macs"),
        ({"budget": "latency"}, "no target is there"),
        ({"layer_limit": 1.5}, "layer_limit"),
        ({"round_to": 0}, "round_to"),
        ({"scope": ("conv",)}, "nothing in the scope (conv)"),
        ({"ratio": 0.9, "scope": ("qk",)}, "wanted 90% of the multiply-adds to go; qk reaches"),
        ({"ratio": None, "blocks": 2}, "a network of 2 residual blocks"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        prune(tiny_vit(), **options)
    assert "\n" not in str(caught.value)
