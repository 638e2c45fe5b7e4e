"""Structured pruning of real architectures with random weights. Minutes long."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deploykit._compat import timm
from deploykit.export.structure import load_model, model_bytes
from deploykit.graph.capture import capture
from deploykit.graph.macs import count_macs
from deploykit.prune.structured import StructureOptions, prune_structure
from deploykit.prune.structured_groups import KINDS
from tests.graphs import batches, images, make_backbone

FAMILIES = [
    "shvit_s4",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "efficientformer_l1",
    "nextvit_small",
    "mobilevit_s",
    "mobilevitv2_050",
    "tiny_vit_5m_224",
]


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILIES)
def test_a_third_less_of_every_family_runs_saves_and_loads(model: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = timm.create_model(model).eval()
    size = module.pretrained_cfg["input_size"][-1]
    options = StructureOptions(
        ratio=0.3, scope=tuple(KINDS), importance="magnitude", round_to=8
    )  # fmt: skip
    backbone, record = prune_structure(
        make_backbone(module, size, 1000), options, batches(size, count=2)
    )
    before, after = record.details["macs"]
    parameters = record.details["parameters"]
    print(f"\n{model}: {record.summary}; MACs {before} {after}; parameters {parameters}")
    for name, reason in record.details["declined"].items():
        print(f"  declined {name}: {reason}")
    assert count_macs(backbone.module, size) == after
    assert 0.28 <= 1 - after / before <= 0.36
    assert parameters[1] < parameters[0]

    captured = capture(backbone)
    structure, tensors = model_bytes(
        captured.graph_module, backbone, precision="fp32", dynamic_batch=captured.dynamic_batch
    )
    (tmp_path / "structure.json").write_bytes(structure)
    (tmp_path / "model.safetensors").write_bytes(tensors)
    with torch.no_grad():
        expected = captured.graph_module(images(2, size))
        assert torch.equal(load_model(tmp_path).graph_module(images(2, size)), expected)
