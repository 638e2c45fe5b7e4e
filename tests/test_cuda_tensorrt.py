"""The GPU target, with stand-ins for the GPU: what it asks of the library, and what it says."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deploykit.errors import MeasurementError, TargetMissingError, UsageError
from deploykit.targets import cuda_tensorrt, nvidia
from deploykit.targets.cuda_tensorrt import CudaTensorrt, count_kernels
from deploykit.targets.registry import get_target, list_targets

CLASSES, SIDE = 4, 8


def test_registered() -> None:
    target = get_target("cuda-tensorrt")
    assert "cuda-tensorrt" in list_targets() and target.formats == ("engine",)


def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    if nvidia.gpu_missing() is None:
        pytest.skip("a GPU is here")
    reason = CudaTensorrt().available()
    assert reason is not None and "needs an NVIDIA GPU" in reason and "\n" not in reason
    with pytest.raises(TargetMissingError, match="needs an NVIDIA GPU"):
        CudaTensorrt().load(tmp_path / "model.engine", 1)


# ── a stand-in for a GPU: torch's CPU tensors and an engine that sums each image ──────────────


class Context:
    """Reads and writes through the addresses it is given, as the library does."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}
        self.streams: list[int] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "image"
        self.shape = shape
        return shape[0] <= 2

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == "logits"
        return (self.shape[0], CLASSES)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        if self.fails:
            return False
        count = int(np.prod(self.shape))
        image = np.ctypeslib.as_array(
            (ctypes.c_float * count).from_address(self.addresses["image"])
        )
        size = self.shape[0] * CLASSES
        logits = (ctypes.c_float * size).from_address(self.addresses["logits"])
        sums = image.reshape(self.shape[0], -1).sum(1)
        logits[:] = list(np.repeat(sums, CLASSES))
        return True


class Engine:
    num_io_tensors = 2

    def __init__(self, context: Context | None, kinds: str = "io", dtype: str = "float") -> None:
        self.context, self.kinds, self.dtype = context, kinds, dtype

    def get_tensor_name(self, index: int) -> str:
        return ("image", "logits")[index]

    def get_tensor_mode(self, name: str) -> str:
        return self.kinds[("image", "logits").index(name)]

    def get_tensor_dtype(self, _: str) -> str:
        return self.dtype

    def get_tensor_profile_shape(self, *_: Any) -> Any:
        return (1, 3, SIDE, SIDE), (1, 3, SIDE, SIDE), (2, 3, SIDE, SIDE)

    def create_execution_context(self) -> Context | None:
        return self.context

    def create_engine_inspector(self) -> Any:
        text = '{"Layers": [{"Name": "{ForeignNode[a...b]}", "LayerType": "Myelin"}]}'
        return SimpleNamespace(get_engine_information=lambda form: text if form == "json" else "")


class ILogger:
    pass


def library(name: str, engine: Engine | None) -> Any:
    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            if engine is None:
                self.logger.log(SimpleNamespace(name="ERROR"), "Magic tag\ndoes not match")
            return engine if data == b"engine" else None

    return SimpleNamespace(
        __name__=name,
        __version__="1.0",
        ILogger=ILogger,
        Runtime=Runtime,
        TensorIOMode=SimpleNamespace(INPUT="i", OUTPUT="o"),
        DataType=SimpleNamespace(FLOAT="float"),
        LayerInformationFormat=SimpleNamespace(JSON="json"),
    )


class Stream:
    cuda_stream = 77
    waited = 0

    def __init__(self, device: Any) -> None:
        pass

    def synchronize(self) -> None:
        Stream.waited += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that puts libraries in place and gives the path of an engine file."""
    cuda = SimpleNamespace(
        Stream=Stream,
        current_device=lambda: 0,
        stream=lambda _: contextlib.nullcontext(),
        is_available=lambda: True,
        get_device_capability=lambda: (8, 9),
        get_device_name=lambda: "Stand-in GPU",
    )
    stand_in = SimpleNamespace(
        cuda=cuda,
        device=lambda *_: torch.device("cpu"),
        empty=torch.empty,
        float32=torch.float32,
        from_numpy=torch.from_numpy,
        version=SimpleNamespace(cuda="13.0"),
        __version__="2.13.0",
    )
    monkeypatch.setattr(cuda_tensorrt, "_torch", lambda: stand_in)
    monkeypatch.setattr(cuda_tensorrt, "gpu_missing", lambda: None)
    file = tmp_path / "model.engine"
    file.write_bytes(b"engine")

    def place(*libraries: Any) -> Path:
        monkeypatch.setattr(cuda_tensorrt, "find_libraries", lambda: list(libraries))
        return file

    return place


def pixels(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).random((count, 3, SIDE, SIDE), dtype=np.float32)


def test_runs_on_its_stream_and_waits(gpu: Any) -> None:
    context = Context(fails=False)
    path = gpu(library("tensorrt", None), library("tensorrt_rtx", Engine(context)))
    run = CudaTensorrt().load(path, 1)
    waited = Stream.waited
    for count, seed in ((1, 0), (1, 1), (2, 2), (1, 3)):
        batch = pixels(count, seed)
        expected = np.repeat(batch.reshape(count, -1).sum(1)[:, None], CLASSES, 1)
        np.testing.assert_allclose(run(batch), expected, rtol=1e-5)
    assert set(context.streams) == {77} and Stream.waited == waited + 4
    batch = pixels(1)[:, :, ::-1]  # not contiguous
    assert run(batch).dtype == np.float32


def test_says_what_is_at_hand(gpu: Any) -> None:
    gpu(library("tensorrt_rtx", None))
    assert CudaTensorrt().available() is None
    text = CudaTensorrt().runtime()
    assert "tensorrt_rtx 1.0" in text and "Stand-in GPU (SM89)" in text and "precision" in text


def test_batch_outside_the_profile_is_one_line(gpu: Any) -> None:
    run = CudaTensorrt().load(gpu(library("tensorrt", Engine(Context(fails=False)))), 1)
    with pytest.raises(MeasurementError, match=r"built for \(1, 3, 8, 8\) to \(2, 3, 8, 8\)"):
        run(pixels(3))
    assert run(pixels(2)).shape == (2, CLASSES)


def test_a_failed_run_is_one_line(gpu: Any) -> None:
    run = CudaTensorrt().load(gpu(library("tensorrt", Engine(Context(fails=True)))), 1)
    with pytest.raises(MeasurementError, match="TensorRT failed on") as error:
        run(pixels(1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (None, "cannot be loaded .*Magic tag does not match"),
        (Engine(None), "cannot run it"),
        (Engine(None, kinds="oo"), "one input and one output, it has 0 and 2"),
        (Engine(None, dtype="half"), "image is another type"),
    ],
)
def test_engines_that_do_not_fit(gpu: Any, engine: Engine | None, reason: str) -> None:
    path = gpu(library("tensorrt", engine))
    with pytest.raises(UsageError, match=reason):
        CudaTensorrt().load(path, 1)
    with pytest.raises(UsageError, match="no such file"):
        CudaTensorrt().load(path.with_name("gone.engine"), 1)


def test_kernels(gpu: Any) -> None:
    path = gpu(library("tensorrt", Engine(None)))
    assert CudaTensorrt().kernels(path) == {"compiled program": 1}
    layer = {
        "Name": "node_Conv_1 + node_relu",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Format/Datatype": "Thirty-two wide channel vectorized Int8"}],
        "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8",
    }
    product = {
        "Name": "node_matmul",
        "LayerType": "MatrixMultiply",
        "Inputs": [{"Format/Datatype": "Row major linear FP16"}],
    }
    sparse = product | {"TacticName": "sm80_xmma_sparse_gemm_f16f16_f16f16_f16_tn_n"}
    other = {"Name": "copy", "LayerType": "Reformat", "Inputs": [{"Format/Datatype": "Int8"}]}
    found = count_kernels({"Layers": [layer, layer, product, sparse, other]})
    assert found == {
        "int8 CaskConvolution": 2,
        "float MatrixMultiply": 1,
        "float sparse MatrixMultiply": 1,
    }
    assert count_kernels({}) == {}
    assert list(count_kernels({"Layers": ["a name"]})) == [
        "unknown: the engine was built without layer details"
    ]


# ── what is shared ────────────────────────────────────────────────────────────────────────────


def test_a_driver_that_fails_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def __init__(self, code: int, count: int) -> None:
            self.code, self.count = code, count

        def cuInit(self, _: int) -> int:  # noqa: N802
            return self.code

        def cuDeviceGetCount(self, pointer: Any) -> int:  # noqa: N802
            pointer._obj.value = self.count
            return 0

    for driver, said in (
        (Driver(0, 1), None),
        (Driver(0, 0), "finds no GPU"),
        (Driver(100, 0), "CUDA error 100"),
    ):
        monkeypatch.setattr(ctypes, "CDLL", lambda _, driver=driver: driver)
        reason = nvidia.gpu_missing()
        assert reason is None if said is None else reason is not None and said in reason


def test_messages_are_one_telling_line() -> None:
    messages = [
        ("WARNING", "something"),
        ("ERROR", "In f: CUDA driver version is insufficient for CUDA runtime version"),
        ("ERROR", "Conv:\n bad weights (In build at /_src/builder.cpp:12)"),
    ]
    assert nvidia.first_error(messages, "none") == "Conv: bad weights"
    assert nvidia.first_error([], "none") == "none"
    assert len(nvidia.tidy("x" * 1000)) == 300
