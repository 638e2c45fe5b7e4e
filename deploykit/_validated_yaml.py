"""YAML files of other kinds than recipes, checked the same way: one line for everything wrong."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from deploykit._recipe_errors import dotted, explain
from deploykit._recipe_yaml import Loc, parse_document, read_text
from deploykit.errors import UsageError

__all__ = ["load_validated"]

_Model = TypeVar("_Model", bound=BaseModel)


def load_validated(path: Path, model: type[_Model]) -> _Model:
    """Read a YAML file as ``model``; unknown keys are named with the nearest known one.

    Raises:
        UsageError: all problems in one message, ``file:line: key: …`` joined by ``; ``.
    """
    document = parse_document(read_text(path), str(path))
    try:
        return model.model_validate_json(json.dumps(document.data, default=str), strict=True)
    except ValidationError as exc:
        errors = exc.errors(include_url=False)
        problems = [
            _unknown(problem.loc, error, model) or problem
            for problem, error in zip(explain(exc), errors, strict=True)
        ]
    raise UsageError(
        "; ".join(
            f"{path}:{document.line(loc)}: {dotted(loc)}: {message}"
            if loc
            else f"{path}: {message}"
            for loc, message in problems
        )
    )


def _unknown(loc: Loc, error: ErrorDetails, model: type[BaseModel]) -> tuple[Loc, str] | None:
    if error["type"] != "extra_forbidden":
        return None
    section: type[BaseModel] | None = model
    for part in loc[:-1]:
        field = section.model_fields.get(str(part)) if section is not None else None
        section = _inner(field.annotation) if field is not None else section
    known = list(section.model_fields) if section is not None else []
    near = difflib.get_close_matches(str(loc[-1]).replace("-", "_"), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
    return loc, f"unknown key; {hint}"


def _inner(annotation: object) -> type[BaseModel] | None:
    """The section in an annotation such as ``dict[str, Section]`` or ``Section | None``."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
