"""Handing a graph to another environment: a ``torch.export`` archive with none of our operators."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import fx

from deploykit.errors import DeploykitError
from deploykit.types import Backbone

__all__ = ["archived", "removed_on_error"]


@contextlib.contextmanager
def archived(graph_module: fx.GraphModule, backbone: Backbone) -> Iterator[Path]:
    """A temporary ``.pt2`` file of the graph for one image (1, 3, S, S).

    Raises:
        DeploykitError: torch.export refuses the graph at batch 1.
    """
    size = backbone.preprocessing.size
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        path = Path(folder) / "graph.pt2"
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.export's notes to its own developers
                program = torch.export.export(graph_module, (torch.zeros(1, 3, size, size),))
                torch.export.save(program, path)
        except Exception as error:  # torch.export raises many unrelated types
            text = str(error).strip() or type(error).__name__
            message = f"{backbone.name} can't be handed on: {text.splitlines()[0]}"
            raise DeploykitError(message) from error
        yield path


@contextlib.contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """Leave no half-made file or folder behind."""
    try:
        yield
    except BaseException:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        raise
