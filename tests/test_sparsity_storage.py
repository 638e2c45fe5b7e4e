"""2:4 weights at half their values: exact round trips, smaller files, files that mean harm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deploykit.errors import UsageError
from deploykit.export.structure import STRUCTURE_NAME, TENSORS_NAME, load_model, save_model
from deploykit.graph.two_four import is_two_of_four, pack_two_of_four, unpack_two_of_four
from deploykit.prune.masks import keep_n_of_m
from deploykit.prune.sparsity import SparsityOptions, sparsify
from deploykit.prune.sparsity_patterns import from_matrix, to_matrix
from deploykit.quant.options import QuantizeOptions
from deploykit.quant.quantize import quantize
from tests.graphs import batches, captured, images, tiny_vit

POSITIONS = ".positions_2_4"


def sparse(shape: tuple[int, ...], axis: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-3, 4, shape, generator=generator).movedim(axis, 1)
    mask = keep_n_of_m(torch.rand(to_matrix(values).shape, generator=generator), 2, 4)
    return (values * from_matrix(mask, values)).movedim(1, axis).to(dtype)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)
    )


@given(
    st.sampled_from([(3, 4), (5, 12), (8, 16, 3, 3), (4, 8, 1)]),
    st.integers(0, 1),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int8]),
    st.integers(0, 999),
)
@settings(max_examples=80, deadline=None)
def test_what_is_packed_comes_back(
    shape: tuple[int, ...], axis: int, dtype: torch.dtype, seed: int
) -> None:
    shape = (shape[1], shape[0], *shape[2:]) if axis == 0 else shape
    tensor = sparse(shape, axis, dtype, seed)
    if not is_two_of_four(tensor, axis):
        assert not tensor.any()
        return
    values, positions = pack_two_of_four(tensor, axis)
    assert values.numel() * 2 == tensor.numel()
    assert len(positions) == -(-tensor.numel() // 8)
    assert same_bits(unpack_two_of_four(values, positions, axis), tensor)


def test_every_bit_of_a_float_counts() -> None:
    """Minus zero is a value, so are NaN and the smallest number there is."""
    odd = torch.tensor([[-0.0, float("nan"), 0.0, 0.0], [0.0, 1e-45, 0.0, -0.0]])
    values, positions = pack_two_of_four(odd, 1)
    assert same_bits(unpack_two_of_four(values, positions, 1), odd)
    assert positions.tolist() == [0b1101_0100]  # (1, 3) above (0, 1), the first position lower
    assert not is_two_of_four(torch.tensor([[-0.0, 1.0, 2.0, 0.0]]), 1)
    assert not is_two_of_four(torch.zeros(4, 4), 1)
    assert not is_two_of_four(torch.ones(4, 6), 1)


BROKEN: list[tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], str]] = [
    (lambda v, p: (v, p[:-1]), "another size"),
    (lambda v, p: (v, p.to(torch.int8)), "another size or type"),
    (lambda v, p: (v, torch.zeros_like(p)), "out of order"),
    (lambda v, p: (v, p | 3), "out of order"),
    (lambda v, p: (v[:, :3], p), "odd number"),
    (lambda v, p: (v, p | torch.tensor([0, 0x40], dtype=torch.uint8)), "after the last"),
]


@pytest.mark.parametrize(("broken", "message"), BROKEN)
def test_positions_that_packing_never_gives_are_refused(
    broken: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], message: str
) -> None:
    tensor = torch.tensor([[1.0, 0.0, 0.0, 2.0] * 3])
    values, positions = pack_two_of_four(tensor, 1)
    with pytest.raises(ValueError, match=message):
        unpack_two_of_four(*broken(values, positions), 1)


def saved(bits: int | None, pattern: str | None, folder: Path) -> Any:
    model: Any = captured(tiny_vit())
    if pattern:
        model = sparsify(model, SparsityOptions(pattern))[0]
    if bits:
        model = quantize(model, QuantizeOptions(bits, bits), batches())
    folder.mkdir()
    save_model(model.graph_module, model.backbone, folder, precision="x")
    return model


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_sparse_model_is_smaller_on_disk_and_computes_the_same(
    bits: int | None, tmp_path: Path
) -> None:
    saved(bits, None, tmp_path / "dense")
    model = saved(bits, "2:4", tmp_path / "sparse")
    entries = json.loads((tmp_path / "sparse" / STRUCTURE_NAME).read_text())["tensors"]
    packed = {name: entry for name, entry in entries.items() if "packing" in entry}
    assert len(packed) == 8, "qkv, projection and two layers of the MLP in two blocks"
    sizes = {f: (tmp_path / f / TENSORS_NAME).stat().st_size for f in ("dense", "sparse")}
    width = 1 if bits else 4
    weights = sum(torch.Size(entry["shape"]).numel() for entry in packed.values())
    saving = weights * width // 2 - weights // 8  # two bits for each kept value
    header = 120 * len(packed)  # a further tensor's name and place
    assert sizes["dense"] - sizes["sparse"] >= saving - header
    assert sizes["dense"] - sizes["sparse"] <= saving
    loaded = load_model(tmp_path / "sparse")
    x = images(3)
    assert same_bits(loaded.graph_module(x), model.graph_module(x))
    again = tmp_path / "again"
    again.mkdir()
    save_model(loaded.graph_module, loaded.backbone, again, precision="x")
    assert (again / TENSORS_NAME).read_bytes() == (tmp_path / "sparse" / TENSORS_NAME).read_bytes()


def test_a_dense_model_is_not_packed(tmp_path: Path) -> None:
    saved(None, None, tmp_path / "dense")
    assert "packing" not in (tmp_path / "dense" / STRUCTURE_NAME).read_text()


def _shape(entry: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
    entry["shape"][1] *= 2


def _odd_shape(entry: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
    entry["shape"][1] += 1


def _negative(entry: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
    entry["shape"] = [-4, -4]


def _no_positions(entry: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name + POSITIONS]


def _no_packing(entry: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
    del entry["packing"]


def _other_packing(entry: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
    entry["packing"] = "1:4"


def _other_axis(entry: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
    entry["packed_axis"] = 2


def _positions(entry: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
    tensors[name + POSITIONS].zero_()


def _integers(entry: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
    entry["dtype"] = "int64"


HARM = [
    (_shape, "the structure says"),
    (_odd_shape, "can't be packed as 2:4"),
    (_negative, "can't be packed as 2:4"),
    (_no_positions, "is missing"),
    (_no_packing, "is not in the structure"),
    (_other_packing, "packing"),
    (_other_axis, "packed_axis"),
    (_positions, "out of order"),
    (_integers, "can't be packed as 2:4"),
]


@pytest.mark.parametrize(("harm", "message"), HARM)
def test_a_packed_file_that_means_harm_is_refused(
    harm: Callable[[dict[str, Any], dict[str, Tensor], str], None],
    message: str,
    sparse_file: tuple[str, bytes],
    tmp_path: Path,
) -> None:
    structure, tensors = json.loads(sparse_file[0]), safetensors.torch.load(sparse_file[1])
    name = next(name for name in structure["tensors"] if name + POSITIONS in tensors)
    harm(structure["tensors"][name], tensors, name)
    data = safetensors.torch.save(tensors)
    structure["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    (tmp_path / TENSORS_NAME).write_bytes(data)
    (tmp_path / STRUCTURE_NAME).write_text(json.dumps(structure))
    with pytest.raises(UsageError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def sparse_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    folder = tmp_path_factory.mktemp("sparse") / "model"
    saved(None, "2:4", folder)
    return (folder / STRUCTURE_NAME).read_text(), (folder / TENSORS_NAME).read_bytes()


def test_an_unpacked_1x1_convolution_lies_in_memory_as_it_did() -> None:
    weight = torch.randn(16, 8, 1, 1)
    weight[:, 1::2] = 0
    again = unpack_two_of_four(*pack_two_of_four(weight, 1), 1)
    assert torch.equal(again, weight) and again.stride() == weight.stride()
