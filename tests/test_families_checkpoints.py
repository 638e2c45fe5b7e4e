"""Own families load the official checkpoints: every name, ``#`` standing for any number."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
import torch

from deploykit.backbones.families.rmt import RMT, _Size
from deploykit.backbones.families.vmamba import VMamba
from deploykit.backbones.families.vmamba import _Size as _ScanSize
from deploykit.backbones.registry import own_builder, plugin_failures
from deploykit.backbones.weights import load_strictly
from deploykit.errors import UsageError


def both(prefix: str, names: str) -> set[str]:
    """Names of layers that have a weight and a bias."""
    return {f"{prefix}{name}.{part}" for name in names.split() for part in ("weight", "bias")}


def alone(prefix: str, names: str) -> set[str]:
    return {prefix + name for name in names.split()}


def batchnorm(prefix: str, names: str) -> set[str]:
    stats = {f"{prefix}{n}.running_{s}" for n in names.split() for s in ("mean", "var")}
    return both(prefix, names) | stats


def pattern(names: Iterable[str]) -> set[str]:
    """Names with their indices hidden, without counters of batches."""
    return {
        re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
        for name in names
        if not name.endswith("num_batches_tracked")
    }


HORNET = (
    both("stages.#.#.", "norm1 norm2 pwconv1 pwconv2 gnconv.proj_in gnconv.proj_out")
    | both("stages.#.#.gnconv.", "dwconv pws.# dwconv.pre_norm dwconv.post_norm")
    | alone("stages.#.#.", "gamma1 gamma2 gnconv.dwconv.dw.weight gnconv.dwconv.complex_weight")
    | both("", "downsample_layers.#.# norm head")
)
CSWIN = {
    name
    for stage in "1234"
    for name in both(f"stage{stage}.#.", "norm1 qkv proj attns.#.get_v norm2 mlp.fc1 mlp.fc2")
} | both("", "stage1_conv_embed.# norm head")
CSWIN |= both("", " ".join(f"merge{i}.conv merge{i}.norm" for i in "123"))
UNIREPLKNET = (
    both("stages.#.#.", "se.down se.up pwconv1.#")
    | alone("stages.#.#.", "gamma act.#.gamma act.#.beta dwconv.weight dwconv.lk_origin.weight")
    | batchnorm("stages.#.#.", "norm pwconv2.# dwconv.origin_bn")
    | both("", "downsample_layers.#.# norm head")
)
for _branch in ("k5_1", "k7_2", "k3_3", "k3_4", "k3_5"):
    UNIREPLKNET |= batchnorm("stages.#.#.dwconv.", f"dil_bn_{_branch}")
    UNIREPLKNET |= {f"stages.#.#.dwconv.dil_conv_{_branch}.weight"}
T2T_TRUNK = (
    both("blocks.#.", "norm1 attn.proj norm2 mlp.fc1 mlp.fc2")
    | both("", "tokens_to_token.project norm head")
    | alone("", "blocks.#.attn.qkv.weight cls_token pos_embed")
)
T2T, T2T_SOFTMAX = set(T2T_TRUNK), set(T2T_TRUNK)
for _step in ("tokens_to_token.attention1.", "tokens_to_token.attention2."):
    T2T |= both(_step, "kqv proj norm1 norm2 mlp.#") | {f"{_step}w"}
    T2T_SOFTMAX |= both(_step, "norm1 attn.proj norm2 mlp.fc1 mlp.fc2") | {
        f"{_step}attn.qkv.weight"
    }
RMT_NAMES = (
    both("layers.#.blocks.#.", "pos.conv retention_layer_norm final_layer_norm")
    | both("layers.#.blocks.#.retention.", "q_proj k_proj v_proj lepe.conv out_proj")
    | both("layers.#.blocks.#.ffn.", "fc1 dwconv.conv fc2")
    | alone("layers.#.blocks.#.", "gamma_1 gamma_2")
    | batchnorm("", "layers.#.downsample.norm patch_embed.proj.# norm")
    | both("", "layers.#.downsample.reduction proj head")
)
TRANSNEXT = both("", "head")
for _stage in "1234":
    TRANSNEXT |= both("", f"patch_embed{_stage}.proj patch_embed{_stage}.norm norm{_stage}")
    _block = f"block{_stage}.#."
    TRANSNEXT |= both(_block, "norm1 norm2 mlp.fc1 mlp.dwconv.dwconv mlp.fc2")
    TRANSNEXT |= both(f"{_block}attn.", "proj cpb_fc1 cpb_fc2")
    TRANSNEXT |= alone(f"{_block}attn.", "temperature query_embedding")
    if _stage == "4":
        TRANSNEXT |= both(f"{_block}attn.", "qkv")
    else:
        TRANSNEXT |= both(f"{_block}attn.", "q kv sr norm")
        TRANSNEXT |= alone(
            f"{_block}attn.", "relative_pos_bias_local learnable_tokens learnable_bias"
        )
VMAMBA = (
    both("layers.#.blocks.#.", "norm norm2 op.out_norm mlp.fc1 mlp.fc2")
    | alone("layers.#.blocks.#.op.", "in_proj.weight conv2d.weight out_proj.weight A_logs Ds")
    | alone("layers.#.blocks.#.op.", "x_proj_weight dt_projs_weight dt_projs_bias")
    | both("", "patch_embed.# layers.#.downsample.# classifier.norm classifier.head")
)


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("hornet_tiny_gf", HORNET),
        ("cswin_t", CSWIN),
        ("unireplknet_a", UNIREPLKNET),
        ("t2t_vit_7", T2T),
        ("t2t_vit_t_14", T2T_SOFTMAX),
        ("rmt_b", RMT_NAMES),
        ("transnext_micro", TRANSNEXT),
        ("vmamba_t", VMAMBA),
    ],
)
def test_names_are_those_of_the_official_checkpoints(name: str, official: set[str]) -> None:
    assert not plugin_failures()  # imports the families
    with torch.device("meta"):
        module = own_builder(name)[1](name, num_classes=1000, img_size=224)
    assert pattern(module.state_dict()) == official


def test_rmts_checkpoint_loads_with_its_tables() -> None:
    size = _Size((8, 8, 8, 8), (1, 1, 1, 1), (2,) * 4, (1,) * 4, (4,) * 4, 2)
    module, trained = RMT(size, 3, 32), RMT(size, 3, 32)
    state = dict(trained.state_dict())
    state["layers.0.Relpos.angle"] = torch.zeros(4)
    state["layers.0.Relpos.decay"] = torch.zeros(2)
    assert load_strictly(module, state, "a test")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_vmambas_linear_weights_become_convolutions() -> None:
    size = _ScanSize(8, (1, 1, 1, 1), 1)
    module, trained = VMamba(size, 3), VMamba(size, 3)
    linear = re.compile(r"\.(in_proj|out_proj|fc1|fc2)\.weight$")
    state = {
        name: tensor.flatten(1) if linear.search(name) else tensor
        for name, tensor in trained.state_dict().items()
    }
    assert state["layers.0.blocks.0.op.in_proj.weight"].shape == (8, 8)
    assert load_strictly(module, state, "a test")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name
    state["layers.0.blocks.0.mlp.fc1.weight"] = torch.zeros(4, 8)
    with pytest.raises(UsageError, match=r"don't fit"):
        load_strictly(module, state, "a test")
