"""RepQ-ViT's own script, run to its end from the user's clone on our weights and images.

Z. Li et al., "RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision
Transformers", ICCV 2023; https://github.com/zkkli/RepQ-ViT. Its ``test_quant.main`` builds a
model, calibrates, folds, calibrates again and validates. Here the first and the last of these
are exchanged, and nothing in between.
"""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from pathlib import Path
from types import MethodType
from typing import Any

from torch import Tensor, nn

from benchmarks.peer_common import SEED, Stopwatch, accept_masks, attentions

NOTES = [
    "simulation: codes are computed as floats, LayerNorm, softmax, GELU and residuals are float",
    "the patch embedding's input has 8 bits at every width, its weights have the width named",
    "zero points of folded layers are not rounded (the peer's code): 2^b + 1 values, not 2^b",
]


def calibrated(
    clone: Path, model: nn.Module, images: Tensor, bits: str, watch: Stopwatch
) -> nn.Module:
    """The model with RepQ-ViT's quantisers in it, calibrated on ``images`` (N, 3, S, S)."""
    sys.path.insert(0, str(clone / "classification"))
    script: Any = importlib.import_module("test_quant")
    build: Any = importlib.import_module("utils.build_model")
    done: list[nn.Module] = []

    def build_model(_: str) -> nn.Module:
        prepare(model, build)
        watch.start()
        return model

    def validate(_args: object, _loader: object, quantized: nn.Module, *_: object) -> Any:
        watch.stop()
        done.append(quantized)
        return 0.0, 0.0, 0.0

    script.build_dataset = lambda _: ([(images, None)], None)
    script.build_model = build_model
    script.validate = validate
    script.args = Namespace(
        model="vit_small",
        device="cpu",
        seed=SEED,
        w_bits=int(bits[1]),
        a_bits=int(bits[3]),
    )
    script.main()
    return done[0]


def prepare(model: nn.Module, build: Any) -> None:
    """Give the attentions the peer's forward, as its ``build_model`` does.

    Modules that do nothing and have ``norm`` in their names (newer than the peer) are taken out
    of the module tree: the peer's loop takes every such name for a LayerNorm.
    """
    for attention in attentions(model):
        attention.matmul1, attention.matmul2 = build.MatMul(), build.MatMul()
        attention.forward = MethodType(build.attention_forward, attention)
        accept_masks(attention)
    for module in model.modules():
        for name, child in list(module.named_children()):
            if "norm" in name and isinstance(child, nn.Identity):
                delattr(module, name)
                object.__setattr__(module, name, _nothing)


def _nothing(x: Tensor) -> Tensor:
    return x
