"""SG-Former, Res-VMamba, Meta-SpikeFormer and polyphase anchoring: what is special about them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.declined import PAGE, PROBES, RESULTS
from benchmarks.declined_page import page
from deploykit._compat import timm
from deploykit.backbones.declined import DECLINED, Declined, why_not_here
from deploykit.backbones.families.meta_spikeformer import MetaSpikeFormer, SpikeAttention, spikes
from deploykit.backbones.families.res_vmamba import ResidualStage
from deploykit.backbones.families.sgformer import (
    GuidedAttention,
    HybridAttention,
    SGFormer,
    grouped_order,
)
from deploykit.backbones.families.sgformer import _Size as GuidedSize
from deploykit.backbones.families.vmamba import VMamba
from deploykit.backbones.families.vmamba import _Size as ScanSize
from deploykit.backbones.inserting import with_inserted
from deploykit.backbones.inserts.polyphase import anchor, shift
from deploykit.backbones.inserts.registry import insert_layers
from deploykit.backbones.registry import specs, squash
from deploykit.backbones.resolve import resolve
from deploykit.backbones.untrained import make_testable
from deploykit.errors import UsageError
from deploykit.export.onnx import onnx_bytes
from deploykit.export.parity import compare, make_reference
from deploykit.graph.capture import capture
from deploykit.graph.edit import makes_choices
from deploykit.graph.signal import sqnr_db
from deploykit.recipe import ModelSection
from deploykit.runtimes import import_onnxruntime
from deploykit.types import Backbone, Preprocessing, WeightsOrigin
from tests.factories import make_artifact

CLASSES = 5
SIDES = {"sgformer": 224, "res_vmamba": 32, "meta_spikeformer": 32, "polyphase": 64}


def twins() -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = timm.models.twins.Twins(
        img_size=64,
        num_classes=CLASSES,
        embed_dims=(8, 8, 16, 16),
        num_heads=(1, 1, 2, 2),
        depths=(2, 2, 2, 2),
        wss=(4, 4, 2, 2),
    ).eval()
    make_testable(module, 0, 64)
    return module


def anchored_twins() -> nn.Module:
    module = twins()
    assert insert_layers(module, "polyphase", "twins") == 4 + 4 + 4 + 3
    return module


TINY: dict[str, Callable[[], nn.Module]] = {
    "sgformer": lambda: SGFormer(GuidedSize(8, (2, 2, 2, 1), (2, 2, 2, 2)), CLASSES, 224),
    "res_vmamba": lambda: VMamba(ScanSize(8, (1, 1, 1, 1), 2), CLASSES, ResidualStage),
    "meta_spikeformer": lambda: MetaSpikeFormer((16, 16, 16, 16), CLASSES, depths=(1, 1), steps=2),
    "polyphase": anchored_twins,
}


def tiny(name: str) -> tuple[Backbone, Tensor]:
    """The backbone, and three images for it."""
    side = SIDES[name]
    torch.manual_seed(0)
    module = TINY[name]()
    make_testable(module, 1, side)
    backbone = Backbone(
        name=name,
        module=module.eval().requires_grad_(False),
        preprocessing=Preprocessing(size=side, mean=(0.5,) * 3, std=(0.25,) * 3),
        weights=WeightsOrigin(kind="random", source="a test"),
        num_classes=CLASSES,
    )
    return backbone, torch.randn(3, 3, side, side)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_the_file_computes_what_the_graph_computes(name: str) -> None:
    backbone, images = tiny(name)
    model = capture(backbone)
    with torch.no_grad():
        wanted = backbone.module(images)
    onnxruntime = import_onnxruntime()
    session = onnxruntime.InferenceSession(
        onnx_bytes(model.graph_module, backbone), providers=["CPUExecutionProvider"]
    )
    chooses = makes_choices(model.graph_module)
    reference = make_reference(name, model.graph_module, images, wanted if chooses else None, 0)
    for batch in (1, 3):
        parts = [
            session.run(None, {session.get_inputs()[0].name: part.numpy()})[0]
            for part in images.split(batch)
        ]
        logits = torch.from_numpy(np.concatenate(parts))
        row = compare(make_artifact(), "onnxruntime", batch, logits, reference, "synthetic")
        assert row.passed, (row.tolerance, row.sqnr_db)


@pytest.mark.parametrize("name", TINY)
def test_the_graph_computes_it_at_any_batch(name: str) -> None:
    backbone, images = tiny(name)
    model = capture(backbone)
    assert model.dynamic_batch
    assert makes_choices(model.graph_module) == (name != "res_vmamba")
    with torch.no_grad():
        wanted = backbone.module(images)
        assert wanted.isfinite().all() and wanted.std(0).max() > 1e-3
        for batch in (1, 3):
            assert sqnr_db(wanted[:batch], model.graph_module(images[:batch])) > 100


def test_tokens_are_grouped_by_rank_and_ordered_by_place() -> None:
    significance = torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.3, 0.7, 0.4, 0.6]])
    rows = torch.arange(8)
    # ranks from the least: 1 3 | 4 6 7 5 | 2 0
    assert grouped_order(significance, (2, 6), rows).tolist() == [[1, 3, 4, 5, 6, 7, 0, 2]]
    # a 2 x 4 map read by columns: 0 4 1 5 2 6 3 7
    columns = torch.arange(8).unflatten(0, (4, 2)).T.flatten()
    assert grouped_order(significance, (2, 6), columns).tolist() == [[1, 3, 4, 5, 6, 7, 0, 2]]
    again = grouped_order(torch.zeros(1, 8), (4,), columns)
    assert again.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]  # ties: the first four, and in columns
    assert grouped_order(torch.zeros(1, 8), (), columns).tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]


def test_groups_are_merged_at_their_own_rates() -> None:
    torch.manual_seed(0)
    layer = GuidedAttention(4, 2, 28, stage=1)
    x, order = torch.randn(2, 784, 4), torch.stack([torch.randperm(784) for _ in range(2)])
    merged = layer._merge(x, order)
    assert merged.shape == (2, 4 + 28 + 28, 4)
    wanted, start = [], 0
    for index, (rate, count) in enumerate(((49, 4), (14, 28), (7, 28))):
        linear = layer.merges[index]
        assert isinstance(linear, nn.Linear)
        for _ in range(count):
            some = x[1, order[1, start : start + rate]]
            wanted.append(linear.weight[0] @ some + linear.bias)
            start += rate
    assert torch.allclose(merged[1], torch.stack(wanted), atol=1e-5)


def test_significance_is_the_mean_of_two_attentions() -> None:
    torch.manual_seed(0)
    layer = HybridAttention(8, 2, 28, 4)
    _, significance = layer(torch.randn(2, 784, 8))
    # one small map repeated 4 x 4 times, 16 windows: each gives 16 in all
    assert torch.allclose(significance.sum(1), torch.full((2,), 16.0), atol=1e-4)
    with torch.no_grad():
        layer.q2.weight.zero_()
        layer.q2.bias.zero_()  # windows give each of their 49 tokens the same
        layer.sr.weight.zero_()
        layer.norm.weight.zero_()  # and so does the small map
        _, even = layer(torch.randn(2, 784, 8))
    assert torch.allclose(even, torch.full_like(even, 1 / 49), atol=1e-6)


def test_sg_former_refuses_sizes_its_groups_do_not_divide() -> None:
    from deploykit.backbones.families.sgformer import sgformer

    with pytest.raises(UsageError, match="multiple of 224 pixels, not 256: use 224 or 448"):
        sgformer("sgformer_s", num_classes=5, img_size=256)


def test_a_stages_residual_is_added_to_its_blocks() -> None:
    torch.manual_seed(0)
    stage = ResidualStage(8, 2, 1, last=False).eval()
    with torch.no_grad():
        for name, parameter in stage.blocks.named_parameters():
            if "out_proj" in name or "fc2" in name:
                parameter.zero_()  # blocks hand on what they get
        x = torch.randn(1, 8, 4, 4)
        assert torch.allclose(stage(x), stage.downsample(2 * x), atol=1e-6)


def test_neurons_leak_fire_and_start_again() -> None:
    torch.manual_seed(0)
    current = 1.5 * torch.randn(4, 50) + 0.8
    wanted = torch.zeros(4, 50)
    for neuron in range(50):
        potential = 0.0
        for step in range(4):
            potential += (float(current[step, neuron]) - potential) / 2
            if potential >= 1:
                wanted[step, neuron], potential = 1, 0.0
    assert torch.equal(spikes(current), wanted) and 0 < wanted.mean() < 1
    assert torch.equal(spikes(torch.full((3, 1), 1.6)).flatten(), torch.tensor([0.0, 1.0, 0.0]))


def test_spike_attention_is_q_times_k_times_v_in_either_order() -> None:
    torch.manual_seed(0)
    layer = SpikeAttention(16).eval()
    for norm in layer.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.constant_(norm.bias, 0.9)
    x = torch.randn(2, 1, 16, 4, 4) + 1
    seen: list[Tensor] = []
    layer.proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        layer(x)
        q, k, v = (spikes(f(spikes(x))).flatten(3) for f in (layer.q, layer.k, layer.v))
        wanted = torch.zeros_like(q)
        for head in range(8):
            part = slice(2 * head, 2 * head + 2)
            scores = q[:, :, part].transpose(-2, -1) @ k[:, :, part]  # places x places, no softmax
            wanted[:, :, part] = v[:, :, part] @ scores.transpose(-2, -1) * 0.125
    assert torch.equal(seen[0].flatten(3), spikes(wanted, 0.5)) and 0 < seen[0].mean() < 1


def test_the_anchor_is_the_component_of_most_energy() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    energies = torch.stack(
        [x[:, :, r::4, c::4].square().sum((1, 2, 3)) for r in range(4) for c in range(4)], dim=1
    )
    rows, columns = anchor(x, 4)
    assert torch.equal(4 * rows + columns, energies.argmax(1))
    moved = shift(x, rows, columns)
    for image in range(2):
        offset = (-int(rows[image]), -int(columns[image]))
        assert torch.equal(moved[image], x[image].roll(offset, dims=(1, 2)))
    with pytest.raises(UsageError, match="4 divides, not 6 x 8"):
        anchor(torch.zeros(1, 1, 6, 8), 4)


def test_anchored_networks_do_not_see_a_shift() -> None:
    plain, anchored = twins(), anchored_twins()
    assert plain.state_dict().keys() == anchored.state_dict().keys()
    torch.manual_seed(1)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for offset in ((0, 1), (5, 3), (17, 40)):
            moved = images.roll(offset, dims=(2, 3))
            assert sqnr_db(anchored(images), anchored(moved)) > 80
            assert sqnr_db(plain(images), plain(moved)) < 40


def test_an_insert_without_weights_leaves_a_trained_host_trained() -> None:
    host = Backbone(
        name="twins",
        module=twins(),
        preprocessing=Preprocessing(size=64, mean=(0.5,) * 3, std=(0.25,) * 3),
        weights=WeightsOrigin(kind="hub", source="a test"),
        num_classes=CLASSES,
    )
    notes: list[str] = []
    section = ModelSection(name="twins_svt_small", insert="polyphase")
    made = with_inserted(host, section, 0, notes)
    assert made.weights == host.weights
    assert any("no weights of its own" in note for note in notes), notes
    other = dataclasses.replace(host, module=nn.Linear(2, 2))
    with pytest.raises(UsageError, match="wants timm's Twins-SVT"):
        with_inserted(other, section, 0, [])


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("SG-Former-S", "sgformer_s"),
        ("sg_former_b", "sgformer_b"),
        ("Res-VMamba", "res_vmamba_t"),
        ("resvmamba_s", "res_vmamba_s"),
        ("Meta-SpikeFormer", "meta_spikeformer_15m"),
        ("metaspikeformer_55m", "meta_spikeformer_55m"),
    ],
)
def test_names_of_the_papers_resolve(typed: str, name: str) -> None:
    assert resolve(typed).name == name


@pytest.mark.parametrize("entry", DECLINED, ids=lambda entry: entry.name)
def test_a_declined_name_says_why_and_what_is_nearest(entry: Declined) -> None:
    for typed in (entry.name, f"{entry.name.replace(' ', '_').lower()}_s"):
        with pytest.raises(UsageError) as caught:
            resolve(typed)
        message = str(caught.value)
        assert message == f"unknown backbone {typed!r}: {entry.message}" and "\n" not in message
    for name in entry.nearest:
        resolve(name)


def test_no_name_that_exists_is_declined() -> None:
    for name in (*specs(), *timm.list_models()):
        assert why_not_here(squash(name)) is None, name


def test_the_page_is_what_the_results_give() -> None:
    results = json.loads(RESULTS.read_text("utf-8"))
    assert {entry.probe for entry in DECLINED} - {""} <= set(PROBES) >= set(results)
    assert PAGE.read_text("utf-8") == page(results)
    assert all("refused" in results[name] for name in ("clips", "channels"))
