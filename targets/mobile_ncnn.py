"""ncnn on this CPU."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np

from deploykit.errors import MeasurementError, UsageError
from deploykit.targets.isolated import IsolatedTarget, one_by_one
from deploykit.targets.registry import FloatArray, Runner, register_target

__all__ = ["MobileNcnn"]

_PRODUCTS = ("Convolution", "ConvolutionDepthWise", "InnerProduct", "Gemm", "MatMul", "SDPA")


@register_target("mobile-ncnn")
class MobileNcnn(IsolatedTarget):
    """Models as a phone runs them, on this machine's processor, computed in float32.

    A batch is its images one after another.
    """

    name: str
    formats: tuple[str, ...] = ("ncnn",)
    exporter: str = "ncnn"
    floats: str = "float32"
    environment: str = "ncnn"

    def import_inside(self) -> None:
        """Import the runtime."""
        import ncnn  # noqa: F401

    def runtime_inside(self) -> str:
        """Name, version and float precision."""
        return f"ncnn {version('ncnn')}, float32"

    def kernels_inside(self, path: Path) -> dict[str, int]:
        """Layers and products in the model, all of them float."""
        lines = (path / "model.param").read_text(encoding="utf-8").splitlines()[2:]
        kinds = Counter(line.split()[0] for line in lines if line.strip())
        return {f"float {kind}": kinds[kind] for kind in _PRODUCTS if kinds[kind]}

    def load_inside(self, path: Path, threads: int) -> Runner:
        """A loaded net on ``threads`` threads.

        Raises:
            UsageError: the runtime refuses the file.
        """
        import ncnn

        net = ncnn.Net()
        net.opt.num_threads = threads
        # float32 throughout: the default computes in half precision where the processor can
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        net.opt.use_bf16_storage = net.opt.use_vulkan_compute = False
        for load, name in ((net.load_param, "model.param"), (net.load_model, "model.bin")):
            if not (path / name).is_file() or load(str(path / name)) != 0:
                message = f"{path}: ncnn cannot load its {name}"
                raise UsageError(message)
        (source,), (result,) = net.input_names(), net.output_names()

        def run(image: FloatArray, /) -> FloatArray:
            extractor = net.create_extractor()
            extractor.input(source, ncnn.Mat(image[0]))
            code, logits = extractor.extract(result)
            if code != 0:
                message = f"{path}: ncnn failed on {image.shape} with code {code}"
                raise MeasurementError(message)
            return np.array(logits, dtype=np.float32).reshape(1, -1)

        return one_by_one(run)
