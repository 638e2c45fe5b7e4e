"""Errors from a device, in the words of whoever sits here."""

from __future__ import annotations

from collections.abc import Mapping

from deploykit.errors import DeploykitError, MeasurementError
from deploykit.targets.remote.session import Session

__all__ = ["plain"]


def plain(error: DeploykitError, session: Session, names: Mapping[str, str]) -> DeploykitError:
    """The error as the user should see it: a lost connection called one, paths of this machine."""
    if session.lost():
        return session.loss()
    text = str(error)
    for there, path in names.items():
        text = text.replace(there, path)
    kind = type(error) if type(error) is not DeploykitError else MeasurementError
    where = session.address.device
    return kind(text if text.startswith(where) else f"{where}: {text}")
