"""YAML as a recipe needs it: plain data with line numbers in, deterministic text out.

A recipe comes from somebody else's repository as often as from one's own, so what makes YAML
dangerous or surprising is refused here: tags, anchors and aliases (bombs), duplicate keys,
deep nesting, huge files.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from deploykit.errors import UsageError

__all__ = ["Document", "Loc", "dump_yaml", "parse_document", "parse_value", "read_text"]

Loc = tuple[int | str, ...]

MAX_BYTES = 1_000_000
_MAX_DEPTH = 20


@dataclass(frozen=True)
class Document:
    """A mapping read from YAML, and the line (from 1) where each key stands."""

    data: dict[str, Any]
    lines: dict[Loc, int]

    def line(self, loc: Loc) -> int:
        """Line of ``loc``, or of the nearest enclosing key that is in the file."""
        while loc and loc not in self.lines:
            loc = loc[:-1]
        return self.lines.get(loc, 1)


def read_text(path: Path) -> str:
    """The file's text, if it is UTF-8 and below 1 MB."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or str(exc)
        raise UsageError(f"cannot read recipe {path}: {reason}; check the path") from exc
    if len(raw) > MAX_BYTES:
        raise UsageError(f"{path}: wanted a recipe below 1 MB, got a larger file; is it YAML?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise UsageError(
            f"{path}: wanted UTF-8 text, got byte {raw[exc.start]:#04x} at offset {exc.start}; "
            "save the recipe as UTF-8"
        ) from exc


def parse_document(text: str, source: str) -> Document:
    """Parse one YAML mapping; ``source`` opens the error messages."""
    data = _load(text, source)
    if not isinstance(data, dict):
        got = "an empty file" if data is None else f"a {_kind(data)}"
        raise UsageError(f"{source}:1: wanted a mapping with at least model.name, got {got}")
    node = _yaml().compose(text)
    return Document(data, dict(_lines(node, ())))


def parse_value(text: str, source: str) -> Any:
    """Parse the value of ``--set key=value``: a scalar or a list of scalars."""
    value = _load(text, source, line_numbers=False)
    if isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
    ):
        raise UsageError(
            f"{source}: wanted a single value or a list, got {text!r}; "
            "set one key at a time, or write a recipe file"
        )
    return value


def _texts(data: object) -> Iterator[str]:
    """Every text in nested data."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _texts(key)
            yield from _texts(value)
    elif isinstance(data, (list, tuple)):
        for value in data:
            yield from _texts(value)


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Deterministic block-style YAML of plain data, keys in the order given."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment] # untyped default
    # Escaped: a next-line character, for one, is read back as a line break where it stands bare.
    yaml.allow_unicode = all(text.isprintable() for text in _texts(data))
    yaml.width = 10_000  # folding would make a diff of a long list unreadable
    yaml.dump(dict(data), stream)
    return stream.getvalue()


def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)


def _load(text: str, source: str, *, line_numbers: bool = True) -> Any:
    try:
        _refuse_tricks(text, source, line_numbers)
        return _yaml().load(text)
    except MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        where = f"{source}:{mark.line + 1}" if mark is not None and line_numbers else source
        problem = str(exc.problem or exc.context)
        if problem.startswith("but "):  # ruamel splits one sentence over two fields
            problem = f"{exc.context} {problem}"
        problem = " ".join(problem.split())
        raise UsageError(f"{where}: not valid YAML: {problem}; mend that line") from exc
    except YAMLError as exc:  # a control character
        problem = next(iter(str(exc).splitlines()), "unreadable")
        raise UsageError(f"{source}: not valid YAML: {problem}; remove it") from exc
    except ValueError as exc:  # a number of more digits than Python converts, an impossible date
        problem = str(exc).split(";")[0]
        raise UsageError(f"{source}: not valid YAML: {problem}; put quotes around texts") from exc


def _refuse_tricks(text: str, source: str, line_numbers: bool) -> None:
    """Walk the events, before anything is built, and refuse what no recipe needs."""
    depth = 0
    for event in _yaml().parse(text):
        where = f"{source}:{event.start_mark.line + 1}" if line_numbers else source
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
            raise UsageError(
                f"{where}: anchors and aliases (&name, *name) are refused in a recipe; "
                "write the value out, or put quotes around a text that starts with & or *"
            )
        tag = getattr(event, "tag", None)
        if tag is not None and str(tag) != "!":
            raise UsageError(f"{where}: YAML tags are refused in a recipe, got {tag}; remove it")
        if isinstance(event, CollectionStartEvent):
            depth += 1
            if depth > _MAX_DEPTH:
                raise UsageError(f"{where}: nested deeper than {_MAX_DEPTH} levels; flatten it")
        elif isinstance(event, CollectionEndEvent):
            depth -= 1


def _lines(node: Node | None, loc: Loc) -> Iterator[tuple[Loc, int]]:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            inner = (*loc, str(key.value))
            yield inner, key.start_mark.line + 1
            yield from _lines(value, inner)
    elif isinstance(node, SequenceNode):
        for index, value in enumerate(node.value):
            yield (*loc, index), value.start_mark.line + 1
            yield from _lines(value, (*loc, index))


def _kind(value: object) -> str:
    return {"list": "list", "str": "text", "int": "number", "float": "number"}.get(
        type(value).__name__, type(value).__name__
    )
