"""Block reconstruction: AdaRound, QDrop, and the three losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch
import torch.nn.functional as F

from deploykit.fsio import atomic_write_bytes
from deploykit.graph.signal import sqnr_db
from deploykit.quant import walk
from deploykit.quant.cache import TensorCache
from deploykit.quant.quantize import QuantizeOptions, quantize
from deploykit.quant.quantizers.uniform import UniformQuantizer
from deploykit.quant.reconstruction.activations import LearntActivation, drop_quantization
from deploykit.quant.reconstruction.losses import PlainLoss, WeightedLoss, perturbation_hessian
from deploykit.quant.reconstruction.relu import ReluOptions, replace_gelu
from deploykit.quant.reconstruction.rounding import AdaRoundWeight
from deploykit.quant.weights import quantize_weight
from tests.graphs import aten, captured, images, nodes_of, tiny_cnn, tiny_vit


def calibration() -> list[torch.Tensor]:
    return list(images(64, seed=1).split(16))


def test_soft_rounding_starts_at_the_weight_and_hardens_to_codes() -> None:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    start = quantize_weight(weight, 4)
    learnt = AdaRoundWeight(weight, start)
    inside = (weight / start.scale[:, None]).clamp(-8, 7) * start.scale[:, None]
    # Half way between the weight and its nearest code's side: less than half a step off.
    assert ((learnt() - inside).abs() <= 0.5 * start.scale[:, None]).all()
    hard = learnt.harden()
    assert hard.codes.min() >= -8 and hard.codes.max() <= 7
    assert torch.equal(hard.codes, start.codes)  # nothing learnt yet: what it started from


def test_the_penalty_vanishes_only_where_every_rounding_is_decided() -> None:
    weight = torch.randn(4, 5)
    learnt = AdaRoundWeight(weight, quantize_weight(weight, 4))
    assert float(learnt.penalty(2.0)) > 0
    with torch.no_grad():
        learnt.logits.copy_(torch.where(learnt.logits > 0, 20.0, -20.0))
    assert float(learnt.penalty(2.0)) == 0
    torch.testing.assert_close(learnt(), learnt.harden().dequantize())


def test_a_learnt_activation_gives_the_quantiser_s_values_and_gradients() -> None:
    quantizer = UniformQuantizer(0.1, 3, 4)
    learnt, x = LearntActivation(quantizer), torch.linspace(-1, 2, 200, requires_grad=True)
    result = learnt(x)
    torch.testing.assert_close(result, quantizer(x.detach()), rtol=0, atol=1e-6)
    result.sum().backward()
    outside = (x.detach() < -0.35) | (x.detach() > 1.25)
    assert x.grad is not None and (x.grad[outside] == 0).all() and (x.grad[~outside] == 1).all()
    assert learnt.scale is not None and learnt.scale.grad is not None


def test_qdrop_leaves_about_half_of_the_elements_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = drop_quantization(torch.zeros(10_000), torch.ones(10_000), 0.5, generator)
    assert 0.47 < float(mixed.mean()) < 0.53
    assert torch.equal(
        drop_quantization(torch.zeros(3), torch.ones(3), 0.0, generator), torch.zeros(3)
    )


def test_the_perturbation_hessian_finds_what_the_logits_depend_on() -> None:
    outputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.zeros(6, 4)
    weight[0] = torch.tensor([3.0, -3.0, 1.0, -1.0])
    suffix = lambda x: x @ weight  # noqa: E731
    hessian = perturbation_hessian(suffix, outputs, suffix(outputs))
    assert hessian.shape == (6,) and hessian[0] > 0.1 and hessian[1:].abs().max() < 1e-4


def test_a_weighted_loss_of_equal_weights_is_the_plain_one() -> None:
    output, wanted = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    plain = PlainLoss()(output, wanted, 0)
    torch.testing.assert_close(WeightedLoss(torch.ones(5, 6))(output, wanted, 0), plain)


@pytest.mark.parametrize("loss", ["plain", "aphq", "fima"])
def test_reconstruction_beats_rounding_to_nearest_on_unseen_images(loss: str) -> None:
    """In the logits' KL, which the weighted losses approximate; seeds differ by 10 % here."""
    model = captured(tiny_vit())
    x = images(64, seed=5)
    wanted = model.graph_module(x).log_softmax(-1)
    nearest = QuantizeOptions(3, 8, keep_8bit=(), rounding="nearest")
    learnt = replace(nearest, reconstruction=loss, reconstruction_iterations=100)  # type: ignore[arg-type]

    def lost(options: QuantizeOptions) -> float:
        given = quantize(model, options, calibration)(x).log_softmax(-1)
        return float(F.kl_div(given, wanted, log_target=True, reduction="batchmean"))

    assert mean(lost(replace(learnt, seed=seed)) for seed in (0, 1)) < lost(nearest)


def test_it_is_deterministic_and_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = captured(tiny_cnn())
    options = QuantizeOptions(
        4, 4, rounding="erq", reconstruction="plain", reconstruction_iterations=8
    )
    whole = quantize(model, options, calibration)
    cache = TensorCache(tmp_path, atomic_write_bytes)
    real, seen = walk.reconstruct_unit, []

    def interrupted(*args: object, **kwargs: object) -> None:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(1)
        real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(walk, "reconstruct_unit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, options, calibration, cache=cache)
    seen.clear()
    monkeypatch.setattr(walk, "reconstruct_unit", lambda *a, **k: (seen.append(1), real(*a, **k)))
    resumed = quantize(model, options, calibration, cache=cache)
    assert len(seen) == len(list(tmp_path.glob("unit-*"))) - 2
    assert torch.equal(resumed(images()), whole(images()))


def test_gelu_is_replaced_by_relu_and_its_layers_learnt_anew() -> None:
    model = captured(tiny_vit())
    x, exact = images(32, seed=5), model.graph_module(images(32, seed=5))
    learnt = model.copy().graph_module
    record = replace_gelu(learnt, calibration(), ReluOptions(iterations=60, rate=1e-3))
    swapped = model.copy().graph_module
    replace_gelu(swapped, calibration(), ReluOptions(iterations=1, rate=0.0))
    for graph_module in (learnt, swapped):
        assert not nodes_of(graph_module, aten.gelu.default)
        assert len(nodes_of(graph_module, aten.relu.default)) == 2
    assert sqnr_db(exact, learnt(x)) > sqnr_db(exact, swapped(x)) + 2
    assert record.summary.startswith("2 GELUs")
    result = quantize(model, QuantizeOptions(8, 8, relu_mlp=True), calibration)
    assert "relu_mlp" in {record.name for record in result.records}
    assert not nodes_of(result.graph_module, aten.gelu.default)
