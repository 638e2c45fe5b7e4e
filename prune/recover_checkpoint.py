"""The state of a recovery on disk: one safetensors file, its numbers as JSON in the header.

One file, so that tensors and numbers can't be of two different moments. No pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor, nn

from deploykit.errors import UsageError
from deploykit.fsio import ensure_directory, publish, writing

__all__ = ["CHECKPOINT_NAME", "fingerprint", "load_checkpoint", "save_checkpoint"]

CHECKPOINT_NAME = "recover.safetensors"
_FORMAT = "deploykit recover 1"


def fingerprint(settings: Mapping[str, Any], *modules: nn.Module) -> str:
    """SHA-256 of settings and tensors: a checkpoint is only taken up by the run it came from."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for module in modules:
        for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(
    folder: Path, run: str, state: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a checkpoint beside the last one, then put it in its place in one step.

    Args:
        run: the run's fingerprint.
        state: plain data.
        tensors: on any device.
    """
    ensure_directory(folder)
    place = folder / CHECKPOINT_NAME
    aside = folder / f".{CHECKPOINT_NAME}.tmp"
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with writing(place):
        save_file(stored, aside, {"format": _FORMAT, "run": run, "state": json.dumps(state)})
        publish(aside, place)


def load_checkpoint(folder: Path, run: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The state and tensors of the last checkpoint; None where there isn't any.

    Raises:
        UsageError: it can't be read, or is of another run.
    """
    path = folder / CHECKPOINT_NAME
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise UsageError(f"{path}: not a recovery's checkpoint; remove it")
            if header.get("run") != run:
                message = "of a recovery with another model, other options or other images"
                raise UsageError(f"{path}: {message}; remove it or choose another folder")
            state: dict[str, Any] = json.loads(header["state"])
            return state, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path}: not readable as a checkpoint; remove it") from error
