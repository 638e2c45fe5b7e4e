"""The pieces of recovery: places, losses, weights, order of images, averages, stopping."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from deploykit import recovery
from deploykit.data import open_dataset
from deploykit.errors import UsageError
from deploykit.prune.distill_losses import LOSSES, Lesson, register
from deploykit.prune.distill_taps import (
    attention_maps,
    block_outputs,
    comparable,
    embeddings,
    logits,
    with_taps,
)
from deploykit.prune.recover import RecoverOptions
from deploykit.prune.recover_data import Augmented, Order, Plain, split
from deploykit.prune.recover_ema import decay_at, moving_average
from deploykit.prune.recover_options import rate_for
from deploykit.prune.recover_stop import EarlyStop, Judgement
from deploykit.prune.recover_weights import hold_zeros, make_trainable
from deploykit.training_images import TrainingImages
from deploykit.types import Preprocessing
from tests import tiny_models
from tests.graphs import captured, images, nodes_of
from tests.recovery import Waves, cnn, damaged, vit

aten = torch.ops.aten
LESSON = Lesson(torch.tensor([1, -1, 3]), temperature=2.0)

# --- places ---


def test_places_of_a_vit_are_its_blocks_and_attentions() -> None:
    graph = vit().graph_module.graph
    assert list(block_outputs(graph)) == ["blocks.0", "blocks.1"]
    assert list(attention_maps(graph)) == ["blocks.0.attn", "blocks.1.attn"]
    taps = {**block_outputs(graph), **attention_maps(graph), **logits(graph)}
    values = with_taps(vit().graph_module, taps)(images(3))
    assert values["blocks.1"].shape == (3, 17, 32)
    assert values["blocks.0.attn"].shape == (3, 2, 17, 17)
    torch.testing.assert_close(values["blocks.0.attn"].sum(-1), torch.ones(3, 2, 17))
    assert torch.equal(values["logits"], vit().graph_module(images(3)))
    # The block's value is the residual stream, before the next block's norm.
    last = values["blocks.1"][:, 0]
    state = vit().graph_module.state_dict()
    normed = F.layer_norm(last, (32,), state["norm.weight"], state["norm.bias"], 1e-6)
    torch.testing.assert_close(
        F.linear(normed, state["head.weight"], state["head.bias"]), values["logits"]
    )


def test_position_embeddings_and_attention_biases_are_no_blocks() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.bias = nn.Linear(32, 32), nn.Parameter(torch.randn(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            x = x.mean(1) + self.bias
            q = self.q(x)
            return ((q @ q.transpose(1, 2) + q).softmax(-1) @ q).mean(1)

    graph = captured(Biased()).graph_module.graph
    assert block_outputs(graph) == {}
    assert len(attention_maps(graph)) == 1


def test_a_convolutional_hybrid_has_its_places_too() -> None:
    graph = captured(tiny_models.tiny_hybrid()).graph_module.graph
    assert list(block_outputs(graph)) == ["5"]
    assert list(attention_maps(graph)) == ["5"]


def test_places_with_other_shapes_are_left_out_with_the_reason() -> None:
    class Narrow(nn.Module):
        def __init__(self, inner: int, extra: bool) -> None:
            super().__init__()
            self.first = Residual(inner)
            self.second = Residual(8) if extra else nn.Identity()
            self.stem, self.head = nn.Conv2d(3, inner, 4, 4), nn.Linear(inner, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(self.stem(x))
            return self.head(self.second(x).mean((2, 3)))

    class Residual(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(width, width, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x)

    student, teacher = captured(Narrow(6, False)), captured(Narrow(8, True))
    kept, left_out = comparable(
        student.graph_module, teacher.graph_module, block_outputs, student.example
    )
    assert kept == []
    assert left_out == {"first": "student 6×8×8, teacher 8×8×8", "second": "not in the student"}


# --- losses ---


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_least_where_student_and_teacher_agree(name: str) -> None:
    loss = LOSSES[name]
    model = vit().graph_module
    places = loss.find(model.graph)
    assert places
    values = with_taps(model, places)(images(3))
    for value in values.values():
        teacher = value.detach()
        student = (teacher + 0.1 * torch.rand(teacher.shape)).requires_grad_()
        if name == "attention":
            student = (student / student.sum(-1, keepdim=True)).detach().requires_grad_()
        far = loss.compute(student, teacher, LESSON)
        far.backward()
        assert far.shape == () and far > 0
        assert student.grad is not None and student.grad.isfinite().all()
        assert student.grad.abs().sum() > 0
        if name != "labels":
            assert loss.compute(teacher, teacher, LESSON) == pytest.approx(0, abs=1e-6)


def test_losses_are_what_their_formulas_say() -> None:
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    by_hand = 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(LOSSES["logits"].compute(student, teacher, LESSON), by_hand)
    logs = student.log_softmax(1)
    torch.testing.assert_close(
        LOSSES["labels"].compute(student, teacher, LESSON), -(logs[0, 1] + logs[2, 3]) / 2
    )
    none = Lesson(torch.full((3,), -1), 2.0)
    assert LOSSES["labels"].compute(student, teacher, none) == 0
    error = ((student - teacher) ** 2).mean(1) / teacher.var(1, correction=0)
    torch.testing.assert_close(LOSSES["features"].compute(student, teacher, LESSON), error.mean())
    mean_only = teacher.mean(1, keepdim=True).expand_as(teacher)
    assert LOSSES["features"].compute(mean_only, teacher, LESSON) == pytest.approx(1)


def test_a_loss_is_registered_once() -> None:
    with pytest.raises(ValueError, match="there already"):
        register("logits", logits)(LOSSES["logits"].compute)


# --- weights ---


def test_trained_are_weights_not_statistics_nor_tables() -> None:
    model = cnn().copy().graph_module
    names = make_trainable(model)
    assert not [name for name in names if "running" in name]
    assert "stem_norm.weight" in names
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(names)


def test_buffers_that_passes_left_as_weights_are_trained() -> None:
    from deploykit.graph.edit import add_tensor, clean

    model = cnn().copy().graph_module
    (head,) = nodes_of(model, aten.linear.default)
    changed = add_tensor(model, "head.folded", torch.ones(10, 24), head)
    other = add_tensor(model, "some.table", torch.ones(2, 1), head)
    with model.graph.inserting_before(head):
        scaled = model.graph.call_function(aten.mul.Tensor, (head.args[0], 1.0))
        scaled = model.graph.call_function(aten.mul.Tensor, (scaled, other))
    head.args = (scaled, changed, head.args[2])
    clean(model)
    names = make_trainable(model)
    assert "head_folded" in names
    assert "some_table" not in names


def test_only_layers_weights_are_held_at_zero() -> None:
    model = damaged(vit(), 0.0).graph_module
    with torch.no_grad():
        model.get_parameter("blocks.0.mlp.fc1.weight")[:, ::2] = 0
        model.get_parameter("blocks.0.mlp.fc1.bias").zero_()
        model.get_parameter("cls_token").zero_()
    make_trainable(model)
    assert hold_zeros(model) == {"blocks.0.mlp.fc1.weight": 0.5}
    model(images(2)).square().sum().backward()
    gradient = model.get_parameter("blocks.0.mlp.fc1.weight").grad
    assert gradient is not None
    assert (gradient[:, ::2] == 0).all() and (gradient[:, 1::2] != 0).any()


# --- images ---


def test_held_out_images_are_never_trained_on() -> None:
    options = RecoverOptions(held_out=0.2, split_seed=4, batch_size=8)
    parts = split(Waves(50), vit().backbone, options)
    assert len(parts.held_out) == 10
    assert sorted([*parts.train.tolist(), *parts.held_out.tolist()]) == list(range(50))
    seen = {index for _, index in Order(parts.train, 0, 0, 500)}
    assert seen == set(parts.train.tolist())
    few = split(Waves(50), vit().backbone, RecoverOptions(held_out=0.9, held_out_images=3))
    assert len(few.held_out) == 3


def test_every_epoch_has_every_image_once_in_its_own_order() -> None:
    indices = torch.arange(10, 20)
    keys = list(Order(indices, seed=1, first=0, last=30))
    epochs = [[index for epoch, index in keys if epoch == e] for e in range(3)]
    assert all(sorted(epoch) == indices.tolist() for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert list(Order(indices, seed=1, first=13, last=30)) == keys[13:]
    assert list(Order(indices, seed=2, first=0, last=30)) != keys


def test_augmentation_depends_on_the_seed_the_epoch_and_the_image_alone() -> None:
    noisy = Augmented(Waves(4), seed=1, classes=10)
    torch.manual_seed(5)
    first = noisy[0, 2][0]
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn), "the caller's random numbers are left alone"
    assert torch.equal(noisy[0, 2][0], first)
    assert not torch.equal(noisy[1, 2][0], first)
    assert not torch.equal(Augmented(Waves(4), seed=2, classes=10)[0, 2][0], first)
    plain = Plain(Waves(4), torch.tensor([2]), classes=10)
    assert torch.equal(plain[0][0], Waves(4).pixels[2])


def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(6):
        place = tmp_path / str(number % 2)
        place.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    return tmp_path


def test_images_of_a_folder_are_cropped_anew_and_evaluated_as_they_are(tmp_path: Path) -> None:
    preprocessing = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.3, 0.4))
    opened = open_dataset(folder(tmp_path), preprocessing, labelled=True, num_classes=2)
    made = TrainingImages(opened)
    assert len(made) == 6
    torch.manual_seed(0)
    first, label = made[0]
    assert first.shape == (3, 32, 32) and first.dtype == torch.float32
    assert label == 0 and made[5][1] == 1
    assert not torch.equal(made[0][0], first)
    torch.manual_seed(0)
    assert torch.equal(made[0][0], first)
    (batch, labels), *_ = opened.tensor_batches(6)
    assert labels is not None
    plain = made.evaluation()
    assert torch.equal(torch.stack([plain[i][0] for i in range(6)]), batch)
    assert [plain[i][1] for i in range(6)] == labels.tolist()


@pytest.mark.slow
def test_images_travel_to_other_processes(tmp_path: Path) -> None:
    preprocessing = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.3, 0.4))
    opened = open_dataset(folder(tmp_path), preprocessing, labelled=False, limit=4)
    made = pickle.loads(pickle.dumps(TrainingImages(opened.subset([1, 3]))))
    assert len(made) == 2 and made[1][1] == -1
    spawned = DataLoader(made.evaluation(), 2, num_workers=1, multiprocessing_context="spawn")
    (batch, _), *_ = spawned
    assert torch.equal(batch[0], made.evaluation()[0][0])


# --- averages and stopping ---


def test_the_average_follows_by_the_formula() -> None:
    module = nn.Linear(2, 1, bias=False)
    average = moving_average(module, decay=0.3)
    values = [1.0, 3.0, -2.0, 5.0]
    expected = 0.0
    for updates, value in enumerate(values):
        with torch.no_grad():
            module.weight.fill_(value)
        average.update_parameters(module)
        d = min(0.3, (1 + updates) / (10 + updates))
        expected = value if updates == 0 else d * expected + (1 - d) * value
    assert average.module.weight[0, 0].item() == pytest.approx(expected)
    assert decay_at(0, 0.99) == pytest.approx(0.1)
    assert decay_at(10_000, 0.99) == 0.99


def judged(drop: float, kl: float, nll: float | None = None) -> Judgement:
    return Judgement(images=100, drop=drop, agreement=100 - drop, kl=kl, nll=nll)


def test_the_embedding_is_what_every_classifier_reads() -> None:
    model = vit()
    (name,) = embeddings(model.graph_module.graph)
    assert name == "head"
    taps = {**embeddings(model.graph_module.graph), **logits(model.graph_module.graph)}
    values = with_taps(model.graph_module, taps)(images(3))
    state = model.graph_module.state_dict()
    torch.testing.assert_close(
        F.linear(values["head"], state["head.weight"], state["head.bias"]), values["logits"]
    )
    assert list(embeddings(cnn().graph_module.graph))


def test_stopping_keeps_the_best_and_loses_patience() -> None:
    stop = EarlyStop(patience=2, target_drop=None)
    assert stop.update(judged(5, 1.0))
    assert not stop.update(judged(4, 1.1)), "one image of a hundred is chance"
    assert stop.update(judged(6, 0.5)), "nearer to the teacher, whatever the count says"
    assert not stop.update(judged(6, 0.5)) and not stop.reason
    assert not stop.update(judged(3, 0.7))
    assert stop.reason == "no better in 2 evaluations"
    assert stop.best == judged(6, 0.5)
    again = EarlyStop(patience=2, target_drop=None)
    again.restore(stop.state())
    assert again == stop


def test_labels_count_for_more_than_the_teacher() -> None:
    stop = EarlyStop(patience=9, target_drop=None)
    stop.update(judged(2, 0.5, nll=0.4))
    assert stop.update(judged(2, 0.6, nll=0.3))
    assert not stop.update(judged(2, 0.1, nll=0.35))


def test_stopping_at_the_target_and_at_no_number() -> None:
    stop = EarlyStop(patience=9, target_drop=1.0)
    stop.update(judged(3, 1.0))
    assert not stop.reason
    assert not stop.update(judged(math.nan, math.nan))
    assert stop.update(judged(1.0, 0.9))
    assert stop.reason == "held-out drop is at most 1 points"
    assert RecoverOptions().target_drop is None


def test_the_rate_follows_the_distance_within_limits() -> None:
    rates = [rate_for(kl) for kl in (0.0, 0.01, 0.06, 1.0, 4.0, 1e6)]
    assert rates == sorted(rates)
    assert rates[0] == 3e-6
    assert rates[-1] == 1e-4
    assert rate_for(1.0) == pytest.approx(2e-5)
    assert RecoverOptions().lr is None
    with pytest.raises(UsageError, match=r"recover.lr: wanted more than 0"):
        RecoverOptions(lr=0.0)


@pytest.mark.parametrize(
    ("flags", "wanted"), [({"avx512_bf16"}, "bf16"), ({"amx_bf16"}, "bf16"), ({"avx2"}, "fp32")]
)
def test_products_are_halved_where_the_processor_does_that(
    flags: set[str], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(recovery, "cpu_facts", lambda: ("a CPU", frozenset(flags)))
    assert recovery.fast_precision() == wanted
