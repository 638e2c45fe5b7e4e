"""Parameters and multiply-adds of every own family, counted here, beside the published ones.

    python benchmarks/counts.py
    python benchmarks/counts.py --only sret crate_t

Networks are built without memory for their weights (torch's meta device): parameters are exact,
multiply-adds are torch's FLOP count halved, for one image of the variant's size. Writes
``docs/counts.md``, with every own variant; nothing is timed or run on data.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from deploykit.backbones.registry import BackboneSpec, own_builder, specs, squash
from deploykit.errors import DeploykitError, one_line
from deploykit.fsio import atomic_write_text

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "counts.md"

# GMACs that torch's counter gives for the authors' code, 1000 classes, 224 pixels. None of ours:
# measured on other code, kept here as the other side of the comparison.
OFFICIAL_GMACS = {
    "casvit_xs": 0.55, "casvit_s": 0.91, "casvit_m": 1.86, "casvit_t": 3.56,
    "convvit_b": 22.97,
    "crate_t": 2.16, "crate_s": 4.55, "crate_b": 7.80, "crate_l": 26.85,
    "cswin_t": 4.32, "cswin_s": 6.80, "cswin_b": 14.96,
    "cvt_13": 4.57, "cvt_21": 7.18,
    "efficientvmamba_t": 0.66, "efficientvmamba_s": 1.14, "efficientvmamba_b": 3.69,
    "fcaformer_l1": 1.37, "fcaformer_l2": 3.60, "fcaformer_l3": 6.65, "fcaformer_l4": 14.49,
    "hornet_tiny_7x7": 3.97, "hornet_tiny_gf": 3.89, "hornet_small_7x7": 8.81,
    "hornet_base_7x7": 15.57,
    "illama_t": 1.25, "illama_s": 4.60, "illama_b": 17.56, "illama_l": 62.79,
    "l2vit_tiny": 4.69, "l2vit_small": 8.98, "l2vit_base": 15.81,
    "litv2_s": 3.72, "litv2_m": 7.46, "litv2_b": 13.17,
    "pvt_v1_tiny": 1.93, "pvt_v1_small": 3.82, "pvt_v1_medium": 6.66, "pvt_v1_large": 9.81,
    "raftmlp_s": 2.09, "raftmlp_m": 4.27, "raftmlp_l": 6.54,
    "rmt_t": 2.64, "rmt_s": 4.78, "rmt_b": 10.37, "rmt_l": 19.49,
    "sgformer_s": 4.78, "sgformer_m": 7.43, "sgformer_b": 15.54,
    "spectformer_h_s": 4.04, "spectformer_h_b": 6.59, "spectformer_h_l": 13.18,
    "spectformer_xs": 3.99, "spectformer_s": 6.63,
    "sret_t": 1.11, "sret_lt": 1.16, "sret_s": 4.17,
    "stvit_s": 4.35, "stvit_b": 9.84, "stvit_l": 15.56,
    "t2t_vit_7": 1.15, "t2t_vit_10": 1.52, "t2t_vit_12": 1.76, "t2t_vit_14": 4.78,
    "t2t_vit_19": 8.48, "t2t_vit_24": 13.66, "t2t_vit_t_14": 6.09,
    "transnext_micro": 2.65, "transnext_tiny": 5.71, "transnext_small": 10.29,
    "transnext_base": 18.30,
    "uniformer_s": 3.63, "uniformer_s_plus": 4.20, "uniformer_b": 8.25,
    "unireplknet_a": 0.67, "unireplknet_f": 0.95, "unireplknet_p": 1.63, "unireplknet_n": 2.85,
    "unireplknet_t": 5.00, "unireplknet_s": 9.22,
}  # fmt: skip


def count(name: str) -> tuple[int, int]:
    """Parameters, and multiply-adds for one image; no tensor has memory."""
    variant, build = own_builder(name)
    with torch.device("meta"):
        module = build(name, num_classes=1000, img_size=variant.input).eval()
    module.requires_grad_(False)  # the counter stumbles over views of parameters
    side = variant.input
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.empty(1, 3, side, side, device="meta"))
    params = sum(parameter.numel() for parameter in module.parameters())
    return params, int(counter.get_total_flops()) // 2


def line(spec: BackboneSpec) -> str:
    """A variant's row of the table."""
    published = "" if spec.params_m is None else f"{spec.params_m:g}"
    official = OFFICIAL_GMACS.get(spec.name)
    start = f"| {spec.family} | {spec.name} | {spec.input} | {published}"
    try:
        params, macs = count(spec.name)
    except (DeploykitError, NotImplementedError) as error:
        return f"{start} | – | {official or ''} | – | {one_line(error, 80)} |"
    difference = "" if official is None else f"{100 * (macs / 1e9 / official - 1):+.1f} %"
    return f"{start} | {params / 1e6:.2f} | {official or ''} | {macs / 1e9:.2f} | {difference} |"


def page(found: list[BackboneSpec]) -> str:
    """The table as Markdown."""
    lines = [
        "# Counts",
        "",
        "Made by `python benchmarks/counts.py`: own families at 1000 classes. *M published*: what "
        "the paper or the authors' code gives; where a paper gives none, its `paper_name` says "
        "“after the paper” and the number is this build's. *GMACs, official*: torch's counter on "
        "the authors' code, where that was run. The counter sees linear layers, convolutions and "
        "matrix products only: a Fourier transform or a scan that is a single operator there and "
        "products here makes the difference.",
        "",
        "| family | name | px | M published | M here | GMACs, official | GMACs here | difference |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|",
    ]
    return "\n".join([*lines, *map(line, found)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="families or names; prints them")
    args = parser.parse_args()
    found = [spec for spec in specs().values() if spec.source == "own"]
    unknown = set(OFFICIAL_GMACS) - {spec.name for spec in found}
    if unknown:
        parser.error(f"OFFICIAL_GMACS names what isn't here: {', '.join(sorted(unknown))}")
    found.sort(key=lambda spec: (spec.family.lower(), spec.params_m or 0.0))
    if args.only:
        wanted = {squash(text) for text in args.only}
        found = [s for s in found if {squash(s.family), squash(s.name)} & wanted]
        sys.stdout.write(page(found))
    else:
        atomic_write_text(PAGE, page(found))


if __name__ == "__main__":
    main()
