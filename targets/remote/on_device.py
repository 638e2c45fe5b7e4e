"""What every target on another device has: the files of a target of ours, timed over there."""

from __future__ import annotations

from abc import ABC, abstractmethod

from deploykit.errors import DeploykitError
from deploykit.targets.registry import Target
from deploykit.targets.remote.address import Address

__all__ = ["OnDevice"]


class OnDevice(ABC):
    """``inner``'s files on the device at ``address``."""

    def __init__(self, name: str, address: Address, inner: Target) -> None:
        self.name = name
        self.formats = inner.formats
        self.exporter = inner.exporter
        self.floats = inner.floats
        self._address = address

    @property
    def place(self) -> OnDevice:
        """Files are timed on the device."""
        return self

    def available(self) -> str | None:
        """None, or why the device can't be reached or what is missing there."""
        try:
            self._reach()
        except DeploykitError as error:
            return str(error)
        return None

    @abstractmethod
    def _reach(self) -> None:
        """Ask the device whether the target can be used there.

        Raises:
            DeploykitError: it can't.
        """
