"""Res-VMamba: Chen et al., *Res-VMamba: Fine-Grained Food Category Visual Classification Using
Selective State Space Models with Deep Residual Learning* (2024).

After the paper: VMamba with a residual around the blocks of each stage, besides those inside of
them. Between which points the paper's runs, and which of VMamba's forms it was trained on, isn't
established here; this one adds no parameters to VMamba's final form. Weights of the authors don't
load, those of VMamba do.
"""

from __future__ import annotations

from torch import Tensor, nn

from deploykit.backbones.families.vmamba import SIZES, Stage, VMamba, checkpoint_filter_fn
from deploykit.backbones.layers.sizes import check_side
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["ResidualStage", "checkpoint_filter_fn", "res_vmamba"]


class ResidualStage(Stage):
    """``x + blocks(x)``, then the step to the next stage; (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.downsample(x + self.blocks(x))
        return out


@register_backbone(
    "Res-VMamba",
    {
        f"res_vmamba_{letter}": Variant(
            paper_name=f"Res-VMamba-{letter.upper()} (after the paper)",
            params_m=params,
            headline=letter == "t",
        )
        for letter, params in (("t", 30.0), ("s", 50.0), ("b", 89.0))
    },
    doc=229,
)
def res_vmamba(variant: str, *, num_classes: int, img_size: int) -> nn.Module:
    """Res-VMamba of one size; ``img_size`` is a multiple of 32. No weight depends on it."""
    check_side("Res-VMamba", img_size)
    return VMamba(SIZES[variant.removeprefix("res_")], num_classes, ResidualStage)
