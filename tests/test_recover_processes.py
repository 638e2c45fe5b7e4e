"""Several processes recover one student together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deploykit.prune.recover import recover
from tests.recovery import QUICK, Waves, cnn, damaged, weights

pytest.importorskip("accelerate")


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_twice_the_batch(tmp_path: Path) -> None:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "tests.recovery_processes", str(tmp_path)]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    details = json.loads((tmp_path / "0.json").read_text())
    assert details["processes"] == 2 and details["steps"] == 3
    assert details["best"] == json.loads((tmp_path / "1.json").read_text())["best"]

    alone, record = recover(
        damaged(cnn()), cnn(), replace(QUICK, batch_size=16, epochs=1), Waves(64)
    )
    for name, weight in weights(alone).items():
        torch.testing.assert_close(first[name], weight, rtol=1e-3, atol=1e-5)
    assert record.details["best"]["kl"] == pytest.approx(details["best"]["kl"], rel=1e-3)
    before = record.details["history"][-1]["loss"]
    assert details["history"][-1]["loss"] == pytest.approx(before, rel=1e-3)
