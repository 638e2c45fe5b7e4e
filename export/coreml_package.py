"""An ``.mlpackage`` as a folder: what it holds, written the same way each time."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploykit.errors import DeploykitError, UsageError, one_line
from deploykit.targets.coreml import import_coremltools, quiet

__all__ = ["load_program", "load_spec", "write_package"]

_AUTHOR = "com.apple.CoreML"
_SPEC = f"{_AUTHOR}/model.mlmodel"
_WEIGHTS = f"{_AUTHOR}/weights"
_DATE = "com.github.apple.coremltools.conversion_date"


def write_package(model: Any, path: Path, description: str, metadata: Mapping[str, str]) -> None:
    """Write a converted model as a package folder at ``path``, which isn't there.

    coremltools' own writer puts random identifiers, the date and a file of stack traces into it;
    this one doesn't, so equal models give equal bytes.

    Args:
        model: a ``coremltools.models.MLModel`` that isn't loaded.
        metadata: joins the model's user-defined metadata.
    """
    spec = type(model.get_spec())()
    spec.CopyFrom(model.get_spec())
    about = spec.description.metadata
    about.shortDescription = description
    about.userDefined.pop(_DATE, None)
    for key, value in metadata.items():
        about.userDefined[key] = value
    data = path / "Data"
    (data / _AUTHOR).mkdir(parents=True)
    (data / _SPEC).write_bytes(spec.SerializeToString(deterministic=True))
    if model.weights_dir is not None and Path(model.weights_dir).is_dir():
        (data / _WEIGHTS).mkdir()
        for file in sorted(Path(model.weights_dir).iterdir()):
            shutil.copyfile(file, data / _WEIGHTS / file.name)
    root = _identifier(_SPEC)
    entries = {root: _entry("model.mlmodel", _SPEC, "CoreML Model Specification")}
    if (data / _WEIGHTS).is_dir():
        entries[_identifier(_WEIGHTS)] = _entry("weights", _WEIGHTS, "CoreML Model Weights")
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": root,
    }
    (path / "Manifest.json").write_text(json.dumps(manifest, indent=4), encoding="utf-8")


def _identifier(item: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"deploykit:{item}"))


def _entry(name: str, item: str, description: str) -> dict[str, str]:
    return {"author": _AUTHOR, "description": description, "name": name, "path": item}


def load_spec(path: Path) -> Any:
    """The package's ``Model_pb2.Model``.

    Raises:
        TargetMissingError: coremltools is not installed.
        UsageError: it isn't a package.
    """
    ct = import_coremltools()
    from google.protobuf.message import DecodeError

    try:
        manifest = json.loads((path / "Manifest.json").read_text(encoding="utf-8"))
        item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        spec = ct.proto.Model_pb2.Model()
        spec.ParseFromString((path / "Data" / item).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, DecodeError) as error:
        message = f"{path}: wanted a Core ML package: {one_line(error)}"
        raise UsageError(message) from error
    return spec


def load_program(path: Path) -> tuple[Any, Any]:
    """The package's spec and its MIL program, in coremltools' classes.

    Raises:
        TargetMissingError: coremltools is not installed.
        UsageError: it isn't a package.
        DeploykitError: it holds no ML program, or a damaged one.
    """
    spec = load_spec(path)
    if spec.WhichOneof("Type") != "mlProgram":
        message = f"{path}: wanted an ML program, it holds a {spec.WhichOneof('Type')}"
        raise DeploykitError(message)
    from coremltools.converters.mil.frontend.milproto import load as milproto

    weights = path / "Data" / _WEIGHTS
    try:
        with quiet():
            return spec, milproto.load(spec, spec.specificationVersion, str(weights))
    except Exception as error:  # it raises anything
        message = f"{path}: its program can't be read: {one_line(error)}"
        raise DeploykitError(message) from error
