"""Ways in which timm's networks mislead, each of which was fallen into once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deploykit._compat import timm
from deploykit.backbones.build import build_backbone
from deploykit.backbones.registry import aliases
from deploykit.backbones.resolve import resolve
from deploykit.graph.capture import capture
from deploykit.recipe import ModelSection

# Published without a classifier of ImageNet-1k: encoders of CLIP, DINOv2 and SAM.
ENCODERS = {
    "DINOv2", "MCi", "SAM", "ViTamin",  # families
    "clip_vit_b16", "clip_vit_b32", "clip_vit_l14", "eva_clip_g", "vit_b_mae",  # names
}  # fmt: skip


def test_a_bias_changed_after_a_run_is_in_the_captured_graph() -> None:
    """timm's LeViT, TinyViT and EfficientFormer keep the gathered bias in eval mode."""
    section = ModelSection(name="levit_128s", weights="random", num_classes=4, img_size=96)
    backbone, _ = build_backbone(section, 0)
    module, image = backbone.module, torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        before = module(image)
        for name, parameter in module.named_parameters():
            if name.endswith("attention_biases"):
                parameter.normal_()
        assert torch.equal(module(image), before)  # the trap
        graph = capture(backbone).graph_module
        module.train()
        wanted = module.eval()(image)
        assert not torch.allclose(wanted, before, atol=1e-3)
        assert torch.allclose(graph(image), wanted, atol=1e-4)


def test_a_network_with_two_heads_takes_its_classes_from_either(tmp_path: Path) -> None:
    name = "deit_tiny_distilled_patch16_224"
    trained = timm.create_model(name, num_classes=7, img_size=32).eval()
    torch.nn.init.normal_(trained.head.weight)
    torch.nn.init.normal_(trained.head_dist.weight)
    assert isinstance(trained.get_classifier(), tuple)
    save_file(trained.state_dict(), tmp_path / "heads.safetensors")
    section = ModelSection(name=name, weights=str(tmp_path / "heads.safetensors"), img_size=32)
    backbone, _ = build_backbone(section, 0)
    assert backbone.num_classes == 7
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = trained.forward_features(image)
        heads = trained.head(tokens[:, 0]), trained.head_dist(tokens[:, 1])
        assert torch.allclose(backbone.module(image), (heads[0] + heads[1]) / 2, atol=1e-5)


def test_every_named_network_has_weights_for_imagenet_1k_unless_it_is_an_encoder() -> None:
    for name, spec in aliases().items():
        assert spec.timm_id is not None
        classes = timm.get_pretrained_cfg(spec.timm_id).num_classes
        assert (classes != 1000) == bool({spec.family, name} & ENCODERS), (
            f"{name}: {classes} classes"
        )


@pytest.mark.parametrize("arch", ["tiny_vit_5m_224", "swinv2_base_window12_192"])
def test_a_default_tag_of_another_data_set_is_never_taken_silently(arch: str) -> None:
    config = timm.get_pretrained_cfg(arch)
    assert config.num_classes != 1000
    resolved = resolve(arch)
    chosen = timm.get_pretrained_cfg(str(resolved.spec.timm_id))
    assert chosen.num_classes == 1000 or resolved.spec.timm_id == f"{arch}.{config.tag}"
    if chosen.num_classes == 1000:
        assert str(config.num_classes) in resolved.notes[0]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_network_of_one_size_is_built_for_the_size_asked_for(name: str) -> None:
    section = ModelSection(name=name, weights="random", img_size=64, num_classes=3)
    backbone, _ = build_backbone(section, 0)
    assert backbone.preprocessing.size == 64
    with torch.no_grad():
        assert backbone.module(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
