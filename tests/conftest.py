"""Fixtures: a tiny model with data, ready for the whole pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny_models


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks for a hub, so none waits for one."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("DEPLOYKIT_WEIGHTS", raising=False)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images labelled with what the tiny model itself answers, so its accuracy is 100 %."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (48, 4, 4, 3), dtype=np.uint8)
    images = coarse.repeat(8, axis=1).repeat(8, axis=2)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        labels = tiny_models.tiny_hybrid()((pixels - 0.5) / 0.25).argmax(1)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, images=images, labels=labels.numpy())
    return path


@pytest.fixture
def tiny_options(tiny_data: Path) -> dict[str, Any]:
    """Options of ``deploykit.compress`` that finish in seconds."""
    return {
        "recipe": {
            "measure": {"min_samples": 16, "min_seconds": 0.05, "max_seconds": 0.3,
                        "warmup_seconds": 0.0},
            "verify": {"images": 16, "batch_sizes": [1, 5]},
        },
        "model": "tests.tiny_models:tiny_hybrid",
        "calib": tiny_data,
        "calib_images": 32,
        "data": tiny_data,
    }  # fmt: skip
