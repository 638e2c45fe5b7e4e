"""Attention whose heads, query/key and value widths are independent, as pruning leaves them.

The modules of timm tie them: one ``head_dim`` serves queries, keys and values, and a scale is
derived from it. Before anything is pruned these modules take their place, with the same tensors
and the same result; the softmax scale stays what it was trained with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["SlimAttention", "SlimSingleHead"]


class SlimAttention(nn.Module):
    """Multi-head self-attention over tokens (B, N, C).

    ``qkv`` gives all queries, then all keys, then all values, each heads-major. With ``q``, ``k``
    and ``v_proj`` apart, ``reduce`` may shorten what keys and values are made from.

    Args:
        parts: ``qkv`` alone, or ``q``, ``k`` and ``v_proj``; ``proj``; optionally ``norm`` (before
            all), ``q_norm``, ``k_norm``, ``reduce``.
        table: position bias, float32 (heads, entries), looked up by ``index``, int64 (N, N).
    """

    index: Tensor | None
    norm: nn.Module
    qkv: nn.Module
    q: nn.Module
    k: nn.Module
    v_proj: nn.Module
    reduce: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    proj: nn.Module

    def __init__(
        self,
        parts: dict[str, nn.Module],
        *,
        heads: int,
        qk: int,
        v: int,
        scale: float,
        table: Tensor | None = None,
        index: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.names = frozenset(parts)
        for name, part in parts.items():
            self.add_module(name, part)
        self.heads, self.qk, self.v, self.scale = heads, qk, v, scale
        self.table = None if table is None else nn.Parameter(table.clone())
        self.register_buffer("index", index)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise NotImplementedError("only windows' masks are known")
        batch, tokens, _ = x.shape
        if "norm" in self.names:
            x = self.norm(x)
        if "qkv" in self.names:
            sizes = [self.heads * self.qk, self.heads * self.qk, self.heads * self.v]
            q, k, v = self.qkv(x).split(sizes, dim=-1)
        else:
            source = self.reduce(x) if "reduce" in self.names else x
            q, k, v = self.q(x), self.k(source), self.v_proj(source)
        q = q.reshape(batch, tokens, self.heads, self.qk).transpose(1, 2)
        k = k.reshape(batch, -1, self.heads, self.qk).transpose(1, 2)
        v = v.reshape(batch, -1, self.heads, self.v).transpose(1, 2)
        if "q_norm" in self.names:
            q = self.q_norm(q)
        if "k_norm" in self.names:
            k = self.k_norm(k)
        logits = (q * self.scale) @ k.transpose(-2, -1)
        if self.table is not None:
            logits = logits + self.table[:, self.index]
        if mask is not None:  # (windows, N, N), the same for every image and head
            windows = mask.shape[0]
            logits = logits.reshape(-1, windows, self.heads, tokens, tokens) + mask[:, None]
            logits = logits.reshape(-1, self.heads, tokens, tokens)
        mixed = logits.softmax(-1) @ v
        result: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return result


class SlimSingleHead(nn.Module):
    """SHViT's single-head attention over maps (B, C, H, W): part of the channels attends.

    The first ``attended`` channels become ``v`` attended ones, which stand before the others in
    what ``proj`` reads.
    """

    def __init__(
        self,
        pre_norm: nn.Module,
        qkv: nn.Module,
        proj: nn.Module,
        *,
        qk: int,
        v: int,
        scale: float,
    ) -> None:
        super().__init__()
        self.pre_norm, self.qkv, self.proj = pre_norm, qkv, proj
        self.qk, self.v, self.scale = qk, v, scale

    @property
    def attended(self) -> int:
        weight = self.pre_norm.weight
        assert isinstance(weight, Tensor)
        return weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        attended = self.attended
        mixed = self.qkv(self.pre_norm(x[:, :attended])).flatten(2)
        q, k, v = mixed.split([self.qk, self.qk, self.v], dim=1)
        weights = ((q.transpose(-2, -1) @ k) * self.scale).softmax(-1)
        seen = (v @ weights.transpose(-2, -1)).reshape(batch, self.v, height, width)
        result: Tensor = self.proj(torch.cat([seen, x[:, attended:]], dim=1))
        return result
