"""In ncnn's environment: from a ``torch.export`` archive to ncnn's pair of files."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

__all__ = ["PARAM", "WEIGHTS", "write"]

PARAM, WEIGHTS = "model.param", "model.bin"
_CONVERT_SECONDS = 1800


def write(program: str, path: str, half: bool) -> dict[str, int]:
    """Convert the archive at ``program`` into the new folder ``path``.

    Args:
        half: whether weights are stored in 16 bits.

    Returns:
        ncnn's layers: how many compute with weights, and how many there are.

    Raises:
        ValueError: ncnn has no layer for an operator, or the converter failed.
    """
    warnings.simplefilter("ignore")
    import torch

    exported = torch.export.load(program)
    (example,) = exported.example_inputs[0]
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        script = Path(folder) / "graph.pt"
        traced = torch.jit.trace(exported.module(), example, check_trace=False)
        traced.save(str(script))
        _convert(script, list(example.shape), half)
        layers = _layers(script.with_name("graph.ncnn.param").read_text(encoding="utf-8"))
        _check_layers(layers)
        place = Path(path)
        place.mkdir()
        shutil.copyfile(script.with_name("graph.ncnn.param"), place / PARAM)
        shutil.copyfile(script.with_name("graph.ncnn.bin"), place / WEIGHTS)
    weighted = [kind for kind in layers if kind.startswith(("Convolution", "InnerProduct"))]
    return {"float": len(weighted) + layers.count("Gemm") + layers.count("MatMul")}


def _convert(script: Path, shape: list[int], half: bool) -> None:
    from pnnx import EXEC_PATH

    inputs = f"inputshape=[{','.join(map(str, shape))}]f32"
    done = subprocess.run(
        [str(EXEC_PATH), str(script), inputs, "device=cpu", f"fp16={int(half)}"],
        cwd=script.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_CONVERT_SECONDS,
        check=False,
    )
    if done.returncode != 0 or not script.with_name("graph.ncnn.bin").is_file():
        said = done.stderr.decode(errors="replace").strip().splitlines() or [""]
        message = f"pnnx failed with exit code {done.returncode}: {said[-1][:200]}"
        raise ValueError(message)


def _layers(param: str) -> list[str]:
    """Types of the layers in a .param file: a magic number, two counts, then a line each."""
    return [line.split()[0] for line in param.splitlines()[2:] if line.strip()]


def _check_layers(layers: list[str]) -> None:
    """Converter's leftovers keep PyTorch's dotted names; ncnn's own names have no dot."""
    unknown = sorted({kind for kind in layers if not re.fullmatch(r"\w+", kind)})
    if unknown:
        message = f"ncnn has no layer for {', '.join(unknown)}"
        raise ValueError(message)
