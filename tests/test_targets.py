"""Targets: estimators on simulated series, the protocol on a fake clock, real tiny models.

No wall-clock figure decides a test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.errors import MeasurementError, TargetMissingError, UsageError
from deploykit.targets import registry
from deploykit.targets.child import ask
from deploykit.targets.cpu_onnxruntime import CpuOnnxRuntime
from deploykit.targets.device import Neighbours, allowed_cores, describe, pick_cores
from deploykit.targets.measure import measure
from deploykit.targets.protocol import Timing, discredit, run_protocol, warm_up
from deploykit.targets.registry import get_target, list_targets, register_target
from deploykit.targets.statistics import (
    median_interval,
    paired_ratio,
    percentile,
    percentile_floor,
    verdict,
)

SHAPE = (3, 8, 8)
TARGETS = ["cpu-onnxruntime", "cpu-openvino"]


def drifting(rng: np.random.Generator, blocks: int, scales: list[float]) -> list[np.ndarray]:
    """Latencies with a drift common to a block, skewed noise, and rare spikes."""
    drift = np.exp(0.1 * np.cumsum(rng.standard_normal(blocks)) / np.sqrt(blocks))[:, None]
    return [
        scale
        * drift
        * (1 + 0.03 * rng.gamma(1.0, 1.0, (blocks, 4)))
        * np.where(rng.random((blocks, 4)) < 0.03, 3.0, 1.0)
        for scale in scales
    ]


# ── statistics ────────────────────────────────────────────────────────────────────────────────


def test_equal_models_are_called_equal_and_a_planted_slowdown_is_found() -> None:
    trials, equal, slower, covered = 60, 0, 0, 0
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        original, same, slow = drifting(rng, 16, [10.0, 10.0, 11.0])
        ratio = paired_ratio(same, original, rng)
        equal += verdict(ratio.low, ratio.high) == "equal"
        covered += ratio.low <= 1 <= ratio.high
        ratio = paired_ratio(slow, original, rng)
        slower += verdict(ratio.low, ratio.high) == "slower"
    assert equal >= 0.95 * trials
    assert slower >= 0.95 * trials
    assert covered >= 0.88 * trials  # nominally 0.95; 0.88 is two and a half sigma below


def test_median_interval_covers_the_true_median() -> None:
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        interval = median_interval(rng.normal(10.0, 1.0, (16, 4)), rng)
        assert interval.low <= interval.value <= interval.high
        covered += interval.low <= 10.0 <= interval.high
    assert covered >= 53


def test_ratio_is_paired_by_block() -> None:
    """A machine that is three times slower half of the time does not blur the ratio."""
    rng = np.random.default_rng(0)
    mood = np.where(np.arange(20) % 2, 3.0, 1.0)[:, None]
    original = 10 * mood * rng.normal(1, 0.005, (20, 4))
    faster = 5 * mood * rng.normal(1, 0.005, (20, 4))
    ratio = paired_ratio(faster, original, rng)
    assert ratio.within(0.01)
    assert ratio.value == pytest.approx(0.5, rel=0.01)
    assert not median_interval(original, rng).within(0.05)


def test_intervals_are_reproducible() -> None:
    samples = np.random.default_rng(1).normal(10, 1, (16, 4))
    first, second = (median_interval(samples, np.random.default_rng(7)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("percent", "floor"), [(50, 11), (90, 64), (95, 130), (99, 662)])
def test_percentile_floor_is_the_binomial_rule(percent: float, floor: int) -> None:
    assert percentile_floor(percent) == floor


def test_percentile_is_withheld_with_the_reason() -> None:
    samples = np.arange(64, dtype=float).reshape(16, 4)
    assert percentile(samples[:-1], 90) == (None, "p90 needs 64 samples, 60 taken")
    assert percentile(samples, 90) == (57.0, None)  # a value that was observed
    assert percentile(samples, 99) == (None, "p99 needs 662 samples, 64 taken")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.5, 0.6, "faster"), (1.05, 1.2, "slower"), (0.9, 1.1, "equal"), (0.981, 0.99, "equal")],
)
def test_verdict(low: float, high: float, expected: str) -> None:
    assert verdict(low, high) == expected


# ── protocol ──────────────────────────────────────────────────────────────────────────────────


class Machine:
    """A clock that only moves when a model runs, and a log of what ran."""

    def __init__(self, seed: int = 0) -> None:
        self.now = 0
        self.log: list[str] = []
        self.rng = np.random.default_rng(seed)

    def clock(self) -> int:
        return self.now

    def model(self, name: str, ms: float, noise: float = 0.01) -> Callable[[], None]:
        def call() -> None:
            self.log.append(name)
            factor = float(np.exp(noise * self.rng.standard_normal()))
            self.now += int(ms * 1e6 * factor)

        return call


def test_protocol_takes_enough_samples_and_time() -> None:
    machine = Machine()
    calls = [machine.model("a", 10), machine.model("b", 5)]
    original, compressed = run_protocol(calls, Timing(), clock=machine.clock)
    assert original.samples.size >= 64
    assert original.samples.shape == compressed.samples.shape
    assert 3 <= machine.now / 1e9 < 30
    assert not original.noisy
    assert original.ratio is None
    assert compressed.ratio is not None
    assert compressed.ratio.low <= 0.5 <= compressed.ratio.high
    assert compressed.p50.value == pytest.approx(5, rel=0.02)
    assert original.p90 is not None
    assert original.warmup.stable
    assert original.warmup.seconds <= 1.1


def test_blocks_are_interleaved_and_mirrored() -> None:
    machine = Machine()
    timing = Timing(min_samples=16, min_seconds=0.1, warmup_seconds=0)
    run_protocol([machine.model(n, 1) for n in "abc"], timing, clock=machine.clock)
    blocks = "".join(machine.log)[3:]  # after one call each to warm up
    bursts = [blocks[i : i + 2] for i in range(0, len(blocks), 2)]  # untimed, timed
    assert all(burst[0] == burst[1] for burst in bursts)
    rounds = ["".join(b[0] for b in bursts[i : i + 3]) for i in range(0, len(bursts), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert all(first == second[::-1] for first, second in zip(*[iter(rounds)] * 2, strict=True))
    assert len(set(rounds)) > 2


def test_drift_hits_both() -> None:
    """The machine slows down to half its speed; equal models stay equal."""
    machine = Machine()

    def slowing() -> None:
        machine.now += int(10e6 * (1 + machine.now / 4e9))

    _, second = run_protocol([slowing, slowing], Timing(max_seconds=4), clock=machine.clock)
    assert second.ratio is not None
    assert verdict(second.ratio.low, second.ratio.high) == "equal"


def test_noisy_machine_is_extended_then_called_noisy() -> None:
    machine = Machine()
    calls = [machine.model("a", 10, noise=1.5), machine.model("b", 10, noise=1.5)]
    first, _ = run_protocol(calls, Timing(max_seconds=8), clock=machine.clock)
    assert machine.now / 1e9 >= 8
    assert first.noisy
    assert not first.warmup.stable


def test_a_shared_machine_is_told_by_its_medians() -> None:
    """Another process takes 8 ms whenever 12 ms of ours are over: most long calls meet it, most
    short ones don't. The comparison stands; the medians don't."""
    machine = Machine()
    ours = 0

    def sharing(ms: int) -> Callable[[], None]:
        def call() -> None:
            nonlocal ours
            before, ours = ours, ours + ms
            machine.now += int(ms * 1e6) + int(8e6) * (ours // 12 - before // 12)

        return call

    original, compressed = run_protocol([sharing(10), sharing(5)], Timing(), clock=machine.clock)
    assert not original.noisy
    assert compressed.ratio is not None and compressed.ratio.value == pytest.approx(0.5)
    assert compressed.noisy and not compressed.ratio_noisy
    said = "the medians' quotient is 0.28, the undisturbed calls' 0.50: something else was running"
    assert said in (compressed.withheld or "")


def test_too_slow_for_the_budget_is_noisy_and_says_why() -> None:
    machine = Machine()
    (only,) = run_protocol([machine.model("a", 2000)], Timing(max_seconds=30), clock=machine.clock)
    assert only.samples.size < 64
    assert only.noisy
    assert only.withheld is not None
    assert "max_seconds ended before 64 samples" in only.withheld
    assert machine.now / 1e9 < 45


def test_discredited_figures_keep_their_reasons() -> None:
    machine = Machine()
    (series,) = run_protocol([machine.model("a", 10)], Timing(), clock=machine.clock)
    doubted = discredit(series, "busy")
    assert doubted.noisy
    assert (doubted.withheld or "").endswith("; busy")
    assert doubted.p50 == series.p50


def test_warm_up_waits_for_a_cold_machine() -> None:
    machine = Machine()

    def warming() -> None:  # 20 ms at first, 10 ms in the end
        machine.now += int(10e6 * (1 + np.exp(-machine.now / 0.1e9)))

    warmup = warm_up(warming, 5.0, machine.clock)
    assert warmup.stable
    assert warmup.last_ms == pytest.approx(10, rel=0.05)


def test_progress_is_monotone_and_throttled() -> None:
    machine = Machine()
    seen: list[float] = []
    run_protocol(
        [machine.model("a", 10)],
        Timing(),
        clock=machine.clock,
        progress=lambda fraction, _text: seen.append(fraction),
    )
    assert 2 <= len(seen) <= machine.now / 0.5e9 + 2
    assert seen == sorted(seen)


# ── registry and device ───────────────────────────────────────────────────────────────────────


def test_targets_are_found_by_name() -> None:
    assert set(TARGETS) <= set(list_targets())
    for name in list_targets():  # no helper among them, however its file is called
        assert get_target(name).name == name
    assert get_target("cpu-onnxruntime").name == "cpu-onnxruntime"
    with pytest.raises(UsageError, match="cpu-onnxruntime"):
        get_target("cpu-onnx")
    with pytest.raises(UsageError, match="unknown target 'measure'"):
        get_target("measure")


def test_every_name_on_the_list_is_a_target() -> None:
    for name in list_targets():
        assert get_target(name).name == name


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="already registered"):

        @register_target("cpu-onnxruntime")
        class Impostor(CpuOnnxRuntime):
            pass


def test_entry_point_that_cannot_be_imported_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("npu-broken", "no_such_module:Target", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda **_: [point])
    assert "npu-broken" in list_targets()
    with pytest.raises(TargetMissingError, match="no_such_module"):
        get_target("npu-broken")


def test_missing_openvino_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    target = get_target("cpu-openvino")
    assert "pip install" in (target.available() or "")
    with pytest.raises(TargetMissingError, match="pip install"):
        target.load(Path("model.onnx"), 1)


def test_device_description() -> None:
    cores = pick_cores(1)
    assert len(cores) == 1
    assert set(cores) <= set(allowed_cores())
    facts = describe("t", "r 1.0", threads=1, cores=2, pinned_to=cores)
    assert facts["device"]
    assert facts["os"]
    assert facts["pinned_to"] == cores


def test_neighbours_are_told_from_oneself(monkeypatch: pytest.MonkeyPatch) -> None:
    Times = namedtuple("Times", "user system idle iowait guest")
    clock = {"wall": 0.0, "own": 0.0, "busy": 0.0}
    monkeypatch.setattr("time.perf_counter", lambda: clock["wall"])
    monkeypatch.setattr("time.process_time", lambda: clock["own"])
    monkeypatch.setattr(
        "psutil.cpu_times",
        lambda **_: [Times(99, 0, 0, 0, 99), Times(clock["busy"], 0, 5, 5, clock["busy"])],
    )
    neighbours = Neighbours([1])
    assert neighbours.share() == 0
    clock.update(wall=10.0, own=6.0, busy=9.0)
    assert neighbours.share() == pytest.approx(0.3)


# ── real runtimes on a tiny model ─────────────────────────────────────────────────────────────


def save_tiny(path: Path, channels: int = 4) -> Path:
    """Convolution, ReLU, mean, ten logits; dynamic batch."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((channels, 3, 3, 3)).astype(np.float32),
        "fc": rng.standard_normal((channels, 10)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("MatMul", ["f", "fc"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *SHAPE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def need(name: str) -> None:
    # not importorskip: a bare import of openvino sends telemetry
    reason = get_target(name).available()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny.onnx")


def test_both_targets_compute_the_same(tiny: Path) -> None:
    need("cpu-openvino")
    runners = [get_target(name).load(tiny, 1) for name in TARGETS]
    for batch in (1, 5):
        images = np.random.default_rng(0).standard_normal((batch, *SHAPE)).astype(np.float32)
        first, second = (runner(images) for runner in runners)
        assert first.shape == (batch, 10)
        assert first.dtype == np.float32
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)
        for runner in runners:  # deterministic, and a result outlives the next call
            kept = runner(images)
            copy = kept.copy()
            runner(images + 1)
            np.testing.assert_array_equal(kept, copy)
            np.testing.assert_array_equal(runner(images), copy)


@pytest.mark.parametrize("name", TARGETS)
def test_bad_files_and_shapes_are_one_line(name: str, tiny: Path, tmp_path: Path) -> None:
    need(name)
    target = get_target(name)
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"no model")
    for path in (garbage, tmp_path / "missing.onnx", tmp_path):
        with pytest.raises(UsageError) as caught:
            target.load(path, 1)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(MeasurementError) as failed:
        target.load(tiny, 1)(np.zeros((1, 5, 8, 8), np.float32))
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("name", TARGETS)
def test_runtimes_are_used_without_their_telemetry(name: str, tiny: Path, tmp_path: Path) -> None:
    """Both leave an id in the home folder when their telemetry is on."""
    need(name)
    code = (
        "import sys; from pathlib import Path; from deploykit.targets.registry import get_target;"
        f"get_target({name!r}).load(Path(sys.argv[1]), 1);"
        "print([m for m in sys.modules if m.split('.')[0] == 'openvino_telemetry'])"
    )
    # what would switch telemetry off by itself must not help the test
    helpers = ("CI", "XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY")
    clean = {key: value for key, value in os.environ.items() if key not in helpers}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny)],
        env={**clean, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", TARGETS)
def test_signals_are_survived_after_models_are_gone(name: str, tiny: Path) -> None:
    need(name)
    code = f"""
import os, signal, time
from pathlib import Path
from deploykit.targets.registry import get_target
path, target = Path({str(tiny)!r}), get_target({name!r})
older, younger = target.load(path, 1), target.load(path, 1)
target.kernels(path)
del older
del younger
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    print("alive")
"""
    assert run_python(code) == "alive"


def test_the_worker_is_light() -> None:
    code = (
        "import deploykit.targets.worker, sys;"
        "print(sorted({'torch', 'pydantic', 'scipy', 'timm', 'onnxruntime'} & set(sys.modules)))"
    )
    assert run_python(code) == "[]"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


# ── measure() and its child ───────────────────────────────────────────────────────────────────


def test_measure_end_to_end(tiny: Path, tmp_path: Path) -> None:
    wide = save_tiny(tmp_path / "wide ünïcode.onnx", channels=16)
    seen: list[tuple[float, str]] = []
    first, second = measure(
        "cpu-onnxruntime",
        [("original", tiny, "fp32"), ("compressed", wide, "w8a8")],
        batch=2,
        input_shape=SHAPE,
        min_samples=16,
        min_seconds=0.05,
        max_seconds=0.5,
        warmup_seconds=0.05,
        progress=lambda fraction, text: seen.append((fraction, text)),
    )
    assert (first.artifact, second.artifact) == ("original", "compressed")
    assert second.precision == "w8a8"
    assert second.target == "cpu-onnxruntime"
    assert first.batch == 2
    assert first.samples == len(first.samples_ms) >= 16
    assert 0 < first.p50_low_ms <= first.p50_ms <= first.p50_high_ms
    assert first.ratio is None
    assert second.ratio is not None
    assert second.ratio_low is not None
    assert second.ratio_high is not None
    assert second.ratio_low <= second.ratio <= second.ratio_high
    assert (first.p99_ms is None) == (first.samples < 662)
    assert first.p99_ms is not None or "p99" in (first.withheld or "")
    # a process without torch; were torch in it, or the parent's peak, it would be well above
    assert first.peak_rss_bytes is not None
    assert 2**20 < first.peak_rss_bytes < 250 * 2**20
    assert first.load_ms is not None
    assert first.device.runtime.startswith("onnxruntime ")
    assert first.ran_as == "float32"
    assert first.first_call_ms is not None
    assert first.device.before is not None
    assert first.device.after is not None
    assert (first.energy_mj is None) == (not first.energy.startswith("RAPL"))
    assert first.energy  # what counted it, or why nothing did
    assert first.ratio_noisy is False or first.noisy
    assert len(first.device.pinned_to) == (1 if sys.platform == "linux" else 0)
    assert seen[-1] == (1.0, "measured")
    assert [fraction for fraction, _ in seen] == sorted(fraction for fraction, _ in seen)


def test_measure_refuses_in_one_line(tiny: Path, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"no model")
    one = [("original", tiny, "fp32")]
    cases: list[tuple[list[tuple[str, Path, str]], dict[str, Any], str]] = [
        ([], {}, "nothing to measure"),
        (one * 2, {}, "must differ"),
        ([("original", tmp_path / "gone.onnx", "fp32")], {}, "no such file"),
        ([("original", Path(__file__), "fp32")], {}, "loads .onnx files"),
        (one, {"threads": 10_000}, "10000 threads wanted"),
        (one, {"batch": 0}, "1 or more"),
        (one, {"min_seconds": 2.0, "max_seconds": 1.0}, "max_seconds"),
        ([("original", garbage, "fp32")], {}, "cannot load"),
    ]
    for artifacts, options, pattern in cases:
        with pytest.raises(UsageError, match=pattern) as caught:
            measure("cpu-onnxruntime", artifacts, input_shape=SHAPE, **options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "pattern"),
    [
        ("import os; os.abort()", "SIGABRT"),
        ("import sys; sys.exit('no luck')", "exit code 1.*no luck"),
        ("print('hello')", "unreadable"),
        ("print('[1]')", "unreadable"),
        ("import time; time.sleep(60)", "silent for 0.5 s"),
        (
            'print(\'{"event": "error", "kind": "KeyError", "message": "odd"}\')',
            "odd",
        ),
    ],
)
def test_a_child_that_fails_is_one_clear_error(code: str, pattern: str) -> None:
    with pytest.raises(MeasurementError, match=pattern) as caught:
        ask({"threads": 1}, silence_seconds=0.5, command=[sys.executable, "-I", "-S", "-c", code])
    assert "\n" not in str(caught.value)


def test_an_interrupt_ends_the_child(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid()));"
        'print(\'{"event": "progress"}\', flush=True); time.sleep(60)'
    )

    def interrupt(_fraction: float, _text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(
            {"threads": 1},
            progress=interrupt,
            silence_seconds=30,
            command=[sys.executable, "-I", "-S", "-c", code],
        )
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_the_worker_reports_its_own_failure() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploykit.targets.worker"],
        input=json.dumps({"mode": "time", "target": "cpu-onnxruntime"}),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.strip().startswith("KeyError")
