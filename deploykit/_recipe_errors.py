"""What is wrong with a recipe, in words a person can act on.

Turns pydantic's errors into "key: what was wanted, what came, nearest valid name".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from deploykit._recipe_yaml import Loc
from deploykit.recipe import RECIPE_VERSION, Recipe

__all__ = ["Problem", "dotted", "explain", "key_names", "model_at", "suggest_key"]


class Problem(NamedTuple):
    """One thing wrong, and where in the data."""

    loc: Loc
    message: str


_WANTED = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "dict_type": "a mapping",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_attributes_type": "a mapping",
    "model_type": "a mapping",
    "path_type": "a path",
    "string_type": "text (put quotes around it)",
    "tuple_type": "a list",
}
_LIMITS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def explain(exc: ValidationError) -> list[Problem]:
    """All problems of a failed validation, in the order of the recipe's keys."""
    return [_explain_one(error) for error in exc.errors(include_url=False)]


def dotted(loc: Loc) -> str:
    """``('model', 'preprocessing', 'mean', 2)`` as ``model.preprocessing.mean[2]``."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def model_at(loc: Loc) -> type[BaseModel] | None:
    """The section that ``loc`` names, or None where it names a value or nothing."""
    section: type[BaseModel] | None = Recipe
    for part in loc:
        field = section.model_fields.get(str(part)) if section is not None else None
        section = _as_model(field.annotation) if field is not None else None
    return section


def key_names(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every settable key, dotted: ``model.name``, ``quantize.bits`` …"""
    for name, field in section.model_fields.items():
        inner = _as_model(field.annotation)
        if inner is None:
            yield prefix + name
        else:
            yield from key_names(inner, f"{prefix}{name}.")


def suggest_key(loc: Loc) -> str:
    """How to mend an unknown key: the nearest name here, else elsewhere, else all names here."""
    key = str(loc[-1]).replace("-", "_")
    section = model_at(loc[:-1])
    here = list(section.model_fields) if section is not None else []
    if near := difflib.get_close_matches(key, here, n=1):
        return f"did you mean {dotted((*loc[:-1], near[0]))}?"
    leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(list(key_names()))}
    if near := difflib.get_close_matches(key, leaves, n=1, cutoff=0.75):
        return f"did you mean {leaves[near[0]]}?"
    return f"known here: {', '.join(here)}" if here else "remove it"


def _explain_one(error: ErrorDetails) -> Problem:
    loc: Loc = error["loc"]
    kind, context, got = error["type"], error.get("ctx", {}), _show(error["input"])
    if kind == "extra_forbidden":
        return Problem(loc, f"unknown key; {suggest_key(loc)}")
    if kind == "missing":
        return Problem(loc, "missing, and it has no default; add it")
    if kind == "value_error":
        message = str(context["error"])
        blamed = _blamed(loc, message)
        return Problem(blamed, message.removeprefix(f"{dotted(blamed)} "))
    if loc == ("version",):
        return Problem(
            loc,
            f"this deploykit reads recipe version {RECIPE_VERSION}, got {got}; update deploykit",
        )
    if kind == "literal_error":
        return Problem(loc, _choice(context, error["input"], got))
    if kind in _LIMITS:
        words, name = _LIMITS[kind]
        return Problem(loc, f"wanted {words} {context[name]:g}, got {got}")
    if kind in ("too_short", "too_long", "string_too_short", "string_too_long"):
        words = "at least" if kind.endswith("short") else "at most"
        count = context.get("min_length", context.get("max_length"))
        unit = "characters" if kind.startswith("string") else "items"
        return Problem(loc, f"wanted {words} {count} {unit}, got {got}")
    wanted = _WANTED.get(kind)
    message = f"wanted {wanted}, got {got}" if wanted else f"{error['msg']}, got {got}"
    return Problem(loc, message)


def _choice(context: dict[str, Any], value: object, got: str) -> str:
    names = re.findall(r"'([^']*)'", str(context.get("expected", "")))
    message = f"wanted one of {', '.join(names)}, got {got}"
    near = difflib.get_close_matches(str(value), names, n=1)
    return f"{message}; did you mean {near[0]}?" if near else message


def _blamed(loc: Loc, message: str) -> Loc:
    """The key a model validator complains about: the first one its message names."""
    known = set(key_names())
    for word in re.findall(r"[a-z_0-9]+(?:\.[a-z_0-9]+)?", message):
        for name in (word, f"{dotted(loc)}.{word}"):
            if name in known and not dotted(loc).startswith(name):
                return tuple(name.split("."))
    return loc


def _show(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "…"


def _as_model(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
