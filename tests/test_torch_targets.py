"""The torch targets: saved graphs, float and quantised, run as they are and compiled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploykit.artifacts import ArtifactWriter
from deploykit.errors import MeasurementError, TargetMissingError, UsageError
from deploykit.export.registry import Source, get_exporter
from deploykit.export.structure import STRUCTURE_NAME, TENSORS_NAME, save_model
from deploykit.graph.capture import CapturedModel
from deploykit.graph.quantized import QuantizedModel
from deploykit.progress import Reporter
from deploykit.quant.quantize import QuantizeOptions, quantize
from deploykit.targets.measure import measure
from deploykit.targets.nvidia import gpu_missing
from deploykit.targets.registry import get_target
from deploykit.workspace import open_workspace
from tests.graphs import captured, images
from tests.tiny_models import SIZE, tiny_hybrid


@pytest.fixture(scope="module")
def model() -> CapturedModel:
    return captured(tiny_hybrid(), SIZE)


@pytest.fixture(scope="module")
def quantized(model: CapturedModel) -> QuantizedModel:
    return quantize(model, QuantizeOptions(8, 8), lambda: [images(8, SIZE, seed=1)])


def saved(folder: Path, model: CapturedModel | QuantizedModel, bits: str, **facts: Any) -> Path:
    folder.mkdir(parents=True)
    save_model(model.graph_module, model.backbone, folder, precision=bits, **facts)
    return folder


def run(name: str, path: Path, x: Tensor) -> Tensor:
    return torch.from_numpy(get_target(name).load(path, 1)(x.numpy()))


def test_a_saved_graph_runs_as_it_was(
    model: CapturedModel, quantized: QuantizedModel, tmp_path: Path
) -> None:
    x = images(3, SIZE)
    floats = saved(tmp_path / "a.torch", model, "fp32")
    codes = saved(tmp_path / "b.torch", quantized, "w8a8")
    with torch.no_grad():
        wanted, simulated = model.graph_module(x), quantized.graph_module(x)
    for path in (floats, floats / STRUCTURE_NAME):
        torch.testing.assert_close(run("cpu-torch", path, x), wanted)
    torch.testing.assert_close(run("cpu-torch", codes, x), simulated)
    assert not torch.allclose(wanted, simulated)
    target = get_target("cpu-torch")
    assert getattr(target.load(floats, 1), "precision") == "float32"  # noqa: B009
    assert getattr(target.load(codes, 1), "precision") == "float32, w8a8 simulated"  # noqa: B009


def test_nothing_of_a_simulation_is_called_an_integer_kernel(
    model: CapturedModel, quantized: QuantizedModel, tmp_path: Path
) -> None:
    target = get_target("cpu-torch")
    floats = target.kernels(saved(tmp_path / "a.torch", model, "fp32"))
    codes = target.kernels(saved(tmp_path / "b.torch", quantized, "w8a8"))
    assert floats == {"float conv2d": 4, "float linear": 1, "float matmul": 2}
    assert {name: count for name, count in codes.items() if "float" in name} == floats
    assert codes["simulated fake_quantize"] > 0
    assert not any(name.startswith("int8") for name in codes)


def test_the_file_of_a_simulation_says_what_it_is(
    quantized: QuantizedModel, tmp_path: Path
) -> None:
    path = tmp_path / "model.torch"
    source = Source(quantized.graph_module, quantized.backbone, "w8a8")
    made = get_exporter("torch").export(source, path)
    assert made.simulated
    assert "simulated in floats" in made.notes[0]
    assert sorted(file.name for file in path.iterdir()) == [TENSORS_NAME, STRUCTURE_NAME]
    workspace = open_workspace(tmp_path / "out", "recipe", "0", resume=False, overwrite=False)
    writer = ArtifactWriter(workspace, Reporter(), quantized.backbone, {})
    how = quantized.how_it_runs()
    artifact = writer.write(get_exporter("torch"), "compressed", quantized, "w8a8", **how)
    assert how["integer"]
    assert (artifact.integer, artifact.wider) == ([], [])
    assert artifact.simulated == [*how["integer"], *how["wider"], *how["simulated"]]
    workspace.discard()


def test_a_graph_for_one_image_refuses_two(model: CapturedModel, tmp_path: Path) -> None:
    path = saved(tmp_path / "one.torch", model, "fp32", dynamic_batch=False)
    runner = get_target("cpu-torch").load(path, 1)
    assert len(runner(images(1, SIZE).numpy())) == 1
    with pytest.raises(UsageError, match="one image at a time, got 2"):
        runner(images(2, SIZE).numpy())


def test_bad_files_and_shapes_are_one_line(model: CapturedModel, tmp_path: Path) -> None:
    garbage = tmp_path / STRUCTURE_NAME
    garbage.write_text("{")
    for path in (garbage, tmp_path / "gone.torch"):
        with pytest.raises(UsageError) as caught:
            get_target("cpu-torch").load(path, 1)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    runner = get_target("cpu-torch").load(saved(tmp_path / "a.torch", model, "fp32"), 1)
    with pytest.raises(MeasurementError) as failed:
        runner(np.zeros((1, 5, SIZE, SIZE), np.float32))
    assert "\n" not in str(failed.value)


def test_it_is_timed_in_a_process_of_its_own(
    model: CapturedModel, quantized: QuantizedModel, tmp_path: Path
) -> None:
    files = [
        ("original", saved(tmp_path / "a.torch", model, "fp32"), "fp32"),
        ("compressed", saved(tmp_path / "b.torch", quantized, "w8a8"), "w8a8"),
    ]
    found = measure(
        "cpu-torch", files, input_shape=(3, SIZE, SIZE), min_samples=16, min_seconds=0.05,
        max_seconds=0.5, warmup_seconds=0.05,
    )  # fmt: skip
    assert [one.artifact for one in found] == ["original", "compressed"]
    assert "eager, float32" in found[0].device.runtime


def test_without_a_c_compiler_compiling_says_so(
    model: CapturedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    path = saved(tmp_path / "a.torch", model, "fp32")
    with pytest.raises(TargetMissingError, match=r"C\+\+ compiler.*no-such-compiler"):
        get_target("cpu-torch-compiled").load(path, 1)


@pytest.mark.slow  # the compiler
def test_compiled_graphs_compute_the_same(
    model: CapturedModel, quantized: QuantizedModel, tmp_path: Path
) -> None:
    """In processes of their own: the compiler leaves settings behind."""
    code = (
        "import sys, json, numpy as np; from pathlib import Path;"
        "from deploykit.targets.registry import get_target;"
        "x = np.load(sys.argv[2]); r = get_target('cpu-torch-compiled').load(Path(sys.argv[1]), 1);"
        "print(json.dumps([r.precision, r(x).tolist(), r(x[:1]).tolist()]))"
    )
    x = images(3, SIZE)
    np.save(tmp_path / "x.npy", x.numpy())
    for one, bits, precision in (
        (model, "fp32", "float32"),
        (quantized, "w8a8", "float32, w8a8 simulated"),
    ):
        path = saved(tmp_path / f"{bits}.torch", one, bits)
        command = [sys.executable, "-c", code, str(path), str(tmp_path / "x.npy")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        said, logits, first = json.loads(done.stdout.splitlines()[-1])
        assert said == precision
        wanted = one.graph_module(x).detach()
        # a code may flip at an edge: within a few steps of the last layer's grid
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if bits == "fp32" else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(torch.tensor(logits), wanted, **tolerance)
        torch.testing.assert_close(torch.tensor(first), wanted[:1], **tolerance)


@pytest.mark.skipif(gpu_missing() is None, reason="there is a GPU")
def test_without_a_gpu_the_cuda_target_is_one_line(model: CapturedModel, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.torch", model, "fp32")
    target = get_target("cuda-torch")
    assert "needs an NVIDIA GPU" in (target.available() or "")
    for act in (target.runtime, lambda: target.load(path, 1)):
        with pytest.raises(TargetMissingError, match="needs an NVIDIA GPU") as caught:
            act()
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 6


@pytest.mark.skipif(gpu_missing() is not None, reason="needs an NVIDIA GPU")
def test_on_a_gpu_floats_are_float16_and_codes_are_exact(
    model: CapturedModel, quantized: QuantizedModel, tmp_path: Path
) -> None:
    x = images(3, SIZE)
    floats = run("cuda-torch", saved(tmp_path / "a.torch", model, "fp32"), x)
    codes = run("cuda-torch", saved(tmp_path / "b.torch", quantized, "w8a8"), x)
    torch.testing.assert_close(floats, model.graph_module(x).detach(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(codes, quantized.graph_module(x).detach(), rtol=0.02, atol=0.02)


def test_a_layer_free_graph_has_no_kernels(tmp_path: Path) -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    path = saved(tmp_path / "mean.torch", captured(Mean(), SIZE), "fp32")
    assert get_target("cpu-torch").kernels(path) == {}
