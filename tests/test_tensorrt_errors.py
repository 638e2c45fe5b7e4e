"""What goes wrong with TensorRT, and what its full library does otherwise."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from deploykit.errors import DeploykitError, TargetMissingError, UsageError
from deploykit.export import tensorrt_build
from deploykit.export.tensorrt import (
    TensorrtExporter,
    TensorrtOptions,
    ask_builder,
)
from deploykit.targets import nvidia
from tests.tensorrt_models import (
    EXACT,
    ONE_GPU,
    float_source,
    quantized_source,
)


@pytest.fixture(autouse=True)
def _rtx() -> None:
    pytest.importorskip("tensorrt_rtx")


# ── what goes wrong ───────────────────────────────────────────────────────────────────────────


def test_truncated_onnx_is_one_line(tmp_path: Path) -> None:
    whole = float_source("cnn")
    assert whole.onnx is not None
    file = tmp_path / "model.onnx"
    file.write_bytes(whole.onnx.read_bytes()[:-1000])
    source = dataclasses.replace(whole, onnx=file)
    with pytest.raises(DeploykitError, match="can't be read as an ONNX file") as error:
        TensorrtExporter(ONE_GPU).export(source, tmp_path / "model.engine")
    assert "\n" not in str(error.value)


def request(tmp_path: Path, **changes: Any) -> Any:
    values = tensorrt_build.Request(
        library="tensorrt_rtx",
        onnx=str(float_source("cnn").onnx),
        engine=str(tmp_path / "model.engine"),
        input_name="image",
        batch=[1, 2, 4],
        input_shape=[3, 32, 32],
        capabilities=["SM89"],
        workspace_mib=0,
        optimization_level=3,
        sparse=False,
        fp8=False,
        timing_cache="",
    )
    return {**values, **changes}


def test_builder_refuses_a_broken_file_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.onnx"
    file.write_bytes(b"\x08\x09 not an onnx file")
    with pytest.raises(DeploykitError, match="can't read the network") as error:
        ask_builder(request(tmp_path, onnx=str(file)), 60)
    assert "\n" not in str(error.value)


def test_builder_refuses_unsigned_codes(tmp_path: Path) -> None:
    """The reason for the dialect: should a version ever take them, the dialect can go."""
    with pytest.raises(DeploykitError, match="zero point"):
        ask_builder(request(tmp_path, onnx=str(quantized_source("cnn", 8, 8).onnx)), 60)


def test_unknown_capability(tmp_path: Path) -> None:
    options = dataclasses.replace(ONE_GPU, capabilities=("SM12345",))
    with pytest.raises(UsageError, match=r"unknown compute capability 'SM12345'.*SM89"):
        TensorrtExporter(options).export(float_source("cnn"), tmp_path / "model.engine")


def test_slow_build_is_ended(tmp_path: Path) -> None:
    with pytest.raises(DeploykitError, match=r"took more than 0.01 s"):
        ask_builder(request(tmp_path), 0.01)


def test_a_builder_that_dies_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploykit.export import tensorrt

    command = (sys.executable, "-c", "import sys; sys.exit('out of luck')")
    monkeypatch.setattr(tensorrt, "_BUILDER", command)
    with pytest.raises(DeploykitError, match=r"builder died \(exit code 1\): out of luck"):
        ask_builder(request(tmp_path), 60)


@pytest.mark.parametrize(
    "wrong", [{"batch": (0, 1, 2)}, {"batch": (4, 2, 8)}, {"optimization_level": 6},
              {"workspace_mib": 0}],
)  # fmt: skip
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="wanted"):
        TensorrtOptions(**wrong)


def test_reader_wants_the_engine_s_own_onnx(tmp_path: Path) -> None:
    path, exporter = tmp_path / "model.engine", TensorrtExporter(EXACT)
    with pytest.raises(UsageError, match="can't be read"):
        exporter.reader(path)
    exporter.export(float_source("cnn"), path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UsageError, match="belongs to another engine"):
        exporter.reader(path)


def test_missing_libraries_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "LIBRARIES", ("no_such_library",))
    reason = TensorrtExporter().available()
    assert reason is not None and "deploykit-vision[tensorrt-rtx]" in reason
    with pytest.raises(TargetMissingError):
        nvidia.find_libraries()


# ── the full library, by a stand-in: RTX under its name, without compute capabilities ─────────


class FullLibrary:
    __name__ = "tensorrt"

    def __getattr__(self, name: str) -> Any:
        import tensorrt_rtx

        if name == "ComputeCapability":
            raise AttributeError(name)
        return getattr(tensorrt_rtx, name)


@pytest.fixture
def full_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_build, "find_libraries", lambda _: [FullLibrary()])


def test_full_library_wants_a_gpu(full_library: None, tmp_path: Path) -> None:
    if nvidia.gpu_missing() is None:
        pytest.skip("a GPU is here")
    with pytest.raises(TargetMissingError, match=r"builds on the GPU .* no NVIDIA driver"):
        tensorrt_build.build(request(tmp_path, capabilities=[]))
    reason = nvidia.build_obstacle(FullLibrary())
    assert reason is not None and "choose the library tensorrt_rtx" in reason
    with pytest.raises(UsageError, match="for the GPU at hand only"):
        tensorrt_build.build(request(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_full_library_keeps_a_timing_cache(
    full_library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "gpu_missing", lambda: None)
    cache = tmp_path / "timing.cache"
    asked = request(tmp_path, capabilities=[], timing_cache=str(cache))
    answer = tensorrt_build.build(asked)
    first = cache.read_bytes()
    assert first and answer["capabilities"] == [] and not answer["cache_refused"]
    assert answer["layers"] == {"float32": 5}
    cache.write_bytes(b"another version's cache")
    tensorrt_build.build(asked)
    assert cache.read_bytes() == first
    assert {one.name for one in tmp_path.iterdir()} == {"timing.cache", "model.engine"}
    link = tmp_path / "link.cache"
    link.symlink_to(cache)
    with pytest.raises(UsageError, match="not a link or folder"):
        tensorrt_build.build({**asked, "timing_cache": str(link)})


def test_rtx_says_that_it_keeps_no_cache(tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    options = dataclasses.replace(EXACT, timing_cache=cache)
    done = TensorrtExporter(options).export(float_source("cnn"), tmp_path / "m.engine")
    assert any("no timing cache" in note for note in done.notes) and not cache.exists()
