"""MIL operators in torch: what each computes, and one line where one can't."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("coremltools")

from deploykit.errors import DeploykitError, UsageError
from deploykit.export.mil_evaluate import MilProgram
from deploykit.export.mil_ops import OPERATORS, Call
from deploykit.graph.signal import sqnr_db
from tests.coreml_models import FULL, HALF, package, package_of
from tests.graphs import images


def compute(op_type: str, **arguments: Any) -> Any:
    """One operator; numbers and lists become tensors, as constants of a program do."""
    given = {
        name: value if isinstance(value, Tensor | str) or _is_tensors(value) else _tensor(value)
        for name, value in arguments.items()
    }
    return OPERATORS[op_type](Call(SimpleNamespace(op_type=op_type), given))


def _is_tensors(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, Tensor) for item in value)


def _tensor(value: Any) -> Tensor:
    array = np.asarray(value)
    kind = {"f": np.float32, "i": np.int32}.get(array.dtype.kind, array.dtype)
    return torch.from_numpy(array.astype(kind))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = noise(2, 4, 7, 9)
W = noise(6, 2, 3, 3, seed=1)
HALVES = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])

CASES: dict[str, tuple[Callable[[], Any], Callable[[], Tensor]]] = {
    "convolution padded by hand, more at the end": (
        lambda: compute("conv", x=X, weight=W, pad_type="custom", pad=[0, 1, 2, 3],
                        strides=[2, 1], dilations=[1, 2], groups=2),
        lambda: F.conv2d(F.pad(X, [2, 3, 0, 1]), W, None, (2, 1), 0, (1, 2), 2),
    ),
    "convolution padded to the same size": (
        lambda: compute("conv", x=X[..., :7], weight=W, pad_type="same", groups=2),
        lambda: F.conv2d(X[..., :7], W, padding="same", groups=2),
    ),
    "convolution padded to half the size, the odd pixel at the start": (
        lambda: compute("conv", x=X[:, :, :6, :6], weight=W, pad_type="same_lower",
                        strides=[2, 2], groups=2),
        lambda: F.conv2d(F.pad(X[:, :, :6, :6], [1, 0, 1, 0]), W, None, 2, groups=2),
    ),
    "maximum of a padded window": (
        lambda: compute("max_pool", x=X - 9, kernel_sizes=[3, 3], strides=[2, 2],
                        pad_type="custom", pad=[1, 1, 1, 1]),
        lambda: F.max_pool2d(X - 9, 3, 2, 1),
    ),
    "mean of a padded window, without the padding": (
        lambda: compute("avg_pool", x=X, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom",
                        pad=[1, 1, 1, 1], exclude_padding_from_average=True),
        lambda: F.avg_pool2d(X, 3, 2, 1, count_include_pad=False),
    ),
    "mean of a padded window, with it": (
        lambda: compute("avg_pool", x=X, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom",
                        pad=[1, 1, 1, 1]),
        lambda: F.avg_pool2d(X, 3, 2, 1),
    ),
    "codes of halves are even, and clipped": (
        lambda: compute("quantize", input=torch.cat([HALVES, torch.tensor([-9.0, 999.0])]),
                        scale=1.0, zero_point=3, output_dtype="uint8"),
        lambda: torch.tensor([1, 3, 3, 5, 5, 0, 255], dtype=torch.int32),
    ),
    "signed codes": (
        lambda: compute("quantize", input=torch.tensor([-99.0, 99.0]), scale=0.5,
                        output_dtype="int8"),
        lambda: torch.tensor([-128, 127], dtype=torch.int32),
    ),
    "codes of channels": (
        lambda: compute("dequantize", input=torch.tensor([[1, 2], [3, 4]], dtype=torch.int32),
                        scale=[1.0, 10.0], zero_point=[0, 1], axis=1),
        lambda: torch.tensor([[1.0, 10.0], [3.0, 30.0]]),
    ),
    "weights of blocks": (
        lambda: compute("constexpr_blockwise_shift_scale", data=[[1, 2, 3, 4]],
                        scale=[[1.0, 10.0]], offset=[[1, 0]]),
        lambda: torch.tensor([[0.0, 1.0, 30.0, 40.0]]),
    ),
    "weights of channels": (
        lambda: compute("constexpr_affine_dequantize", quantized_data=[[1, 2], [3, 4]],
                        scale=[2.0, 3.0], zero_point=1, axis=0),
        lambda: torch.tensor([[0.0, 2.0], [6.0, 9.0]]),
    ),
    "layer norm over inner axes": (
        lambda: compute("layer_norm", x=X, axes=[1, 2], gamma=W[0, :1, 0, 0] + torch.ones(4, 7),
                        beta=torch.ones(4, 7), epsilon=1e-5),
        lambda: (
            F.layer_norm(X.permute(0, 3, 1, 2), [4, 7], W[0, :1, 0, 0] + torch.ones(4, 7),
                         torch.ones(4, 7)).permute(0, 2, 3, 1)
        ),
    ),
    "product of transposed factors": (
        lambda: compute("matmul", x=X, y=X, transpose_x=True, transpose_y=False),
        lambda: X.mT @ X,
    ),
    "integers divide downwards": (
        lambda: compute("real_div", x=[-7, 7], y=[2, 2]),
        lambda: torch.tensor([-4, 3], dtype=torch.int32),
    ),
    "cast cuts off": (
        lambda: compute("cast", x=torch.tensor([-1.7, 1.7]), dtype="int32"),
        lambda: torch.tensor([-1, 1], dtype=torch.int32),
    ),
    "a slice with masks": (
        lambda: compute("slice_by_index", x=X, begin=[0, 1, 2, 8], end=[9, 3, 0, 9],
                        stride=[1, 1, 2, 1], begin_mask=[True, False, False, False],
                        end_mask=[True, False, True, False],
                        squeeze_mask=[False, False, False, True]),
        lambda: X[:, 1:3, 2::2, 8],
    ),
    "gather with negative places": (
        lambda: compute("gather", x=X, indices=[[0, -1]], axis=1),
        lambda: X[:, [[0, -1]]],
    ),
    "gather of one place drops the axis": (
        lambda: compute("gather", x=torch.tensor([5, 6]), indices=1, axis=0),
        lambda: torch.tensor(6),
    ),
    "pad of constants, outer axis first": (
        lambda: compute("pad", x=X, pad=[0, 0, 0, 0, 1, 0, 0, 2], mode="constant",
                        constant_val=3.0),
        lambda: F.pad(X, [0, 2, 1, 0], value=3.0),
    ),
    "pad by reflection": (
        lambda: compute("pad", x=X, pad=[0, 0, 0, 0, 1, 2, 3, 1], mode="reflect"),
        lambda: F.pad(X, [3, 1, 1, 2], mode="reflect"),
    ),
    "new axes counted in the result": (
        lambda: compute("expand_dims", x=X, axes=[-1, 0]),
        lambda: X[None, ..., None],
    ),
    "reshape that keeps an axis": (
        lambda: compute("reshape", x=X, shape=[0, -1]),
        lambda: X.flatten(1),
    ),
    "sigmoid GELU": (
        lambda: compute("gelu", x=X, mode="SIGMOID_APPROXIMATION"),
        lambda: X * torch.sigmoid(1.702 * X),
    ),
    "logarithm of zero is the least float's": (
        lambda: compute("log", x=torch.zeros(1)) < -100,
        lambda: torch.tensor([True]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_operator(case: str) -> None:
    made, wanted = (function() for function in CASES[case])
    assert made.shape == wanted.shape
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)


def test_split_in_pieces_given_or_counted() -> None:
    by_sizes = compute("split", x=X, split_sizes=[1, 3], axis=1)
    assert [part.shape[1] for part in by_sizes] == [1, 3]
    by_number = compute("split", x=X, num_splits=2, axis=1)
    assert torch.equal(torch.cat(by_number, 1), X)


class Zoo(nn.Module):
    """Operators that a vision model may have beside those of the tiny models."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.GroupNorm(2, 4)
        self.first = nn.Conv2d(3, 4, 3, padding="same")
        with torch.no_grad():
            self.groups.weight.uniform_(0.5, 2)
            self.groups.bias.uniform_(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(self.first(x))
        x = F.max_pool2d(x, 3, 2, 1) + F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        x = F.hardswish(x) + F.leaky_relu(x, 0.2) - F.hardsigmoid(x) + F.elu(x) * F.relu6(x)
        x = torch.cat([x.roll(3, 2), F.silu(x)], 1)
        x = F.pixel_unshuffle(F.pad(x, (2, 2, 2, 2), mode="reflect"), 2)
        x = torch.where(x > 0, x.sqrt(), x.square().clamp(max=4))
        first, second = x.unbind(3)[0], x.amax(3)
        return torch.stack([first.mean(2), F.normalize(second, dim=1).sum(2)], 2).flatten(1)


def test_a_zoo_of_operators_survives_the_way_through_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = package_of(Zoo(), FULL, tmp_path)
    batch = images(3)
    program = MilProgram(made.path)
    assert sqnr_db(made.graph_module(batch), program(batch)) >= 100
    assert len(program.operators) >= 15


def test_an_unknown_operator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OPERATORS, "gelu")
    monkeypatch.delitem(OPERATORS, "layer_norm")
    with pytest.raises(DeploykitError, match=r"not known in torch: gelu, layer_norm$"):
        MilProgram(package("vit").path)


def test_a_failing_operator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    program = MilProgram(package("cnn").path)
    monkeypatch.setitem(OPERATORS, "relu", lambda call: call.tensor("absent"))
    with pytest.raises(DeploykitError, match="relu 'relu_cast_fp16' failed"):
        program(images(1))


@pytest.mark.parametrize("shape", [(1, 3, 31, 32), (65, 3, 32, 32), (3, 32, 32)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"wanted images of 1\.\.64 x 3 x 32 x 32, got"):
        MilProgram(package("cnn").path)(torch.zeros(shape))


def test_what_float16_cannot_hold_is_not_finite(tmp_path: Path) -> None:
    """A package whose values overflow in float16 doesn't pass for a good one."""

    class Loud(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 6e4 * 10).mean((2, 3)) / 1e5

    batch = images(2)
    loud = package_of(Loud(), HALF, tmp_path)
    assert torch.isfinite(loud.graph_module(batch)).all()
    assert not torch.isfinite(MilProgram(loud.path)(batch)).all()
