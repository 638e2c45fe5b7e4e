"""How well I-ViT's integer operators stand in for softmax, GELU and LayerNorm without training.

    python benchmarks/integer_ops.py                              # the operators alone, seconds
    python benchmarks/integer_ops.py --data FOLDER                # and top-1 of the real ViT

FOLDER is that of ``benchmarks/accuracy.py vit``. Prints Markdown. Nothing here is timed: the
operators are simulated.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from deploykit.quant.integer_ops import int_gelu, int_layer_norm, int_softmax, shift_exp

ROOT = Path(__file__).resolve().parent.parent
TOKENS, CHANNELS, ROWS = 197, 384, 4096


def symmetric(x: Tensor, bits: int) -> tuple[Tensor, float]:
    """Codes over the range of ``x``, and their scale."""
    top = 2 ** (bits - 1) - 1
    scale = float(x.abs().max()) / top
    return torch.round(x / scale).to(torch.int64), scale


def exponential(scale: float, shift: int) -> float:
    """Largest relative error of ShiftExp above the point where its range ends, percent."""
    one = torch.tensor(1.0 / scale).ceil()
    codes = -torch.arange(0, int(shift * one / 1.4375) + 1)
    got = shift_exp(codes, scale, shift).double() * scale / 2**shift
    return 100 * float((got / torch.exp(codes * scale).double() - 1).abs().max())


def softmax(spread: float, bits: int) -> tuple[float, float, float]:
    """Mean sum of a row, share of zeros in percent, largest error; 8-bit inputs."""
    x = spread * torch.randn(ROWS, TOKENS, generator=torch.Generator().manual_seed(0))
    codes, scale = symmetric(x, 8)
    out, out_scale = int_softmax(codes, scale, bits)
    values = out * out_scale
    error = float((values - torch.softmax(codes * scale, -1)).abs().max())
    return float(values.sum(-1).mean()), 100 * float((out == 0).double().mean()), error


def gelu(top: float) -> tuple[float, float]:
    """Largest error for x in [-top, top] (one row) and for x in [-top, 0]; 8-bit inputs."""
    scale = top / 127
    codes = torch.arange(-127, 128)
    out, out_scale = int_gelu(codes, scale)
    error = (out * out_scale - F.gelu(codes * scale)).abs()
    return float(error.max()), float(error[:128].max())


def layer_norm(bits: int) -> float:
    """Largest error against LayerNorm of the same codes."""
    x = torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(0))
    codes, _ = symmetric(x * torch.linspace(0.2, 5, CHANNELS), bits)
    weight, bias = torch.ones(CHANNELS), torch.zeros(CHANNELS)
    out, scale = int_layer_norm(codes, weight, bias)
    return float((out * scale - F.layer_norm(codes.double(), (CHANNELS,))).abs().max())


def real(data: Path, limit: int | None) -> list[str]:
    """Top-1 of the float ViT with only the three operators exchanged, all or one at a time."""
    sys.path.insert(0, str(ROOT))
    from benchmarks import peer_common as common
    from deploykit.graph.capture import capture
    from deploykit.quant import research_integer as research

    backbone = common.load_backbone(data)
    validation = common.validation_set(data, backbone, limit)
    calibration, source = common.calibration_tensor(data, backbone, common.CALIBRATION_IMAGES)
    captured = capture(backbone)
    reference = common.predictions(captured.graph_module, validation)
    lines = ["", "| bits of softmax, GELU | top-1 | lost, points (95 %) |", "|:--|--:|--:|"]
    row = {}
    for bits in (16, 8):
        changed = captured.copy().graph_module
        record = research.replace_with_integer_ops(changed, lambda: calibration.split(16), bits)
        row = common.accuracy_row(validation, reference, common.predictions(changed, validation))
        lost = f"{row['drop']:.1f} ({row['drop_low']:.1f} … {row['drop_high']:.1f})"
        lines.append(f"| {bits} | {row['top1']:.1f} % | {lost} |")
    lines += ["", f"{record.summary}; everything else float32; calibrated on {source}; fp32 "]
    lines[-1] += f"{row['top1_original']:.1f} % of {row['images']} images. A simulation."
    return lines


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--val-images", type=int, help="fewer than all 1,000")
    args = parser.parse_args()
    lines = ["| ShiftExp, scale | n = 15 | n = 23 |", "|:--|--:|--:|"]
    for name, scale in (("1/13", 1 / 13), ("1/64", 1 / 64), ("1/12.7", 1 / 12.7)):
        errors = " | ".join(f"{exponential(scale, shift):.1f} %" for shift in (15, 23))
        lines.append(f"| {name} | {errors} |")
    lines += ["", f"| Shiftmax, {TOKENS} logits N(0, σ²) | bits | mean row sum | zeros | error |"]
    lines += ["|:--|--:|--:|--:|--:|"]
    for spread in (1.0, 2.0, 3.0):
        for bits in (8, 16):
            total, zeros, error = softmax(spread, bits)
            lines.append(
                f"| σ = {spread:.0f} | {bits} | {total:.3f} | {zeros:.0f} % | {error:.3f} |"
            )
    lines += ["", "| ShiftGELU, range | error | error where x ≤ 0 |", "|:--|--:|--:|"]
    for top in (1.0, 2.0, 4.0, 8.0, 12.0):
        everywhere, negative = gelu(top)
        lines.append(f"| ±{top:.0f} | {everywhere:.2f} | {negative:.2f} |")
    lines += ["", "| I-LayerNorm, input bits | error |", "|:--|--:|"]
    lines += [f"| {bits} | {layer_norm(bits):.4f} |" for bits in (8, 16)]
    if args.data is not None:
        lines += real(args.data, args.val_images)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
