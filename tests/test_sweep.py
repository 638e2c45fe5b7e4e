"""Sweeps: what is asked, what is chosen, what a kill leaves, who is best."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploykit.cli import _main
from deploykit.errors import ExitCode, UsageError
from deploykit.progress import Reporter
from deploykit.recipe_io import load_recipe
from deploykit.report.sweep_page import render_page
from deploykit.sweep.engines import LocalEngine
from deploykit.sweep.result import SweepReport, TrialResult, best_of, front_of
from deploykit.sweep.run import run_sweep
from deploykit.sweep.sampling import Suggestions
from deploykit.sweep.spec import Limits, load_sweep
from deploykit.sweep.trial import COMPRESS, TrialRequest, run_trial
from deploykit.targets.device import allowed_cores, physical_cores
from deploykit.targets.exclusive import claim_cores
from tests.pretended_trial import WORK

ROOT = Path(__file__).resolve().parent.parent
TINY = "tests.tiny_models:tiny_hybrid"
SPEC: dict[str, Any] = {
    "recipe": {"model": {"name": TINY}, "quantize": {"preset": "fast"}},
    "search": {
        "quantize.bits": [f"w{w}a8" for w in (3, 4, 5, 6, 7, 8)],
        "quantize.edge_bits": {"low": 4, "high": 8, "step": 2},
        "quantize.softmax": ["uniform", "log2", "twin-uniform"],
    },
    "objectives": ["top1", "ratio", "bytes"],
    "seed": 5,
}  # fmt: skip


def write_spec(folder: Path, **changes: Any) -> Path:
    # the recipe needs labelled images where top1 counts; the pretended work reads none
    spec = {**SPEC, **changes}
    if isinstance(spec["recipe"], dict) and "top1" in (spec.get("objectives") or ["top1"]):
        spec["recipe"] = {**spec["recipe"], "evaluation": {"data": "labelled.npz"}}
    path = folder / "spec.yaml"
    path.write_text(json.dumps(spec), encoding="utf-8")  # JSON is YAML
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": "gird"}, "did you mean grid?"),
        ({"smapler": "grid"}, "smapler: unknown key; did you mean sampler?"),
        ({"search": {"quantize.bit": ["w8a8"]}}, "did you mean quantize.bits?"),
        ({"search": {"quantize": ["w8a8"]}}, "quantize is a section"),
        ({"search": {"quantize.bits": ["w8a8", "w9a8"]}}, "search.quantize.bits: quantize.bits"),
        ({"search": {"quantize.bits": []}}, "nothing to choose from"),
        ({"search": {}}, "at least 1 items"),
        ({"search": {"prune.ratio": {"low": 0.1, "high": 0.5}}}, "needs a step"),
        ({"search": {"prune.ratio": {"low": 0.5, "high": 0.1}}}, "must be above low"),
        ({"search": {"prune.ratio": {"low": 0.5, "high": 2, "step": 1}}}, "search.prune.ratio"),
        ({"objectives": ["bytes", "bytes"]}, "names one twice"),
        ({"limits": {"max_ration": 1}}, "did you mean max_ratio?"),
        ({"recipe": "nowhere.yaml"}, "nowhere.yaml"),
        ({"trials": 0}, "wanted more than 0"),
    ],
)
def test_a_wrong_spec_is_one_line_before_anything_runs(
    changes: dict[str, Any], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_spec(tmp_path, **changes)
    assert _main(["sweep", str(path), "-o", str(tmp_path / "out")]) == ExitCode.USAGE
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


def test_top1_needs_labelled_images(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(SPEC), encoding="utf-8")
    with pytest.raises(UsageError, match="top1 needs labelled images"):
        load_sweep(path)


def test_objectives_are_those_that_compare(tmp_path: Path) -> None:
    one = load_sweep(write_spec(tmp_path, objectives=["bytes"]))
    assert one.objectives == ["bytes"]
    search = {"model.name": [TINY, "tests.tiny_models:tiny_tokens"]}
    spec = {"recipe": {"model": {"name": TINY}}, "search": search}
    (tmp_path / "two.yaml").write_text(json.dumps(spec), encoding="utf-8")
    # ratios of different models are of different originals
    assert load_sweep(tmp_path / "two.yaml").objectives == ["latency_ms", "bytes"]


def test_nought_stands_for_a_step_left_out(tmp_path: Path) -> None:
    search = {"prune.ratio": {"low": 0, "high": 0.4, "step": 0.1}, "targets": ["cpu-onnxruntime"]}
    sweep = load_sweep(write_spec(tmp_path, search=search, objectives=["bytes"]))
    assert [point["prune.ratio"] for point in sweep.grid] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert sweep.recipe(sweep.grid[0]).prune.ratio is None
    assert sweep.recipe(sweep.grid[3]).prune.ratio == 0.3
    assert sweep.recipe(sweep.grid[0]).targets == ["cpu-onnxruntime"]


def test_several_recipes_are_a_dimension(tmp_path: Path) -> None:
    for name, bits in (("a.yaml", "w8a8"), ("b.yaml", "w4a8")):
        recipe = {"model": {"name": TINY}, "quantize": {"bits": bits}}
        (tmp_path / name).write_text(json.dumps(recipe), encoding="utf-8")
    changes = {"recipe": ["a.yaml", "b.yaml"], "search": {"seed": [0, 1]}}
    sweep = load_sweep(write_spec(tmp_path, objectives=["bytes"], **changes))
    made = {(p["recipe"], sweep.recipe(p).quantize.bits, sweep.recipe(p).seed) for p in sweep.grid}
    assert made == {(f, b, s) for f, b in (("a.yaml", "w8a8"), ("b.yaml", "w4a8")) for s in (0, 1)}


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe", "nsga2"])
def test_what_a_trial_tries_follows_from_its_number(sampler: str, tmp_path: Path) -> None:
    sweep = load_sweep(write_spec(tmp_path, sampler=sampler, trials=12))
    once, again = Suggestions(sweep), Suggestions(sweep)
    backwards = [again.suggest(n, []).values for n in reversed(range(8))]
    assert [once.suggest(n, []).values for n in range(8)] == backwards[::-1]
    assert len({json.dumps(v) for v in backwards}) > 4
    longer = Suggestions(load_sweep(write_spec(tmp_path, sampler=sampler, trials=14)))
    assert longer.suggest(7, []).values == backwards[0]
    assert longer.count == 14


def test_a_grid_tries_every_point_once(tmp_path: Path) -> None:
    sweep = load_sweep(write_spec(tmp_path))
    suggestions = Suggestions(sweep)
    tried = {json.dumps(suggestions.suggest(n, []).values) for n in range(suggestions.count)}
    assert len(tried) == suggestions.count == sweep.grid_size == 6 * 3 * 3


def trial(number: int, top1: float, ratio: float, size: int, **more: Any) -> TrialResult:
    time_ = {"target": "t", "device": "d", "p50_ms": ratio, "ratio": ratio, "ratio_low": ratio,
             "ratio_high": ratio, "noisy": False, "pinned_to": [0]}  # fmt: skip
    facts = {"values": {}, "recipe_sha256": "", "folder": "", "state": "complete", **more}
    return TrialResult.model_validate(
        {"number": number, "top1": top1, "bytes": size, "times": [time_], **facts}
    )


def test_the_front_is_what_no_other_beats() -> None:
    trials = [
        trial(0, 90, 1.0, 100),
        trial(1, 80, 0.5, 50),
        trial(2, 80, 0.5, 60),  # beaten by 1
        trial(3, 89, 0.6, 60),
        trial(4, 99, 0.1, 10, state="failed"),
        trial(5, 90, 1.0, 100, same_as=0),
    ]
    names: list[Any] = ["top1", "ratio", "bytes"]
    front = front_of(trials, names, Limits())
    assert front == [0, 1, 3]
    # scaled to 0..1: 0 is (0, 1, 1), 1 is (1, 0, 0), 3 is (0.1, 0.2, 0.2): the knee
    best = best_of([trials[n] for n in front], names)
    assert best == {"top1": 0, "ratio": 1, "bytes": 1, "knee": 3}
    assert front_of(trials, names, Limits(max_bytes=60)) == [1, 3]
    assert front_of(trials, names, Limits(max_drop=1)) == []  # the drop isn't known
    assert best_of([], names) == {}


def test_two_claimers_have_no_core_in_common(tmp_path: Path) -> None:
    cores = physical_cores()
    if len(cores) < 2:
        pytest.skip("one physical core")
    before = allowed_cores()
    with claim_cores(1, tmp_path) as first:
        assert allowed_cores() == first
    assert allowed_cores() == before
    # a lock isn't taken twice, so the other claimer, in another process, gets the other core
    script = (
        "import sys; from pathlib import Path\n"
        "from deploykit.targets.exclusive import claim_cores\n"
        "with claim_cores(1, Path(sys.argv[1])) as cores: print(cores)\n"
    )
    with claim_cores(1, tmp_path) as mine:
        os.sched_setaffinity(0, before)  # the other process starts with all cores
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True,
            check=True, cwd=ROOT,
        )  # fmt: skip
    assert not set(json.loads(done.stdout)) & set(mine)
    with pytest.raises(UsageError, match="physical cores wanted"), claim_cores(999, tmp_path):
        pass


def request(tmp_path: Path, **changes: Any) -> TrialRequest:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "trials").mkdir(exist_ok=True)
    facts: dict[str, Any] = {
        "number": 0, "recipe": {"quantize": {"bits": "w4a8", "edge_bits": 8}},
        "out": str(tmp_path / "trials" / "0"), "log": str(tmp_path / "logs" / "0.log"),
        "threads": 1, "minutes": None, "command": "test", "work": WORK,
    }  # fmt: skip
    return TrialRequest(**{**facts, **changes})  # type: ignore[typeddict-item]


def test_whatever_a_trial_does_is_one_line(tmp_path: Path) -> None:
    assert run_trial(request(tmp_path))["bytes"] == 4800
    diary = (tmp_path / "diary.jsonl").read_text()
    assert run_trial(request(tmp_path))["bytes"] == 4800  # finished, and so not run again
    assert (tmp_path / "diary.jsonl").read_text() == diary
    crash = {"quantize": {"bits": "w3a8", "edge_bits": 8, "softmax": "log2"}}
    died = run_trial(request(tmp_path / "b", recipe=crash))
    assert died["state"] == "failed" and "SIGABRT" in died["reason"]
    wrong = run_trial(request(tmp_path / "c", recipe={"quantize": {}}))
    assert wrong["reason"] == "KeyError: 'bits'" and wrong["exit_code"] == ExitCode.UNEXPECTED
    late = run_trial(request(tmp_path / "d", minutes=1e-6, work="tests.pretended_trial:sleep"))
    assert "trial_minutes" in late["reason"]
    stop = threading.Event()
    stop.set()
    assert run_trial(request(tmp_path / "e"), stop)["exit_code"] == ExitCode.INTERRUPTED


def test_without_affinity_one_claims_all_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_setaffinity")
    with claim_cores(1, tmp_path) as cores:
        assert cores == sorted(core for group in physical_cores() for core in group)
        assert len(list(tmp_path.glob("core-*.lock"))) == len(physical_cores())


@pytest.mark.parametrize(("package", "options"), [("optuna", []), ("ray", ["--engine", "ray"])])
def test_what_is_not_installed_is_exit_6(
    package: str,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = write_spec(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    code = _main(["sweep", str(path), "-o", str(tmp_path / "out"), *options])
    assert code == ExitCode.TARGET_MISSING
    (line,) = capfd.readouterr().err.splitlines()
    assert "pip install" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workers", "99"], "take fewer"),
        (["--engine", "slurm"], "wanted local or ray, got 'slurm'"),
        (["--ray-address", "auto"], "is for --engine ray"),
        (["--storage", "nonsense"], "wanted a URL such as"),
        (["--storage", "nosuch://host/db"], "can't be opened"),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_spec(tmp_path)
    assert _main(["sweep", str(path), "-o", str(tmp_path / "out"), *options]) == ExitCode.USAGE
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line


def test_a_sweep_records_failures_and_copies_and_says_who_is_best(tmp_path: Path) -> None:
    search = {"quantize.bits": ["w3a8", "w4a8", "4"], "quantize.softmax": ["uniform", "log2"],
              "quantize.edge_bits": [8]}  # fmt: skip
    # w4a8 twice over: "4" is w4a4, the pretended work doesn't see activations
    path = write_spec(tmp_path, search={**search, "quantize.bits": ["w3a8", "w4a8", "W4A8"]})
    out = tmp_path / "out"

    def run(path: Path, **options: Any) -> SweepReport:
        return run_sweep(
            load_sweep(path), out, engine=LocalEngine(1, 1), command="<b>", work=WORK,
            reporter=Reporter(quiet=True), **options,
        )  # fmt: skip

    report = run(path)
    by_values = {(t.values["quantize.bits"], t.values["quantize.softmax"]): t
                 for t in report.trials}  # fmt: skip
    assert "SIGABRT" in by_values["w3a8", "log2"].reason
    copies = [t for t in report.trials if t.same_as is not None]
    assert len(copies) == 2 and all(t.bytes == 4800 for t in copies)
    diary = [json.loads(line) for line in (out / "diary.jsonl").read_text().splitlines()]
    assert len([line for line in diary if line["event"] == "end"]) == 3
    assert len(report.front) == 3
    page = render_page(report)
    assert "<b>" not in page and "&lt;b&gt;" in page and "SIGABRT" in page
    knee = load_recipe(out / "best" / "knee.yaml")
    assert knee.quantize.bits == "w" + report.trial(report.best["knee"]).values[
        "quantize.bits"
    ].lower().removeprefix("w")  # fmt: skip
    assert SweepReport.model_validate_json((out / "sweep.json").read_text()) == report
    with pytest.raises(UsageError, match="isn't empty"):
        run(path)
    again = run(path, resume=True)  # nothing is left to do
    assert len((out / "diary.jsonl").read_text().splitlines()) == len(diary)
    assert again.front == report.front
    # a failed trial runs again where that is asked, and may fail again
    retried = run(path, resume=True, retry_failed=True)
    assert [(t.number, t.reason) for t in retried.trials if t.state == "failed"] == [
        (t.number, t.reason) for t in again.trials if t.state == "failed"
    ]
    assert finished(out) == len(again.trials) + 1
    other = write_spec(tmp_path, search={"quantize.bits": ["w8a8"]})
    with pytest.raises(UsageError, match="of other recipes, keys, sampler or seed"):
        run(other, resume=True)


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Any]:
    """Runs a sweep in a process, killed each time so many more trials are done; then to its end."""

    def run(spec: Path, out: Path, kind: str, kills: list[int]) -> SweepReport:
        command = [sys.executable, "-m", "tests.sweep_work", str(spec), str(out), "2", kind]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        for wanted in [*kills, None]:
            log = (tmp_path / "stderr").open("a")
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment, stderr=log, start_new_session=True
            )
            deadline = time.monotonic() + 240
            while child.poll() is None and time.monotonic() < deadline:
                if wanted is not None and finished(out) >= wanted:
                    child.send_signal(signal.SIGKILL)
                time.sleep(0.02)
            code = child.wait(timeout=10)
            if wanted is not None:
                time.sleep(1)  # its trials notice and end
                with (out / "diary.jsonl").open("a") as diary:
                    diary.write('{"event": "killed"}\n')
            assert code == (0 if wanted is None else -signal.SIGKILL), (
                tmp_path / "stderr"
            ).read_text()[-2000:]
        return SweepReport.model_validate_json((out / "sweep.json").read_text())

    yield run


def finished(out: Path) -> int:
    """Trials in the sweep's database."""
    if not (out / "sweep.db").exists():
        return 0
    with sqlite3.connect(f"file:{out / 'sweep.db'}?mode=ro", uri=True) as database:
        try:
            (count,) = database.execute("select count(*) from trials").fetchone()
        except sqlite3.OperationalError:  # not made yet
            return 0
    return int(count)


def assert_nobody_was_disturbed(out: Path) -> None:
    """No trial that ended started again; none shared a core; one measured at a time."""
    diary = [json.loads(line) for line in (out / "diary.jsonl").read_text().splitlines()]
    ended: set[int] = set()
    running: dict[int, set[int]] = {}
    measuring: int | None = None
    for line in diary:
        if line["event"] == "killed":  # with it all that ran
            running, measuring = {}, None
            continue
        number, cores = line["number"], set(line["cores"])
        if line["event"] == "start":
            assert number not in ended
            assert not any(taken & cores for taken in running.values())
            running[number] = cores
        elif line["event"] == "measure":
            assert measuring is None
            measuring = number
        elif line["event"] == "measured":
            assert measuring == number
            measuring = None
        else:
            running.pop(number, None)
            ended.add(number)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "ray"])
@pytest.mark.parametrize("sampler", ["grid", "nsga2"])
def test_killed_twice_it_ends_as_if_it_had_not_been(
    kind: str, sampler: str, tmp_path: Path, killed: Any
) -> None:
    spec = write_spec(tmp_path, sampler=sampler, trials=48)
    whole = killed(spec, tmp_path / "whole", "local", [])
    broken = killed(spec, tmp_path / "broken", kind, [7, 25])
    assert len(whole.trials) == len(broken.trials) == 48
    assert broken.front == whole.front and len(whole.front) >= 3
    assert broken.best == whole.best

    def figures(report: SweepReport) -> list[Any]:
        return [(t.number, t.values, t.top1, t.ratio, t.bytes, t.state) for t in report.trials]

    assert figures(broken) == figures(whole)
    if kind == "local":
        assert_nobody_was_disturbed(tmp_path / "broken")


@pytest.mark.slow
def test_real_trials_and_one_whose_process_is_shot(tmp_path: Path, tiny_data: Path) -> None:
    recipe = {
        "model": {"name": TINY}, "quantize": {"preset": "fast", "rounding": "nearest"},
        "calibration": {"data": str(tiny_data), "images": 16},
        "evaluation": {"data": str(tiny_data)}, "verify": {"images": 8},
        "measure": {"min_samples": 16, "min_seconds": 0.05, "max_seconds": 0.3},
    }  # fmt: skip
    search = {"quantize.bits": ["w8a8", "w4a8"]}
    spec = {"recipe": recipe, "search": search, "objectives": ["top1", "bytes"]}
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(spec), encoding="utf-8")
    out = tmp_path / "out"
    assert _main(["sweep", str(path), "-o", str(out)]) == 0
    report = SweepReport.model_validate_json((out / "sweep.json").read_text())
    sizes = {t.values["quantize.bits"]: t.bytes for t in report.trials}
    assert sizes["w4a8"] < sizes["w8a8"]  # type: ignore[operator]
    assert all((out / t.folder / "report.html").exists() for t in report.trials)
    assert all(t.times[0].pinned_to == t.cores for t in report.trials)
    # a finished run isn't repeated, and what a kill left of one is gone on with
    first = out / report.trials[0].folder
    stamp = (first / "report.json").stat().st_mtime_ns
    recipes = {"number": 0, "recipe": load_recipe(first / "recipe.yaml").model_dump(mode="json"),
               "out": str(first), "work": COMPRESS}  # fmt: skip
    again = run_trial(request(tmp_path, **recipes))
    assert again["bytes"] == report.trials[0].bytes
    assert (first / "report.json").stat().st_mtime_ns == stamp
