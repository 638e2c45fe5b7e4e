"""What ``--json`` prints."""

from __future__ import annotations

import json
import sys

__all__ = ["print_json"]


def print_json(text: str) -> None:
    """JSON text as one line on standard output."""
    sys.stdout.write(json.dumps(json.loads(text), ensure_ascii=False) + "\n")
