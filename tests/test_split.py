"""A model split by classes: the parts, the ensemble, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import deploykit
from deploykit.api import options_to_recipe
from deploykit.errors import UsageError
from deploykit.fusion import fit_fusion
from deploykit.graph.capture import capture
from deploykit.graph.classes import select_classes
from deploykit.progress import Reporter
from deploykit.recipe_io import build_recipe, merged
from deploykit.report.split_model import SplitReport
from deploykit.split import read_classes, run_split, share_out
from tests.graphs import make_backbone
from tests.tiny_models import SIZE, tiny_hybrid


def test_classes_are_shared_out_evenly_and_all() -> None:
    parts = share_out(10, 3)
    assert [len(part) for part in parts] == [4, 3, 3]
    assert [c for part in parts for c in part] == list(range(10))
    with pytest.raises(UsageError, match="2 to 5 parts of 10 classes, got 6"):
        share_out(10, 6)


def test_selected_classes_have_the_logits_they_had() -> None:
    captured = capture(make_backbone(tiny_hybrid(), SIZE, 4))
    chosen = select_classes(captured, [3, 1])
    images = torch.randn(2, 3, SIZE, SIZE)
    every = captured.graph_module(images)
    torch.testing.assert_close(chosen.graph_module(images), every[:, [3, 1]], atol=1e-6, rtol=0)
    assert chosen.backbone.num_classes == 2
    shapes = {tuple(t.shape) for t in chosen.graph_module.state_dict().values()}
    assert (2, 512) in shapes and (4, 512) not in shapes  # the other rows are gone


@pytest.mark.parametrize("classes", [[0, 4], [-1], [1, 1]])
def test_a_class_that_is_not_there_or_twice_is_refused(classes: list[int]) -> None:
    captured = capture(make_backbone(tiny_hybrid(), SIZE, 4))
    with pytest.raises(UsageError, match="different classes from 0 to 3"):
        select_classes(captured, classes)


def test_fusion_finds_the_scale_that_one_part_lacks() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 4, generator=generator)
    labels = torch.distributions.Categorical(logits=3 * logits).sample()
    shrunk = [logits[:, [0, 2]], 0.1 * logits[:, [3, 1]] - 1]
    fusion = fit_fusion([[0, 2], [3, 1]], shrunk, labels)
    assert fusion.scales[1] / fusion.scales[0] > 4
    plain = torch.cat(shrunk, 1)[:, [0, 3, 1, 2]].argmax(1)
    fused = fusion(shrunk).argmax(1)
    assert (fused == labels).float().mean() > (plain == labels).float().mean() + 0.05


def test_split_makes_parts_that_answer_together(
    tiny_options: dict[str, Any], tmp_path: Path
) -> None:
    options = {k: v for k, v in tiny_options.items() if k != "recipe"}
    data = merged(tiny_options["recipe"], options_to_recipe(**options, bits="w8a8"))
    recipe = build_recipe(data)
    quiet = Reporter(quiet=True)
    report = run_split(recipe, tmp_path / "out", 2, command="test", reporter=quiet)
    assert [part.classes for part in report.parts] == [[0, 1], [2, 3]]
    assert report.accuracy is not None and report.accuracy.top1 > 90  # the original has 100
    assert report.parallel_ratio is not None and report.serial_ratio is not None
    assert report.parallel_ratio <= report.serial_ratio
    written = (tmp_path / "out" / "split.json").read_text(encoding="utf-8")
    assert SplitReport.model_validate(json.loads(written)) == report
    page = (tmp_path / "out" / "split.html").read_text(encoding="utf-8")
    assert "part-2/report.html" in page and "ensemble" in page
    part = deploykit.load_report(tmp_path / "out" / "part-1")
    assert part.exit_code == 0 and part.recipe["model"]["classes"] == [0, 1]


def test_parts_that_leave_a_class_out_are_refused(
    tiny_options: dict[str, Any], tmp_path: Path
) -> None:
    recipe = build_recipe(options_to_recipe(model=tiny_options["model"]))
    for classes in ([[0, 1], [2]], [[0, 1], [1, 2, 3]], [[0, 1, 2, 3]]):
        with pytest.raises(UsageError, match="hold each class from 0 to 3 once"):
            run_split(recipe, tmp_path / "out", classes, command="", reporter=Reporter(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{}", "[[1], []]", "[[true]]", "[1, 2]", "nonsense"])
def test_a_file_of_classes_is_checked(text: str, tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="wanted lists of class numbers"):
        read_classes(path)
