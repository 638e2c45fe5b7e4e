"""Feature maps instead of scores: built, captured, quantised, exported, compared map by map."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import fx, nn

import deploykit
from deploykit._compat import timm
from deploykit.backbones.build import build_backbone
from deploykit.backbones.features import with_features
from deploykit.cli import _main
from deploykit.errors import AccuracyGateError, TargetMissingError, UsageError
from deploykit.export.onnx import onnx_bytes
from deploykit.export.parity import affordable_images, compare_levels, make_reference
from deploykit.export.structure import load_model, save_model
from deploykit.fidelity import LevelError
from deploykit.graph.capture import CapturedModel, capture
from deploykit.graph.levels import apart, is_join, join_levels, split_joined
from deploykit.graph.signal import sqnr_db
from deploykit.graph.units import split_units
from deploykit.pipeline import default_output
from deploykit.prune.merge_options import MergeOptions
from deploykit.prune.merge_tokens import merge_tokens
from deploykit.prune.sparsity import SparsityOptions, sparsify
from deploykit.prune.structured import StructureOptions, prune_structure
from deploykit.quant.options import QuantizeOptions
from deploykit.quant.plan import plan_layers
from deploykit.quant.quantize import quantize
from deploykit.recipe import ModelSection
from deploykit.recipe_io import build_recipe
from deploykit.report.model import Report, load_report
from deploykit.targets.registry import get_target, joined
from deploykit.types import Backbone, FeatureLevel
from tests.factories import make_artifact
from tests.graphs import make_backbone
from tests.tiny_models import SIZE, tiny_stages, tiny_tokens, tiny_windows

MODELS = "tests.tiny_models:"
WINDOWS = [(16, 8, 8, 4.0), (32, 4, 4, 8.0)]  # channels, height, width, stride
STAGES = [(8, 8, 8, 4.0), (12, 4, 4, 8.0)]


@functools.cache
def backbone_of(name: str, *numbers: int) -> Backbone:
    section = ModelSection(name=f"{MODELS}{name}", features=list(numbers) or True)
    return build_backbone(section, 0)[0]


@functools.cache
def captured_of(name: str) -> CapturedModel:
    return capture(backbone_of(name))


def shapes(backbone: Backbone) -> list[tuple[int, int, int, float]]:
    return [(one.channels, one.height, one.width, one.stride) for one in backbone.levels]


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def own_maps(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The maps by timm itself."""
    maps = net.forward_intermediates(x, output_fmt="NCHW", intermediates_only=True)
    return list(maps)


def test_joining_is_a_proper_operator_with_a_gradient() -> None:
    maps = [torch.randn(2, 3, 2, 2, requires_grad=True), torch.randn(2, 1, 4, 4)]
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(join_levels, (maps,), test_utils=utils)
    join_levels(maps)[:, 1].sum().backward()
    assert maps[0].grad is not None
    assert maps[0].grad.flatten(1).nonzero().tolist() == [[0, 1], [1, 1]]
    assert join_levels(maps).shape == (2, 12 + 16)
    assert torch.equal(join_levels(maps)[:, :12], maps[0].flatten(1))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tiny_windows", WINDOWS),
        ("tiny_stages", STAGES),
        ("tiny_encoder", STAGES),
        ("tiny_tokens", [(48, 8, 8, 4.0)]),
    ],
)
def test_the_deepest_map_of_each_resolution_is_given(
    name: str, wanted: list[tuple[int, int, int, float]]
) -> None:
    backbone = backbone_of(name)
    # the stem of tiny_stages gives a map, too: of 16 places a side
    expected = [(8, 16, 16, 2.0), *wanted] if name == "tiny_stages" else wanted
    assert shapes(backbone) == expected
    assert [level.name for level in backbone.levels] == [
        f"features_{number}" for number in range(len(expected))
    ]
    assert backbone.num_classes == 0


def test_the_maps_are_those_of_timm_and_of_the_stages() -> None:
    x = images()
    swin = backbone_of("tiny_windows")
    for mine, theirs in zip(
        split_joined(swin.module(x), swin.levels), own_maps(tiny_windows(), x), strict=True
    ):
        torch.testing.assert_close(mine, theirs.flatten(1))
    net = tiny_stages()
    staged = backbone_of("tiny_stages")
    with torch.no_grad():
        wanted = [net.stem(x), *net.maps(x)]  # type: ignore[operator]
    for mine, theirs in zip(split_joined(staged.module(x), staged.levels), wanted, strict=True):
        assert torch.equal(mine, theirs.flatten(1))


def test_maps_can_be_named_by_number_and_blocks_behind_them_go() -> None:
    backbone = backbone_of("tiny_tokens", 0)
    x = images()
    wanted = own_maps(tiny_tokens(), x)[0].flatten(1)  # by fused attention: the last digit differs
    torch.testing.assert_close(backbone.module(x), wanted)
    assert not any("blocks.1." in name for name, _ in backbone.module.named_parameters())
    both = backbone_of("tiny_tokens", 0, 1)
    assert len(both.levels) == 2
    with pytest.raises(UsageError, match="has maps 0 to 1, not 2"):
        backbone_of("tiny_tokens", 0, 2)


def test_sam_gives_what_its_neck_makes() -> None:
    net = timm.models.vision_transformer_sam.VisionTransformerSAM(
        img_size=SIZE, patch_size=4, embed_dim=24, depth=2, num_heads=2, neck_chans=10,
        use_abs_pos=False,
    ).eval()  # fmt: skip
    made = with_features(make_backbone(net, SIZE), True)
    assert shapes(made) == [(10, 8, 8, 4.0)]


def test_a_network_without_maps_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.tiny_models

    monkeypatch.setattr(
        tests.tiny_models,
        "flat",
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 5)),
        raising=False,
    )
    section = ModelSection(name=f"{MODELS}flat", features=True, img_size=SIZE)
    with pytest.raises(UsageError, match="gives no feature maps") as caught:
        build_backbone(section, 0)
    assert "\n" not in str(caught.value)


def test_layers_are_called_what_they_are_called_without_features() -> None:
    with_maps = captured_of("tiny_windows")
    plain = capture(build_backbone(ModelSection(name=f"{MODELS}tiny_windows"), 0)[0])
    assert set(with_maps.graph_module.state_dict()) < set(plain.graph_module.state_dict())
    names = {plan.layer for plan in plan_layers(with_maps.graph_module, 8, 8)}
    known = {plan.layer for plan in plan_layers(plain.graph_module, 8, 8)}
    assert names == known - {"head.fc"}
    assert with_maps.dynamic_batch


def test_units_are_cut_behind_a_map_that_is_given() -> None:
    captured = captured_of("tiny_windows")
    planned = {plan.node for plan in plan_layers(captured.graph_module, 8, 8)}
    units = split_units(captured.graph_module.graph, planned)
    assert sorted(layer for unit in units for layer in unit.layers) == sorted(planned)
    blocks = {".".join(unit.name.split(".")[:4]) for unit in units}
    assert {"layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"} <= blocks
    assert not any(is_join(node) for unit in units for node in unit.nodes)
    for unit in units:  # everything a unit reads is its own, its source's, or not of the image
        inside = {unit.source, *unit.nodes}
        image = {node for other in units for node in other.nodes}
        for node in unit.nodes:
            assert all(used in inside for used in node.all_input_nodes if used in image)


def test_taken_apart_a_graph_gives_its_maps() -> None:
    captured = captured_of("tiny_windows")
    x = images()
    with torch.no_grad():
        maps = apart(captured.graph_module)(x)
        assert torch.equal(join_levels(list(maps)), captured.graph_module(x))
    assert [tuple(one.shape[1:]) for one in maps] == [one[:3] for one in WINDOWS]
    assert any(is_join(node) for node in captured.graph_module.graph.nodes)  # left as it was


def _quantised(name: str, bits: int, **options: object) -> fx.GraphModule:
    captured = captured_of(name)
    made = quantize(
        captured,
        QuantizeOptions(weight_bits=bits, input_bits=bits, **options),  # type: ignore[arg-type]
        lambda: iter(images(8).split(4)),
    )
    return made.graph_module


@pytest.mark.parametrize("name", ["tiny_windows", "tiny_stages"])
def test_eight_bits_keep_every_map(name: str) -> None:
    x, backbone = images(), backbone_of(name)
    with torch.no_grad():
        wanted = split_joined(backbone.module(x), backbone.levels)
        got = split_joined(_quantised(name, 8)(x), backbone.levels)
    for one, other in zip(wanted, got, strict=True):
        assert 25 < sqnr_db(one, other) < 80


def test_four_bits_are_rounded_and_learnt_unit_by_unit() -> None:
    x, backbone = images(8), backbone_of("tiny_windows")
    learnt = _quantised(
        "tiny_windows", 4, rounding="gptq", reconstruction="aphq", reconstruction_iterations=20
    )
    with torch.no_grad():
        wanted = split_joined(backbone.module(x), backbone.levels)
        got = split_joined(learnt(x), backbone.levels)
    assert all(5 < sqnr_db(*pair) < 30 for pair in zip(wanted, got, strict=True))


def test_the_onnx_file_has_an_output_a_map_at_any_batch(tmp_path: Path) -> None:
    backbone = backbone_of("tiny_windows")
    path = tmp_path / "maps.onnx"
    path.write_bytes(onnx_bytes(captured_of("tiny_windows").graph_module, backbone))
    model = onnx.load(path)
    assert [output.name for output in model.graph.output] == ["features_0", "features_1"]
    (said,) = [p.value for p in model.metadata_props if p.key == "levels"]
    assert json.loads(said) == [level.model_dump() for level in backbone.levels]
    assert not any(node.op_type == "Concat" and "join" in node.name for node in model.graph.node)
    session = onnxruntime.InferenceSession(path)
    for count in (1, 5):
        x = images(count)
        maps = session.run(None, {"image": x.numpy()})
        for mine, theirs in zip(maps, own_maps(tiny_windows(), x), strict=True):
            np.testing.assert_allclose(mine, theirs.numpy(), atol=1e-4)


def test_a_saved_structure_keeps_its_levels(tmp_path: Path) -> None:
    backbone, captured = backbone_of("tiny_windows"), captured_of("tiny_windows")
    save_model(captured.graph_module, backbone, tmp_path, precision="fp32")
    saved = load_model(tmp_path)
    assert saved.backbone.levels == backbone.levels
    with torch.no_grad():
        assert torch.equal(saved.graph_module(images()), captured.graph_module(images()))
    again, _ = build_backbone(ModelSection(name=str(tmp_path), features=True), 0)
    torch.testing.assert_close(capture(again).graph_module(images()), saved.graph_module(images()))
    structure = json.loads((tmp_path / "structure.json").read_text())
    structure["model"]["levels"][0]["channels"] += 1
    (tmp_path / "structure.json").write_text(json.dumps(structure))
    with pytest.raises(UsageError, match="feature maps of other shapes"):
        load_model(tmp_path)


def _level(name: str, channels: int) -> FeatureLevel:
    return FeatureLevel(name=name, channels=channels, height=2, width=2, stride=16)


def test_a_fault_in_one_map_is_that_map_s(tmp_path: Path) -> None:
    levels = [_level("features_0", 4), _level("features_1", 2)]
    right = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    reference = make_reference("graph", lambda _: right, images(8), None, 0, None, levels)
    wrong = right.clone()
    wrong[:, 16:] *= 1.01
    first, second = compare_levels(
        make_artifact(precision="fp32"), "here", 1, wrong, reference, "noise"
    )
    assert (first.level, first.passed, second.level, second.passed) == (
        "features_0", True, "features_1", False,
    )  # fmt: skip
    assert second.sqnr_db == pytest.approx(40, abs=0.1)
    assert first.top1_agreement is None
    assert second.top1_agreement is None
    assert "top-1" not in second.tolerance


def test_rounding_maps_are_judged_by_their_own_noise() -> None:
    levels = [_level("features_0", 4), _level("features_1", 2)]
    generator = torch.Generator().manual_seed(0)
    floats = torch.randn(16, 24, generator=generator)
    noise = torch.randn(16, 24, generator=generator) * 0.1
    simulated = floats + noise
    reference = make_reference("graph", lambda _: simulated, images(16), floats, 0, None, levels)
    other = floats + noise.flip(0)  # as much noise, another draw of it
    rows = compare_levels(make_artifact(), "here", 1, other, reference, "noise")
    assert all(row.passed for row in rows)
    other[:, :16] += noise[:, :16] * 3
    assert [row.passed for row in compare_levels(
        make_artifact(), "here", 1, other, reference, "noise"
    )] == [False, True]  # fmt: skip


def test_no_more_images_are_compared_than_memory_holds() -> None:
    large = FeatureLevel(name="features_0", channels=64, height=512, width=512, stride=2)
    assert affordable_images(32, [large]) == 4
    assert affordable_images(32, [large] * 100) == 2
    assert affordable_images(32, [_level("features_0", 4)]) == 32
    assert affordable_images(32, []) == 32


def test_a_folder_of_maps_is_another_than_that_of_scores() -> None:
    recipe = build_recipe({"model": {"name": "swin_t", "features": True}})
    assert default_output(recipe).name == "swin_t-w8a8-features"


def test_inspect_lists_the_maps(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["inspect", f"{MODELS}tiny_windows", "--features", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["channels"], one["stride"]) for one in found["levels"]] == [(16, 4.0), (32, 8.0)]


def test_fidelity_is_summed_over_batches() -> None:
    wanted = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    got = wanted + 0.1 * torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    error = LevelError()
    for part in (slice(0, 4), slice(4, 6)):
        error.add(wanted[part], got[part])
    assert error.sqnr_db == pytest.approx(sqnr_db(wanted, got))
    assert error.relative == pytest.approx(float((got - wanted).norm() / wanted.norm()))
    assert error.worst_db == pytest.approx(min(map(sqnr_db, wanted, got)))
    assert error.images == 6
    got[0, 0] = torch.nan
    error.add(wanted, got)
    assert error.sqnr_db == -torch.inf


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("features") / "out"
    report = deploykit.compress(
        {
            "measure": {"min_samples": 16, "min_seconds": 0.05, "max_seconds": 0.3},
            "gates": {"min_sqnr_db": 20},
        },
        model=f"{MODELS}tiny_windows",
        features=True,
        calib=tiny_data,
        data=tiny_data,
        targets=["cpu-onnxruntime", "cpu-openvino"],
        out=out,
    )
    return out, report


def test_the_run_compares_every_file_on_every_map_and_batch(
    finished: tuple[Path, Report],
) -> None:
    _, report = finished
    cells = {(r.artifact, r.format, r.runtime, r.level, r.batch) for r in report.parity}
    for name in ("original", "compressed"):
        for form, target in (("onnx", "cpu-onnxruntime"), ("openvino", "cpu-openvino")):
            for level in ("features_0", "features_1"):
                for batch in (1, 8):
                    assert (name, form, target, level, batch) in cells
    assert all(row.passed and row.top1_agreement is None for row in report.parity)


def test_fidelity_stands_in_for_accuracy(finished: tuple[Path, Report], tiny_data: Path) -> None:
    out, report = finished
    assert report.accuracy == []
    assert [level.stride for level in report.levels] == [4.0, 8.0]
    assert {(f.format, f.level) for f in report.fidelity} == {
        (form, level) for form in ("onnx", "openvino") for level in ("features_0", "features_1")
    }
    assert all(20 < row.sqnr_db < 80 for row in report.fidelity)
    assert all(row.worst_sqnr_db <= row.sqnr_db for row in report.fidelity)
    assert str(tiny_data.name) in report.fidelity[0].data
    assert any("accuracy withheld" in line for line in report.warnings)
    assert report.verdict == "ok"  # the one limit that was set held
    (gate,) = [gate for gate in report.gates if gate.name == "min_sqnr_db"]
    assert gate.passed
    assert gate.value == min(row.sqnr_db for row in report.fidelity)
    with pytest.raises(AccuracyGateError, match="below the limit of 70 dB"):
        report.check(min_sqnr_db=70)
    with pytest.raises(UsageError, match="no classes"):
        report.check(max_drop=1)
    assert load_report(out) == report


def test_fidelity_is_that_of_the_files(finished: tuple[Path, Report]) -> None:
    out, report = finished
    row = next(r for r in report.fidelity if (r.format, r.level) == ("onnx", "features_1"))
    from deploykit.images import calibration_images

    backbone = backbone_of("tiny_windows")
    folder = Path(report.recipe["evaluation"]["data"])
    pool = calibration_images(folder, backbone, row.images, 0)
    pixels = torch.cat(list(pool.batches(8))).numpy()
    maps = [
        onnxruntime.InferenceSession(out / name).run(["features_1"], {"image": pixels})[0]
        for name in ("original.onnx", "model.onnx")
    ]
    assert sqnr_db(*map(torch.from_numpy, maps)) == pytest.approx(row.sqnr_db, abs=0.1)


def test_every_rendering_shows_the_maps(finished: tuple[Path, Report]) -> None:
    out, _ = finished
    for name in ("report.md", "report.html"):
        text = (out / name).read_text()
        assert "features_1" in text
        assert "32 × 4 × 4, stride 8" in text
        assert "no classes" in text
        assert "of top-1 agree" not in text


def test_a_runner_gives_the_maps_one_by_one(finished: tuple[Path, Report]) -> None:
    for target, name in (("cpu-onnxruntime", "model.onnx"), ("cpu-openvino", "model.xml")):
        maps = get_target(target).load(finished[0] / name, 1)(images(2).numpy())
        assert isinstance(maps, tuple)
        assert [one.shape for one in maps] == [(2, 16, 8, 8), (2, 32, 4, 4)]
        assert joined(maps).shape == (2, 16 * 64 + 32 * 16)


def test_a_pruned_network_keeps_its_maps_and_is_a_backbone_again(
    tmp_path: Path, tiny_data: Path
) -> None:
    out = tmp_path / "out"
    report = deploykit.compress(
        {
            "measure": {"min_samples": 16, "min_seconds": 0.05, "max_seconds": 0.2},
            "prune": {"ratio": 0.15, "round_to": 2, "images": 8},
        },
        model=f"{MODELS}tiny_windows",
        features=True,
        algorithm="none",
        calib=tiny_data,
        out=out,
    )
    assert [(one.channels, one.height) for one in report.levels] == [(16, 8), (32, 4)]
    assert report.passes[0].name == "prune_structure"
    assert report.passes[0].details["macs"][1] < report.passes[0].details["macs"][0]
    assert {row.level for row in report.fidelity} == {"features_0", "features_1"}
    assert all(row.passed for row in report.parity)
    again, _ = build_backbone(ModelSection(name=str(out), features=True), 0)
    assert again.levels == tuple(report.levels)
    with pytest.raises(UsageError, match="give --features"):
        build_backbone(ModelSection(name=str(out)), 0)


def test_channels_of_the_maps_are_never_pruned() -> None:
    backbone = backbone_of("tiny_stages")
    options = StructureOptions(ratio=0.3, scope=("conv",), round_to=2, images=4)
    with pytest.raises(UsageError, match="nothing in the scope"):
        prune_structure(backbone, options, lambda: iter([images(4)]))
    net = tiny_windows()
    with_maps = with_features(make_backbone(net, SIZE), True)
    options = StructureOptions(ratio=0.15, scope=("mlp", "heads", "embedding"), round_to=2)
    pruned, record = prune_structure(with_maps, options, lambda: iter([images(4)]))
    with torch.no_grad():
        assert pruned.module(images(2)).shape == with_maps.module(images(2)).shape
    assert record.details["macs"][1] < record.details["macs"][0]


def test_sparse_weights_are_found_behind_a_map_too() -> None:
    captured = captured_of("tiny_windows")
    sparse, record = sparsify(
        captured,
        SparsityOptions(pattern="2:4", method="wanda", images=8),
        lambda: iter(images(8).split(4)),
    )
    assert record.details
    x = images()
    with torch.no_grad():
        wanted, got = captured.graph_module(x), sparse.graph_module(x)
    assert all(
        0 < sqnr_db(*pair) < 60
        for pair in zip(
            split_joined(wanted, captured.backbone.levels),
            split_joined(got, captured.backbone.levels),
            strict=True,
        )
    )


def test_tokens_of_a_map_merge_in_their_place_or_not_at_all() -> None:
    captured = captured_of("tiny_tokens")
    with pytest.raises(UsageError, match="can't be merged"):
        merge_tokens(captured, MergeOptions(r=8, least_tokens=16))
    merged, _ = merge_tokens(captured, MergeOptions(r=24, place="local", least_tokens=16))
    x = images()
    with torch.no_grad():
        quality = sqnr_db(captured.graph_module(x), merged.graph_module(x))
    assert 3 < quality < 100


def test_verifying_again_compares_the_maps(finished: tuple[Path, Report]) -> None:
    from deploykit.recheck import verify_folder

    rows = verify_folder(finished[0], ["cpu-onnxruntime"], images=8)
    assert {row.level for row in rows} == {"features_0", "features_1"}
    assert all(row.passed for row in rows)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"gates": {"max_drop": 1}}, "give gates.min_sqnr_db instead"),
        ({"model": {"classes": [0, 1]}}, "model.classes"),
        ({"merge": {"tokens": "auto"}}, "merge.tokens: auto"),
        ({"recover": {"data": "x"}, "merge": {"tokens": 2}}, "recover.data"),
    ],
)
def test_what_needs_classes_is_refused_in_one_line(extra: dict[str, dict], said: str) -> None:
    data: dict[str, dict] = {"model": {"name": "vit_ti", "features": True}}
    for key, section in extra.items():
        data[key] = {**data.get(key, {}), **section}
    with pytest.raises(UsageError, match=said) as caught:
        build_recipe(data)
    assert "\n" not in str(caught.value)


def test_a_format_without_maps_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(TargetMissingError, match="isn't written with feature maps yet"):
        deploykit.compress(
            model=f"{MODELS}tiny_windows", features=True, formats=["coreml"], out=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()
