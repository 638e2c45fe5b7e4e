"""A trial's work without a model."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from deploykit.sweep.trial import TrialRequest
from deploykit.targets.device import allowed_cores
from deploykit.targets.exclusive import measuring_alone

WORK = "tests.pretended_trial:pretend"


def pretend(request: TrialRequest) -> dict[str, Any]:
    """Figures that follow from the recipe, after a while; every start and end leaves a line."""
    section = request["recipe"]["quantize"]
    bits, edge = int(section["bits"][1]), section["edge_bits"]
    if section.get("softmax") == "log2" and bits == 3:
        os.abort()  # this one crashes
    diary = Path(request["out"]).parent.parent / "diary.jsonl"

    def write(event: str) -> None:
        line = {"event": event, "number": request["number"], "at": time.monotonic(),
                "cores": allowed_cores()}  # fmt: skip
        with diary.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    write("start")
    time.sleep(0.05)
    with measuring_alone():
        write("measure")
        time.sleep(0.02)
        write("measured")
    write("end")
    softmax = {"uniform": 0.0, "log2": 0.7, "twin-uniform": 0.3}[section.get("softmax", "uniform")]
    ratio = 0.3 + 0.05 * (bits - 3) + 0.02 * (edge - 4) ** 2 + 0.1 * softmax
    time_ = {"target": "cpu-onnxruntime", "device": "pretended", "p50_ms": 10 * ratio,
             "ratio": ratio, "ratio_low": ratio, "ratio_high": ratio, "noisy": False,
             "pinned_to": allowed_cores()}  # fmt: skip
    top1 = 90 - 30 / bits**2 - edge / 9 + softmax
    return {"state": "complete", "model": "pretended", "drop": 1.0, "top1": top1,
            "bytes": 1000 * bits + 100 * edge, "times": [time_]}  # fmt: skip


def sleep(_: TrialRequest) -> dict[str, Any]:
    """Takes longer than anybody waits."""
    time.sleep(600)
    return {}
