"""torch on the CPU, operator by operator."""

from __future__ import annotations

from pathlib import Path

from deploykit.targets.registry import Runner, register_target
from deploykit.targets.torch_graph import (
    GraphRunner,
    count_kernels,
    import_torch,
    read_graph,
    use_threads,
)

__all__ = ["CpuTorch"]


@register_target("cpu-torch")
class CpuTorch:
    """The saved graph as torch runs it without compiling; quantised graphs are simulated."""

    name: str
    formats: tuple[str, ...] = ("torch", "json")
    exporter: str = "torch"
    floats: str = "float32"

    def available(self) -> str | None:
        """None: torch is always there. It is imported, so that loading is timed without that."""
        import_torch()
        return None

    def runtime(self) -> str:
        """Name, version and float precision."""
        return f"torch {import_torch().__version__}, eager, {self.floats}"

    def kernels(self, path: Path) -> dict[str, int]:
        """Layers and products of the graph, and the roundings that are simulated."""
        return count_kernels(path)

    def load(self, path: Path, threads: int) -> Runner:
        """The graph on ``threads`` threads.

        Raises:
            UsageError: the file is not there, or is no saved graph.
        """
        use_threads(threads)
        saved = read_graph(path)
        return GraphRunner(path, saved, saved.graph_module, self.floats)
