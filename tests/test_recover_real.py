"""A real ViT, made 2:4 sparse, learns a little of what it lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploykit.backbones.build import build_backbone
from deploykit.data import open_dataset
from deploykit.graph.capture import capture
from deploykit.prune.recover import RecoverOptions, recover
from deploykit.prune.sparsity import SparsityOptions, sparsify
from deploykit.recipe import ModelSection
from deploykit.training_images import TrainingImages

DATA = Path(os.environ.get("DEPLOYKIT_REAL_DATA", "/nonexistent"))
CHECKPOINT = DATA / "weights" / "dinov2_s_imagenette_168.safetensors"

pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not CHECKPOINT.exists(), reason="DEPLOYKIT_REAL_DATA has no such weights"),
]


def test_a_real_sparse_vit_gets_nearer_to_its_original() -> None:
    """Minutes on a CPU. So few images can't bring its accuracy back; its answers come nearer."""
    backbone, _ = build_backbone(
        ModelSection(name="vit_small_patch14_dinov2", weights=str(CHECKPOINT), img_size=168), 0
    )
    train = open_dataset(
        DATA / "imagenette" / "train", backbone.preprocessing, labelled=False, limit=256
    )
    student = sparsify(capture(backbone), SparsityOptions())[0]
    options = RecoverOptions(batch_size=16, epochs=1, evaluations=1, held_out=0.125)
    recovered, record = recover(student, capture(backbone), options, TrainingImages(train))
    assert record.details["best"]["kl"] < 0.7 * record.details["before"]["kl"]
    masked = [name for name, share in record.details["zeros_kept"].items() if share == 0.5]
    state, sparse = recovered.graph_module.state_dict(), student.graph_module.state_dict()
    assert len(masked) >= 48
    assert all((state[name][sparse[name] == 0] == 0).all() for name in masked)
