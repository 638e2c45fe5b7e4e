"""Choosing a tensor's quantiser by its measured error."""

from __future__ import annotations

from collections.abc import Sequence

from deploykit.errors import UsageError
from deploykit.quant.observers import Histogram
from deploykit.quant.quantizers import get_quantizer, list_quantizers
from deploykit.quant.quantizers.registry import FittedQuantizer
from deploykit.quant.ranges import MIN_SCALE

__all__ = ["choose_quantizer", "histogram_error"]


def histogram_error(quantizer: FittedQuantizer, histogram: Histogram, power: float = 2.0) -> float:
    """Mean of ``|x^ - x| ** power`` over a tensor's histogram, in the tensor's unit to ``power``.

    Every value counts as the middle of its bin, which adds up to a bin's width, 1/2048 of the
    range, to its error. For softmax outputs, most of which are in the first bin, the result is
    within a few percent of the error on the values themselves up to 6 bits. At 8 bits it is up to
    half too large where nearly all values are zero, for every kind of grid alike.
    """
    present = histogram.counts[0] > 0
    centres, counts = histogram.centres[0][present], histogram.counts[0][present].double()
    # Relative to the widest value: powers of an outlier of 1e30 would overflow.
    widest = max(float(centres.abs().max()), MIN_SCALE)
    errors = ((quantizer(centres) - centres).double() / widest).abs() ** power
    mean = float((errors * counts).sum() / counts.sum())
    return mean * float(widest**power)


def choose_quantizer(
    histogram: Histogram,
    bits: int,
    candidates: Sequence[str],
    range_method: str,
    power: float = 2.0,
    *,
    min_gain_db: float = 1.0,
) -> tuple[str, FittedQuantizer, dict[str, float]]:
    """Fit every candidate that can take the tensor and keep the one with the least error.

    No rule says which widths or tensors a kind is for: at 8 bits a uniform grid wins by its
    error (a table's values lie on an 8-bit grid too), and others win at fewer bits where most
    values are small.

    Args:
        histogram: of a whole tensor.
        bits: 2 to 8.
        candidates: registered names, the one that runs fastest (``uniform``) first.
        range_method: how each is fitted.
        power: of the error that is compared; 2 is the mean squared error, which is what reaches
            the sums of a product.
        min_gain_db: how much smaller than the first's the error must be for another to be
            worth its table, which every runtime looks up value by value.

    Returns:
        The best one's name, the fitted quantiser, and every fitted candidate's error.

    Raises:
        UsageError: a name isn't registered, or no candidate takes the tensor.
    """
    unknown = [name for name in candidates if name not in list_quantizers()]
    if unknown:
        message = f"no quantizer {unknown[0]!r}: choose among {', '.join(list_quantizers())}"
        raise UsageError(message)
    low, high = float(histogram.low[0]), float(histogram.high[0])
    fitted = {
        name: get_quantizer(name).fit(histogram, bits, range_method)
        for name in candidates
        if get_quantizer(name).supports(low, high)
    }
    if not fitted:
        message = (
            f"no quantizer of {', '.join(candidates) or 'an empty list'} takes values of "
            f"{low:g} to {high:g}: add 'uniform', which takes any"
        )
        raise UsageError(message)
    errors = {name: histogram_error(one, histogram, power) for name, one in fitted.items()}
    first = next(iter(errors))
    best = min(errors, key=errors.__getitem__)
    if errors[best] > errors[first] * 10 ** (-min_gain_db / 10):
        best = first
    return best, fitted[best], errors
