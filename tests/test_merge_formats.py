"""A model that merges tokens, in every format that can be written and read here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deploykit.export.parity import compare, in_batches, make_reference
from deploykit.export.registry import Source, get_exporter, list_exporters
from deploykit.export.target_reader import read_by
from deploykit.graph.capture import CapturedModel, capture
from deploykit.graph.edit import makes_choices
from deploykit.prune.merge_options import MergeOptions
from deploykit.prune.merge_tokens import merge_tokens
from deploykit.targets.registry import get_target, list_targets
from deploykit.types import Artifact
from tests.graphs import make_backbone
from tests.tiny_models import CLASSES, SIZE, tiny_tokens

ISOLATED = ("executorch", "litert", "ncnn")  # run by `make test-mobile`


@pytest.fixture(scope="module")
def original() -> CapturedModel:
    return capture(make_backbone(tiny_tokens(), SIZE, CLASSES))


@pytest.mark.parametrize("name", [n for n in list_exporters() if n not in ISOLATED])
def test_merged_tokens_are_the_same_in_the_file(
    name: str, original: CapturedModel, tmp_path: Path
) -> None:
    exporter = get_exporter(name)
    if reason := exporter.available():
        pytest.skip(reason)
    merged, _ = merge_tokens(original, MergeOptions(r=16))
    graph = merged.graph_module
    path = tmp_path / f"model{exporter.suffix}"
    made = exporter.export(Source(graph, merged.backbone, "fp32", dynamic_batch=True), path)
    reader = exporter.reader(path)
    if reader is None:
        target = next(t for t in list_targets() if get_target(t).exporter == name)
        reader = read_by(target, path)
    images = torch.randn(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    before = in_batches(original.graph_module, images, 8)
    reference = make_reference("graph", lambda x: in_batches(graph, x, 8), images, before, 0, graph)
    assert makes_choices(graph) and reference.restless is not None
    artifact = Artifact(
        name="merged", format=name, path=path, bytes=0, sha256="", precision=made.precision,
        weights="untrained", dynamic_batch=made.dynamic_batch, half=made.half,
    )  # fmt: skip
    for batch in (1, 8) if made.dynamic_batch else (1,):
        logits = in_batches(reader[1], images, batch)
        row = compare(artifact, reader[0], batch, logits, reference, "noise")
        assert row.passed, row.tolerance


def test_one_image_of_many_that_goes_another_way_is_no_miss_but_all_are(
    original: CapturedModel, tmp_path: Path
) -> None:
    graph = merge_tokens(original, MergeOptions(r=16))[0].graph_module
    images = torch.randn(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    before = in_batches(original.graph_module, images, 8)
    reference = make_reference("graph", lambda x: in_batches(graph, x, 8), images, before, 0, graph)
    artifact = Artifact(
        name="merged", format="onnx", path=tmp_path, bytes=0, sha256="", precision="fp32",
        weights="untrained",
    )  # fmt: skip
    assert reference.restless is not None
    slightly = torch.ones(8, 1)
    slightly[0] = 1.001  # 60 dB: more than floats differ by
    one = compare(artifact, "x", 8, reference.logits * slightly, reference, "noise")
    every = compare(artifact, "x", 8, reference.logits * 1.001, reference, "noise")
    assert one.passed and (not every.passed or reference.restless > 3)
