"""Training branches merged: equal scores, fewer layers, a note; and what can't be merged stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.build import build_backbone
from deploykit.backbones.deploy_form import in_deploy_form
from deploykit.backbones.untrained import make_testable
from deploykit.recipe import ModelSection
from deploykit.types import Backbone, Preprocessing, WeightsOrigin

SIDE = 32


class TwoBranches(nn.Module):
    """A 3×3 and a 1×1 convolution in parallel; ``wrong`` forgets the second when merging."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.conv: nn.Conv2d = nn.Conv2d(3, 4, 3, padding=1)
        self.point: nn.Conv2d | None = nn.Conv2d(3, 4, 1)
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y if self.point is None else y + self.point(x)

    def reparameterize(self) -> None:
        assert self.point is not None and self.point.bias is not None
        if not self.wrong:
            self.conv.weight[:, :, 1:2, 1:2] += self.point.weight
            assert self.conv.bias is not None
            self.conv.bias += self.point.bias
        self.point = None


class Noise(nn.Module):
    """A variational autoencoder's method of the same name, which is another thing."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def reparameterize(self, mean: Tensor, deviation: Tensor) -> Tensor:
        return mean + deviation * torch.randn_like(mean)


def backbone(block: nn.Module) -> Backbone:
    torch.manual_seed(0)
    net = nn.Sequential(block, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    size = Preprocessing(size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    origin = WeightsOrigin(kind="random", source="test")
    return Backbone("net", net.eval(), size, origin, num_classes=4)


def test_branches_are_merged_in_a_copy() -> None:
    given = backbone(TwoBranches())
    module, note = in_deploy_form(given)
    assert note is not None and note.startswith("1 block in deployment form")
    assert sum(isinstance(m, nn.Conv2d) for m in module.modules()) == 1
    assert sum(isinstance(m, nn.Conv2d) for m in given.module.modules()) == 2
    x = torch.randn(2, 3, SIDE, SIDE)
    assert torch.allclose(module(x), given.module(x), atol=1e-5)


def test_a_merge_that_changes_the_scores_isnt_taken() -> None:
    given = backbone(TwoBranches(wrong=True))
    module, note = in_deploy_form(given)
    assert module is given.module
    assert note is not None and "kept" in note and "differ" in note


def test_a_method_of_the_same_name_for_something_else_isnt_called() -> None:
    given = backbone(Noise())
    assert in_deploy_form(given) == (given.module, None)


@pytest.mark.parametrize("name", ["mobileone_s0", "fastvit_t8", "repvit_m0_9"])
def test_networks_of_timm_arrive_in_deployment_form(name: str) -> None:
    section = ModelSection(name=name, weights="random", img_size=64, num_classes=8)
    built, notes = build_backbone(section, 0)
    assert any("deployment form" in note for note in notes)
    torch.manual_seed(1)
    train_form = timm.create_model(name, num_classes=8)
    make_testable(train_form, 1, 64)
    size = built.preprocessing
    origin = WeightsOrigin(kind="random", source="test")
    merged, _ = in_deploy_form(Backbone(name, train_form, size, origin, num_classes=8))
    assert merged is not train_form
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before, after = train_form(x), merged(x)
    assert float((before - after).abs().max() / before.abs().max()) < 1e-4
    convolutions = sum(isinstance(m, nn.Conv2d) for m in train_form.modules())
    assert sum(isinstance(m, nn.Conv2d) for m in merged.modules()) < convolutions
    assert type(merged) is type(built.module)


def test_a_network_without_branches_is_left_alone() -> None:
    section = ModelSection(name="shvit_s1", weights="random", img_size=64)
    built, notes = build_backbone(section, 0)
    assert not any("deployment form" in note for note in notes)
    assert any(isinstance(m, nn.BatchNorm2d) for m in built.module.modules())
