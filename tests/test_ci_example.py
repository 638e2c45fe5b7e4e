"""The CI examples: their commands exist, and really turn a job green or red."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from ruamel.yaml import YAML

from deploykit.cli import app
from deploykit.history import read_history
from deploykit.report.limits import load_limits

ROOT = Path(__file__).resolve().parent.parent
CI = ROOT / "examples" / "ci"


def load(name: str) -> Any:
    return YAML(typ="safe").load((CI / name).read_text(encoding="utf-8"))


def github_steps() -> list[dict[str, Any]]:
    return [s for s in load("github-actions.yml")["jobs"]["compress"]["steps"] if "run" in s]


def gitlab_lines() -> list[str]:
    job = load("gitlab-ci.yml")["compress"]
    return [*job["script"], *job["after_script"]]


def test_every_command_and_option_of_the_examples_exists() -> None:
    commands: Any = typer.main.get_command(app)
    lines = "\n".join([*(s["run"] for s in github_steps()), *gitlab_lines()]).splitlines()
    used = [line for line in lines if line.strip().startswith(".venv/bin/deploykit ")]
    assert len(used) == 7
    for line in used:
        _, name, *words = shlex.split(line)
        known = {o for p in commands.commands[name].params for o in (*p.opts, *p.secondary_opts)}
        options = {w for w in words if re.fullmatch(r"--?[a-z][a-z-]*", w)}
        assert options and options <= known, line
    assert load_limits(CI / "gates.yaml").max_drop == 1.0


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of a user: the demo with fewer images, the limits, the command."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "examples", folder / "examples")
    recipe = folder / "examples" / "fashion_mnist" / "demo.yaml"
    text = recipe.read_text(encoding="utf-8").replace("images: 512", "images: 64")
    text = text.replace("data: ./test.npz", "data: ./test.npz\n  images: 400")
    recipe.write_text(text + "verify:\n  images: 8\n", encoding="utf-8")
    command = folder / ".venv" / "bin" / "deploykit"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m deploykit.cli "$@"\n')
    command.chmod(0o755)
    return folder


def job(checkout: Path, lines: list[tuple[str, bool]], **variables: str) -> tuple[int, str]:
    """Run steps as a CI service does: in bash -e; after a failure only those marked always."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    code, said = 0, ""
    for line, always in lines:
        if code and not always:
            continue
        done = subprocess.run(
            ["bash", "-e", "-c", line], cwd=checkout, env=environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        said += f"$ {line.strip()}\n{done.stdout}{done.stderr}"
        code = code or done.returncode
    return code, said


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_job_goes_green_and_a_planted_regression_turns_it_red(checkout: Path) -> None:
    summary = checkout / "summary.md"
    steps = [s for s in github_steps() if s["name"] != "install"]
    lines = [(s["run"], s.get("if") == "always()") for s in steps]
    variables = {"GITHUB_STEP_SUMMARY": str(summary), "GITHUB_SHA": "1" * 40}

    code, said = job(checkout, lines, **variables)
    print(said, summary.read_text(), sep="\n")
    # 7 where the machine is too busy to time anything: timings never decide a test
    assert code in (0, 7), said
    history = checkout / "ci-history" / "history.jsonl"
    assert len(read_history(history)[0]) == 1
    if code == 7:  # what the job would have kept on a quieter machine
        shutil.copy(checkout / "out/ci/report.json", checkout / "ci-history/baseline.json")

    recipe = checkout / "examples" / "fashion_mnist" / "demo.yaml"
    # three bits with all corrections switched off: with them the network hardly loses
    worse = "bits: w3a3\n  preset: fast\n  rounding: nearest\n  bias_correction: false"
    recipe.write_text(recipe.read_text().replace("bits: w8a8", worse))
    shutil.rmtree(checkout / "out")
    summary.unlink()
    code, said = job(checkout, lines, **{**variables, "GITHUB_SHA": "2" * 40})
    print(said, summary.read_text(), sep="\n")
    assert code == 3, said
    assert "max_drop" in said and "baseline_top1" in said
    assert "❌" in summary.read_text() and "(exit code 3)" in summary.read_text()
    entries, _ = read_history(history)
    assert [e.commit for e in entries] == ["1" * 40, "2" * 40]
    assert entries[1].exit_code == 3
    for name in ("junit.xml", "trend.html", "report.json"):
        assert (checkout / "out" / "ci" / name).exists()
    assert "<failure" in (checkout / "out" / "ci" / "junit.xml").read_text()
    baseline = json.loads((checkout / "ci-history" / "baseline.json").read_text())
    assert baseline["bits"] == "w8a8"  # a red run is no baseline

    # GitLab's commands on the same runs
    lines = [(x, False) for x in gitlab_lines() if "compress" not in x and "bootstrap" not in x]
    assert job(checkout, lines)[0] == 3
