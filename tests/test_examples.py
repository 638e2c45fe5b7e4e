"""What a newcomer runs: the demo's files, its recipe, the CI step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from deploykit.backbones.build import build_backbone
from deploykit.data import open_dataset
from deploykit.evaluate import top1_and_predictions
from deploykit.recipe_io import load_recipe

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "fashion_mnist"


def test_the_embedded_network_is_trained() -> None:
    recipe = load_recipe(DEMO / "demo.yaml")
    backbone, _ = build_backbone(recipe.model, recipe.seed)
    assert backbone.weights.trained
    assert recipe.evaluation.data is not None
    images = open_dataset(
        recipe.evaluation.data, backbone.preprocessing, labelled=True, num_classes=10, limit=300
    )
    assert images.labels is not None
    predictions = top1_and_predictions(backbone.module, images, 50)
    assert float((predictions == images.labels).float().mean()) > 0.88


def test_the_log_says_what_was_reached() -> None:
    lines = (DEMO / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["top1_test_10000"] >= 91


def test_calibration_and_test_images_differ() -> None:
    recipe = load_recipe(DEMO / "demo.yaml")
    backbone, _ = build_backbone(recipe.model, 0)
    sets = []
    for path in (recipe.calibration.data, recipe.evaluation.data):
        assert path is not None
        found = open_dataset(path, backbone.preprocessing, labelled=True, num_classes=10)
        first = next(iter(found.tensor_batches(64)))[0]
        sets.append({image.numpy().tobytes() for image in first})
        assert len(found) in (512, 2000)
    assert not sets[0] & sets[1]


def test_the_ci_step_passes_and_fails_with_the_right_codes(tmp_path: Path, tiny_data: Path) -> None:
    recipe = {
        "version": 1,
        "model": {"name": "tests.tiny_models:tiny_hybrid"},
        "calibration": {"data": str(tiny_data), "images": 32},
        "evaluation": {"data": str(tiny_data)},
        "verify": {"images": 8},
        "measure": {"min_samples": 64, "min_seconds": 0.2, "max_seconds": 2.0},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, str(ROOT / "examples" / "ci" / "gate.py"), str(path)]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, str(tmp_path / "out"), *options],
            cwd=ROOT, capture_output=True, text=True, check=False,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    slow = run("--max-drop", "100", "--max-latency-ratio", "0.0001")
    # 7 where the machine is too busy to time anything: timings never decide a test.
    assert slow.returncode in (4, 7), slow.stderr
    assert "regression" in slow.stderr
    assert len(slow.stderr.strip().splitlines()) == 1
    fine = run("--max-drop", "100", "--max-latency-ratio", "10000")
    assert fine.returncode in (0, 7), fine.stderr


def test_the_workflow_is_valid_yaml_and_names_real_commands() -> None:
    text = (ROOT / "examples" / "ci" / "github-actions.yml").read_text(encoding="utf-8")
    steps = YAML(typ="safe").load(text)["jobs"]["compress"]["steps"]
    commands = " ".join(step.get("run", "") for step in steps)
    assert (ROOT / "scripts" / "bootstrap.py").exists()
    assert "deploykit compress" in commands and "deploykit check" in commands


def test_the_readme_says_what_was_measured() -> None:
    source = (ROOT / "benchmarks" / "readme.py").read_text(encoding="utf-8")
    names: dict[str, Any] = {
        "__file__": str(ROOT / "benchmarks" / "readme.py"),
        "__name__": "readme",
    }
    exec(compile(source, "readme.py", "exec"), names)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert names["with_results"](readme) == readme
    assert "| w8a8 |" in readme
