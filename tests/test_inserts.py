"""Inserted layers: their formulas, their places, what they make of weights, and who is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.build import build_backbone
from deploykit.backbones.inserts.e2gc import constant_groups
from deploykit.backbones.inserts.ela import EfficientLocalAttention
from deploykit.backbones.inserts.gmm import GaussianMixtureMask
from deploykit.backbones.inserts.registry import insert_layers, inserts
from deploykit.backbones.inserts.ulsam import SubspaceAttentionMaps
from deploykit.errors import UsageError
from deploykit.graph.capture import capture
from deploykit.recipe import ModelSection
from deploykit.types import Backbone

VIT = "test_vit.r160_in1k"


def build(name: str, insert: str, **options: object) -> tuple[Backbone, list[str]]:
    given = {"name": name, "insert": insert, "weights": "random", **options}
    return build_backbone(ModelSection.model_validate(given), seed=0)


def test_local_attention_is_two_one_dimensional_convolutions_of_means() -> None:
    torch.manual_seed(0)
    layer = EfficientLocalAttention(8, 5, 4, 2)
    x = torch.randn(2, 8, 6, 7)
    gates = []
    for mean, conv, norm in (
        (x.mean(3), layer.rows, layer.rows_norm),
        (x.mean(2), layer.columns, layer.columns_norm),
    ):
        y = nn.functional.conv1d(mean, conv.weight.flatten(2), padding=2, groups=conv.groups)
        gates.append(torch.sigmoid(nn.functional.group_norm(y, 2, norm.weight, norm.bias)))
    wanted = x * gates[0][:, :, :, None] * gates[1][:, :, None, :]
    assert torch.allclose(layer(x), wanted, atol=1e-6)


def test_each_subspace_has_a_map_that_sums_to_one() -> None:
    torch.manual_seed(0)
    layer = SubspaceAttentionMaps(8, 4)
    x = torch.randn(2, 8, 5, 6)
    wanted = []
    for space in range(4):
        part = x[:, 2 * space : 2 * space + 2]
        y = part * layer.depthwise.weight[2 * space : 2 * space + 2].view(1, 2, 1, 1)
        y = nn.functional.max_pool2d(y, 3, 1, 1)
        scores = (y * layer.pointwise.weight[space].view(1, 2, 1, 1)).sum(1, keepdim=True)
        attention = scores.flatten(1).softmax(1).reshape(scores.shape)
        assert torch.allclose(attention.sum((1, 2, 3)), torch.ones(2))
        wanted.append(attention * part + part)
    assert torch.allclose(layer(x), torch.cat(wanted, 1), atol=1e-6)


def test_a_mask_falls_with_distance_and_leaves_the_class_token_alone() -> None:
    layer = GaussianMixtureMask((2, 3), prefix=1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1]))
        layer.width.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    mask = layer(torch.ones(1, 1, 7, 7))[0, 0]
    assert torch.equal(mask[0], torch.ones(7)) and torch.equal(mask[:, 0], torch.ones(7))
    # places 0 and 5 of a 2×3 map lie one row and two columns apart: d² = 5
    terms = zip((0.5, 0.2, 0.1, 0.1, 0.1), (1.0, 2.0, 3.0, 4.0, 5.0), strict=True)
    wanted = sum(a * torch.tensor(-5 / (2 * s * s)).exp() for a, s in terms)
    assert float(mask[1, 6]) == pytest.approx(float(wanted), rel=1e-5)
    assert sum(p.numel() for p in layer.parameters()) == 10


def test_groups_have_a_constant_size() -> None:
    depthwise = nn.Conv2d(48, 48, 3, 2, 1, groups=48, bias=False)
    made = constant_groups(depthwise, 16)
    assert made is not None and made.groups == 3
    assert made(torch.zeros(1, 48, 8, 8)).shape == depthwise(torch.zeros(1, 48, 8, 8)).shape
    assert constant_groups(made, 16) is None


@pytest.mark.parametrize(
    ("host", "insert", "kind", "places"),
    [
        ("test_resnet.r160_in1k", "ela_b", EfficientLocalAttention, 4),
        ("mobilenetv2_050", "ela_s", EfficientLocalAttention, 17),
        ("mobilenetv2_050", "ulsam", SubspaceAttentionMaps, 4),
        (VIT, "gmm", GaussianMixtureMask, 6),
        ("mobilenetv2_050", "e2gc_16", nn.Conv2d, 17),
    ],
)
def test_a_host_takes_it_and_is_captured(
    host: str, insert: str, kind: type[nn.Module], places: int
) -> None:
    size = None if host == VIT else 64
    built, notes = build(host, insert, img_size=size, num_classes=5)
    assert any(f"{insert} inserted in {places} places" in note for note in notes), notes
    if kind is not nn.Conv2d:
        assert sum(isinstance(m, kind) for m in built.module.modules()) == places
    model = capture(built)
    x = torch.randn(3, 3, built.preprocessing.size, built.preprocessing.size)
    with torch.no_grad():
        for images in (x, x[:1]):
            wanted: Tensor = built.module(images)
            error = (model.graph_module(images) - wanted).abs().max() / wanted.abs().max()
            assert float(error) < 1e-5
    assert model.dynamic_batch


@pytest.mark.parametrize(
    ("host", "insert", "told"),
    [
        (VIT, "ela_b", "wants blocks with an empty squeeze-and-excitation slot"),
        (VIT, "ulsam", "has no place for it; it wants runs of MobileNet"),
        ("test_resnet.r160_in1k", "gmm", "wants attention of timm's ViT"),
        ("test_resnet.r160_in1k", "e2gc_16", "wants grouped or depthwise"),
        ("test_resnet.r160_in1k", "elephant", "unknown; choose one of e2gc_16"),
    ],
)
def test_other_hosts_are_refused_with_the_reason(host: str, insert: str, told: str) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        build(host, insert)
    assert "\n" not in str(caught.value)


def test_a_finished_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match="finished network"):
        build(str(tmp_path / "model.onnx"), "ela_b")


def test_a_trained_host_with_new_layers_is_untrained(tmp_path: Path) -> None:
    host = timm.create_model("test_resnet", num_classes=5)
    save_file(host.state_dict(), tmp_path / "test_resnet.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEPLOYKIT_WEIGHTS", str(tmp_path))
        built, notes = build("test_resnet", "ela_b", weights="auto")
    assert built.weights.kind == "untrained" and "new layers (ela_b)" in built.weights.source
    assert any("no accuracy" in note for note in notes)
    assert torch.equal(built.module.state_dict()["fc.weight"], host.state_dict()["fc.weight"])


def test_a_checkpoint_with_the_new_layers_is_trained_and_one_without_is_refused(
    tmp_path: Path,
) -> None:
    built, _ = build("test_resnet", "ela_b", num_classes=5)
    state = {name: value + 1 for name, value in built.module.state_dict().items()}
    save_file(state, tmp_path / "with.safetensors")
    path = str(tmp_path / "with.safetensors")
    loaded, _ = build("test_resnet", "ela_b", num_classes=5, weights=path)
    assert loaded.weights.kind == "file" and loaded.weights.sha256
    assert torch.equal(loaded.module.state_dict()["fc.weight"], state["fc.weight"])
    save_file(
        timm.create_model("test_resnet", num_classes=5).state_dict(), tmp_path / "host.safetensors"
    )
    with pytest.raises(UsageError, match="missing"):
        build("test_resnet", "ela_b", num_classes=5, weights=str(tmp_path / "host.safetensors"))


def test_all_inserts_are_known_and_a_second_of_a_name_is_refused() -> None:
    from deploykit.backbones.inserts.registry import register_insert

    assert list(inserts()) == [
        "e2gc_16", "e2gc_32", "e2gc_8", "ela_b", "ela_l", "ela_s", "ela_t", "gmm", "polyphase",
        "ulsam",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="twice"):
        register_insert("gmm", host="")(lambda _: 0)
    with pytest.raises(UsageError, match="nets has no place"):
        insert_layers(nn.Linear(2, 2), "gmm", "nets")
