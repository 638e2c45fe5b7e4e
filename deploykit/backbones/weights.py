"""Where a backbone's weights come from: the hub, a file, or nowhere.

``auto`` tries timm's published weights, then ``DEPLOYKIT_WEIGHTS`` (a checkpoint, or a folder of
checkpoints named after models), and otherwise says in one line why the model is untrained.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from deploykit._compat import timm
from deploykit.backbones.checkpoint import (
    infer_num_classes,
    load_strictly,
    read_checkpoint,
    sha256_of,
)
from deploykit.backbones.registry import arch_of
from deploykit.backbones.untrained import make_testable
from deploykit.errors import UsageError

__all__ = [
    "WEIGHTS_VARIABLE",
    "HubError",
    "Source",
    "fetch_from_hub",
    "find_weights",
    "infer_num_classes",
    "load_strictly",
    "make_testable",
    "read_checkpoint",
    "sha256_of",
]

WEIGHTS_VARIABLE = "DEPLOYKIT_WEIGHTS"
_SUFFIXES = (".safetensors", ".pth", ".pt")
_HUB_TIMEOUT = 3.0  # seconds; a hub that doesn't answer a HEAD in this time is not there


class HubError(Exception):
    """Published weights could not be had; the message says why, in one line."""


@dataclass(frozen=True)
class Source:
    """A weights file that exists. ``label`` is the hub id, or the path as the user wrote it."""

    kind: Literal["hub", "file"]
    path: Path
    label: str


def find_weights(
    weights: str, timm_id: str | None, names: tuple[str, ...]
) -> tuple[Source | None, str]:
    """The file that ``weights`` (``auto``, ``hub``, ``random`` or a path) stands for.

    ``timm_id`` is the id whose published weights are wanted, None where nobody publishes any;
    ``names`` are the names a file in ``DEPLOYKIT_WEIGHTS`` may have. Without a file, the second
    value says why.

    Raises:
        UsageError: ``hub`` and there are none; a path or ``DEPLOYKIT_WEIGHTS`` that doesn't exist.
    """
    if weights == "random":
        return None, "random weights were asked for"
    if weights not in ("auto", "hub"):
        path = Path(weights).expanduser()
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "no such file"
            message = f"weights {weights}: {what}; give auto, hub, random or a checkpoint file"
            raise UsageError(message)
        return Source("file", path, weights), ""
    try:
        if timm_id is None:
            raise HubError(f"nobody publishes weights of {names[0]}")
        return Source("hub", fetch_from_hub(timm_id), timm_id), ""
    except HubError as error:
        if weights == "hub":
            message = f"weights hub: {error}; give a checkpoint file, or auto to go on untrained"
            raise UsageError(message) from error
        reason = str(error)
    local = _in_folder(names)
    if local is not None:
        return Source("file", local, str(local)), reason
    if os.environ.get(WEIGHTS_VARIABLE):
        return None, f"{reason}; no file for {names[0]} in {WEIGHTS_VARIABLE}"
    return None, f"{reason}; {WEIGHTS_VARIABLE} is not set"


def _in_folder(names: tuple[str, ...]) -> Path | None:
    place = os.environ.get(WEIGHTS_VARIABLE)
    if not place:
        return None
    root = Path(place).expanduser()
    if not root.exists():
        raise UsageError(f"{WEIGHTS_VARIABLE}={place}: no such file or folder")
    if root.is_file():
        return root
    stems = dict.fromkeys(name for full in names for name in (full, arch_of(full)))
    files = (root / f"{stem}{suffix}" for stem in stems for suffix in _SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def fetch_from_hub(timm_id: str) -> Path:
    """timm's published checkpoint for ``timm_id``: from the local cache, else downloaded.

    Raises:
        HubError: there are none, or the hub can't be reached (found out within seconds).
    """
    config = timm.get_pretrained_cfg(timm_id)
    if config is None or not (config.hf_hub_id or config.url):
        raise HubError(f"timm publishes no weights for {timm_id}")
    if config.hf_hub_id:
        return _from_hugging_face(config)
    return _from_url(str(config.url))


def _from_hugging_face(config: Any) -> Path:
    repository, _, revision = str(config.hf_hub_id).partition("@")
    names = _safe_first(config.hf_hub_filename or "pytorch_model.bin")
    for name in names:
        cached = huggingface_hub.try_to_load_from_cache(
            repository, name, cache_dir=hub_constants.HF_HUB_CACHE, revision=revision or None
        )
        if isinstance(cached, str):
            return Path(cached)
    _require_reachable(hub_constants.ENDPOINT)
    for name in names:
        try:
            path = huggingface_hub.hf_hub_download(
                repository, name, revision=revision or None, etag_timeout=_HUB_TIMEOUT
            )
        except LocalEntryNotFoundError as error:  # a subclass of the next, but means: no network
            raise HubError(f"the hub broke off: {_first_line(error)}") from error
        except EntryNotFoundError:
            continue
        except Exception as error:  # the client's errors have no common base but this
            raise HubError(f"{repository} is not to be had: {_first_line(error)}") from error
        return Path(path)
    raise HubError(f"{repository} holds none of {', '.join(names)}")


def _safe_first(filename: str) -> tuple[str, ...]:
    """The safetensors twin of a published file before the file itself."""
    if filename == "pytorch_model.bin":
        return ("model.safetensors", filename)
    path = Path(filename)
    if filename == "open_clip_pytorch_model.bin":
        return ("open_clip_model.safetensors", filename)
    if path.suffix == ".bin":
        return (f"{path.stem}.safetensors", filename)
    return (filename,)


def _from_url(url: str) -> Path:
    target = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if target.is_file():
        return target
    if hub_constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE is set")
    _require_reachable("/".join(url.split("/")[:3]))
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _socket_timeout(_HUB_TIMEOUT * 10):
            torch.hub.download_url_to_file(url, str(target), progress=False)
    except Exception as error:  # URL, HTTP, socket and disk errors alike
        raise HubError(f"{url} is not to be had: {_first_line(error)}") from error
    return target


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _require_reachable(endpoint: str) -> None:
    fault = _probe(endpoint)
    if fault:
        raise HubError(fault)


@cache
def _probe(endpoint: str) -> str:
    """Empty if ``endpoint`` answers anything at all within a few seconds, else why not.

    The hub's client repeats a failed request for half a minute; one request first saves that. It
    runs in a thread because looking up a host's name obeys no timeout.
    """
    answer: list[str] = []

    def ask() -> None:
        try:
            huggingface_hub.get_session().head(endpoint, timeout=_HUB_TIMEOUT)
        except Exception as error:
            answer.append(f"{endpoint} can't be reached ({_first_line(error)})")
        else:
            answer.append("")

    if hub_constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and the weights are not in the local cache"
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_TIMEOUT + 1.0)
    return answer[0] if answer else f"{endpoint} doesn't answer within {_HUB_TIMEOUT:g} s"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160].rstrip(".")
