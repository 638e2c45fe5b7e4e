"""What to sweep: recipes to start from, keys to vary, how to choose, what counts."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_origin

from pydantic import Field, model_validator

from deploykit._recipe_errors import key_names, model_at
from deploykit._recipe_section import Section
from deploykit._validated_yaml import load_validated
from deploykit.errors import UsageError
from deploykit.recipe import Recipe
from deploykit.recipe_io import apply_overrides, build_recipe, load_recipe, merged

__all__ = ["Limits", "Objective", "Range", "Sweep", "SweepSpec", "load_sweep"]

Objective = Literal["top1", "ratio", "latency_ms", "bytes"]
Choice = str | int | float | bool | None | list[Any]

RECIPE = "recipe"
"""The dimension of several recipes to start from."""

_MOST_POINTS = 100_000


class Range(Section):
    """Numbers from ``low`` to ``high``; whole ones where all given are whole."""

    low: int | float
    high: int | float
    step: int | float | None = Field(default=None, gt=0)
    log: bool = False

    @model_validator(mode="after")
    def _order(self) -> Range:
        if self.high <= self.low:
            message = f"high {self.high:g} must be above low {self.low:g}"
            raise ValueError(message)
        if self.log and (self.low <= 0 or self.step is not None):
            message = "log wants low above 0 and no step"
            raise ValueError(message)
        return self

    @property
    def whole(self) -> bool:
        return all(isinstance(v, int) for v in (self.low, self.high, self.step or 1))

    def points(self) -> list[int | float]:
        """Every number of a range with a step (1 for whole numbers); else both ends."""
        step = self.step or (1 if self.whole else None)
        if step is None or self.log:
            return [self.low, self.high]
        count = int((self.high - self.low) / step + 1e-9) + 1
        if count > _MOST_POINTS:
            return [self.low, self.high]
        return [_tidy(self.low + n * step) for n in range(count)]


def _tidy(value: float) -> int | float:
    """0.30000000000000004 as 0.3."""
    return value if isinstance(value, int) else round(value, 12)


class Limits(Section):
    """Trials beyond one of these are kept, but don't count among the best."""

    max_drop: float | None = Field(default=None, ge=0, description="percentage points of top-1")
    max_ratio: float | None = Field(default=None, gt=0, description="of the original's time")
    max_latency_ms: float | None = Field(default=None, gt=0)
    max_bytes: int | None = Field(default=None, gt=0)


class SweepSpec(Section):
    """A sweep's file."""

    version: Literal[1] = 1
    recipe: str | list[str] | dict[str, Any] = Field(
        description="recipe file or files, from this file's folder, or a recipe's own keys"
    )
    search: dict[str, list[Choice] | Range] = Field(
        min_length=1, description="recipe keys, such as quantize.bits, and what they take"
    )
    sampler: Literal["grid", "random", "tpe", "nsga2"] = "grid"
    trials: int | None = Field(
        default=None, gt=0, le=_MOST_POINTS, description="None: all of a grid, else 32"
    )
    generation: int = Field(
        default=8, ge=2, description="tpe, nsga2: so many trials are chosen from the same knowledge"
    )
    seed: int = Field(default=0, ge=0, lt=2**31)
    objectives: list[Objective] | None = Field(
        default=None, min_length=1, description="top1 goes up, the others down"
    )
    limits: Limits = Limits()
    trial_minutes: float | None = Field(default=None, gt=0, description="longer ones are ended")

    @model_validator(mode="after")
    def _dimensions(self) -> SweepSpec:
        for key, choices in self.search.items():
            if choices == []:
                message = f"search.{key} has nothing to choose from"
                raise ValueError(message)
            grid_needs = isinstance(choices, Range) and not choices.whole and choices.step is None
            if self.sampler == "grid" and grid_needs:
                message = f"search.{key} needs a step, or another sampler than grid"
                raise ValueError(message)
        if self.objectives and len(set(self.objectives)) < len(self.objectives):
            message = f"objectives names one twice: {', '.join(self.objectives)}"
            raise ValueError(message)
        return self


class Sweep:
    """A checked spec: every dimension with its values, and the recipe that a choice makes."""

    def __init__(self, spec: SweepSpec, bases: dict[str, Recipe], folder: Path) -> None:
        self.spec = spec
        self.bases = bases
        self._folder = folder
        self.dimensions: dict[str, list[Choice] | Range] = {}
        if len(bases) > 1:
            self.dimensions[RECIPE] = list(bases)
        self.dimensions |= spec.search
        self._null_for_zero: set[str] = set()
        self._check_values()

    @property
    def key(self) -> str:
        """Names what is swept, and how it is chosen; not how long, or what counts as good."""
        data = self.spec.model_dump(
            mode="json", exclude={"trials", "limits", "trial_minutes", "recipe"}
        )
        data["bases"] = [base.model_dump(mode="json") for base in self.bases.values()]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def objectives(self) -> list[Objective]:
        """Those asked for, or what can be compared: milliseconds where models differ."""
        if self.spec.objectives:
            return list(self.spec.objectives)
        several = "model.name" in self.dimensions or len(
            {base.model.name for base in self.bases.values()}
        ) > 1  # fmt: skip
        rated = all(base.evaluation.data is not None for base in self.bases.values())
        chosen: list[Objective] = ["latency_ms" if several else "ratio", "bytes"]
        return ["top1", *chosen] if rated or "evaluation.data" in self.dimensions else chosen

    @property
    def grid(self) -> list[dict[str, Any]]:
        """Every combination; ranges by their steps."""
        values = [c.points() if isinstance(c, Range) else c for c in self.dimensions.values()]
        names = list(self.dimensions)
        return [dict(zip(names, v, strict=True)) for v in itertools.product(*values)]

    @property
    def grid_size(self) -> int:
        """How many combinations there are, without making them."""
        size = 1
        for choices in self.dimensions.values():
            size *= len(choices.points() if isinstance(choices, Range) else choices)
        return size

    def recipe(self, chosen: dict[str, Any]) -> Recipe:
        """The recipe of one choice.

        Raises:
            UsageError: the values don't go together.
        """
        values = dict(chosen)
        base = self.bases[values.pop(RECIPE, next(iter(self.bases)))]
        data = base.model_dump(mode="json", exclude_unset=True)
        for key, value in values.items():
            data = merged(data, self._nested(key, value))
        return build_recipe(data, "this trial")

    def _nested(self, key: str, value: Any) -> dict[str, Any]:
        *sections, last = key.split(".")
        if value == 0 and key in self._null_for_zero:
            value = None
        section = model_at(tuple(sections))
        assert section is not None  # checked before
        if get_origin(section.model_fields[last].annotation) is list and not isinstance(
            value, list
        ):
            value = [value]
        names_a_path = last == "data" or (key == "model.weights" and "/" in str(value))
        if names_a_path and isinstance(value, str):
            value = str(self._folder.absolute() / Path(value).expanduser())
        nested: dict[str, Any] = {last: value}
        for part in reversed(sections):
            nested = {part: nested}
        return nested

    def _check_values(self) -> None:
        """Every key is one, and every value alone fits one of the recipes it may meet."""
        known = set(key_names())
        for key, choices in self.spec.search.items():
            if key not in known:
                apply_overrides({}, [f"{key}=0"])  # says which key is meant
                raise UsageError(f"search.{key}: names a section; name one of its keys")
            points: Iterable[Any] = choices.points() if isinstance(choices, Range) else choices
            if isinstance(choices, Range) and choices.low == 0 and self._refused(key, 0):
                # prune.ratio takes more than 0, or null where nothing is pruned
                self._null_for_zero.add(key)
            for value in points:
                if error := self._refused(key, value):
                    raise UsageError(f"search.{key}: {error}")

    def _refused(self, key: str, value: Any) -> str | None:
        """Why no base takes the value; None where one does."""
        errors = []
        for name in self.bases:
            try:
                self.recipe({RECIPE: name, key: value})
            except UsageError as error:
                errors.append(str(error).removeprefix("this trial: "))
        return errors[0] if len(errors) == len(self.bases) else None


def load_sweep(path: Path) -> Sweep:
    """Read a sweep's file and check all that can be checked before anything runs.

    Raises:
        UsageError: a key or value is wrong, here or in a recipe it names; the grid is too large.
    """
    spec = load_validated(path, SweepSpec)
    folder = path.parent
    if isinstance(spec.recipe, dict):
        # relative paths start at the file's folder, as in a recipe file
        bases = {path.name: _inline(spec.recipe, path)}
    else:
        names = [spec.recipe] if isinstance(spec.recipe, str) else spec.recipe
        bases = {name: load_recipe(folder / Path(name).expanduser()) for name in names}
    sweep = Sweep(spec, bases, folder)
    if spec.sampler == "grid" and sweep.grid_size > _MOST_POINTS:
        raise UsageError(
            f"{path}: the grid has {sweep.grid_size} points, wanted at most {_MOST_POINTS}; "
            "take larger steps or another sampler"
        )
    if "top1" in sweep.objectives and "evaluation.data" not in sweep.dimensions:
        lacking = [n for n, base in sweep.bases.items() if base.evaluation.data is None]
        if lacking:
            raise UsageError(
                f"{path}: objectives: top1 needs labelled images: give evaluation.data in "
                f"{lacking[0]}"
            )
    return sweep


def _inline(data: dict[str, Any], path: Path) -> Recipe:
    result = dict(data)
    for section, key in (
        ("model", "weights"), ("calibration", "data"), ("evaluation", "data"), ("recover", "data")
    ):  # fmt: skip
        values = result.get(section)
        value = values.get(key) if isinstance(values, dict) else None
        if isinstance(value, str) and value not in ("auto", "hub", "random"):
            absolute = str(path.parent.absolute() / Path(value).expanduser())
            result[section] = {**result[section], key: absolute}
    return build_recipe(result, f"{path}: recipe")
