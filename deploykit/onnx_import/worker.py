"""The process in which a foreign file is first opened: ``python -m deploykit.onnx_import.worker``.

It reads one request from standard input and prints one line of JSON. A file that crashes a
library, or takes all memory or time it may have, ends this process and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from deploykit.errors import DeploykitError, UsageError, one_line
from deploykit.onnx_import.limits import Limits, check_model, parse, read_bytes

__all__ = ["main"]

_STDERR_BYTES = 16 * 2**20
_LIBRARIES = 8 * 2**30  # of address space: torch built for CUDA maps gigabytes
_IMAGES = 2
_FREE_SIZE = 224
_FLOAT_SQNR_DB = 80.0  # as deploykit.export.parity demands of any float file


def main() -> int:
    """Answer one request; 0 even where the answer is that the file is refused."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries write to standard output as they please
    request = json.loads(sys.stdin.buffer.read())
    path, limits = Path(request["path"]), Limits(**request["limits"])
    try:
        result = _examine(path, request["size"], limits)
    except DeploykitError as error:
        result = {"refused": str(error)}
    except MemoryError:
        result = {"refused": f"--model {path}: reading it takes more memory than is allowed"}
    except Exception as error:  # libraries refuse files in many ways
        message = f"--model {path}: not a usable ONNX file ({one_line(error, 200)})"
        result = {"refused": message}
    with answer:
        answer.write(json.dumps(result) + "\n")
    return 0


def _examine(path: Path, size: int | None, limits: Limits) -> dict[str, Any]:
    """Check, rebuild, run both, compare. The imports are late: a bad file is refused quickly."""
    most = limits.memory_bytes + 4 * limits.file_bytes + 10 * limits.tensor_bytes
    _bound("RLIMIT_CORE", 0)
    _bound("RLIMIT_FSIZE", _STDERR_BYTES)
    _bound("RLIMIT_CPU", limits.seconds)
    data = read_bytes(path, limits)
    _bound_memory(limits.memory_bytes + 4 * len(data), most)
    proto = parse(data, path)
    tensors = check_model(proto, path, limits)
    _bound_memory(limits.memory_bytes + 4 * len(data) + 10 * tensors, most)

    import onnx

    from deploykit.onnx_import.graph import digest, read_graph, used_external_files

    outside = used_external_files(proto, path.parent)
    onnx.checker.check_model(str(path) if outside else proto)
    graph = read_graph(proto, path)
    del proto
    side = graph.size or size or _FREE_SIZE
    found = _compared(data, graph, side, path, bool(outside))
    return {**found, "size": side, "sha256": digest(data, outside)}


def _compared(data: bytes, graph: Any, side: int, path: Path, outside: bool) -> dict[str, Any]:
    import numpy as np
    import torch

    from deploykit.graph.signal import sqnr_db
    from deploykit.onnx_import.module import build_module

    torch.set_num_threads(1)
    name, batches = graph.input, (1, _IMAGES) if graph.batch is None else (1,)
    module = build_module(graph, path)  # first: it refuses in clearer words
    session = _session(path if outside else data)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((_IMAGES, 3, side, side)).astype(np.float32)
    found = 999.0
    for batch in batches:
        theirs = session.run(None, {name: images[:batch]})[0]
        if theirs.ndim != 2 or theirs.shape[0] != batch:
            shape = "×".join(map(str, theirs.shape))
            message = f"the output for {batch} image(s) is {shape}, but (N, classes) is wanted"
            raise UsageError(f"--model {path}: {message}")
        if not np.isfinite(theirs).all():
            raise UsageError(f"--model {path}: it gives NaN or infinity for random images")
        with torch.no_grad():
            ours = module(torch.from_numpy(images[:batch]))
        found = min(found, sqnr_db(torch.from_numpy(theirs), ours))
    if not found >= _FLOAT_SQNR_DB:
        message = f"read as torch it differs from ONNX Runtime (SQNR {found:.0f} dB"
        wanted = f"{_FLOAT_SQNR_DB:g} dB wanted); an operator means something else here"
        raise UsageError(f"--model {path}: {message}, {wanted}")
    return {"classes": int(theirs.shape[1]), "sqnr_db": found}


def _session(model: Path | bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    given = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def _bound_memory(soft: int, hard: int) -> None:
    _bound("RLIMIT_DATA", soft, hard)
    _bound("RLIMIT_AS", soft + _LIBRARIES, hard + _LIBRARIES)


def _bound(name: str, soft: int, hard: int | None = None) -> None:
    """A limit of the operating system, never above what it already is; none on Windows."""
    try:
        import resource
    except ImportError:
        return
    kind = getattr(resource, name)
    highest = resource.getrlimit(kind)[1]
    hard = soft if hard is None else hard
    if highest != resource.RLIM_INFINITY:
        soft, hard = min(soft, highest), min(hard, highest)
    with contextlib.suppress(OSError, ValueError):  # macOS refuses RLIMIT_AS
        resource.setrlimit(kind, (soft, hard))


if __name__ == "__main__":
    sys.exit(main())
