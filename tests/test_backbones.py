"""Names, builds and the facts of `inspect`."""

from __future__ import annotations

import json
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants as hub_constants
from torch import nn

from deploykit._compat import timm
from deploykit.backbones import registry
from deploykit.backbones import weights as weights_module
from deploykit.backbones.build import build_backbone
from deploykit.backbones.inspection import Inspection, inspect_backbone
from deploykit.backbones.registry import (
    Variant,
    families,
    list_backbones,
    normalise,
    register_backbone,
)
from deploykit.backbones.resolve import resolve
from deploykit.errors import UsageError
from deploykit.recipe import ModelSection
from deploykit.types import Backbone, Preprocessing

TINY = "test_vit.r160_in1k"  # 0.4 M parameters, 160 px, fixed size
TINY_CONV = "test_resnet.r160_in1k"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("DEPLOYKIT_WEIGHTS", raising=False)
    weights_module._probe.cache_clear()


def build(name: str, **options: object) -> tuple[Backbone, list[str]]:
    return build_backbone(ModelSection.model_validate({"name": name, **options}), seed=0)


def alias_rows() -> dict[str, dict[str, object]]:
    text = resources.files("deploykit.backbones").joinpath("aliases.json").read_text()
    rows: dict[str, dict[str, object]] = json.loads(text)
    return rows


def test_every_alias_is_a_timm_model_with_that_tag_and_size() -> None:
    rows = alias_rows()
    assert len(rows) == 153
    for name, row in rows.items():
        resolved = resolve(name)
        assert resolved.kind == "timm", name
        timm_id = str(resolved.spec.timm_id)
        assert timm.is_model(timm_id), name
        config = timm.get_pretrained_cfg(timm_id, allow_unregistered=False)
        assert config is not None or "." not in timm_id, name
        if config is not None:
            assert config.input_size[-1] == resolved.spec.input, name
        if not timm.is_model(name):  # where both exist, timm's own id wins
            assert timm_id == row["timm_id"]


def test_every_family_has_one_headline_and_answers_to_its_name() -> None:
    for family, members in families().items():
        assert sum(m.headline for m in members) == 1, family
        resolved = resolve(family)
        assert resolved.name in {m.name for m in members}
        assert any("family" in note for note in resolved.notes) or len(members) == 1


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("SHViT-S4", "shvit_s4"),
        ("shvit s4", "shvit_s4"),
        ("shvits4", "shvit_s4"),
        ("sht_vit_s4", "shvit_s4"),
        ("shtvit_s4", "shvit_s4"),
        ("SHT-ViT-S1", "shvit_s1"),
        ("ViT-S/16", "vit_s"),
        ("DeiT-T", "deit_t"),
        ("ConvNeXt T", "convnext_t"),
        ("tiny-vit-5m", "tinyvit_5m"),
        ("TinyViT-21M-384", "tinyvit_21m_384"),
        ("MobileViTv2 x1.0", "mobilevitv2_1.0"),
        ("GC ViT-xxT", "gcvit_xxt"),
    ],
)
def test_spellings(typed: str, name: str) -> None:
    assert resolve(typed).name == name


def test_an_exact_timm_id_wins_and_keeps_its_tag() -> None:
    assert resolve("shvit_s4").spec.timm_id == "shvit_s4.in1k"
    assert resolve("resnet50.a2_in1k").spec.timm_id == "resnet50.a2_in1k"
    assert resolve("ResNet50.A2-in1k").spec.timm_id == "resnet50.a2_in1k"


def test_a_tag_with_1000_classes_is_chosen_over_a_default_with_others() -> None:
    resolved = resolve("tiny_vit_5m_224")
    assert resolved.spec.timm_id == "tiny_vit_5m_224.dist_in22k_ft_in1k"
    assert "21841" in resolved.notes[0]


def test_an_unknown_tag_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no weights tagged 'in22k'.*in1k"):
        resolve("shvit_s4.in22k")


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("MetaFormer", "caformer"),
        ("stvit_r", "semantic tokens"),
    ],
)
def test_sound_alikes_are_explained_and_never_mapped(typed: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        resolve(typed)


def test_an_unknown_name_gets_three_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        resolve("shvit_s9")
    message = str(caught.value)
    assert "\n" not in message
    near = message.split("nearest: ")[1].split(" (")[0].split(", ")
    assert len(near) == 3 and near[0].startswith("shvit_s")


def test_listing_takes_parts_and_globs() -> None:
    assert {s.name for s in list_backbones("shvit")} == {f"shvit_s{i}" for i in range(1, 5)}
    assert {s.name for s in list_backbones("SHViT-*")} == {f"shvit_s{i}" for i in range(1, 5)}
    assert len(list_backbones()) >= 153
    assert any(s.name == "xcit_nano_12_p8_224" for s in list_backbones("xcit", all_timm=True))


def test_own_families_register_and_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_OWN", {})

    @register_backbone("PoolNet", {"poolnet_t": Variant(input=64, headline=True)})
    def poolnet(variant: str, *, num_classes: int, img_size: int) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, num_classes))

    assert resolve("PoolNet").name == "poolnet_t"
    backbone, _ = build("poolnet-t", num_classes=7, weights="random")
    assert backbone.preprocessing.size == 64
    assert backbone.module(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    with pytest.raises(ValueError, match="registered twice"):
        register_backbone("PoolNet", {"poolnet_t": Variant()})(poolnet)
    with pytest.raises(ValueError, match="must be written"):
        register_backbone("PoolNet", {"PoolNet-S": Variant()})(poolnet)


def test_a_broken_plugin_is_told_and_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        name, value = "bad", "nowhere:thing"

        def load(self) -> None:
            raise ImportError("no module nowhere")

    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: [Broken()])
    registry.plugin_failures.cache_clear()
    try:
        assert "nowhere" in registry.plugin_failures()[0]
        assert resolve("shvit_s1").name == "shvit_s1"
    finally:
        registry.plugin_failures.cache_clear()


def test_a_build_is_in_eval_mode_unfused_and_leaves_the_global_state() -> None:
    before, fused = torch.random.get_rng_state(), timm.layers.use_fused_attn()
    backbone, notes = build(TINY)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert timm.layers.use_fused_attn() == fused
    assert not any(m.training for m in backbone.module.modules())
    assert not any(p.requires_grad for p in backbone.module.parameters())
    flags = [m.fused_attn for m in backbone.module.modules() if hasattr(m, "fused_attn")]
    assert flags and not any(flags)
    assert backbone.weights.kind == "untrained" and backbone.weights.label == "untrained"
    assert any("HF_HUB_OFFLINE" in note for note in notes)
    assert backbone.preprocessing.size == 160


def test_builds_depend_on_the_seed_alone() -> None:
    first = build(TINY, weights="random")[0].module.state_dict()
    torch.rand(3)
    again = build(TINY, weights="random")[0].module.state_dict()
    section = ModelSection(name=TINY, weights="random")
    other = build_backbone(section, seed=1)[0].module.state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_img_size_reaches_the_model_or_only_the_preprocessing() -> None:
    fixed, _ = build(TINY, img_size=96, num_classes=5, weights="random")
    free, _ = build(TINY_CONV, img_size=96, weights="random")
    for backbone, classes in ((fixed, 5), (free, 1000)):
        assert backbone.preprocessing.size == 96
        assert backbone.num_classes == classes
        assert backbone.module(torch.zeros(2, 3, 96, 96)).shape == (2, classes)


def test_a_preprocessing_of_ones_own_decides_the_size() -> None:
    own = Preprocessing(size=96, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=0.9)
    backbone, _ = build(TINY, preprocessing=own, weights="random")
    assert backbone.preprocessing == own
    assert backbone.module(torch.zeros(1, 3, 96, 96)).shape == (1, 1000)
    with pytest.raises(UsageError, match=r"img_size 160 and preprocessing\.size 96"):
        build(TINY, preprocessing=own, img_size=160, weights="random")


def test_an_impossible_size_is_one_line() -> None:
    with pytest.raises(UsageError, match="img_size") as caught:
        build("efficientformer_l1", img_size=8, weights="random")
    assert "\n" not in str(caught.value)


def test_a_headless_tag_gets_1000_classes_and_says_so() -> None:
    backbone, notes = build("deit_t", weights="random", img_size=64)
    assert backbone.num_classes == 1000 and not notes
    assert backbone.family == "DeiT" and backbone.paper == "DeiT-T"
    backbone, notes = build("vit_tiny_patch16_224.augreg_in21k", weights="random", img_size=64)
    assert backbone.num_classes == 1000
    assert any("21843 outputs" in note for note in notes)


def test_inspection_counts_and_probes() -> None:
    conv = inspect_backbone(build("resnet18", weights="random")[0])
    fixed = inspect_backbone(build("deit_t", weights="random", img_size=64)[0])
    assert conv.input_policy == "free" and fixed.input_policy == "fixed"
    assert conv.params == 11_689_512
    assert abs(conv.macs / 1.814e9 - 1) < 0.01
    assert conv.captured_ops == {} and conv.reach == {}
    assert Inspection.model_validate_json(conv.model_dump_json()) == conv


FACTORY = """
import torch
from huggingface_hub import constants as hub_constants
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))

def make(num_classes=4):
    import helper_of_factory
    return Net(num_classes + helper_of_factory.ZERO)

make.deploykit_preprocessing = {"size": 32, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}

def plain():
    return Net(3)

def bad_preprocessing():
    net = Net(3)
    net.deploykit_preprocessing = {"sizes": 3}
    return net

def fails():
    raise RuntimeError("no\\nluck")

def number():
    return 3

def odd():
    return nn.Identity()
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "factory_of_test.py").write_text(FACTORY)
    (tmp_path / "helper_of_factory.py").write_text("ZERO = 0\n")
    monkeypatch.chdir(tmp_path)
    for name in ("factory_of_test", "helper_of_factory"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_factory_in_the_current_folder(factories: Path) -> None:
    path = list(sys.path)
    backbone, _ = build("factory_of_test:make", num_classes=6)
    assert sys.path == path
    assert backbone.num_classes == 6
    assert backbone.weights.kind == "module" and backbone.weights.trained
    assert backbone.preprocessing.size == 32
    assert backbone.preprocessing.mean == (0.1, 0.2, 0.3)
    assert build("factory_of_test:make")[0].num_classes == 4
    plain, _ = build("factory_of_test:plain", img_size=48)
    assert plain.preprocessing.size == 48
    assert plain.preprocessing.mean == (0.485, 0.456, 0.406)


def test_a_factory_takes_a_checkpoint(factories: Path) -> None:
    from safetensors.torch import save_file

    backbone, _ = build("factory_of_test:plain")
    state = {k: v + 1 for k, v in backbone.module.state_dict().items()}
    save_file(state, "net.safetensors")
    loaded, _ = build("factory_of_test:plain", weights="net.safetensors")
    assert loaded.weights.kind == "file" and loaded.weights.sha256
    assert torch.equal(loaded.module.state_dict()["head.bias"], state["head.bias"])


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("factory_of_test:missing", {}, "no callable 'missing'"),
        ("factory_of_test:fails", {}, "no luck"),
        ("factory_of_test:number", {}, "wanted an nn.Module, got int"),
        ("factory_of_test:odd", {}, "wanted float scores"),
        ("factory_of_test:bad_preprocessing", {}, "deploykit_preprocessing"),
        ("factory_of_test:plain", {"num_classes": 9}, "3 outputs, but num_classes is 9"),
        ("factory_of_test:plain", {"weights": "hub"}, "aren't on the hub"),
        ("no_such_module_here:make", {}, "importing no_such_module_here failed"),
        ("factory_of_test.py:make", {}, "factory_of_test:make"),
        ("missing.safetensors", {}, "no such file"),
    ],
)
def test_factory_mistakes_are_one_line(
    factories: Path, name: str, options: dict[str, object], told: str
) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        build(name, **options)
    assert "\n" not in str(caught.value)


def test_normal_form() -> None:
    assert normalise("  ViT-B/16 (384)") == "vit_b_16_384"
