"""What every run of ``benchmarks/peers.py`` shares: the model, the images, the measurement.

The model is the fine-tuned DINOv2 ViT-S/14 at 168 px with ten Imagenette classes; see
``benchmarks/accuracy.py`` for the folder.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.build import build_backbone
from deploykit.data import ImageSet, open_dataset
from deploykit.evaluate import paired_accuracy, top1_and_predictions
from deploykit.recipe import ModelSection
from deploykit.types import Backbone

CALIBRATION_IMAGES = 32
SEED = 0
BATCH = 50


def load_backbone(data: Path) -> Backbone:
    """The real ViT, float32, attention as matmul, softmax, matmul."""
    section = ModelSection(
        name="vit_small_patch14_dinov2",
        img_size=168,
        weights=str(data / "weights" / "dinov2_s_imagenette_168.safetensors"),
    )
    return build_backbone(section, SEED)[0]


def calibration_tensor(data: Path, backbone: Backbone, count: int) -> tuple[Tensor, str]:
    """The calibration images, float32 (count, 3, 168, 168), and their description.

    The same call as deploykit's own runs make, so both calibrate on the same images.
    """
    images = open_dataset(
        data / "imagenette" / "train",
        backbone.preprocessing,
        labelled=False,
        limit=count,
        seed=SEED,
    )
    return torch.cat([batch for batch, _ in images.tensor_batches(count)]), images.description


def validation_set(data: Path, backbone: Backbone, limit: int | None) -> ImageSet:
    """All 1,000 validation images, or ``limit`` of them for a trial."""
    return open_dataset(
        data / "imagenette" / "val",
        backbone.preprocessing,
        labelled=True,
        num_classes=backbone.num_classes,
        limit=limit,
        seed=SEED,
    )


def predictions(run: Callable[[Tensor], Tensor], images: ImageSet) -> list[int]:
    """Top-1 class of every image."""
    found: list[int] = top1_and_predictions(run, images, BATCH).tolist()
    return found


def accuracy_row(images: ImageSet, reference: list[int], found: list[int]) -> dict[str, Any]:
    """Accuracy beside the float model's, paired image by image."""
    assert images.labels is not None
    result = paired_accuracy(
        "peer", images.labels, torch.tensor(reference), torch.tensor(found), images.description
    )
    return result.model_dump(exclude={"artifact", "simulated_top1"})


def peak_rss_bytes() -> int:
    """Most memory this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stopwatch:
    """Seconds and peak memory of the part between ``start`` and ``stop``.

    Processor seconds of this process compare work on a machine that does other things as well.
    """

    def start(self) -> None:
        self.rss_before = peak_rss_bytes()
        self.began = time.perf_counter()
        self.cpu_began = time.process_time()

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self.began
        self.cpu_seconds = time.process_time() - self.cpu_began
        self.rss = peak_rss_bytes()

    def row(self) -> dict[str, Any]:
        return {
            "calibration_seconds": round(self.seconds, 2),
            "calibration_cpu_seconds": round(self.cpu_seconds, 2),
            "peak_rss_bytes": self.rss,
            "peak_rss_bytes_before_calibration": self.rss_before,
        }


def attentions(model: nn.Module) -> list[nn.Module]:
    """timm's attention modules."""
    kind = timm.models.vision_transformer.Attention
    return [module for module in model.modules() if isinstance(module, kind)]


def accept_masks(attention: nn.Module) -> None:
    """Let timm of today call an attention forward written for timm of 2022, which knew no masks.

    Raises:
        ValueError: the block does pass a mask, which such a forward would ignore.
    """
    inner = attention.forward

    def forward(x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("the peer's attention knows no masks")
        result: Tensor = inner(x)
        return result

    attention.forward = forward
