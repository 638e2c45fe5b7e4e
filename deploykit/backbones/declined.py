"""Networks of the literature that are not here, and why: for who types their names, and for
``docs/phase3.md``, whose numbers ``benchmarks/declined.py`` measures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["DECLINED", "Declined", "why_not_here"]


@dataclass(frozen=True)
class Declined:
    """One network: how its names begin without separators, why not, and what comes nearest.

    ``nearest`` are names that resolve; ``probe`` is the measurement that shows the reason.
    """

    name: str
    pattern: str
    reason: str
    nearest: tuple[str, ...]
    probe: str = ""

    @property
    def message(self) -> str:
        return f"{self.name} is not here: {self.reason}; nearest: {', '.join(self.nearest)}"


_CLIPS = "it takes clips of frames, and one image is what is prepared, captured and measured here"
_SEARCHED = "and its layers' widths aren't established here; search or prune a host instead"
_NO_TABLE = "its widths and depths aren't established here"

DECLINED = (
    Declined(
        "UniFormer for video", r"uniformer(for)?(video|3d)", _CLIPS, ("uniformer_s",), "clips"
    ),
    Declined("UniFormerV2", r"uniformerv2", _CLIPS, ("clip_vit_b16",), "clips"),
    Declined("VideoMAE V2", r"videomae", _CLIPS, ("vit_b_mae",), "clips"),
    Declined(
        "ChAda-ViT",
        r"chadavit",
        "its number of input channels varies (microscopy) and images here have three",
        ("vit_s",),
        "channels",
    ),
    Declined(
        "SegMAN",
        r"segman",
        f"{_NO_TABLE}, and its mixer (neighbourhood attention, then a scan) is slow without its "
        "CUDA extensions",
        ("vmamba_t", "nat_tiny"),
        "local_scan",
    ),
    Declined(
        "A2Mamba",
        r"a2mamba",
        f"{_NO_TABLE}, and its mixer (two neighbourhood attentions and a scan) is slow without "
        "its CUDA extensions",
        ("vmamba_t", "dinat_tiny"),
        "attended_scan",
    ),
    Declined(
        "ViT-CoMer",
        r"vitcomer",
        "it is for dense prediction and has no classifier (its deformable attention exports)",
        ("vit_s", "litv2_s"),
        "deformable",
    ),
    Declined(
        "SparseFormer",
        r"sparseformer",
        "its whole structure isn't established here (its sampling of regions exports)",
        ("lookupvit", "vit_s"),
        "sampling",
    ),
    Declined(
        "TiC",
        r"tic([tsbl]|tiny|small|base)?$",
        "only its operator (attention as a convolution) is published, no network",
        ("nat_mini", "cswin_t"),
        "attention_conv",
    ),
    Declined("MAFormer", r"maformer", f"{_NO_TABLE} and there is no code", ("cswin_t", "gcvit_t")),
    Declined(
        "FIT",
        r"fit([tsbl]|tiny|small|base)?$",
        "there is no classifier of it, and its structure isn't established here",
        ("lookupvit",),
    ),
    Declined(
        "DuoFormer",
        r"duoformer",
        "its structure isn't established here (its code was not to be had)",
        ("resnet50", "crossvit_s"),
    ),
    Declined("NViT", r"nvit", f"it is DeiT-B pruned, {_SEARCHED}", ("deit_b", "deit_s"), "pruned"),
    Declined("ViT-ResNAS", r"vitresnas", f"it comes from a search, {_SEARCHED}", ("pvt_v1_small",)),
    Declined(
        "As-ViT",
        r"asvit",
        f"of its search only the seed is known, {_SEARCHED}",
        ("vit_s", "swin_t"),
    ),
    Declined(
        "M2-ViT",
        r"m2vit",
        "its products with structured matrices gain nothing where dense ones have better kernels",
        ("vit_b",),
        "monarch",
    ),
    Declined(
        "MPCViT",
        r"mpcvit",
        "it is for encrypted inference at 32 and 64 pixels, and its attention without softmax "
        "gains little elsewhere",
        ("vit_ti",),
        "relu_attention",
    ),
)


def why_not_here(squashed: str) -> str | None:
    """Why a name without separators (``registry.squash``) isn't known, if that is known."""
    for entry in DECLINED:
        if re.match(entry.pattern, squashed):
            return entry.message
    return None
