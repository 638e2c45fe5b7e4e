"""Reading checkpoint files nobody vouches for, and loading them strictly.

A pickle can run code when it is opened. Torch files are therefore opened with
``weights_only=True`` and nothing else: a file this refuses stays refused.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.errors import UsageError, one_line

__all__ = ["infer_num_classes", "load_strictly", "read_checkpoint", "sha256_of"]

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_MAX_NESTING = 3
_COUNTER = "num_batches_tracked"  # absent from old checkpoints, and unused in evaluation


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a ``.safetensors`` or torch file, on the CPU, floats as float32.

    ``state_dict``, ``model`` and ``model_ema`` wrappers are opened (an average of weights wins,
    as in timm), ``module.`` and ``_orig_mod.`` prefixes removed.

    Raises:
        UsageError: the file is missing, truncated, no checkpoint, needs code to be run, or holds
            a value that is not finite.
    """
    if path.is_dir():
        raise UsageError(f"weights {path}: a folder, but a checkpoint file is wanted")
    if not path.is_file():
        raise UsageError(f"weights {path}: no such file (auto, hub, random or a checkpoint file)")
    if path.stat().st_size == 0:
        raise UsageError(f"weights {path}: the file is empty")
    content: object
    if path.suffix.lower() == ".safetensors":
        try:
            content = safetensors.torch.load_file(path, device="cpu")
        except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as error:
            message = (
                f"weights {path}: not a readable safetensors file, or cut short "
                f"({one_line(error, 160)}); download or save it again"
            )
            raise UsageError(message) from error
    else:
        content = _read_torch(path)
    return _tensors(_unwrap(content), path)


def _read_torch(path: Path) -> object:
    try:
        # timm's training checkpoints carry their arguments as a Namespace, which is plain data
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on odd files, which we judge ourselves
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        message = (
            f"weights {path}: not opened, because it isn't plain tensors (opening it could run "
            f"code, or it is no checkpoint); save the state dict as .safetensors and give that"
        )
        raise UsageError(message) from error
    except Exception as error:  # a damaged file can fail anywhere inside the unpickler
        message = (
            f"weights {path}: not a readable torch checkpoint, or cut short "
            f"({one_line(error, 160)}); download or save it again"
        )
        raise UsageError(message) from error


def _unwrap(content: object) -> object:
    for _ in range(_MAX_NESTING):
        if not isinstance(content, Mapping):
            break
        inner = next((content[k] for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    return content


def _tensors(content: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        message = f"weights {path}: no state dict inside, but {type(content).__name__}"
        raise UsageError(message)
    odd = [str(k) for k, v in content.items() if not (isinstance(k, str) and _is_dense(v))]
    if odd:
        message = (
            f"weights {path}: {len(odd)} of {len(content)} entries aren't dense tensors "
            f"({_few(odd)}); save model.state_dict() alone"
        )
        raise UsageError(message)
    cleaned: dict[str, Tensor] = timm.models.clean_state_dict(dict(content))
    state = {k: v.float() if v.is_floating_point() else v for k, v in cleaned.items()}
    bad = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        message = f"weights {path}: {len(bad)} tensors hold NaN or infinity ({_few(bad)})"
        raise UsageError(message)
    return state


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def infer_num_classes(
    state: Mapping[str, Tensor], classifier: str | Iterable[str] | None
) -> int | None:
    """Number of classes by the classifier's weight, None where the checkpoint has none.

    ``classifier`` is the classifier's module name, or several (models with two heads).
    """
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    for name in names:
        weight = state.get(f"{name}.weight")
        if weight is not None and weight.ndim >= 2:
            return int(weight.shape[0])
    return None


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> list[str]:
    """Copy ``state`` into ``module``: every tensor, or none.

    Where names or shapes differ, the family's own converter is tried before giving up: as in timm,
    ``checkpoint_filter_fn(state, module)`` beside the network's class (original checkpoints,
    position embeddings of another size). Returns notes for the user.

    Raises:
        UsageError: names or shapes differ; says how many and which first.
    """
    wanted = {k: v for k, v in module.state_dict().items() if not k.endswith(_COUNTER)}
    notes: list[str] = []
    given = dict(state)
    fault = _differences(wanted, given)
    if fault:
        converted = _convert(module, state)
        if converted is None or _differences(wanted, converted):
            raise UsageError(f"weights {source} don't fit the model: {fault}")
        given = converted
        notes.append(f"weights {source} were converted to the model's names and shapes")
    module.load_state_dict(given, strict=False)  # names and shapes are checked above
    return notes


def _convert(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    convert = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None
    try:
        result: dict[str, Tensor] = convert(dict(state), module)
    except Exception:  # it expects its own family's layouts; anything else is just no match
        return None
    return result


def _differences(wanted: Mapping[str, Tensor], given: Mapping[str, Any]) -> str:
    """One line on what differs, empty where nothing does."""
    missing = [k for k in wanted if k not in given]
    unexpected = [k for k in given if k not in wanted and not k.endswith(_COUNTER)]
    shapes = [
        f"{k}: file {_shape(given[k])}, model {_shape(v)}"
        for k, v in wanted.items()
        if k in given and given[k].shape != v.shape
    ]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({_few(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_few(unexpected)})")
    if shapes:
        parts.append(f"{len(shapes)} of another shape ({_few(shapes)})")
    if not parts:
        return ""
    if len(missing) + len(unexpected) > len(wanted) // 2:
        mend = "is it another model's checkpoint?"
    else:
        mend = "check the model name, num_classes and img_size"
    return f"{', '.join(parts)} of {len(wanted)} tensors; {mend}"


def _few(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _shape(tensor: Tensor) -> str:
    return "×".join(str(n) for n in tensor.shape) or "scalar"
