"""What the torch targets share: a graph that deploykit saved, run by torch.

A quantised graph is a simulation here: its codes are rounded and computed as floats. Its logits
are those of the file that ships; its speed says nothing of integer kernels, and its runner says
so in ``precision``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.errors import MeasurementError, UsageError, one_line
from deploykit.targets.registry import FloatArray

if TYPE_CHECKING:
    from deploykit.export.structure import SavedModel

__all__ = [
    "GraphRunner",
    "count_kernels",
    "import_torch",
    "layer_names",
    "read_graph",
    "use_threads",
]

_PRODUCTS = ("linear", "conv2d", "matmul", "bmm", "scaled_dot_product_attention")


def import_torch() -> Any:
    """Imported when it is used: the other targets' measuring process does without."""
    import torch

    return torch


def read_graph(path: Path) -> SavedModel:
    """The saved graph in a folder, or beside and in ``structure.json``.

    Raises:
        UsageError: the files are not there, or are no saved graph.
    """
    # The one place where this room reads a format of ours: no foreign runtime does.
    from deploykit.export.structure import load_model

    return load_model(path)


def layer_names(graph_module: Any) -> dict[str, str]:
    """The layer that each convolution, linear layer and matrix product computes, by node."""
    from deploykit.graph.layer_names import computing_layers

    return {node.name: name for node, name in computing_layers(graph_module)}


def use_threads(threads: int) -> None:
    """Let torch compute on this many threads."""
    torch = import_torch()
    torch.set_num_threads(threads)
    with suppress(RuntimeError):  # it was used in parallel already, so it can't be set any more
        torch.set_num_interop_threads(1)


def count_kernels(path: Path) -> dict[str, int]:
    """Layers and products of the graph, all of them float, and the roundings simulated."""
    counts: Counter[str] = Counter()
    for node in read_graph(path).graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        room, _, rest = str(node.target).partition(".")
        name = rest.partition(".")[0]
        if room == "aten" and name in _PRODUCTS:
            counts[f"float {name}"] += 1
        elif room == "deploykit":
            counts[f"simulated {name}"] += 1
    return dict(counts)


class GraphRunner:
    """A saved graph to be called with images float32 (N, 3, S, S).

    Args:
        path: what messages call it.
        saved: the graph, for what it says of itself.
        run: images as a torch tensor to logits as a torch tensor on the CPU.
        floats: the precision that floats are computed in.
    """

    def __init__(
        self, path: Path, saved: SavedModel, run: Callable[[Any], Any], floats: str
    ) -> None:
        self._path = path
        self._one_image = not saved.dynamic_batch
        self._run = run
        whole = saved.precision == "fp32"
        self.precision = floats if whole else f"{floats}, {saved.precision} simulated"
        """What is really computed in, such as ``float32, w8a8 simulated``."""

    def __call__(self, images: FloatArray, /) -> FloatArray:
        if self._one_image and len(images) != 1:
            message = f"{self._path}: the graph takes one image at a time, got {len(images)}"
            raise UsageError(message)
        torch = import_torch()
        batch = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
        try:
            with torch.inference_mode():
                logits = self._run(batch)
        except Exception as error:  # the compiler's exceptions share no base
            message = f"{self._path}: torch failed on {images.shape}: {one_line(error)}"
            raise MeasurementError(message) from error
        return np.asarray(logits.numpy(), dtype=np.float32)
