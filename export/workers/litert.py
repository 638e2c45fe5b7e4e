"""In LiteRT's environment: from a ``torch.export`` archive to a ``.tflite`` file."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np

from deploykit.export.workers.tflite_codes import Weight, put_codes

__all__ = ["write"]


def write(
    program: str, path: str, codes: str, kinds: list[tuple[int, str, bool]]
) -> dict[str, int]:
    """Convert the archive at ``program``, put the codes in, and write ``path``.

    Args:
        codes: a ``.npz`` file with ``codes0``, ``scale0``, ``codes1`` … of the weights that the
            archive holds as floats.
        kinds: of each of them: the width of its codes, its layer's kind, and whether that layer
            must keep its input's grid.

    Returns:
        Layers by what computes them, see ``put_codes``.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import litert_torch
    import torch
    import torch.ao.quantization.fx._decomposed  # the operators in the archive
    from ai_edge_litert.tools import flatbuffer_utils

    exported = torch.export.load(program)
    (example,) = exported.example_inputs[0]
    converted = litert_torch.convert(exported.module(), (example,))
    converted.export(path)
    with np.load(codes, allow_pickle=False) as stored:
        weights = [
            Weight(stored[f"codes{i}"], stored[f"scale{i}"], *facts)
            for i, facts in enumerate(kinds)
        ]
    model = flatbuffer_utils.read_model(path)
    counts = put_codes(model, weights)
    Path(path).write_bytes(flatbuffer_utils.convert_object_to_bytearray(model))
    _try(path)
    return dict(counts)


def _try(path: str) -> None:
    """Load and run the file once: a runtime that refuses it should do so now."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=path, num_threads=1)
    interpreter.allocate_tensors()
    interpreter.invoke()
