"""Does the file compute what the graph computes? Compared on the same images.

Two float programs that add in another order differ by about 1e-6 of their values, and trained
networks hardly amplify that: 80 dB is easily reached. (One that does is held to its own rounding,
``rounding.py``.) A graph with quantised activations is another matter.
Wherever a value lies at the edge between two codes, that 1e-6 decides which code it gets; the
flipped code moves later values, which flip more codes. Rerunning the *same* simulation with its
input changed by 1e-6 shows how far this goes (the floor, printed beside each figure): after some
dozen layers the difference is as large as the quantisation noise itself. So a quantised file
must differ from its simulation by no more than the noise that quantisation makes anyway, and,
the sharper demand, must not be farther from the float model than the simulation is (by a margin,
and as far as so many images can tell: where both err independently, some images favour either).

A graph that merges tokens makes choices, too: of two tokens that are alike to the sixth digit,
either goes. Most images have no such pair and must agree as float programs do; no more of them
may differ than when the graph itself is rerun as above. A network of spikes is all choices: its
float file is held to the graph's own rounding.

Feature maps are judged level by level, each as if it were the only output. They have no classes:
what is said of top-1 doesn't apply.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from deploykit.export.rounding import FLOOR_MARGIN_DB, half_floor_db, single_floor_db
from deploykit.graph.levels import split_joined
from deploykit.graph.quantized import has_activation_quantizers
from deploykit.graph.signal import sqnr_db
from deploykit.types import Artifact, FeatureLevel, ParityRow

__all__ = [
    "Reference",
    "affordable_images",
    "compare",
    "compare_levels",
    "in_batches",
    "make_reference",
    "most_flips",
]

FLOAT_SQNR_DB = 80.0
NOISE_MARGIN_DB = 3.0  # both differ from the float model by independent noise of equal power
EXCESS_DB = 1.0
# In float16 the scales have 11 bits, too: the last of 256 codes moves by a sixteenth of a step.
HALF_EXCESS_DB = 2.0
PERTURBATION = 1e-6
_DRAWS = 3
_CHANCE = 0.01
_MOST_VALUES = 2**26  # of feature maps, in each of the half dozen copies that a comparison holds


@dataclass(frozen=True)
class Reference:
    """What an artefact's logits are compared with.

    Attributes:
        name: of the model in torch, such as ``simulation (torch)``.
        logits: (N, classes) of the graph the artefact was lowered from.
        float_logits: (N, classes) of the float model, if the graph quantises activations;
            None if the graph has no rounding inside.
        floor_sqnr_db: SQNR of the graph against itself with the input changed by 1e-6.
        restless: most images, in such a rerun, that differ more than float programs may; None
            where every image must agree or the graph quantises activations.
        half_sqnr_db: SQNR of the graph in float16 against itself, worked out when it is asked for.
        single_sqnr_db: SQNR of the graph in float32 against itself in float64, likewise.
        floor_flips: top-1 changes in all such reruns together, of ``reruns`` times N images; None
            of feature maps.
        reruns: how many there were.
        levels: of feature maps, each level's own reference, with its name.
    """

    name: str
    logits: Tensor
    float_logits: Tensor | None
    floor_sqnr_db: float
    floor_flips: int | None
    reruns: int = _DRAWS
    restless: int | None = None
    half_sqnr_db: Callable[[], float] = lambda: math.inf
    single_sqnr_db: Callable[[], float] = lambda: math.inf
    levels: tuple[tuple[FeatureLevel, Reference], ...] = ()


def affordable_images(count: int, levels: Sequence[FeatureLevel]) -> int:
    """How many of the images can be compared: feature maps of all may not fit in memory."""
    values = sum(level.values for level in levels)
    return count if not values else min(count, max(_MOST_VALUES // values, 2))


@torch.no_grad()
def in_batches(run: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """Logits of all images (N, 3, S, S), run ``size`` at a time."""
    return torch.cat([run(batch) for batch in images.split(size)])


@torch.no_grad()
def make_reference(
    name: str,
    run: Callable[[Tensor], Tensor],
    images: Tensor,
    float_logits: Tensor | None,
    seed: int,
    graph_module: fx.GraphModule | None = None,
    levels: Sequence[FeatureLevel] = (),
) -> Reference:
    """Run the graph on the images, and (if it rounds inside) again with them hardly changed.

    Args:
        run: (N, 3, S, S) to (N, classes), or to joined feature maps.
        images: (N, 3, S, S) float32.
        float_logits: the float model's logits on the images, if the graph quantises
            activations or makes choices, else None.
        graph_module: what ``run`` runs, for files that compute in float16.
        levels: the feature maps that ``run`` gives.
    """
    logits = run(images)
    wanted = split_joined(logits, levels)
    floats: Sequence[Tensor | None] = [None] * len(wanted)
    measured = [_Rerun(flips=None if levels else 0) for _ in wanted]
    if float_logits is not None:
        floats = split_joined(float_logits, levels)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(_DRAWS):
            noise = torch.randn(images.shape, generator=generator) * PERTURBATION
            again = split_joined(run(images * (1 + noise)), levels)
            measured = [
                one.with_draw(*pair) for one, *pair in zip(measured, wanted, again, strict=True)
            ]
    rounds = graph_module is None or has_activation_quantizers(graph_module)
    parts = []
    for number, (outputs, exact, seen) in enumerate(zip(wanted, floats, measured, strict=True)):
        restless = None if rounds or float_logits is None else seen.restless
        one = Reference(name, outputs, exact, seen.floor, seen.flips, restless=restless)
        if float_logits is None and graph_module is not None:
            part = functools.partial(_level, levels=levels, number=number)
            half, single = (
                functools.cache(functools.partial(floor, graph_module, images, part))
                for floor in (half_floor_db, single_floor_db)
            )
            one = dataclasses.replace(one, half_sqnr_db=half, single_sqnr_db=single)
        parts.append(one)
    if not levels:
        return parts[0]
    whole = Reference(name, logits, float_logits, min(seen.floor for seen in measured), None)
    return dataclasses.replace(whole, levels=tuple(zip(levels, parts, strict=True)))


@dataclass(frozen=True)
class _Rerun:
    """How far reruns with the input hardly changed were from the first run.

    Attributes:
        floor, restless: at the worst.
        flips: of all together.
    """

    floor: float = math.inf
    flips: int | None = 0
    restless: int = 0

    def with_draw(self, logits: Tensor, again: Tensor) -> _Rerun:
        flips = self.flips
        if flips is not None:
            flips += int((logits.argmax(1) != again.argmax(1)).sum())
        floor = min(self.floor, sqnr_db(logits, again))
        return _Rerun(floor, flips, max(self.restless, _restless(logits, again)))


def _level(joined: Tensor, levels: Sequence[FeatureLevel], number: int) -> Tensor:
    return split_joined(joined, levels)[number]


def compare_levels(
    artifact: Artifact,
    runtime: str,
    batch: int,
    outputs: Tensor,
    reference: Reference,
    data: str,
) -> list[ParityRow]:
    """``compare``, a row for every level of feature maps; one row where scores are compared.

    Args:
        outputs: (N, classes), or feature maps joined, (N, total).
    """
    if not reference.levels:
        return [compare(artifact, runtime, batch, outputs, reference, data)]
    levels = [level for level, _ in reference.levels]
    return [
        compare(artifact, runtime, batch, part, own, data).model_copy(update={"level": level.name})
        for part, (level, own) in zip(split_joined(outputs, levels), reference.levels, strict=True)
    ]


def compare(
    artifact: Artifact,
    runtime: str,
    batch: int,
    logits: Tensor,
    reference: Reference,
    data: str,
) -> ParityRow:
    """Judge an artefact's logits, got at one batch size, against the reference's.

    Args:
        logits: (N, classes) float32, for the reference's images in order.
        data: what the images were.
    """
    wanted = reference.logits
    count = len(wanted)
    difference = (logits.double() - wanted.double()).abs()
    sqnr = sqnr_db(wanted, logits)
    has_classes = reference.floor_flips is not None
    disagree = int((logits.argmax(1) != wanted.argmax(1)).sum()) if has_classes else 0
    own: float | None
    if reference.float_logits is None:
        needed, why = FLOAT_SQNR_DB, ""
        if artifact.half or not sqnr >= FLOAT_SQNR_DB:
            floor = reference.half_sqnr_db() if artifact.half else reference.single_sqnr_db()
            needed = min(floor - FLOOR_MARGIN_DB, FLOAT_SQNR_DB)
        if needed < FLOAT_SQNR_DB or artifact.half:
            kind = "float16" if artifact.half else "float32"
            why = f", within {FLOOR_MARGIN_DB:g} dB of the graph in {kind} (it is {floor:.1f} dB)"
        passed = sqnr >= needed
        tolerance = f"SQNR >= {needed:.4g} dB{why}"
        own = None
    else:
        own = sqnr_db(reference.float_logits, wanted)
        theirs = sqnr_db(reference.float_logits, logits)
        needed = min(own - NOISE_MARGIN_DB, FLOAT_SQNR_DB)
        excess = HALF_EXCESS_DB if artifact.half else EXCESS_DB
        noisier = _noisier(reference.float_logits, wanted, logits, excess)
        passed = sqnr >= needed and not noisier
        tolerance = (
            f"SQNR >= {needed:.1f} dB; noise within {excess:g} dB of the reference's, as far as "
            f"{count} images tell (it is {theirs:.1f} dB)"
        )
        if reference.floor_flips is not None:
            allowed = most_flips(count, reference.floor_flips, reference.reruns * count)
            passed = passed and disagree <= allowed
            tolerance += f"; at most {allowed} of {count} top-1 changed, as chance explains"
        if reference.restless is not None:
            most = 2 * reference.restless + 1
            passed = passed and (artifact.half or _restless(wanted, logits) <= most)
            tolerance += f"; at most {most} of {count} images below {FLOAT_SQNR_DB:g} dB"
    return ParityRow(
        artifact=artifact.name,
        format=artifact.format,
        precision=artifact.precision,
        reference=reference.name,
        runtime=runtime,
        batch=batch,
        images=count,
        data=data,
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        sqnr_db=sqnr,
        top1_agreement=100 * (count - disagree) / count if has_classes else None,
        noise_db=own,
        floor_db=None if own is None else reference.floor_sqnr_db,
        tolerance=tolerance,
        passed=bool(passed and torch.isfinite(logits).all()),
    )


def most_flips(count: int, seen: int, among: int) -> int:
    """How many top-1 changes of ``count`` images chance explains, if ``seen`` of ``among`` do.

    The most for which Fisher's exact test, one-sided, can't tell the two shares apart at 1 %.
    """
    from scipy.stats import hypergeom

    found = 0
    while found < count:
        more = found + 1
        if hypergeom.sf(more - 1, among + count, seen + more, count) < _CHANCE:
            break
        found = more
    return found


def _restless(wanted: Tensor, logits: Tensor) -> int:
    """How many images differ more than float programs may."""
    signal = wanted.double().square().sum(1)
    noise = (logits.double() - wanted.double()).square().sum(1)
    return int((noise > signal / 10 ** (FLOAT_SQNR_DB / 10)).sum())


def _noisier(floats: Tensor, wanted: Tensor, logits: Tensor, excess_db: float) -> bool:
    """Whether a file's distance to the float model is larger than its simulation's by more than
    ``excess_db``, and that isn't chance: by two standard errors over the images, pair by pair."""
    exact = floats.double()
    own = (wanted.double() - exact).square().sum(1)
    theirs = (logits.double() - exact).square().sum(1)
    beyond = theirs - own * 10 ** (excess_db / 10)
    error = beyond.std() / math.sqrt(len(beyond)) if len(beyond) > 1 else beyond.new_zeros(())
    return not bool(beyond.mean() <= 2 * error)  # not a number is noisier
