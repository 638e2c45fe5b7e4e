"""Quantisation-aware training, and the two stages of GPUSQ-ViT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deploykit.errors import UsageError
from deploykit.graph.capture import CapturedModel
from deploykit.prune.distill_taps import logits, with_taps
from deploykit.prune.qat import FakeQuantize, fit_scale, insert_fake_quantizers
from deploykit.prune.recover import QatOptions, recover
from deploykit.prune.recover_gpusq import recover_gpusq, weights_from
from deploykit.prune.recover_weights import make_trainable
from deploykit.types import PassRecord
from tests.graphs import images
from tests.recovery import QUICK, Interrupt, Waves, cnn, damaged, kl, same, sparse_vit, vit, weights

pytest.importorskip("accelerate")


def made(scale: float, zero: float, low: int, high: int, *, learnt: bool = True) -> FakeQuantize:
    return FakeQuantize(torch.tensor(scale), torch.tensor(zero), low, high, learnt=learnt)


def test_rounding_is_that_of_codes() -> None:
    values = torch.linspace(-3, 3, 101)
    scale, zero = 0.25, 5.0
    rounded = made(scale, zero, 0, 15)(values)
    codes = torch.clamp((values / scale).round() + zero, 0, 15)
    torch.testing.assert_close(rounded, (codes - zero) * scale)
    reference = torch.fake_quantize_per_tensor_affine(values, scale, 5, 0, 15)
    torch.testing.assert_close(rounded, reference)
    assert made(scale, 0.0, -7, 7)(torch.zeros(3)).tolist() == [0, 0, 0]


def test_gradients_are_those_of_lsq() -> None:
    """Against torch's own learnable rounding, whose gradients have the same definition."""
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scale = torch.tensor([0.3], requires_grad=True)
    reference = torch._fake_quantize_learnable_per_tensor_affine(
        values, scale, torch.tensor([4.0]), 0, 15, 1.0
    )
    reference.square().sum().backward()
    on_values, on_scale = values.grad, scale.grad
    assert on_values is not None and on_scale is not None
    values.grad = None
    quantizer = made(0.3, 4.0, 0, 15)
    quantizer(values).square().sum().backward()
    torch.testing.assert_close(values.grad, on_values)
    factor = 0.3 / (64 * 15) ** 0.5  # of the logarithm, and LSQ's own
    torch.testing.assert_close(quantizer.log_scale.grad, on_scale[0] * factor)
    fixed = made(0.3, 4.0, 0, 15, learnt=False)
    fixed(values).sum().backward()
    assert fixed.log_scale.grad is None


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_fitted_steps_err_no_more_than_the_full_range(bits: int, symmetric: bool) -> None:
    rows = torch.randn(3, 500, generator=torch.Generator().manual_seed(1)) ** 3 + 0.5
    steps, zeros = fit_scale(rows, bits, symmetric=symmetric)
    low, high = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)

    def error(step: Tensor, zero: Tensor) -> Tensor:
        codes = ((rows / step[:, None]).round() + zero[:, None]).clamp(low, high)
        return ((codes - zero[:, None]) * step[:, None] - rows).square().sum(1)

    least, most = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    if symmetric:
        full, zero = rows.abs().amax(1) / high, torch.zeros(3)
    else:
        full = (most - least) / high
        zero = (-least / full).round()
    assert (error(steps, zeros) <= error(full, zero) * 1.001).all()
    if bits == 2:
        assert (error(steps, zeros) < 0.8 * error(full, zero)).all()
    assert fit_scale(torch.zeros(1, 4), bits, symmetric=symmetric)[0] > 0


def test_every_layer_is_rounded_and_shared_inputs_once() -> None:
    model = with_taps(vit().graph_module, logits(vit().graph_module.graph))
    names = make_trainable(model)
    before = model(images(2))["logits"]
    found = insert_fake_quantizers(model, QatOptions(4, 8, edge_bits=8), lambda: [images(4)])
    assert len(found["w4a8"]) == 8
    assert found["w8a8"] == ["patch_embed.proj", "head"]
    after = model(images(2))["logits"]
    assert not torch.equal(before, after)
    assert ((after - before).norm() / before.norm()).item() < 0.5
    after.sum().backward()
    trained = dict(model.named_parameters())
    assert all(trained[name].grad is not None for name in names)
    scales = [p for name, p in trained.items() if name.endswith("log_scale")]
    assert len(scales) == 20
    assert all(scale.grad is not None for scale in scales)


def test_weights_learn_to_be_rounded() -> None:
    """Rounding the returned weights anew costs nothing; rounding the teacher's own does."""
    options = replace(QUICK, qat=QatOptions(3, 16, edge_bits=3))
    recovered, record = recover(vit(), vit(), options, Waves(256))
    assert record.details["best"]["kl"] < 0.5 * record.details["before"]["kl"]
    assert "rounded to w3a16" in record.summary
    assert str(recovered.graph_module.graph) == str(vit().graph_module.graph)
    assert not same(recovered, vit())

    def rounded(model: CapturedModel) -> CapturedModel:
        model = model.copy()
        for name, weight in weights(model).items():
            if name.endswith("weight") and weight.ndim > 1:
                steps, _ = fit_scale(weight.flatten(1), 3, symmetric=True)
                step = steps.view(-1, *[1] * (weight.ndim - 1))
                weight.copy_((weight / step).round().clamp(-3, 3) * step)
        return model

    torch.testing.assert_close(kl(rounded(recovered), vit()), kl(recovered, vit()))
    assert kl(recovered, vit()) < 0.5 * kl(rounded(vit()), vit())


@pytest.mark.parametrize("ranges", ["learnt", "fixed"])
def test_ranges_learn_only_where_asked_and_resume(tmp_path: Path, ranges: str) -> None:
    qat = QatOptions(4, 8, ranges=ranges)
    options = replace(QUICK, qat=qat, epochs=1, evaluations=2)
    whole, _ = recover(damaged(cnn()), cnn(), options, Waves(128))
    with pytest.raises(KeyboardInterrupt):
        recover(damaged(cnn()), cnn(), options, Waves(128), steps=Interrupt(4), checkpoint=tmp_path)
    resumed, _ = recover(damaged(cnn()), cnn(), options, Waves(128), checkpoint=tmp_path)
    assert same(whole, resumed)
    assert ("log_scale" in (tmp_path / "recover.safetensors").read_bytes()[:20_000].decode(
        "latin1")) == (ranges == "learnt")  # fmt: skip


def test_gpusq_takes_the_sparse_stage_s_losses_as_weights(tmp_path: Path) -> None:
    options = replace(QUICK, qat=QatOptions(4, 8), epochs=1)
    recovered, (sparse, rounded) = recover_gpusq(
        sparse_vit(), vit(), options, Waves(), checkpoint=tmp_path
    )
    for name, weight in weights(sparse_vit()).items():
        if name in sparse.details["zeros_kept"]:
            assert (weights(recovered)[name][weight == 0] == 0).all()
    assert kl(recovered, vit()) < kl(sparse_vit(), vit())
    assert sparse.details["rounded"] == {} and rounded.details["rounded"]
    parts = sparse.details["history"][-1]["parts"]
    blocks = [parts["features|blocks.0"], parts["features|blocks.1"]]
    factors = dict(weights_from(sparse))
    assert factors["blocks.1"] / factors["blocks.0"] == pytest.approx(blocks[1] / blocks[0])
    assert sum(factors.values()) == pytest.approx(2)
    assert rounded.details["losses"]["features"] == pytest.approx(
        {name: factor / 2 for name, factor in factors.items()}
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rounded", "sparse"]
    nothing = PassRecord(name="recover", summary="", details={"history": []})
    assert weights_from(nothing) == ()


@pytest.mark.parametrize(
    "bad", [{"weight_bits": 1}, {"input_bits": 9}, {"weight_bits": 16, "input_bits": 16}]
)
def test_widths_that_make_no_sense_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"recover\.qat"):
        QatOptions(**bad)
