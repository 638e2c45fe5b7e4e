"""Recipes in and out: YAML files, ``--set key=value``, command-line options.

Every problem comes out as one UsageError that says where, what was wanted, what came, and the
nearest valid name.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, get_origin

from pydantic import ValidationError

from deploykit._recipe_errors import Problem, dotted, explain, key_names, model_at, suggest_key
from deploykit._recipe_yaml import Loc, dump_yaml, parse_document, parse_value, read_text
from deploykit.errors import UsageError
from deploykit.recipe import Recipe

__all__ = ["apply_overrides", "build_recipe", "dump_recipe", "load_recipe", "merged"]

_COMMAND_LINE = "command line"
_WEIGHT_WORDS = ("auto", "hub", "random")
_PATH_KEYS: tuple[tuple[str, str], ...] = (
    ("model", "weights"),
    ("calibration", "data"),
    ("evaluation", "data"),
    ("recover", "data"),
)


def load_recipe(
    path: Path | str,
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read a recipe file, lay options and then ``--set`` overrides over it, and validate.

    Args:
        path: The YAML file. Relative data and weights paths in it start at its folder.
        overrides: ``key=value`` texts of ``--set``; relative paths start at the working folder.
        options: Command-line options as nested data, ``{"quantize": {"bits": "w4a8"}}``.

    Raises:
        UsageError: All problems in one message, ``file:line: key: …`` joined by ``; ``.
    """
    path = Path(path)
    document = parse_document(read_text(path), str(path))

    def here(loc: Loc) -> str:
        return f"{path}:{document.line(loc)}"

    data = _with_paths(document.data, path.parent, here)
    # Paths given on the command line are made absolute first: they start elsewhere.
    given = _with_paths(dict(options or {}), Path.cwd(), lambda _: _COMMAND_LINE)
    given = apply_overrides(given, overrides)
    from_command_line = set(_leaves(given))
    data = merged(data, given)

    def where(loc: Loc) -> str:
        prefixes = {loc[:n] for n in range(1, len(loc) + 1)}
        return _COMMAND_LINE if prefixes & from_command_line else here(loc)

    return _validated(data, where)


def build_recipe(data: Mapping[str, Any], source: str = _COMMAND_LINE) -> Recipe:
    """Validate nested data, such as the options of a command line.

    Relative data and weights paths start at the working folder.

    Raises:
        UsageError: All problems in one message, ``source: key: …`` joined by ``; ``.
    """
    return _validated(_with_paths(data, Path.cwd(), lambda _: source), lambda _: source)


def apply_overrides(base: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Lay ``key=value`` texts over nested data and give the result; ``base`` is not changed.

    Values are YAML scalars or lists: ``quantize.bits=w4a8``, ``targets=[a, b]``. A key whose
    value is text takes the text as it is. Relative paths start at the working folder.

    Raises:
        UsageError: No ``=``, an unknown key (the nearest is named), or a value that is no
            scalar and no list.
    """
    data = copy.deepcopy(dict(base))
    for override in overrides:
        key, equals, text = override.partition("=")
        source = f"--set {override}"
        if not equals or not key.strip():
            raise UsageError(f"{source}: wanted key=value, such as quantize.bits=w4a8")
        loc = tuple(key.strip().split("."))
        value = _override_value(loc, text, source)
        section = data
        for part in loc[:-1]:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[loc[-1]] = value
    return _with_paths(data, Path.cwd(), lambda _: _COMMAND_LINE)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every key spelled out, the same text for the same recipe.

    Data and weights paths are written absolute, because the file may be read from elsewhere.
    What comes from ``load_recipe`` or ``build_recipe`` loads back to an equal recipe.
    """
    data = recipe.model_dump(mode="json")
    return dump_yaml(_with_paths(data, Path.cwd(), lambda _: "recipe"))


def _override_value(loc: tuple[str, ...], text: str, source: str) -> Any:
    parent = model_at(loc[:-1])
    if parent is None or loc[-1] not in parent.model_fields:
        wrong = next(n for n in range(1, len(loc) + 1) if not _known(loc[:n]))
        near = difflib.get_close_matches(dotted(loc), list(key_names()), n=1, cutoff=0.75)
        hint = f"did you mean {near[0]}?" if near else suggest_key(loc[:wrong])
        raise UsageError(f"{source}: unknown key {dotted(loc)}; {hint}")
    if (section := model_at(loc)) is not None and text.strip() not in ("null", ""):
        keys = ", ".join(section.model_fields)
        raise UsageError(f"{source}: {dotted(loc)} is a section; set one of its keys: {keys}")
    annotation = parent.model_fields[loc[-1]].annotation
    if annotation is str:
        return text
    value = parse_value(text, source)
    is_list = get_origin(annotation) is list
    return [value] if is_list and not isinstance(value, list) else value


def _known(loc: tuple[str, ...]) -> bool:
    parent = model_at(loc[:-1])
    return parent is not None and loc[-1] in parent.model_fields


def _validated(data: Mapping[str, Any], where: Callable[[Loc], str]) -> Recipe:
    # A section left empty (all its lines commented out) means its defaults.
    data = {k: {} if v is None and model_at((k,)) is not None else v for k, v in data.items()}
    problems = list(_unfit(data, ()))
    if not problems:
        try:
            # Strict JSON rules: "5" is no number and true is no 1, but a list is a tuple
            # and a text is a path.
            return Recipe.model_validate_json(json.dumps(data, default=str), strict=True)
        except ValidationError as exc:
            problems = explain(exc)
    lines = [
        f"{where(p.loc)}: {dotted(p.loc)}: {p.message}" if p.loc else f"{where(())}: {p.message}"
        for p in problems
    ]
    raise UsageError("; ".join(lines))


def _unfit(value: Any, loc: Loc) -> Iterator[Problem]:
    """What no key of a recipe takes, and JSON cannot carry."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                yield Problem((*loc, str(key)), f"wanted a name as key, got {key!r}")
            else:
                yield from _unfit(inner, (*loc, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _unfit(inner, (*loc, index))
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(loc, f"wanted a finite number, got {value}")
    elif isinstance(value, str | PurePath):
        text = str(value)
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text):
            yield Problem(loc, f"wanted plain text, got {text!r}; remove the odd characters")
        elif not text and loc in _PATH_KEYS:  # Path("") would be the working folder
            yield Problem(loc, "wanted a path, got an empty text")


def _with_paths(
    data: Mapping[str, Any], folder: Path, where: Callable[[Loc], str]
) -> dict[str, Any]:
    """The same data with its data and weights paths made absolute, starting at ``folder``."""
    result = dict(data)
    for section, key in _PATH_KEYS:
        values = result.get(section)
        value = values.get(key) if isinstance(values, Mapping) else None
        if not isinstance(value, str | PurePath) or not str(value):
            continue
        if section == "model" and str(value) in _WEIGHT_WORDS:
            continue
        try:
            absolute = folder.absolute() / Path(value).expanduser()
        except RuntimeError as exc:  # ~nobody
            loc = (section, key)
            raise UsageError(
                f"{where(loc)}: {dotted(loc)}: no home folder for {str(value)!r}; "
                "write the whole path"
            ) from exc
        result[section] = {**result[section], key: str(absolute)}
    return result


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested data with other nested data laid over it, key by key."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old or {}, value) if _both_maps(old, value) else value
    return result


def _both_maps(old: object, new: object) -> bool:
    return isinstance(new, Mapping) and (old is None or isinstance(old, Mapping))


def _leaves(data: Mapping[str, Any], loc: Loc = ()) -> Iterator[Loc]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*loc, key))
        else:
            yield (*loc, key)
