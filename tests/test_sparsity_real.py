"""2:4 zeros in a real ViT, on real images; see test_real."""

from __future__ import annotations

import torch

from deploykit.backbones.build import build_backbone
from deploykit.data import open_dataset
from deploykit.graph.capture import CapturedModel, capture
from deploykit.prune.sparsity import SparsityOptions, sparsify
from deploykit.recipe import ModelSection
from tests.test_real import CHECKPOINT, DATA, pytestmark  # noqa: F401  skips where they aren't


def test_sparsegpt_keeps_what_magnitude_loses() -> None:
    """Measured on these 500 images: 86.6 dense, 35.4 by magnitude, 76.0 by SparseGPT."""
    model = ModelSection(name="vit_small_patch14_dinov2", img_size=168, weights=str(CHECKPOINT))
    backbone, _ = build_backbone(model, 0)
    captured = capture(backbone)
    train, val = (
        open_dataset(
            DATA / "imagenette" / part, backbone.preprocessing, labelled=True, num_classes=10,
            limit=limit,
        )
        for part, limit in (("train", 128), ("val", 500))
    )  # fmt: skip
    calibration = [images for images, _ in train.tensor_batches(16)]
    evaluation = [images for images, _ in val.tensor_batches(25)]

    def top1(model: CapturedModel) -> float:
        with torch.no_grad():
            found = torch.cat([model.graph_module(x).argmax(1) for x in evaluation])
        assert val.labels is not None
        return 100 * float((found == val.labels).float().mean())

    def pruned(options: SparsityOptions) -> float:
        return top1(sparsify(captured, options, lambda: calibration)[0])

    by_magnitude = pruned(SparsityOptions("2:4", "magnitude"))
    by_sparsegpt = pruned(SparsityOptions("2:4", "sparsegpt", bias_correction=True))
    assert by_sparsegpt >= 73
    assert by_sparsegpt >= by_magnitude + 30
