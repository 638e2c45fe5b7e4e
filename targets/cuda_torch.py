"""torch on an NVIDIA GPU, compiled, launched as CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploykit.errors import TargetMissingError
from deploykit.targets.nvidia import gpu_missing
from deploykit.targets.registry import Runner, register_target
from deploykit.targets.torch_graph import GraphRunner, count_kernels, import_torch, read_graph

__all__ = ["CudaTorch"]


@register_target("cuda-torch")
class CudaTorch:
    """Float graphs in float16 (autocast), quantised ones simulated in float32.

    Codes don't survive float16 arithmetic, so a simulation has to be float32. A call copies the
    images to the GPU, runs, copies the logits back and waits for that.
    """

    name: str
    formats: tuple[str, ...] = ("torch", "json")
    exporter: str = "torch"
    floats: str = "float16"

    def available(self) -> str | None:
        """None, or what is missing: a driver, a GPU, or a torch built for CUDA."""
        missing = gpu_missing()
        if missing is not None:
            return f"cuda-torch needs an NVIDIA GPU, but {missing}; run on a machine with one"
        torch = import_torch()
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} can't use the GPU; install torch's build for CUDA"
        return None

    def runtime(self) -> str:
        """Name, versions, the GPU and its generation, float precision."""
        self._require()
        torch = import_torch()
        major, minor = torch.cuda.get_device_capability()
        return (
            f"torch {torch.__version__}, compiled with CUDA graphs, CUDA {torch.version.cuda}, "
            f"{torch.cuda.get_device_name()} (SM{major}{minor}), {self.floats}"
        )

    def kernels(self, path: Path) -> dict[str, int]:
        """Layers and products of the graph, and the roundings that are simulated."""
        return count_kernels(path)

    def load(self, path: Path, threads: int) -> Runner:  # noqa: ARG002  a GPU has its own
        """The graph on the GPU that torch calls current, to be compiled at the first call.

        Raises:
            TargetMissingError: a driver, a GPU or torch's build for CUDA is missing.
            UsageError: the file is not there, or is no saved graph.
        """
        return self._compiled(path, "reduce-overhead")

    def load_launched(self, path: Path) -> Runner:
        """As ``load``, the same kernels launched one by one: replayed, they bear no names."""
        return self._compiled(path, "default")

    def _compiled(self, path: Path, mode: str) -> Runner:
        self._require()
        torch = import_torch()
        saved = read_graph(path)
        half = saved.precision == "fp32"
        compiled = torch.compile(saved.graph_module.to("cuda"), mode=mode, dynamic=False)

        def run(images: Any) -> Any:
            with torch.autocast("cuda", torch.float16, enabled=half):
                logits = compiled(images.to("cuda"))
            return logits.float().cpu()  # waits; and the graph's own output is written over

        return GraphRunner(path, saved, run, self.floats if half else "float32")

    def device_memory_bytes(self) -> int:
        """Most memory that torch ever reserved on the GPU in this process."""
        return int(import_torch().cuda.max_memory_reserved())

    def _require(self) -> None:
        if (reason := self.available()) is not None:
            raise TargetMissingError(reason)
