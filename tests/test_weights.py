"""Checkpoints: where they come from, what is refused, and untrained networks."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants as hub_constants
from safetensors.torch import save_file
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones import weights as weights_module
from deploykit.backbones.build import build_backbone
from deploykit.backbones.untrained import make_testable
from deploykit.backbones.weights import HubError, fetch_from_hub, read_checkpoint, sha256_of
from deploykit.errors import UsageError
from deploykit.recipe import ModelSection
from deploykit.types import Backbone

TINY = "test_vit.r160_in1k"


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty local hub cache, and no network."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.delenv("DEPLOYKIT_WEIGHTS", raising=False)
    weights_module._probe.cache_clear()
    return folder


def build(**options: object) -> tuple[Backbone, list[str]]:
    return build_backbone(ModelSection.model_validate({"name": TINY, **options}), seed=0)


def tiny_state(num_classes: int = 1000) -> dict[str, Tensor]:
    """Distinct, finite weights of the tiny ViT."""
    torch.manual_seed(5)
    module = timm.create_model(TINY, num_classes=num_classes)
    return {k: torch.randn_like(v) * 0.1 for k, v in module.state_dict().items()}


def assert_loaded(backbone: Backbone, state: dict[str, Tensor]) -> None:
    loaded = backbone.module.state_dict()
    assert all(torch.equal(loaded[k], v.float()) for k, v in state.items())


def publish(hub: Path, state: dict[str, Tensor]) -> None:
    """Lay ``state`` into the cache as the hub's client would have."""
    config = timm.get_pretrained_cfg(TINY)
    repository = hub / f"models--{config.hf_hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    save_file(state, snapshot / "model.safetensors")


def test_a_file_loads_strictly_and_is_named_with_its_hash(tmp_path: Path) -> None:
    state, path = tiny_state(), tmp_path / "a.safetensors"
    save_file(state, path)
    backbone, notes = build(weights=str(path))
    assert_loaded(backbone, state)
    assert backbone.weights.kind == "file" and backbone.weights.source == str(path)
    assert backbone.weights.sha256 == sha256_of(path)
    assert not notes


@pytest.mark.parametrize("wrap", ["", "state_dict", "model", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_wrappers_and_prefixes_are_removed(tmp_path: Path, wrap: str, prefix: str) -> None:
    state = {"head.weight": torch.ones(2, 3), "head.bias": torch.zeros(2)}
    content: object = {prefix + k: v for k, v in state.items()}
    if wrap:
        content = {wrap: content, "epoch": 3}
    torch.save(content, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth").keys() == state.keys()


def test_halves_become_floats_and_classes_are_read_from_the_file(tmp_path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in tiny_state(10).items()}
    save_file(state, tmp_path / "a.safetensors")
    backbone, _ = build(weights=str(tmp_path / "a.safetensors"))
    assert backbone.num_classes == 10
    assert all(p.dtype == torch.float32 for p in backbone.module.parameters())
    assert_loaded(backbone, state)


def test_a_checkpoint_of_another_size_is_converted_and_says_so(tmp_path: Path) -> None:
    name = "deit_tiny_patch16_224"
    full = timm.create_model(name, num_classes=3, img_size=64).state_dict()
    full["pos_embed"] = torch.randn(1, 1 + 14 * 14, 192)  # as trained at 224
    save_file(full, tmp_path / "a.safetensors")
    section = ModelSection(name=name, weights=str(tmp_path / "a.safetensors"), img_size=64)
    backbone, notes = build_backbone(section, seed=0)
    assert backbone.module(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert any("converted" in note for note in notes)


def test_a_checkpoint_can_be_the_model(tmp_path: Path) -> None:
    state, path = tiny_state(4), tmp_path / f"{TINY}.safetensors"
    save_file(state, path)
    backbone, notes = build(name=str(path))
    assert backbone.name == TINY and backbone.num_classes == 4
    assert_loaded(backbone, state)
    assert any(path.name in note for note in notes)
    save_file(state, tmp_path / "best.safetensors")
    with pytest.raises(UsageError, match="--model NAME --weights"):
        build(name=str(tmp_path / "best.safetensors"))


class Payload:
    """Unpickles by running code that leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.marker,))


def test_the_payload_would_run_if_it_were_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors", ".ckpt"])
@pytest.mark.parametrize("plain", [True, False])
def test_code_in_a_checkpoint_never_runs(tmp_path: Path, suffix: str, plain: bool) -> None:
    marker, path = tmp_path / "ran", tmp_path / f"evil{suffix}"
    content = {"state_dict": {"head.weight": torch.ones(1), "x": Payload(marker)}}
    if plain:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(UsageError) as caught:
        build(weights=str(path))
    assert not marker.exists()
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def damage(kind: str, folder: Path) -> Path:
    safe, torch_file = folder / "a.safetensors", folder / "a.pth"
    save_file(tiny_state(2), safe)
    torch.save(tiny_state(2), torch_file)
    content = safe.read_bytes()
    if kind == "cut safetensors":
        safe.write_bytes(content[: len(content) // 2])
        return safe
    if kind == "header only":
        safe.write_bytes(content[:20])
        return safe
    if kind == "huge header":
        safe.write_bytes((2**62).to_bytes(8, "little") + content[8:])
        return safe
    if kind == "cut torch":
        torch_file.write_bytes(torch_file.read_bytes()[: len(content) // 2])
        return torch_file
    if kind == "text":
        torch_file.write_text("<html>404</html>")
        return torch_file
    if kind == "empty":
        torch_file.write_bytes(b"")
        return torch_file
    if kind == "a list":
        torch.save([torch.ones(1)], torch_file)
        return torch_file
    if kind == "numbers among tensors":
        torch.save({**tiny_state(2), "epoch": 3}, torch_file)
        return torch_file
    if kind == "nan":
        save_file({"head.weight": torch.tensor([[float("nan")]])}, safe)
        return safe
    if kind == "folder":
        return folder
    return folder / "missing.safetensors"


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("cut safetensors", "cut short"),
        ("header only", "cut short"),
        ("huge header", "cut short"),
        ("cut torch", "cut short"),
        ("text", "isn't plain tensors|cut short"),
        ("empty", "empty"),
        ("a list", "no state dict inside, but list"),
        ("numbers among tensors", "1 of .* entries aren't dense tensors \\(epoch\\)"),
        ("nan", "NaN"),
        ("folder", "folder"),
        ("missing", "no such file"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, kind: str, told: str) -> None:
    path = damage(kind, tmp_path)
    with pytest.raises(UsageError, match=told) as caught:
        build(weights=str(path))
    assert "\n" not in str(caught.value)


def test_a_misfit_is_counted_and_exemplified(tmp_path: Path) -> None:
    state = tiny_state(10)
    del state["norm.bias"]
    state["extra"] = torch.ones(1)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UsageError) as caught:
        build(weights=str(tmp_path / "a.safetensors"), num_classes=7)
    message = str(caught.value)
    assert "1 missing (norm.bias)" in message
    assert "1 unexpected (extra)" in message
    assert "2 of another shape (head.weight: file 10×64, model 7×64" in message
    assert "num_classes" in message and "\n" not in message


def test_auto_takes_the_hub_first_then_the_folder(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    mine, published = tiny_state(), {k: v + 1 for k, v in tiny_state().items()}
    monkeypatch.setenv("DEPLOYKIT_WEIGHTS", str(folder))
    backbone, _ = build()
    assert backbone.weights.kind == "untrained"
    assert "no file for test_vit" in backbone.weights.source

    save_file(mine, folder / "test_vit.safetensors")
    backbone, notes = build()
    assert_loaded(backbone, mine)
    assert backbone.weights.kind == "file" and len(notes) == 1

    publish(hub, published)
    for weights in ("auto", "hub"):
        backbone, notes = build(weights=weights)
        assert_loaded(backbone, published)
        assert backbone.weights.kind == "hub" and backbone.weights.source == TINY
        assert not notes

    backbone, _ = build(weights="random")
    assert backbone.weights.kind == "random" and not backbone.weights.trained


def test_published_weights_under_a_new_head_do_not_count_as_trained(hub: Path) -> None:
    publish(hub, tiny_state())
    backbone, notes = build(weights="hub", num_classes=10)
    assert backbone.num_classes == 10
    assert backbone.weights.kind == "untrained"
    assert any("classifier" in note for note in notes)


def test_hub_or_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="weights hub: HF_HUB_OFFLINE is set"):
        build(weights="hub")
    with pytest.raises(HubError, match="timm publishes no weights"):
        fetch_from_hub("mixer_s16_224")
    monkeypatch.setenv("DEPLOYKIT_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"DEPLOYKIT_WEIGHTS=.*no such file or folder"):
        build()


def test_a_dead_hub_is_found_out_with_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append((url, timeout))
            raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    for _ in range(2):
        with pytest.raises(HubError, match="can't be reached \\(no route\\)"):
            fetch_from_hub(TINY)
    assert len(asked) == 1 and asked[0][1] <= 5


class Degenerate(nn.Module):
    """Zero head, zero residual scale, zero-initialised norm: its output is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.norm1 = nn.BatchNorm2d(8)
        self.gamma = nn.Parameter(torch.full((8, 1, 1), 1e-6))
        self.conv2 = nn.Conv2d(8, 8, 1)
        self.norm2 = nn.BatchNorm2d(8)
        self.logit_scale = nn.Parameter(torch.full((2,), 2.3))
        self.head = nn.Linear(8, 5)
        for zero in (self.norm2.weight, self.head.weight, self.head.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv(x))
        x = x + self.gamma * self.norm2(self.conv2(x))
        pooled: Tensor = self.head(x.relu().mean((2, 3)))
        return pooled


def test_untrained_networks_are_made_testable() -> None:
    torch.manual_seed(1)
    module = Degenerate()
    images = torch.randn(4, 3, 32, 32)
    before = torch.random.get_rng_state()
    make_testable(module, seed=3, size=32)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not module.training and module.norm1.momentum == 0.1
    with torch.no_grad():
        scores = module(images)
    assert scores.std(dim=0).min() > 1e-3
    assert torch.all(module.gamma == 0.5)
    assert torch.all(module.logit_scale == 2.3)  # constant, but not degenerate
    assert module.norm2.weight.min() >= 0.5 and module.norm2.weight.max() <= 1.5
    assert module.norm1.running_var is not None and module.norm1.running_mean is not None
    assert not torch.allclose(module.norm1.running_mean, torch.zeros(8))


def test_make_testable_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    modules = [Degenerate() for _ in range(3)]
    for module in modules[1:]:
        module.load_state_dict(modules[0].state_dict())
    for module, seed in zip(modules, (7, 7, 8), strict=True):
        torch.rand(2)
        make_testable(module, seed=seed, size=32)
    first, again, other = (m.state_dict() for m in modules)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
