"""AdaLog's calibration, run from the user's clone on our weights and images.

Z. Wu et al., "AdaLog: Post-Training Quantization for Vision Transformers with Adaptive Logarithm
Quantizer", ECCV 2024; https://github.com/GoatWu/AdaLog. Calibration only (the tables' "Calibrate"
columns), without its block reconstruction.

The peer asks for CUDA. Here its ``.cuda()`` calls do nothing, and it is told of a device with
``memory`` bytes, from which it chooses how many candidates to try at once: that changes the
memory and the time it takes, not what it finds. Little is best, one at a time: several at once
don't fit a CPU's cache, and took three times as long.

Its search tries 128 candidates in 6 steps and 3 rounds for every layer, about a thousand TFLOP
for a ViT-S and 32 images: seconds on a GPU, hours on two cores. Two options make it shorter.

``gram``: the weight candidates' errors ``|R - X (W_c - W)'|^2``, with ``R`` the error that the
    quantised input alone makes, are computed as ``|R|^2 - 2 d (X'R) + d (X'X) d'``: the same
    numbers from fewer operations (a layer has many more tokens than inputs). Less work, nothing
    else; the search itself stays the peer's.
``token_stride``: activation candidates are judged on every n-th token only. A deviation from
    the peer; the candidates themselves still come from all tokens.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.peer_common import Stopwatch, accept_masks, attentions

PEER_SEED = 5  # the peer's default
NOTES = [
    "simulation: codes are computed as floats, LayerNorm, softmax, GELU and residuals are float",
    "calibration only, without the peer's block reconstruction",
    "the patch embedding's input is not quantised (the peer skips 8-bit inputs of convolutions)",
    "q, k and v have a scale per head",
]
CONFIGS = {"w3a3": "configs.3bit", "w4a4": "configs.4bit", "w6a6": "configs.6bit"}


def deviations(gram: bool, token_stride: int) -> list[str]:
    """What a run did otherwise than the peer, for the results."""
    found = []
    if gram:
        found.append("weight candidates' errors computed from Gram matrices: same values")
    if token_stride > 1:
        found.append(f"DEVIATION: activation candidates judged on every {token_stride}th token")
    return found


def calibrated(
    clone: Path,
    model: nn.Module,
    images: Tensor,
    bits: str,
    watch: Stopwatch,
    *,
    memory: int,
    gram: bool,
    token_stride: int,
    only: Callable[[str], bool] | None = None,
) -> tuple[nn.Module, dict[str, float]]:
    """The model with AdaLog's quantisers in it, and the seconds each layer's search took.

    Follows the calibration half of the peer's ``test_quant.main``. ``only`` picks layers by name
    for an estimate; the model is then of no other use.
    """
    sys.path.insert(0, str(clone))
    wrap: Any = importlib.import_module("utils.wrap_net")
    calibrator: Any = importlib.import_module("utils.calibrator")
    layers = [importlib.import_module(f"quant_layers.{n}") for n in ("linear", "conv", "matmul")]
    config = importlib.import_module(CONFIGS[bits]).Config()
    config.calib_size = config.calib_batch_size = len(images)
    torch.manual_seed(PEER_SEED)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_cuda(layers, memory))
        if gram:
            _use_gram(stack, layers[0])
        if token_stride > 1:
            _use_fewer_tokens(stack, layers, token_stride)
        seconds = _time_layers(stack, layers)
        model = wrap.wrap_modules_in_net(model, config, reparam=True).eval()
        for attention in attentions(model):
            accept_masks(attention)
        module: Any
        for name, module in model.named_modules():
            module.peer_name = name
            if only is not None and hasattr(module, "calibrated") and not only(name):
                module.calibrated = True
        watch.start()
        loader = [(images, torch.zeros(len(images)))]
        calibrator.QuantCalibrator(model, loader).batching_quant_calib()
        if only is None:
            model = wrap.wrap_reparamed_modules_in_net(model)
            for module in model.modules():
                if hasattr(module, "mode") and hasattr(module, "reparam_bias"):
                    module.reparam_bias()
        watch.stop()
    return model, seconds


@contextlib.contextmanager
def _without_cuda(layers: list[Any], memory: int) -> Iterator[None]:
    """Keep everything on the CPU and let the peer's modules believe that there is CUDA."""

    class Properties:
        total_memory = memory

    class Cuda:
        @staticmethod
        def is_available() -> bool:
            return True

        @staticmethod
        def get_device_properties(_: int) -> Properties:
            return Properties()

    class Torch:
        cuda = Cuda()

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    def stay(self: Tensor, *_args: object, **_options: object) -> Tensor:
        return self

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.Tensor, "cuda", stay))
        for module in layers:  # only these: torch itself must go on knowing that there is none
            stack.enter_context(mock.patch.object(module, "torch", Torch()))
        yield


def _time_layers(stack: contextlib.ExitStack, layers: list[Any]) -> dict[str, float]:
    """Collect the seconds of each layer's search, by the layer's name."""
    seconds: dict[str, float] = {}

    def timed(search: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(self: Any) -> Any:
            began = time.perf_counter()
            try:
                return search(self)
            finally:
                seconds[self.peer_name] = (
                    seconds.get(self.peer_name, 0.0) + time.perf_counter() - began
                )

        return run

    outer = {
        "linear": (
            "AsymmetricallyBatchingQuantLinear",
            "AsymmetricallyChannelWiseBatchingQuantLinear",
            "PostGeluLogBasedBatchingQuantLinear",
        ),
        "conv": ("AsymmetricallyBatchingQuantConv2d",),
        "matmul": (
            "AsymmetricallyBatchingQuantMatMul",
            "PostSoftmaxAsymmetricallyBatchingQuantMatMul",
        ),
    }
    for module in layers:
        for name in outer[module.__name__.rpartition(".")[2]]:
            kind = getattr(module, name)
            method = "hyperparameter_searching"
            stack.enter_context(mock.patch.object(kind, method, timed(vars(kind)[method])))
    return seconds


def gram_weight_errors(
    x: Tensor, weight: Tensor, residual: Tensor, scale: Tensor, zero_point: Tensor, levels: int
) -> Tensor:
    """Squared output errors of weight candidates, less what all candidates share.

    Args:
        x: quantised inputs (tokens, in).
        weight: float weight (out, in).
        residual: wanted output minus ``x @ weight.T + bias`` (tokens, out).
        scale, zero_point: of candidate c and output o (candidates, out, 1).
        levels: number of codes.

    Returns:
        (candidates, out): ``|R - X d'|^2 - |R|^2`` with ``d`` the candidate's rounding error.
    """
    gram, cross = x.T @ x, residual.T @ x
    errors = []
    for s, z in zip(scale, zero_point, strict=True):
        d = ((weight / s).round_() + z).clamp_(0, levels - 1).sub_(z).mul_(s).sub_(weight)
        errors.append(((d @ gram - 2 * cross) * d).sum(1))
    return torch.stack(errors)


def _use_gram(stack: contextlib.ExitStack, linear: Any) -> None:
    """Exchange the scoring of weight candidates in linear layers for ``gram_weight_errors``."""
    kind = linear.AsymmetricallyBatchingQuantLinear

    def search(self: Any, scales: Tensor, zero_points: Tensor, topk: int = 1) -> Tensor:
        x = self.quant_input(self.raw_input.cuda()).reshape(-1, self.in_features)
        residual = self.raw_out.cuda().reshape(-1, self.out_features) - torch.nn.functional.linear(
            x, self.weight, self.bias
        )
        flat = (len(scales), self.out_features, 1)
        errors = gram_weight_errors(
            x,
            self.weight,
            residual,
            scales.reshape(flat),
            zero_points.reshape(flat),
            2 * self.w_quantizer.n_levels,
        )
        best = errors.topk(topk, dim=0, largest=False).indices
        best = best.reshape(topk, self.n_V, -1, 1)
        if topk == 1:
            self.w_quantizer.scale.data.copy_(torch.gather(scales, 0, best)[0])
            self.w_quantizer.zero_point.data.copy_(torch.gather(zero_points, 0, best)[0])
        return best

    stack.enter_context(mock.patch.object(kind, "_search_best_w_scale", search))


def _use_fewer_tokens(stack: contextlib.ExitStack, layers: list[Any], stride: int) -> None:
    """Let activation candidates be judged on every ``stride``-th token (query, for a matmul)."""

    def thinned(score: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, *args: Any, **options: Any) -> Any:
            inputs, out = self.raw_input, self.raw_out
            if isinstance(inputs, list):
                self.raw_input = [inputs[0][:, :, ::stride], inputs[1]]
                self.raw_out = out[:, :, ::stride]
            elif inputs.ndim == 3:
                # offset by image, so that every position of the image has its turn
                chosen = torch.arange(inputs[..., 0].numel())[::stride]
                self.raw_input = inputs.flatten(0, 1)[chosen][None]
                self.raw_out = out.flatten(0, 1)[chosen][None]
            try:
                return score(self, *args, **options)
            finally:
                self.raw_input, self.raw_out = inputs, out

        return run

    places = {
        "linear": {
            "AsymmetricallyBatchingQuantLinear": ("_search_best_a_scale",),
            "PostGeluLogBasedBatchingQuantLinear": (
                "_search_best_log_base",
                "_search_best_scale_logbase",
            ),
        },
        "matmul": {
            "AsymmetricallyBatchingQuantMatMul": ("_search_best_A_scale", "_search_best_B_scale"),
            "PostSoftmaxAsymmetricallyBatchingQuantMatMul": ("_search_best_A_log_base",),
        },
    }
    for module in layers:
        for name, methods in places.get(module.__name__.rpartition(".")[2], {}).items():
            kind = getattr(module, name)
            for method in methods:
                patched = thinned(vars(kind)[method])
                stack.enter_context(mock.patch.object(kind, method, patched))
