"""Tiny models and their Core ML packages, made once for all tests that read them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import fx, nn

from deploykit._compat import timm
from deploykit.export.coreml import Coreml
from deploykit.export.registry import Exported, Source
from deploykit.graph.capture import CapturedModel
from deploykit.quant.quantize import QuantizeOptions, quantize
from tests.graphs import SIZE, batches, captured, make_backbone, shake, tiny_cnn, tiny_vit
from tests.tiny_models import tiny_hybrid

HALF, FULL = Coreml(), Coreml(floats="fp32")
_FOLDER = tempfile.TemporaryDirectory(prefix="coreml-tests-")


def tiny_swin() -> nn.Module:
    """Two blocks of windowed attention, the second with shifted windows and their mask."""
    swin = timm.models.SwinTransformer(
        img_size=SIZE, patch_size=4, window_size=4, embed_dim=16, depths=(2,), num_heads=(2,),
        num_classes=10,
    )  # fmt: skip
    return shake(swin).eval()


MODELS = {"cnn": tiny_cnn, "vit": tiny_vit, "hybrid": tiny_hybrid, "swin": tiny_swin}


@dataclass(frozen=True)
class Package:
    """A graph and the package it became."""

    graph_module: fx.GraphModule
    path: Path
    exported: Exported


@cache
def model_of(name: str) -> CapturedModel:
    return captured(MODELS[name]())


@cache
def graph_of(name: str, precision: str) -> fx.GraphModule:
    """The float graph (``fp32``) or a quantised one, such as ``w4a8``."""
    if precision == "fp32":
        return model_of(name).graph_module
    weights, inputs = map(int, precision[1:].split("a"))
    options = QuantizeOptions(weights, inputs)
    return quantize(model_of(name), options, batches(count=16)).graph_module


def package(
    name: str, precision: str = "fp32", floats: str = "fp16", dynamic: bool = True
) -> Package:
    """The package of a model, what isn't quantised in ``floats``."""
    return _package(name, precision, floats, dynamic)


@cache
def _package(name: str, precision: str, floats: str, dynamic: bool) -> Package:
    exporter = FULL if floats == "fp32" else HALF
    graph_module = graph_of(name, precision)
    path = Path(_FOLDER.name) / f"{name}-{precision}-{floats}-{dynamic}.mlpackage"
    return Package(graph_module, path, write(graph_module, path, exporter, precision, dynamic))


def write(
    graph_module: fx.GraphModule,
    path: Path,
    exporter: Coreml,
    precision: str = "fp32",
    dynamic: bool = True,
) -> Exported:
    backbone = make_backbone(nn.Identity())
    metadata = {"deploykit.precision": precision, "weights": "untrained"}
    return exporter.export(Source(graph_module, backbone, precision, dynamic, metadata), path)


def package_of(module: nn.Module, exporter: Coreml, folder: Path) -> Package:
    """The package of a module made for one test."""
    graph_module = captured(module).graph_module
    path = folder / "x.mlpackage"
    return Package(graph_module, path, write(graph_module, path, exporter))
