"""Files that mean harm, or are merely broken: one line each, exit code 2, nothing written."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from deploykit.backbones.build import build_backbone
from deploykit.errors import UsageError
from deploykit.onnx_import.examine import read_onnx
from deploykit.onnx_import.limits import LIMIT_VARIABLE, Limits, check_model, parse
from deploykit.recipe import ModelSection
from tests.graphs import images
from tests.onnx_files import constant, head, make_model, tiny_model, write

PATH = Path("model.onnx")
Model = onnx.ModelProto


def refused(model: Model, folder: Path = Path(), limits: Limits | None = None) -> str:
    """What the structural checks say; nothing but the message was parsed before."""
    proto = parse(model.SerializeToString(), PATH)
    with pytest.raises(UsageError) as caught:
        check_model(proto, folder / "model.onnx", limits or Limits())
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text


def weight(model: Model) -> TensorProto:
    return next(t for t in model.graph.initializer if t.name == "stem.weight")


def _old_opset(model: Model) -> None:
    model.opset_import[0].version = 9


def _new_opset(model: Model) -> None:
    model.opset_import[0].version = 99


def _custom_domain(model: Model) -> None:
    model.graph.node[0].domain = "com.evil"


def _quantised(model: Model) -> None:
    model.graph.node[0].op_type = "QLinearConv"


def _branch(model: Model) -> None:
    node = helper.make_node("If", ["c"], ["y"], then_branch=model.graph, else_branch=model.graph)
    model.graph.node.append(node)


def _two_inputs(model: Model) -> None:
    model.graph.input.add().CopyFrom(
        helper.make_tensor_value_info("second", TensorProto.FLOAT, [1, 3, 8, 8])
    )


def _two_outputs(model: Model) -> None:
    model.graph.output.add().CopyFrom(
        helper.make_tensor_value_info("pooled", TensorProto.FLOAT, [1, 6, 1, 1])
    )


def _half_input(model: Model) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def _half_weights(model: Model) -> None:
    weight(model).data_type = TensorProto.FLOAT16


def _absurd_shape(model: Model) -> None:
    weight(model).dims[0] = 2**60


def _negative_shape(model: Model) -> None:
    weight(model).dims[0] = -6


def _larger_than_stored(model: Model) -> None:
    weight(model).dims[0] = 2**20


def _batch_of_four(model: Model) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4


def _oblong(model: Model) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 16


def _sparse(model: Model) -> None:
    model.graph.sparse_initializer.add()


def _functions(model: Model) -> None:
    model.functions.add().name = "mine"


REFUSED: dict[str, tuple[Callable[[Model], None], str]] = {
    "old opset": (_old_opset, "opset 9"),
    "new opset": (_new_opset, "opset 99"),
    "custom domain": (_custom_domain, "com.evil"),
    "quantised": (_quantised, "quantised already"),
    "branch": (_branch, "a graph of its own"),
    "two inputs": (_two_inputs, "2 inputs"),
    "two outputs": (_two_outputs, "2 outputs"),
    "half input": (_half_input, "float16"),
    "half weights": (_half_weights, "float16"),
    "absurd shape": (_absurd_shape, "claims the shape"),
    "negative shape": (_negative_shape, "claims the shape"),
    "larger than stored": (_larger_than_stored, "are stored"),
    "batch of four": (_batch_of_four, "fixed at 4"),
    "oblong": (_oblong, "square"),
    "sparse": (_sparse, "sparse"),
    "functions": (_functions, "functions of its own"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_structure_is_refused(case: str) -> None:
    bend, words = REFUSED[case]
    model = tiny_model()
    bend(model)
    assert words in refused(model)


def test_the_good_file_passes_the_same_checks() -> None:
    model = tiny_model()
    stored = 4 * sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    assert check_model(model, PATH, Limits()) == stored
    assert "claim more than" in refused(model, limits=Limits(tensor_bytes=stored - 1))


def outside(model: Model, place: str, offset: int = 0) -> Model:
    """The weight moved to an external file."""
    tensor = weight(model)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", place), ("offset", str(offset))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return model


@pytest.mark.parametrize(
    "place", ["../secret", "/etc/passwd", "a/../../secret", "C:\\secret", "..\\secret", "", "link"]
)
def test_external_data_stays_in_the_folder(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(6 * 27 * 4))
    (folder / "link").symlink_to(tmp_path / "secret")
    assert "the model's own folder" in refused(outside(tiny_model(), place), folder)


@pytest.mark.parametrize("offset", [1, 2**40])
def test_external_data_must_be_there_in_full(offset: int, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(6 * 27 * 4))
    assert "beyond the end" in refused(outside(tiny_model(), "data", offset), tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "own folder" in refused(outside(tiny_model(), "pipe"), tmp_path)
    assert "missing" in refused(outside(tiny_model(), "nowhere"), tmp_path)


def test_external_data_in_the_folder_is_read(tmp_path: Path) -> None:
    whole = write(tmp_path, tiny_model(), "whole.onnx")
    (tmp_path / "data").write_bytes(b"12345678" + weight(tiny_model()).raw_data)
    path = write(tmp_path, outside(tiny_model(), "data", 8))
    found, wanted = read_onnx(path), read_onnx(whole)
    x = images(2, 8)
    assert torch.equal(found.module(x), wanted.module(x))
    (tmp_path / "data").write_bytes(b"87654321" + weight(tiny_model()).raw_data)
    assert read_onnx(path).sha256 != found.sha256 != wanted.sha256


def build(path: Path) -> str:
    """What a user is told."""
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    with pytest.raises(UsageError) as caught:
        build_backbone(ModelSection(name=str(path)), seed=0)
    assert before == (sorted(path.parent.iterdir()) if path.parent.is_dir() else [])
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    assert path.name in text
    return text


def test_files_that_are_no_models(tmp_path: Path) -> None:
    good = tiny_model().SerializeToString()
    assert "no such file" in build(tmp_path / "none.onnx")
    assert "empty" in build(write(tmp_path, b"", "zero.onnx"))
    assert "ONNX file" in build(write(tmp_path, good[: len(good) // 2], "cut.onnx"))
    assert "ONNX file" in build(write(tmp_path, b"\x89PNG and more", "picture.onnx"))
    (tmp_path / "folder.onnx").mkdir()
    assert "not a plain file" in build(tmp_path / "folder.onnx")


def test_the_limit_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, tiny_model())
    monkeypatch.setenv(LIMIT_VARIABLE, "1000")
    assert "at most 1000" in build(path)
    monkeypatch.setenv(LIMIT_VARIABLE, "lots")
    with pytest.raises(UsageError, match="positive number"):
        read_onnx(path)


def _before_pooling(*nodes: Any, weights: list[TensorProto] | None = None) -> Model:
    end, more = head("features", 3)
    return make_model([*nodes, *end], [*(weights or []), *more])


def test_a_cycle_is_refused(tmp_path: Path) -> None:
    model = _before_pooling(
        helper.make_node("Add", ["image", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Relu", ["b"], ["features"]),
    )
    build(write(tmp_path, model))


BOMBS: dict[str, Model] = {
    "constant from a shape": _before_pooling(
        helper.make_node("ConstantOfShape", ["s"], ["big"]),
        helper.make_node("ReduceMax", ["big"], ["one"], keepdims=0),
        helper.make_node("Add", ["image", "one"], ["features"]),
        weights=[constant("s", [2**20, 2**20], np.int64)],
    ),
    "range": _before_pooling(
        helper.make_node("Range", ["a", "b", "c"], ["big"]),
        helper.make_node("ReduceMax", ["big"], ["one"], keepdims=0),
        helper.make_node("Add", ["image", "one"], ["features"]),
        weights=[constant("a", 0), constant("b", 1e13), constant("c", 1)],
    ),
    "broadcast": _before_pooling(
        helper.make_node("Add", ["a", "b"], ["big"]),
        helper.make_node("ReduceMax", ["big"], ["one"], keepdims=0),
        helper.make_node("Add", ["image", "one"], ["features"]),
        weights=[constant("a", np.zeros((2**18, 1))), constant("b", np.zeros((1, 2**18)))],
    ),
    "padding of the image": _before_pooling(
        helper.make_node("Pad", ["image", "p"], ["features"]),
        weights=[constant("p", [0, 0, 0, 0, 0, 0, 2**20, 2**20], np.int64)],
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_cannot_take_all_memory(bomb: str, tmp_path: Path) -> None:
    build(write(tmp_path, BOMBS[bomb]))


def test_an_operator_nobody_knows_is_named(tmp_path: Path) -> None:
    model = _before_pooling(helper.make_node("Hardmax", ["image"], ["features"]))
    with pytest.raises(UsageError, match="operators that are not read: Hardmax"):
        read_onnx(write(tmp_path, model))


def test_crashes_and_silence_end_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, tiny_model())

    def ask(code: str, **limits: int) -> str:
        with pytest.raises(UsageError) as caught:
            read_onnx(path, limits=Limits(**limits), command=(sys.executable, "-c", code))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "SIGSEGV" in ask("import os; os.kill(os.getpid(), 11)")
    assert "more than 1 s" in ask("import time; time.sleep(60)", seconds=1)
    assert "ended in a crash" in ask("print('not json')")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"weights": "random"}, "holds its weights"),
        ({"num_classes": 10}, "has 4 outputs"),
        ({"img_size": 16}, "8 pixels"),
    ],
)
def test_options_that_contradict_the_file(
    section: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = write(tmp_path, tiny_model())
    with pytest.raises(UsageError, match=words):
        build_backbone(ModelSection(name=str(path), **section), seed=0)
