"""Why tokens can't be merged somewhere."""

from __future__ import annotations

__all__ = ["BlockedError"]


class BlockedError(Exception):
    """A node can't stand behind a merge, or a block can't hold one; the message is the reason."""
