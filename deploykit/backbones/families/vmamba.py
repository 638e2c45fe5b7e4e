"""VMamba: Liu et al., *VMamba: Visual State Space Model* (NeurIPS 2024), its final form: a state
of one, no gate, an MLP in each block.

Modules are named as in the official checkpoints; linear layers on maps are 1x1 convolutions here,
whose weights ``checkpoint_filter_fn`` gives their shape. The scan is written with log2(L) steps
of plain operators (``layers/selective_scan.py``): no CUDA extension, and it exports.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.selective_scan import draw_scan_parameters, selective_scan
from deploykit.backbones.layers.sizes import check_side
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["SIZES", "Stage", "VMamba", "checkpoint_filter_fn", "vmamba"]


@dataclass(frozen=True)
class _Size:
    width: int
    depths: tuple[int, ...]
    expansion: int  # inner channels of a scan against the block's


SIZES = {
    "vmamba_t": _Size(96, (2, 2, 8, 2), 1),
    "vmamba_s": _Size(96, (2, 2, 15, 2), 2),
    "vmamba_b": _Size(128, (2, 2, 15, 2), 2),
}


class SS2D(nn.Module):
    """2D selective scan (paper, section 4.2): (N, C, H, W) to the same.

    The map is read in four directions (along rows, along columns, and both backwards), each a
    state-space model with its own weights; the four results are summed.
    """

    def __init__(self, dim: int, expansion: int) -> None:
        super().__init__()
        inner, self.rank, self.state = expansion * dim, -(-dim // 16), 1
        self.in_proj = nn.Conv2d(dim, inner, 1, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.x_proj_weight = nn.Parameter(torch.empty(4, self.rank + 2 * self.state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, self.rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(4, inner))
        self.A_logs = nn.Parameter(torch.empty(4 * inner, self.state))
        self.Ds = nn.Parameter(torch.ones(4 * inner))
        self.out_norm = _norm(inner)
        self.out_proj = nn.Conv2d(inner, dim, 1, bias=False)
        draw_scan_parameters(
            self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, self.A_logs
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv2d(self.in_proj(x)))
        out: Tensor = self.out_proj(self.out_norm(self._scan(x)))
        return out

    def _scan(self, x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        ahead = torch.stack((x.flatten(2), x.transpose(2, 3).flatten(2)), dim=1)
        sequences = torch.cat((ahead, ahead.flip(-1)), dim=1)
        parts = (self.rank, self.state, self.state)
        step, b, c = (self.x_proj_weight @ sequences).split(parts, dim=2)
        step = F.softplus(self.dt_projs_weight @ step + self.dt_projs_bias.unsqueeze(-1))
        a = -torch.exp(self.A_logs).unflatten(0, (4, -1))
        y = selective_scan(sequences, step, a, b, c, self.Ds.unflatten(0, (4, -1)))
        y = y[:, :2] + y[:, 2:].flip(-1)
        rows = y[:, 0].unflatten(2, (height, width))
        columns = y[:, 1].unflatten(2, (width, height)).transpose(2, 3)
        out: Tensor = rows + columns
        return out


class MapMlp(nn.Module):
    """Linear, GELU, linear over the channels of (N, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, 4 * dim, 1)
        self.fc2 = nn.Conv2d(4 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class VSSBlock(nn.Module):
    """``x += SS2D(LN x); x += MLP(LN x)`` on (N, C, H, W) (paper, figure 3)."""

    def __init__(self, dim: int, expansion: int) -> None:
        super().__init__()
        self.norm = _norm(dim)
        self.op = SS2D(dim, expansion)
        self.norm2 = _norm(dim)
        self.mlp = MapMlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.op(self.norm(x))
        x = x + self.mlp(self.norm2(x))
        return x


class Stage(nn.Module):
    """Blocks at one resolution, then the step to the next where there is one."""

    def __init__(self, dim: int, depth: int, expansion: int, *, last: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(VSSBlock(dim, expansion) for _ in range(depth)))
        halve = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1)
        # the official layer changes the layout of the map where the identities are
        steps = () if last else (nn.Identity(), halve, nn.Identity(), _norm(2 * dim))
        self.downsample = nn.Sequential(*steps)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.downsample(self.blocks(x))
        return out


class Classifier(nn.Module):
    """LN, mean over the map, linear: (N, C, H, W) to (N, classes)."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = _norm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(x).mean((2, 3)))
        return out


class VMamba(nn.Module):
    """float32 (N, 3, S, S) to (N, classes); strides 4, 8, 16, 32."""

    def __init__(self, size: _Size, num_classes: int, stage_type: type[Stage] = Stage) -> None:
        super().__init__()
        width, last = size.width, len(size.depths) - 1
        self.patch_embed = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, stride=2, padding=1),
            nn.Identity(),
            _norm(width // 2),
            nn.Identity(),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            nn.Identity(),
            _norm(width),
        )
        self.layers = nn.Sequential(
            *(
                stage_type(width * 2**stage, depth, size.expansion, last=stage == last)
                for stage, depth in enumerate(size.depths)
            )
        )
        self.classifier = Classifier(width * 2**last, num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.layers(self.patch_embed(x)))
        return scores


def _norm(dim: int) -> nn.Module:
    norm: nn.Module = timm.layers.LayerNorm2d(dim, eps=1e-5)
    return norm


def checkpoint_filter_fn(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """An official checkpoint, its linear weights (C', C) as those of 1x1 convolutions."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    return {
        name: tensor.view(shapes[name])
        if name in shapes and len(shapes[name]) == 4 and tensor.ndim == 2
        else tensor
        for name, tensor in state.items()
    }


@register_backbone(
    "VMamba",
    {
        "vmamba_t": Variant(paper_name="VMamba-T", params_m=30.0, headline=True),
        "vmamba_s": Variant(paper_name="VMamba-S", params_m=50.0),
        "vmamba_b": Variant(paper_name="VMamba-B", params_m=89.0),
    },
    licence="mit",
)
def vmamba(variant: str, *, num_classes: int, img_size: int) -> VMamba:
    """VMamba of one size; ``img_size`` is a multiple of 32. No weight depends on it."""
    check_side("VMamba", img_size)
    return VMamba(SIZES[variant], num_classes)
