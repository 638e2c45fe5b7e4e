"""torch on the CPU, compiled by its Inductor."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from deploykit.errors import TargetMissingError
from deploykit.targets.cpu_torch import CpuTorch
from deploykit.targets.registry import Runner, register_target
from deploykit.targets.torch_graph import GraphRunner, import_torch, read_graph, use_threads

__all__ = ["CpuTorchCompiled"]

_COMPILERS = ("g++", "clang++", "c++", "cl")


@register_target("cpu-torch-compiled")
class CpuTorchCompiled(CpuTorch):
    """The saved graph under ``torch.compile``; quantised graphs are simulated.

    It is compiled for a shape when that comes for the first time, so the first call takes long.
    """

    def available(self) -> str | None:
        """None, or that there is no C++ compiler, which torch's needs."""
        chosen = os.environ.get("CXX")
        names = _COMPILERS if not chosen else (chosen,)
        if not any(shutil.which(name) for name in names):
            return (
                f"torch.compile needs a C++ compiler and found none of {', '.join(names)}; "
                "install one (g++), or set CXX to it"
            )
        return super().available()

    def runtime(self) -> str:
        """Name, version and float precision."""
        return f"torch {import_torch().__version__}, compiled by Inductor, {self.floats}"

    def load(self, path: Path, threads: int) -> Runner:
        """The graph on ``threads`` threads, to be compiled at the first call.

        Raises:
            TargetMissingError: there is no C++ compiler.
            UsageError: the file is not there, or is no saved graph.
        """
        if (reason := self.available()) is not None:
            raise TargetMissingError(reason)
        use_threads(threads)
        torch = import_torch()
        import torch._inductor.config as inductor

        inductor.compile_threads = 1  # a pool of compilers would live on beside what is timed
        saved = read_graph(path)
        run = torch.compile(saved.graph_module, dynamic=False)
        return GraphRunner(path, saved, run, self.floats)
