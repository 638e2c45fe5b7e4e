"""The recipe's ``model.insert``: new layers in a host, and what that means for its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from deploykit.backbones.inserts.registry import insert_layers
from deploykit.backbones.weights import load_strictly, make_testable, read_checkpoint, sha256_of
from deploykit.errors import UsageError, one_line
from deploykit.recipe import ModelSection
from deploykit.types import Backbone, WeightsOrigin

__all__ = ["host_section", "refuse_finished", "with_inserted"]


def refuse_finished(model: ModelSection, name: str) -> None:
    """Nothing, unless layers are to be inserted in a network that comes from a file.

    Raises:
        UsageError: they are.
    """
    if model.insert is not None:
        message = f"model.insert {model.insert}: {name} is a finished network"
        raise UsageError(f"{message}; give a backbone's name or module:factory")


def host_section(model: ModelSection) -> ModelSection:
    """What to build before layers are inserted: a checkpoint is for the network after that."""
    if model.insert is None or not _is_file(model.weights):
        return model
    return model.model_copy(update={"weights": "random"})


def with_inserted(backbone: Backbone, model: ModelSection, seed: int, notes: list[str]) -> Backbone:
    """The backbone with ``model.insert`` in it, changed in place; adds notes for the user.

    A checkpoint file has to hold the new layers' weights too. Without one they are random, so that
    a trained host becomes an untrained network, and says so; one without new weights stays trained.

    Raises:
        UsageError: an unknown insert, no place for it, a size it doesn't fit, weights that don't.
    """
    assert model.insert is not None
    name, size = model.insert, backbone.preprocessing.size
    module = backbone.module
    before = _shapes(module)
    places = insert_layers(module, name, backbone.name)
    module.eval()
    try:
        with torch.no_grad():
            module(torch.zeros(1, 3, size, size))
    except Exception as error:  # a host's refusals have no common type
        what = one_line(error, 200)
        raise UsageError(f"model.insert {name}: {backbone.name} fails with it ({what})") from error
    notes.append(f"{name} inserted in {places} {'place' if places == 1 else 'places'}")
    if _is_file(model.weights):
        path = Path(model.weights).expanduser()
        notes += load_strictly(module, read_checkpoint(path), model.weights)
        origin = WeightsOrigin(kind="file", source=model.weights, sha256=sha256_of(path))
    elif backbone.weights.trained and _shapes(module) == before:
        origin = backbone.weights
        notes.append(f"{name} has no weights of its own; the host's were trained without it")
    elif backbone.weights.trained:
        origin = WeightsOrigin(
            kind="untrained", source=f"{backbone.weights.source}, but with new layers ({name})"
        )
        notes.append(f"the layers of {name} are random: no accuracy can be had from the network")
    else:
        make_testable(module, seed, size)
        origin = backbone.weights
    return dataclasses.replace(backbone, module=module, weights=origin)


def _shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _is_file(weights: str) -> bool:
    return weights not in ("auto", "hub", "random")
