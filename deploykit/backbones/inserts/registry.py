"""Which layers can be inserted, and inserting them.

An insert changes a freshly built network before it is captured. Its layers are new: on a host with
trained weights they make an untrained network, unless a checkpoint brings their weights too.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import nn

from deploykit.errors import UsageError

__all__ = ["Insert", "insert_layers", "inserts", "register_insert"]

Change = Callable[[nn.Module], int]
"""Changes a module in place; the number of places where it did."""


@dataclass(frozen=True)
class Insert:
    """A named change, and what a host must have for it."""

    name: str
    host: str
    change: Change


_INSERTS: dict[str, Insert] = {}


def register_insert(name: str, *, host: str) -> Callable[[Change], Change]:
    """Add an insert under a name; ``host`` says what a network must have, for the refusal.

    Raises:
        ValueError: the name is taken.
    """

    def add(change: Change) -> Change:
        if name in _INSERTS:
            message = f"insert {name!r} is registered twice"
            raise ValueError(message)
        _INSERTS[name] = Insert(name, host, change)
        return change

    return add


@cache
def _import_all() -> None:
    package = importlib.import_module("deploykit.backbones.inserts")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def inserts() -> dict[str, Insert]:
    """All inserts by name."""
    _import_all()
    return dict(sorted(_INSERTS.items()))


def insert_layers(module: nn.Module, name: str, host: str) -> int:
    """Insert in place; the number of places. ``host`` is the network's name, for messages.

    Raises:
        UsageError: no insert of that name, or the network has no place for it.
    """
    known = inserts()
    if name not in known:
        raise UsageError(f"model.insert {name!r}: unknown; choose one of {', '.join(known)}")
    places = known[name].change(module)
    if not places:
        message = f"model.insert {name}: {host} has no place for it; it wants {known[name].host}"
        raise UsageError(message)
    return places
