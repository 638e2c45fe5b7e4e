"""Recovery by distillation, on tiny models and images made here."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deploykit import compress
from deploykit.errors import DeploykitError, ExitCode, TargetMissingError, UsageError
from deploykit.export.onnx import onnx_bytes
from deploykit.export.structure import model_bytes
from deploykit.graph.capture import CapturedModel
from deploykit.graph.two_four import is_two_of_four
from deploykit.prune import recover_loop
from deploykit.prune.recover import RecoverOptions, recover
from deploykit.prune.recover_checkpoint import CHECKPOINT_NAME
from deploykit.prune.recover_judge import Judge
from deploykit.prune.recover_stop import Judgement
from tests.graphs import captured
from tests.recovery import QUICK, Interrupt, Waves, cnn, damaged, kl, same, sparse_vit, vit, weights

pytest.importorskip("accelerate")

# --- what it is for ---


@pytest.mark.parametrize("make", [vit, cnn])
def test_a_damaged_student_gets_nearer_to_its_teacher(make: Callable[[], CapturedModel]) -> None:
    teacher, student = make(), damaged(make())
    before = {name: value.clone() for name, value in weights(student).items()}
    recovered, record = recover(student, teacher, QUICK, Waves())
    assert kl(recovered, teacher) < 0.5 * kl(student, teacher)
    assert all(torch.equal(before[k], v) for k, v in weights(student).items()), "a copy is trained"
    assert record.details["best"]["kl"] < record.details["before"]["kl"]
    assert "held-out" in record.summary
    losses = [row["loss"] for row in record.details["history"]]
    assert losses[-1] < losses[0]


def test_zeros_of_2_4_stay_and_the_rest_recovers() -> None:
    teacher, student = vit(), sparse_vit()
    recovered, record = recover(student, teacher, QUICK, Waves())
    assert kl(recovered, teacher) < 0.7 * kl(student, teacher)
    masked = 0
    for name, weight in weights(recovered).items():
        if record.details["zeros_kept"].get(name) == 0.5:
            zeros = weights(student)[name] == 0
            assert torch.equal(weight == 0, zeros)
            assert is_two_of_four(weight, 1)
            masked += 1
    assert masked == 8


def test_zeros_come_alive_where_that_is_asked() -> None:
    teacher, student = vit(), sparse_vit()
    options = replace(QUICK, keep_zeros=False, epochs=1)
    recovered, _ = recover(student, teacher, options, Waves())
    name = "blocks.0.attn.qkv.weight"
    assert float((weights(recovered)[name] == 0).float().mean()) < 0.1


def test_what_comes_out_is_exported_as_what_went_in() -> None:
    teacher, student = vit(), sparse_vit()
    recovered, _ = recover(student, teacher, replace(QUICK, epochs=1), Waves(48))
    assert str(recovered.graph_module.graph) == str(student.graph_module.graph)
    kinds = [dict(m.graph_module.named_parameters()).keys() for m in (recovered, student)]
    assert kinds[0] == kinds[1]
    assert not any(p.requires_grad for p in recovered.graph_module.parameters())
    assert onnx_bytes(recovered.graph_module, recovered.backbone, dynamic_batch=True)
    assert model_bytes(recovered.graph_module, recovered.backbone, precision="fp32")


def test_a_student_that_is_the_teacher_is_returned_as_it_is() -> None:
    model = cnn()
    recovered, record = recover(model, model, replace(QUICK, target_drop=0.0), Waves(48))
    assert same(recovered, model)
    assert record.details["steps"] == 0


def test_nothing_worse_than_what_came_is_returned() -> None:
    """A rate that destroys the student: the first weights are the best of the held-out ones."""
    teacher, student = vit(), damaged(vit(), 0.02)
    options = replace(QUICK, lr=0.3, warmup=0.0, epochs=2, ema_decay=0.5, patience=2)
    recovered, record = recover(student, teacher, options, Waves(64))
    assert same(recovered, student)
    assert record.details["stopped"] == "no better in 2 evaluations"


def test_a_narrower_student_learns_from_what_can_be_compared() -> None:
    """Another width inside, as structured pruning leaves it: logits and one block are left."""
    torch.manual_seed(0)
    narrow = captured(Residuals(inner=12))
    teacher = captured(Residuals(inner=16))
    options = replace(
        QUICK, losses=(("logits", 1.0), ("features", 1.0), ("attention", 1.0)), lr=3e-3
    )
    recovered, record = recover(narrow, teacher, options, Waves())
    assert kl(recovered, teacher) < 0.5 * kl(narrow, teacher)
    assert list(record.details["losses"]) == ["logits", "features"]
    assert list(record.details["losses"]["features"]) == ["outer"]
    assert record.details["left_out"] == {"features": {"inner.0": "student 12×8×8, teacher 16×8×8"}}


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).relu()


class Residuals(nn.Module):
    """A residual block at a width of 8, and one inside at a width that can be pruned."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.stem, self.outer = nn.Conv2d(3, 8, 4, 4), Residual(8)
        self.inner = nn.Sequential(Residual(inner))
        self.widen, self.head = nn.Conv2d(8, inner, 1), nn.Linear(inner, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.widen(self.outer(self.stem(x)))).mean((2, 3)))


def test_attention_maps_are_learnt_where_asked() -> None:
    """Only they: the student's maps come nearer, and the record says what was compared."""
    options = replace(QUICK, losses=(("attention", 1.0),), epochs=2)
    recovered, record = recover(damaged(vit()), vit(), options, Waves())
    first, *_, last = (row["parts"] for row in record.details["history"])
    assert last["attention|blocks.0.attn"] < 0.7 * first["attention|blocks.0.attn"]
    assert record.details["losses"]["logits"] == {"logits": 0.0}
    assert not same(recovered, vit())


def test_with_labels_the_drop_is_that_of_accuracy() -> None:
    with torch.no_grad():
        labels = vit().graph_module(Waves().pixels).argmax(1)
    options = replace(QUICK, losses=(("logits", 1.0), ("labels", 0.5)), epochs=1)
    _, record = recover(damaged(vit()), vit(), options, Waves(labels=labels))
    best = record.details["best"]
    assert best["by"] == "labels"
    assert best["drop"] == pytest.approx(100 - best["agreement"]), "the teacher is always right"
    assert "labels|logits" in record.details["history"][0]["parts"]
    halved = torch.where(torch.arange(128) % 2 == 0, labels, -1)
    _, record = recover(damaged(vit()), vit(), options, Waves(labels=halved))
    assert record.details["best"]["by"] == "agreement", "not all held-out images have a label"


def test_bf16_trains_float_weights_in_the_same_process() -> None:
    options = replace(QUICK, epochs=1)
    full, _ = recover(damaged(cnn()), cnn(), options, Waves(64))
    half, _ = recover(damaged(cnn()), cnn(), replace(options, precision="bf16"), Waves(64))
    assert not same(full, half)
    assert kl(half, cnn()) == pytest.approx(kl(full, cnn()), rel=0.1)
    assert {w.dtype for w in weights(half).values()} == {w.dtype for w in weights(full).values()}


# --- determinism and resuming ---


def test_a_seed_decides_everything_and_workers_nothing() -> None:
    teacher, student = cnn(), damaged(cnn())
    short = replace(QUICK, epochs=1)
    first, _ = recover(student, teacher, short, Waves(64))
    torch.manual_seed(12345)
    again, _ = recover(student, teacher, replace(short, workers=2), Waves(64))
    other, _ = recover(student, teacher, replace(short, seed=1), Waves(64))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("after", [1, 5, 11])
def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path: Path, after: int) -> None:
    teacher, student = cnn(), damaged(cnn())
    options = replace(QUICK, evaluations=4, epochs=2)
    whole, record = recover(student, teacher, options, Waves(128))
    assert record.details["steps"] == 12
    with pytest.raises(KeyboardInterrupt):
        recover(student, teacher, options, Waves(128), steps=Interrupt(after), checkpoint=tmp_path)
    assert (tmp_path / CHECKPOINT_NAME).exists() == (after > 3)
    resumed, resumed_record = recover(student, teacher, options, Waves(128), checkpoint=tmp_path)
    assert same(whole, resumed)
    mine, theirs = record.details["history"], resumed_record.details["history"]
    assert mine == theirs
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT_NAME]

    done, _ = recover(
        student, teacher, options, Waves(128), steps=Interrupt(1), checkpoint=tmp_path
    )
    assert same(whole, done), "a finished run is read, not repeated"


def test_a_checkpoint_of_another_run_or_a_broken_one_is_refused(tmp_path: Path) -> None:
    teacher, student = cnn(), damaged(cnn())
    options = replace(QUICK, epochs=0.1)
    recover(student, teacher, options, Waves(48), checkpoint=tmp_path)
    with pytest.raises(UsageError, match="another model, other options"):
        recover(student, teacher, replace(options, lr=1e-5), Waves(48), checkpoint=tmp_path)
    with pytest.raises(UsageError, match="another model"):
        recover(teacher, teacher, options, Waves(48), checkpoint=tmp_path)
    (tmp_path / CHECKPOINT_NAME).write_bytes(b"\x80\x04 a pickle, perhaps")
    with pytest.raises(UsageError, match="not readable as a checkpoint"):
        recover(student, teacher, options, Waves(48), checkpoint=tmp_path)


class Clock:
    """A machine where each step takes 0.05 s and each evaluation ``judging`` seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, judging: float) -> None:
        self.now = 0.0
        judge = Judge.__call__

        def judged(self_: Judge, module: nn.Module) -> Judgement:
            self.now += judging
            return judge(self_, module)

        monkeypatch.setattr(Judge, "__call__", judged)
        monkeypatch.setattr(recover_loop, "time", SimpleNamespace(monotonic=lambda: self.now))

    @contextmanager
    def steps(self, *_step: object) -> Iterator[Callable[[float], None]]:
        def advance(amount: float) -> None:
            self.now += 0.05 * amount

        yield advance


@pytest.mark.parametrize(("judging", "evaluations", "steps"), [(0.02, 10, 50), (0.5, 1, 38)])
def test_a_run_keeps_to_its_time_and_slow_evaluations_do_not_take_it(
    monkeypatch: pytest.MonkeyPatch, judging: float, evaluations: int, steps: int
) -> None:
    clock = Clock(monkeypatch, judging)
    options = replace(QUICK, epochs=10_000, max_seconds=3.0, evaluations=10)
    teacher, student = cnn(), damaged(cnn())
    _, record = recover(student, teacher, options, Waves(64), steps=clock.steps)
    history = record.details["history"]
    assert len(history) == evaluations
    assert history[-1]["step"] == record.details["steps"] >= steps
    assert record.details["seconds"] == pytest.approx(clock.now, abs=0.051) and clock.now <= 3.0


# --- refusals ---


def test_what_cannot_be_recovered_is_refused() -> None:
    model = cnn()
    with pytest.raises(UsageError, match="no images"):
        recover(model, model, QUICK, Waves(0))
    with pytest.raises(UsageError, match="to hold out"):
        recover(model, model, QUICK, Waves(1))
    other = replace(model, backbone=replace(model.backbone, num_classes=3))
    with pytest.raises(UsageError, match="10 classes, the teacher 3"):
        recover(model, other, QUICK, Waves(8))
    with pytest.raises(UsageError, match="fixes its batch"):
        recover(replace(model, dynamic_batch=False), model, QUICK, Waves(8))
    with pytest.raises(UsageError, match=r"nothing in the student .* attention"):
        recover(model, model, replace(QUICK, losses=(("attention", 1.0),)), Waves(8))
    with pytest.raises(UsageError, match="no block nowhere"):
        recover(model, model, replace(QUICK, feature_weights=(("nowhere", 2.0),)), Waves(8))
    with pytest.raises(UsageError, match=r"float \(3, 32, 32\)"):
        recover(model, model, QUICK, [(torch.zeros(3, 8, 8), -1)] * 4)
    with pytest.raises(UsageError, match="label 10"):
        labels = torch.full((8,), 10)
        recover(damaged(cnn()), model, QUICK, Waves(8, labels=labels))


@pytest.mark.parametrize(
    "bad",
    [
        {"losses": (("unheard", 1.0),)},
        {"losses": (("logits", 0.0),)},
        {"lr": 0.0},
        {"held_out": 1.0},
        {"workers": -1},
        {"max_seconds": 0.0},
        {"ema_decay": 1.0},
        {"epochs": math.nan},
    ],
)
def test_options_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        RecoverOptions(**bad)


def test_without_accelerate_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "accelerate":
            raise ImportError("No module named 'accelerate'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    model = cnn()
    with pytest.raises(TargetMissingError, match=r"deploykit-vision\[recover\]") as raised:
        recover(model, model, QUICK, Waves(8))
    assert raised.value.exit_code == ExitCode.TARGET_MISSING
    with pytest.raises(TargetMissingError, match=r"deploykit-vision\[recover\]"):  # at once
        compress(model="no such model", prune=0.3, recover=tmp_path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_that_are_not_there_are_told_before_anything_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="gone: no such file or folder"):
        compress(model="shvit_s1", weights="random", prune=0.3, recover=tmp_path / "gone", out=out)
    assert not out.exists()


def test_a_loss_that_is_no_number_ends_the_run() -> None:
    teacher, student = cnn(), damaged(cnn())
    with torch.no_grad():
        weights(student)["head.weight"].fill_(math.nan)
    with pytest.raises(DeploykitError, match=r"no number at step .* lower recover.lr"):
        recover(student, teacher, replace(QUICK, keep_zeros=False), Waves(48))


def test_an_image_that_cannot_be_read_is_one_line_from_any_process() -> None:
    class Broken(Waves):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            if index > 0:
                raise UsageError("image x.jpg: can't be read")
            return super().__getitem__(index)

    model = cnn()
    for workers in (0, 1):
        with pytest.raises(UsageError, match=r"^image x.jpg: can't be read$"):
            recover(model, model, replace(QUICK, workers=workers), Broken(48))
