"""Every own family: parameters as published, any batch and size, the graph and the ONNX file."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deploykit.backbones.build import build_backbone
from deploykit.backbones.registry import (
    BackboneSpec,
    families,
    own_builder,
    plugin_failures,
    specs,
)
from deploykit.backbones.resolve import resolve
from deploykit.errors import UsageError
from deploykit.export.onnx import onnx_bytes
from deploykit.export.parity import compare, make_reference
from deploykit.graph.capture import capture
from deploykit.graph.edit import makes_choices
from deploykit.graph.signal import sqnr_db
from deploykit.recipe import ModelSection
from deploykit.runtimes import import_onnxruntime
from deploykit.synthetic import synthetic_images
from tests.factories import make_artifact

OWN = {name: spec for name, spec in specs().items() if spec.source == "own"}
SMALLEST = sorted(
    min((m for m in members if m.source == "own"), key=lambda m: m.params_m or 0.0).name
    for members in families().values()
    if any(m.source == "own" for m in members)
)
BATCHES = (1, 3)

# MOAT's published counts are with position tables of 224 pixels, whatever the input is.
COUNTED_AT = {"MOAT": 224}

# 10⁹ multiply-adds of the official code at 224 pixels, as torch counts them.
GMACS = {
    "casvit_xs": 0.55,
    "casvit_t": 3.56,
    "cvt_13": 4.57,
    "litv2_s": 3.72,
    "pvt_v1_tiny": 1.93,
    "pvt_v1_large": 9.81,
    "sgformer_s": 4.78,
    "sgformer_b": 15.54,
    "stvit_s": 4.35,
    "uniformer_s": 3.63,
    "uniformer_s_plus": 4.20,
}


def shapes_only(name: str, classes: int = 1000, side: int | None = None) -> nn.Module:
    """The variant without memory behind its tensors: shapes and counts, at no cost."""
    variant, build = own_builder(name)
    with torch.device("meta"):
        return build(name, num_classes=classes, img_size=side or variant.input).eval()


def run_shapes(module: nn.Module, batch: int, side: int) -> Tensor:
    logits = module(torch.empty(batch, 3, side, side, device="meta"))
    assert isinstance(logits, Tensor)
    return logits


def as_published(count: int, published: float) -> bool:
    """Whether ``count`` rounds to the published millions, in the digits that were published."""
    digits = -int(Decimal(repr(published)).normalize().as_tuple().exponent)
    return abs(count / 1e6 - published) <= 0.5 * 10.0 ** -max(digits, 0) + 1e-9


@pytest.mark.parametrize("name", OWN)
def test_parameters_are_as_many_as_published(name: str) -> None:
    published = OWN[name].params_m
    assert published, f"{name} says no number of parameters"
    module = shapes_only(name, side=COUNTED_AT.get(OWN[name].family))
    count = sum(p.numel() for p in module.parameters())
    assert as_published(count, published), f"{name}: {count / 1e6:.3f} M, published {published}"


def test_counts_are_compared_in_the_digits_given() -> None:
    assert as_published(3_204_999, 3.2) and as_published(3_201_000, 3.2)
    assert as_published(3_454_999, 3.45) and not as_published(3_456_000, 3.45)
    assert as_published(277_300_000, 277.0) and not as_published(276_400_000, 277.0)


@pytest.mark.parametrize("name", GMACS)
def test_multiply_adds_are_those_of_the_official_code(name: str) -> None:
    module = shapes_only(name)
    with FlopCounterMode(display=False) as counter:
        run_shapes(module, 1, 224)
    half_digit = 0.005
    assert abs(counter.get_total_flops() / 2e9 - GMACS[name]) <= 0.01 * GMACS[name] + half_digit


@pytest.mark.parametrize("name", SMALLEST)
def test_two_sizes_and_two_batches_give_logits(name: str) -> None:
    side = own_builder(name)[0].input
    module = shapes_only(name, classes=7)
    for batch in BATCHES:
        assert run_shapes(module, batch, side).shape == (batch, 7)
    try:
        larger = shapes_only(name, classes=7, side=2 * side)
    except UsageError as error:
        assert str(2 * side) in str(error)  # a family of one size says so
    else:
        assert run_shapes(larger, 2, 2 * side).shape == (2, 7)


@pytest.mark.parametrize("name", OWN)
def test_names_in_other_spellings_resolve(name: str) -> None:
    spec: BackboneSpec = OWN[name]
    assert resolve(name).kind == "own"
    for typed in (spec.paper_name, name.upper(), name.replace("_", "-"), name.replace("_", "")):
        assert resolve(typed).name == name


def test_no_family_failed_to_import() -> None:
    assert not plugin_failures()
    assert len(OWN) >= len(SMALLEST) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_graph_and_onnx_compute_what_the_module_computes(name: str) -> None:
    backbone, _ = build_backbone(ModelSection(name=name, weights="random"), seed=0)
    model = capture(backbone)
    assert model.dynamic_batch
    images = synthetic_images(max(BATCHES), backbone.preprocessing, 1)
    with torch.no_grad():
        wanted = backbone.module(images)
        assert wanted.isfinite().all()
        assert wanted.std(0).mean() > 1e-3  # a dead network would agree with anything
        for batch in BATCHES:
            again = model.graph_module(images[:batch])
            assert sqnr_db(wanted[:batch], again) > 100
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    data = onnx_bytes(model.graph_module, backbone)
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    # a network that ranks tokens may differ by a choice, as far as the graph differs from itself
    graph = model.graph_module
    chosen = wanted if makes_choices(graph) else None
    reference = make_reference(name, graph, images, chosen, 0, graph)
    artifact = make_artifact(name="original", precision="fp32", simulated=[])
    for batch in BATCHES:
        parts = [
            session.run(None, {session.get_inputs()[0].name: part.numpy()})[0]
            for part in images.split(batch)
        ]
        logits = torch.from_numpy(np.concatenate(parts))
        row = compare(artifact, "onnxruntime", batch, logits, reference, "synthetic")
        assert row.passed, row.tolerance
