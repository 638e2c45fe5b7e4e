"""Which backbones there are.

Three sources, in the order in which a name is looked up (``resolve.py``): timm's own ids, the
alias table (``aliases.json``: the names papers use), and families registered here with
:func:`register_backbone` (by a file in ``families/``, or by a third party through the entry
point group ``deploykit.backbones``).
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import os
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from deploykit._compat import timm

__all__ = [
    "ENTRY_POINT_GROUP",
    "BackboneSpec",
    "Variant",
    "aliases",
    "arch_of",
    "families",
    "list_backbones",
    "normalise",
    "own_builder",
    "own_spellings",
    "plugin_failures",
    "register_backbone",
    "specs",
    "squash",
]

ENTRY_POINT_GROUP = "deploykit.backbones"
NO_PLUGINS = "DEPLOYKIT_NO_PLUGINS"

_SIZES = {"t": "tiny", "s": "small", "m": "medium", "b": "base", "l": "large", "xl": "xlarge"}
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class BackboneSpec(BaseModel):
    """One line of ``deploykit list``: a name, and the facts known without building it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    source: Literal["timm", "own"] = "timm"
    family: str = ""
    paper_name: str = ""
    timm_id: str | None = Field(default=None, description="id with its weights' tag")
    params_m: float | None = Field(default=None, description="millions, with 1000 classes")
    input: int | None = Field(default=None, description="default square input, pixels")
    licence: str | None = Field(default=None, description="licence of the published weights")
    doc: int | None = Field(default=None, description="number of the paper in the reading list")
    headline: bool = Field(default=False, description="what the bare family name stands for")


class Variant(BaseModel):
    """One size of an own family, with how its images are prepared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    paper_name: str = ""
    also: tuple[str, ...] = Field(default=(), description="other spellings of the name")
    params_m: float | None = None
    input: int = 224
    crop_pct: float = 0.875
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    mean: tuple[float, float, float] = _IMAGENET_MEAN
    std: tuple[float, float, float] = _IMAGENET_STD
    headline: bool = False


class Builder(Protocol):
    """Builds one variant of an own family."""

    def __call__(self, variant: str, *, num_classes: int, img_size: int) -> nn.Module: ...


@dataclass(frozen=True)
class _Own:
    spec: BackboneSpec
    variant: Variant
    build: Builder


_OWN: dict[str, _Own] = {}


def register_backbone(
    family: str,
    variants: Mapping[str, Variant],
    *,
    licence: str | None = None,
    doc: int | None = None,
) -> Callable[[Builder], Builder]:
    """Register a family; decorates its builder ``build(variant, *, num_classes, img_size)``.

    ``variants`` maps names in normal form (``casvit_s``: small letters, digits, ``_``, ``.``) to
    their facts. The builder returns an ``nn.Module`` taking float32 (N, 3, S, S).

    Raises:
        ValueError: a name isn't in normal form, or is taken by another builder.
    """

    def decorate(build: Builder) -> Builder:
        for name, variant in variants.items():
            if normalise(name) != name:
                message = f"backbone name {name!r} must be written {normalise(name)!r}"
                raise ValueError(message)
            if name in _OWN:
                message = f"backbone {name!r} is registered twice"
                raise ValueError(message)
            spec = BackboneSpec(
                name=name,
                source="own",
                family=family,
                paper_name=variant.paper_name or name,
                params_m=variant.params_m,
                input=variant.input,
                licence=licence,
                doc=doc,
                headline=variant.headline,
            )
            _OWN[name] = _Own(spec, variant, build)
        return build

    return decorate


def own_builder(name: str) -> tuple[Variant, Builder]:
    """Variant and builder of an own backbone whose name :func:`resolve` returned."""
    own = _OWN[name]
    return own.variant, own.build


def own_spellings() -> dict[str, str]:
    """Further spellings of own backbones, and the names they stand for.

    Papers and their code disagree on ``_t`` and ``_tiny``: both serve, unless one is taken.
    """
    plugin_failures()
    found = {text: name for name, own in _OWN.items() for text in own.variant.also}
    for name in _OWN:
        for letter, word in _SIZES.items():
            for this, other in ((letter, word), (word, letter)):
                text = re.sub(rf"_{this}(?=_|$)", f"_{other}", name)
                if text not in _OWN:
                    found.setdefault(text, name)
    return found


def normalise(name: str) -> str:
    """Lower case; ``-``, blank and ``/`` become ``_``; else only letters, digits, ``_``, ``.``."""
    text = re.sub(r"[-\s/]+", "_", name.strip().lower())
    return re.sub(r"[^a-z0-9_.]", "", text)


def squash(name: str) -> str:
    """Normal form without separators: all spellings of one name agree."""
    return re.sub(r"[_.]", "", normalise(name))


def arch_of(timm_id: str) -> str:
    """The architecture in a timm id: what comes before the weights' tag."""
    return timm_id.split(".", 1)[0]


@cache
def aliases() -> dict[str, BackboneSpec]:
    """The alias table: paper names and the timm ids they stand for."""
    text = resources.files("deploykit.backbones").joinpath("aliases.json").read_text("utf-8")
    return {name: BackboneSpec(name=name, **row) for name, row in json.loads(text).items()}


@cache
def plugin_failures() -> tuple[str, ...]:
    """Import own families and plug-ins, once; a line for each plug-in that failed.

    Plug-ins are code of other packages and are trusted as such; ``DEPLOYKIT_NO_PLUGINS=1``
    leaves them out.
    """
    package = importlib.import_module("deploykit.backbones.families")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    failures = []
    if not os.environ.get(NO_PLUGINS):
        for point in metadata.entry_points(group=ENTRY_POINT_GROUP):
            try:
                point.load()
            except Exception as error:  # a broken plug-in must not take the product down
                failures.append(f"plug-in {point.name} ({point.value}) failed: {error}")
    return tuple(failures)


def specs() -> dict[str, BackboneSpec]:
    """All named backbones: the alias table, then own families and plug-ins."""
    plugin_failures()
    return {**aliases(), **{name: own.spec for name, own in _OWN.items()}}


def families() -> dict[str, list[BackboneSpec]]:
    """Known families and their variants, in the order of the table."""
    result: dict[str, list[BackboneSpec]] = {}
    for spec in specs().values():
        result.setdefault(spec.family, []).append(spec)
    return result


def list_backbones(pattern: str | None = None, *, all_timm: bool = False) -> list[BackboneSpec]:
    """Backbones whose name, family or paper name matches ``pattern``.

    ``pattern`` is a glob (``swin*``) or a part of a name (``vit-s``), in any spelling. With
    ``all_timm`` every timm model is looked through, not only the named ones.
    """
    found = list(specs().values())
    if all_timm:
        known = {arch_of(spec.timm_id) for spec in found if spec.timm_id}
        names = (name for name in timm.list_models() if name not in known)
        found += [BackboneSpec(name=name, timm_id=name) for name in names]
    if pattern is None or not pattern.strip():
        return found
    glob = any(mark in pattern for mark in "*?[")
    wanted = re.sub(r"[-_.\s/]", "", pattern.lower()) if glob else squash(pattern)

    def matches(spec: BackboneSpec) -> bool:
        texts = [squash(t) for t in (spec.name, spec.family, spec.paper_name, spec.timm_id or "")]
        if glob:
            return any(fnmatch.fnmatchcase(text, wanted) for text in texts)
        return any(wanted in text for text in texts)

    return [spec for spec in found if matches(spec)]
