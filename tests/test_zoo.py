"""The zoo suite: its choice of members, its processes, its matrix; and the zoo itself (slow)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import zoo, zoo_member
from benchmarks.zoo_matrix import markdown
from benchmarks.zoo_member import STEPS, cells
from deploykit.backbones.registry import BackboneSpec, families
from deploykit.errors import DeploykitError

SHARD = os.environ.get("DEPLOYKIT_ZOO_SHARD", "1/1")
"""Which part of the zoo the slow test walks: ``i/n``."""

CELL = {"passed": True, "sqnr_db": 99.7, "seconds": 1.0}


def test_the_smallest_member_of_every_family_is_walked_by_exactly_one_shard() -> None:
    every = zoo.chosen([], "1/1")
    assert list(every) == sorted(families())
    for family, spec in every.items():
        assert all((spec.params_m or 0) <= (m.params_m or 0) for m in families()[family])
    shards = [set(zoo.chosen([], f"{index}/3")) for index in (1, 2, 3)]
    assert set().union(*shards) == set(every)
    assert sum(map(len, shards)) == len(every)


def test_families_and_members_are_named_in_any_spelling() -> None:
    assert [spec.name for spec in zoo.chosen(["shvit", "CRATE-T"], "1/1").values()] == [
        "crate_t",
        "shvit_s1",
    ]
    with pytest.raises(ValueError, match="nonsense"):
        zoo.chosen(["nonsense"], "1/1")
    for shard in ("0/2", "3/2", "2", "a/b"):
        with pytest.raises(ValueError, match="i/n"):
            zoo.chosen([], shard)


def test_a_step_is_taken_refused_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(member: zoo_member.Member) -> dict[str, Any]:
        raise DeploykitError("no such thing")

    def broken(member: zoo_member.Member) -> dict[str, Any]:
        raise KeyError("x")

    some = {"capture": zoo_member.captured, "fp32": zoo_member.original}
    monkeypatch.setattr(zoo_member, "STEPS", some | {"prune": refused, "merge": broken})
    found = dict(cells("tests.tiny_models:tiny_hybrid"))
    assert found["capture"]["dynamic_batch"] and found["capture"]["macs"] > 0
    assert found["fp32"]["passed"] and found["fp32"]["batches"] == [1, 4]
    assert found["prune"]["why"] == "no such thing"
    assert found["merge"]["failed"] == "KeyError: 'x'"


@pytest.mark.slow
def test_a_small_network_goes_through_every_step() -> None:
    found = dict(cells("test_vit.r160_in1k"))
    assert list(found) == list(STEPS)
    assert not [cell["failed"] for cell in found.values() if "failed" in cell]
    for step in ("fp32", "w8a8", "w4a4", "prune"):
        assert found[step]["passed"] and found[step]["batches"] == [1, 4], step
    assert found["w4a4"]["bytes"] < found["w8a8"]["bytes"] < found["fp32"]["bytes"]
    assert found["latency"]["kernels"]
    assert found["merge"].get("passed") or "tokens" in found["merge"]["why"]


def test_a_process_that_ends_early_says_why_and_nothing_else_is_lost() -> None:
    row = zoo.run_member("no_such_network", 16.0, 2.0)
    assert row["cells"] == {} and "no_such_network" in row["ended"]
    row = zoo.run_member("test_vit.r160_in1k", 16.0, 0.01)
    assert row["ended"] == "more than 0.01 minutes"


def test_results_are_laid_over_each_other(tmp_path: Path) -> None:
    path = tmp_path / "zoo.json"
    zoo.update(path, "B", {"name": "b", "cells": {}})
    zoo.update(path, "A", {"name": "a", "cells": {}})
    zoo.update(path, "B", {"name": "b", "cells": {"fp32": CELL}})
    data = json.loads(path.read_text())
    assert list(data["members"]) == ["A", "B"]
    assert data["members"]["B"]["cells"]["fp32"]["passed"]
    assert [file.name for file in tmp_path.iterdir()] == ["zoo.json"]


def test_members_that_are_done_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run(name: str, gigabytes: float, minutes: float) -> dict[str, Any]:
        ran.append(name)
        return {"cells": {"fp32": CELL}, "seconds": 1.0}

    monkeypatch.setattr(zoo, "run_member", run)
    paths = ["--results", str(tmp_path / "zoo.json"), "--matrix", str(tmp_path / "matrix.md")]
    for extra in ([], [], ["--again"]):
        monkeypatch.setattr("sys.argv", ["zoo.py", "--only", "shvit", *paths, *extra])
        zoo.main()
    assert ran == ["shvit_s1", "shvit_s1"]
    assert "| SHViT | shvit_s1 |" in (tmp_path / "matrix.md").read_text()


def test_every_hole_of_the_matrix_has_its_reason() -> None:
    refused = {"why": "can't | be", "seconds": 0.1}
    latency = {"fp32_ms": 4.0, "w8a8_ms": 2.0, "ratio": 0.5, "noisy": True}
    rows = {
        "A": {
            "name": "a", "cells": {
                "capture": {"dynamic_batch": True, "peak_rss_bytes": 2.5e9},
                "fp32": CELL, "w8a8": CELL | {"passed": False},
                "w4a4": refused, "prune": {"failed": "KeyError: 'x'"}, "merge": refused,
                "latency": latency,
            },
            "seconds": 90.0,
        },
        "B": {"name": "b", "cells": {}, "ended": "killed", "seconds": 5310.0},
    }  # fmt: skip
    members = {name: BackboneSpec(name=name.lower(), family=name) for name in "ABC"}
    where = {"cpu": "a CPU", "cores_allowed": 2}
    lines = markdown({"members": rows, "environment": where}, members).splitlines()
    cells_a = next(line for line in lines if line.startswith("| A")).split(" | ")
    assert cells_a[3:] == [
        "yes", "100", "100 ✘", "no (1)", "no (2)", "no (1)", "4.0 → 2.0 (×0.50) ~",
        "1.5 min, 2.5 GB |",
    ]  # fmt: skip
    assert next(line for line in lines if line.startswith("| B")).count("no (3)") == 7
    assert next(line for line in lines if line.startswith("| C")).count("–") == 8
    assert "took 1.5 hours of one core" in lines[2]
    assert lines[-3:] == [
        "1. refused: can't \\| be",
        "2. failed: KeyError: 'x'",
        "3. ended: killed",
    ]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", zoo.chosen([], SHARD))
def test_a_family_ships(family: str) -> None:
    spec = zoo.members()[family]
    if (spec.params_m or 0) > zoo.LARGEST:
        pytest.skip(f"{spec.name} has {spec.params_m} M parameters")
    row = zoo.run_member(spec.name, 16.0, 45.0)
    assert "ended" not in row, row["ended"]
    for step in ("capture", "fp32", "w8a8", "w4a4", "latency"):
        assert not {"why", "failed"} & set(row["cells"][step]), f"{step}: {row['cells'][step]}"
    for step in ("fp32", "w8a8", "w4a4", "prune", "merge"):
        cell = row["cells"][step]
        assert "failed" not in cell, f"{step}: {cell}"
        assert cell.get("passed", True), f"{step}: {cell}"
