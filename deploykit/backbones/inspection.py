"""Facts about a backbone that need no captured graph: what ``deploykit inspect`` starts with."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from deploykit.graph.macs import count_macs
from deploykit.types import Backbone, FeatureLevel, Preprocessing, WeightsOrigin

__all__ = ["Inspection", "inspect_backbone"]

_SIZE_STEP = 32  # the coarsest stride in common use: a conv net that is free takes this step


class Inspection(BaseModel):
    """What is known of a backbone before anything is done to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    family: str
    paper: str
    weights: WeightsOrigin
    num_classes: int
    levels: list[FeatureLevel] = Field(default=[], description="feature maps, in place of classes")
    preprocessing: Preprocessing
    params: int = Field(description="parameters, buffers not counted")
    macs: int = Field(description="multiply-adds for one image, in linear, conv and matmul")
    input_policy: Literal["fixed", "free"] = Field(
        description="free: takes images 32 pixels smaller and larger as well"
    )
    captured_ops: dict[str, int] = Field(default={}, description="operator: count, once captured")
    reach: dict[str, dict[str, int | str]] = Field(
        default={}, description="what each pass or target can do with it, once captured"
    )
    notes: list[str] = []


def inspect_backbone(backbone: Backbone, notes: list[str] | None = None) -> Inspection:
    """Count and probe a copy of the backbone; the backbone itself isn't run."""
    module = copy.deepcopy(backbone.module).eval()
    size = backbone.preprocessing.size
    return Inspection(
        name=backbone.name,
        family=backbone.family,
        paper=backbone.paper,
        weights=backbone.weights,
        num_classes=backbone.num_classes,
        levels=list(backbone.levels),
        preprocessing=backbone.preprocessing,
        params=sum(p.numel() for p in module.parameters()),
        macs=count_macs(module, size),
        input_policy="free" if _is_free(module, size) else "fixed",
        notes=list(notes or []),
    )


def _is_free(module: nn.Module, size: int) -> bool:
    for other in (size - _SIZE_STEP, size + _SIZE_STEP):
        if other < _SIZE_STEP:
            continue
        try:
            with torch.no_grad():
                module(torch.zeros(1, 3, other, other))
        except Exception:  # a network's refusals have no common type
            return False
    return True
