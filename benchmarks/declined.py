"""Why some networks of the literature are not here: their operators built, exported and timed.

    python -m benchmarks.declined
    python -m benchmarks.declined --only monarch clips

Each probe builds what is special about a network with random weights, exports it to ONNX, and
times the file in ONNX Runtime, one thread, interleaved with something ordinary. Results are kept
in ``benchmarks/results/phase3.json``, and ``docs/phase3.md`` is written from them.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.declined_page import page
from benchmarks.declined_parts import (
    PARTS,
    Clip,
    FiveChannels,
    Part,
)
from deploykit.backbones.build import build_backbone
from deploykit.backbones.declined import DECLINED
from deploykit.errors import DeploykitError, one_line
from deploykit.fsio import atomic_write_text
from deploykit.graph.capture import capture
from deploykit.graph.signal import sqnr_db
from deploykit.recipe import ModelSection
from deploykit.runtimes import import_onnxruntime
from deploykit.types import Backbone, Preprocessing, WeightsOrigin

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "phase3.json", ROOT / "docs" / "phase3.md"
PRUNED, PRUNED_HOST = (
    ROOT / "benchmarks" / "results" / "prune_families.json",
    "deit_tiny_patch16_224",
)
_BLOCKS, _SECONDS = 15, 0.05  # interleaved blocks, and how long each side runs in one

Session = Any


def session_of(module: nn.Module, example: Tensor) -> tuple[Session, int, float]:
    """The module's ONNX file in ONNX Runtime, its nodes, and its largest relative error."""
    onnxruntime = import_onnxruntime()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, (example,), dynamo=True, verbose=False)
        wanted = module(example)
    assert program is not None
    program.optimize()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (given,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    error = float((torch.from_numpy(given) - wanted).abs().max() / wanted.abs().max())
    return session, len(list(program.model.graph)), error


def fastest(session: Session, example: Tensor) -> float:
    """Milliseconds of the fastest call in a block: the thread's own time, so that other work on
    the machine, which is shared, doesn't count."""
    feed = {session.get_inputs()[0].name: example.numpy()}
    best, until = float("inf"), time.thread_time() + _SECONDS
    while time.thread_time() < until:
        start = time.thread_time()
        session.run(None, feed)
        best = min(best, time.thread_time() - start)
    return best * 1e3


def timed(part: Part) -> dict[str, Any]:
    """Nodes, error and time of a part against what it is compared with."""
    torch.manual_seed(0)
    module, example = part.build()
    other, ordinary = part.against()
    session, nodes, error = session_of(module.eval(), example)
    reference, other_nodes, _ = session_of(other.eval(), ordinary)
    fastest(session, example), fastest(reference, ordinary)
    pairs = [(fastest(session, example), fastest(reference, ordinary)) for _ in range(_BLOCKS)]
    ratios = sorted(a / b for a, b in pairs)
    return {
        "part": part.what,
        "against": part.against_what,
        "nodes": nodes,
        "against_nodes": other_nodes,
        "error": error,
        "ms": statistics.median(a for a, _ in pairs),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 10],
        "ratio_high": ratios[-1 - len(ratios) // 10],
    }


def refused(module: nn.Module, what: str) -> dict[str, Any]:
    """What a capture says of a network that doesn't take three-channel images."""
    backbone = Backbone(
        name=what,
        module=module.eval(),
        preprocessing=Preprocessing(size=32, mean=(0.5,) * 3, std=(0.5,) * 3),
        weights=WeightsOrigin(kind="random", source="a probe"),
        num_classes=2,
    )
    try:
        capture(backbone)
    except DeploykitError as error:
        return {"part": what, "refused": one_line(error, 160)}
    raise AssertionError(f"{what} was captured: it is no reason to decline anything")


def pruned() -> dict[str, Any]:
    """What pruning makes of a DeiT, from the results of ``benchmarks/prune_families.py``."""
    step = json.loads(PRUNED.read_text("utf-8"))["models"][PRUNED_HOST]["prune"]
    return {"part": f"{PRUNED_HOST} pruned here", "summary": step["summary"]}


def shifted() -> dict[str, Any]:
    """How far Twins' scores move with a shift of its image, with anchoring and without."""
    torch.manual_seed(0)
    images = torch.randn(1, 3, 224, 224)
    agree: dict[str, float] = {}
    for key, insert in (("plain_db", None), ("anchored_db", "polyphase")):
        section = ModelSection(name="twins_svt_s", weights="random", insert=insert)
        module = build_backbone(section, seed=0)[0].module
        with torch.no_grad():
            agree[key] = sqnr_db(module(images), module(images.roll((3, 5), dims=(2, 3))))
    return {"part": "Twins-SVT-S, shifted by 3 and 5 pixels around the borders", **agree}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "clips": lambda: refused(Clip(), "patches of 2 frames of 16 pixels (a 3-D convolution)"),
    "channels": lambda: refused(FiveChannels(), "an image of five channels"),
    "pruned": pruned,
    "shift": shifted,
    **{name: functools.partial(timed, part) for name, part in PARTS.items()},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PROBES), default=list(PROBES))
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    args = parser.parse_args()
    missing = {entry.probe for entry in DECLINED if entry.probe} - set(PROBES)
    if missing:
        parser.error(f"no such probe: {', '.join(sorted(missing))}")
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    for name in [] if args.page else args.only:
        results[name] = PROBES[name]()
        sys.stdout.write(f"{name}: {json.dumps(results[name])}\n")
        sys.stdout.flush()
        atomic_write_text(RESULTS, json.dumps(results, indent=1, sort_keys=True) + "\n")
    atomic_write_text(PAGE, page(results))


if __name__ == "__main__":
    main()
