"""CRATE: Yu et al., *White-Box Transformers via Sparse Rate Reduction* (NeurIPS 2023).

Modules are named as in the authors' checkpoints, which load as they are; a position table of
another size is resized.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side
from deploykit.backbones.layers.vit import resized_positions
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["Crate", "checkpoint_filter_fn", "crate"]

_PATCH = 16
_STEP = 0.1  # of the gradient step of ISTA, and the weight of its sparsity

# width, depth, heads
_SIZES = {
    "crate_t": (384, 12, 6),
    "crate_s": (576, 12, 12),
    "crate_b": (768, 12, 12),
    "crate_l": (1024, 24, 16),
}


class SubspaceAttention(nn.Module):
    """Multi-head subspace self-attention: queries, keys, values are one projection (sec. 2.3).

    float32 (N, L, C) to (N, L, C).
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        w = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        attention = ((w * self.scale) @ w.transpose(-2, -1)).softmax(-1)
        out: Tensor = self.to_out((attention @ w).transpose(1, 2).flatten(2))
        return out


class SparseCode(nn.Module):
    """One step of ISTA against a dictionary D (section 2.4); (N, L, C) to (N, L, C), ≥ 0.

    ``relu(z + step (D^T z - D^T D z) - step * sparsity)``. For deployment D and its transpose are
    weights of their own, and two products do: ``D^T (z - D z)``.
    """

    transposed: nn.Parameter | None

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.weight)
        self.register_parameter("transposed", None)

    def forward(self, z: Tensor) -> Tensor:
        if self.transposed is not None:
            residual = F.linear(z - F.linear(z, self.weight), self.transposed)
        else:
            transposed = self.weight.t()
            residual = F.linear(z, transposed) - F.linear(F.linear(z, self.weight), transposed)
        return F.relu(z + _STEP * residual - _STEP * _STEP)

    def reparameterize(self) -> None:
        """Store the transpose beside D: a constant is quantised, what is computed of one isn't."""
        self.transposed = nn.Parameter(self.weight.detach().t().contiguous(), requires_grad=False)


class PreNorm(nn.Module):
    """A layer on normalised tokens."""

    def __init__(self, dim: int, layer: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fn(self.norm(x))
        return out


class _Layers(nn.Module):
    """Compress, then sparsify, layer by layer: ``x = ISTA(LN (x + MSSA(LN x)))``."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                (PreNorm(dim, SubspaceAttention(dim, heads)), PreNorm(dim, SparseCode(dim)))
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            compress, sparsify = layer
            x = sparsify(x + compress(x))
        return x


class _Patches(nn.Module):
    """(N, 3, H, W) to (N, patches, 768): row, column, then colour within a patch."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(3, (-1, _PATCH)).unflatten(2, (x.shape[2] // _PATCH, _PATCH))
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class Crate(nn.Module):
    """float32 (N, 3, S, S) to (N, classes)."""

    def __init__(self, dim: int, depth: int, heads: int, num_classes: int, img_size: int) -> None:
        super().__init__()
        self.side = img_size // _PATCH
        patch = 3 * _PATCH**2
        self.to_patch_embedding = nn.Sequential(
            _Patches(), nn.LayerNorm(patch), nn.Linear(patch, dim), nn.LayerNorm(dim)
        )
        self.pos_embedding = nn.Parameter(torch.randn(1, self.side**2 + 1, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.transformer = _Layers(dim, depth, heads)
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.to_patch_embedding(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.transformer(x + self.pos_embedding)
        scores: Tensor = self.mlp_head(x[:, 0])
        return scores


def checkpoint_filter_fn(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The authors' state dict, its position table resized to the module's."""
    assert isinstance(module, Crate)
    table = resized_positions(state["pos_embedding"], module.pos_embedding, module.side, 1, 0)
    return {**state, "pos_embedding": table}


@register_backbone(
    "CRATE",
    {
        "crate_t": Variant(paper_name="CRATE-T", params_m=6.09, headline=True),
        "crate_s": Variant(paper_name="CRATE-S", params_m=13.12),
        "crate_b": Variant(paper_name="CRATE-B", params_m=22.80),
        "crate_l": Variant(paper_name="CRATE-L", params_m=77.64),
    },
    licence="mit",
    doc=223,
)
def crate(variant: str, *, num_classes: int, img_size: int) -> Crate:
    """CRATE of one size; ``img_size`` is a multiple of 16."""
    check_side("CRATE", img_size, _PATCH)
    return Crate(*_SIZES[variant], num_classes, img_size)
