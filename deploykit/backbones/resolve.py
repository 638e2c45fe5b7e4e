"""What a model name typed by a user means.

A name is never mapped to a network that merely sounds alike: where that threatens, the message
explains instead.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deploykit._compat import timm
from deploykit.backbones.declined import why_not_here
from deploykit.backbones.registry import (
    BackboneSpec,
    aliases,
    arch_of,
    families,
    normalise,
    own_spellings,
    specs,
    squash,
)
from deploykit.errors import UsageError
from deploykit.export.structure import STRUCTURE_NAME

__all__ = ["CHECKPOINT_SUFFIXES", "Resolved", "holds_weights", "resolve"]

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")

_FACTORY = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")
_SHVIT_TYPO = re.compile(r"^sht_?vit")  # a common slip for SHViT, e.g. sht_vit_s4

# Names that look like a timm name but are another network: explained, never mapped. Matched
# against the name without separators.
_NOT_IN_TIMM: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"^metaformer"),
        "'MetaFormer' names several networks: choose one such as caformer_s36, convformer_s18 or "
        "poolformer_s12, or give your own model as 'module:factory'",
    ),
    (
        re.compile(r"^stvitr"),
        "STViT-R (semantic tokens) is a way to drop tokens, not a backbone, and stvit_s (super "
        "token sampling) is another network; see --tokens, or give 'module:factory'",
    ),
)


@dataclass(frozen=True)
class Resolved:
    """What a name means. ``notes`` are lines for the user (what was assumed)."""

    kind: Literal["timm", "own", "factory", "onnx", "structure"]
    name: str
    spec: BackboneSpec
    notes: tuple[str, ...] = ()
    factory: str | None = None
    weights_path: Path | None = None


def resolve(name: str) -> Resolved:
    """What ``name`` means.

    In this order: ``module:factory``; an ONNX file or a saved structure; an exact timm id, with or
    without tag; an alias or the paper's own spelling of it; an own family's variant; a checkpoint
    file or folder; a family's bare name (its headline variant, with a note).

    Raises:
        UsageError: nothing of the kind; the message names the three nearest names.
    """
    text = name.strip()
    if re.search(r"\.py:\w+$", text):
        module = Path(text.split(":")[0]).stem
        message = (
            f"--model {text!r}: write a factory as module:function, such as "
            f"{module}:{text.split(':')[1]}, and run from the folder that holds {module}.py"
        )
        raise UsageError(message)
    if _FACTORY.match(text) and not Path(text).exists():
        spec = BackboneSpec(name=text, source="own")
        return Resolved("factory", text, spec, factory=text)
    path = Path(text).expanduser()
    if holds_weights(text):
        spec = BackboneSpec(name=text, source="own")
        kind: Literal["onnx", "structure"] = (
            "onnx" if path.suffix.lower() == ".onnx" else "structure"
        )
        return Resolved(kind, text, spec, weights_path=path)
    if path.suffix.lower() in CHECKPOINT_SUFFIXES or (os.sep in text and path.exists()):
        return _resolve_checkpoint(path)
    found = _resolve_name(text)
    if found is not None:
        return found
    if path.exists():
        return _resolve_checkpoint(path)
    raise UsageError(_unknown(text))


def holds_weights(name: str) -> bool:
    """Whether ``name`` is a file that holds a network with its weights (ONNX, saved structure)."""
    path = Path(name.strip()).expanduser()
    if path.suffix.lower() == ".onnx" or path.name == STRUCTURE_NAME:
        return True
    try:
        return (path / STRUCTURE_NAME).is_file()
    except OSError:  # longer than any path can be
        return False


def _resolve_name(text: str) -> Resolved | None:
    for candidate in dict.fromkeys((text, normalise(text))):
        if candidate and timm.is_model(candidate):
            return _resolve_timm(candidate)
    plain = normalise(text)
    notes: tuple[str, ...] = ()
    if _SHVIT_TYPO.match(plain):
        plain = _SHVIT_TYPO.sub("shvit", plain)
        notes = (f"{text!r} is read as {plain!r}",)
    spec = specs().get(plain) or _by_spelling().get(squash(plain))
    if spec is not None:
        return Resolved("own" if spec.source == "own" else "timm", spec.name, spec, notes)
    for family, members in families().items():
        if squash(plain) == squash(family):
            chosen = next((m for m in members if m.headline), members[0])
            others = ", ".join(m.name for m in members if m is not chosen)
            note = f"{text!r} is a family: {chosen.name} is used" + (
                f" (others: {others})" if others else ""
            )
            kind: Literal["own", "timm"] = "own" if chosen.source == "own" else "timm"
            return Resolved(kind, chosen.name, chosen, (*notes, note))
    return None


def _by_spelling() -> dict[str, BackboneSpec]:
    """Names and paper names without separators; a spelling that two models share is left out."""
    table: dict[str, BackboneSpec | None] = {}
    known = specs()
    for spec in known.values():
        for text in {squash(spec.name), squash(spec.paper_name)}:
            table[text] = None if text in table else spec
    for text, name in own_spellings().items():
        spec = known[name]
        table[squash(text)] = spec if table.get(squash(text), spec) is spec else None
    return {text: spec for text, spec in table.items() if spec is not None}


def _resolve_timm(name: str) -> Resolved:
    arch, _, tag = name.partition(".")
    tags = list(timm.list_pretrained(f"{arch}.*")) or [
        n for n in timm.list_pretrained(arch) if arch_of(n) == arch
    ]
    notes: tuple[str, ...] = ()
    timm_id = name
    if tag and name not in tags and not _is_registered(name):
        known = ", ".join(sorted(t.split(".", 1)[-1] for t in tags)) or "none"
        message = f"timm model {arch!r} has no weights tagged {tag!r}; its tags: {known}"
        raise UsageError(message)
    if not tag:
        timm_id, notes = _choose_tag(arch, tags)
    known_spec = next((s for s in aliases().values() if s.timm_id == timm_id), None)
    if known_spec is not None:
        spec = known_spec.model_copy(update={"name": name})
    else:
        config = timm.get_pretrained_cfg(timm_id)
        size = int(config.input_size[-1]) if config is not None else None
        spec = BackboneSpec(
            name=name,
            timm_id=timm_id,
            input=size,
            paper_name=arch,
            licence=getattr(config, "license", None),
        )
    return Resolved("timm", name, spec, notes)


def _is_registered(timm_id: str) -> bool:
    """Whether timm knows this tag; some are known and have no weights."""
    try:
        return timm.get_pretrained_cfg(timm_id, allow_unregistered=False) is not None
    except RuntimeError:
        return False


def _choose_tag(arch: str, tags: list[str]) -> tuple[str, tuple[str, ...]]:
    """The arch's default tag, or one with 1000 classes where the default has another number."""
    config = timm.get_pretrained_cfg(arch)
    default_tag = getattr(config, "tag", None)
    default = f"{arch}.{default_tag}" if default_tag else arch
    if config is None or config.num_classes == 1000:
        return default, ()
    thousand = [t for t in tags if timm.get_pretrained_cfg(t).num_classes == 1000]
    if not thousand:
        return default, ()
    named = {spec.timm_id for spec in aliases().values()}
    chosen = next((t for t in thousand if t in named), thousand[0])
    note = (
        f"{arch}'s default weights have {config.num_classes} classes: {chosen} is used (1000); "
        f"write {default} for the others"
    )
    return chosen, (note,)


def _resolve_checkpoint(path: Path) -> Resolved:
    """A checkpoint given as the model: its architecture is in config.json, or is its file name."""
    if not path.exists():
        message = f"--model {path}: no such file; give a model name or an existing checkpoint"
        raise UsageError(message)
    folder = path if path.is_dir() else path.parent
    config = folder / "config.json"
    names = [] if path.is_dir() else [path.name.removesuffix(path.suffix), path.stem.split(".")[0]]
    if config.is_file():
        # somebody else's config.json is no error: then the file name decides
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            names.insert(0, str(json.loads(config.read_text("utf-8"))["architecture"]))
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in CHECKPOINT_SUFFIXES)
        files.sort(key=lambda f: f.suffix != ".safetensors")
        if not files:
            message = (
                f"--model {path}: no checkpoint in this folder ({', '.join(CHECKPOINT_SUFFIXES)})"
            )
            raise UsageError(message)
        path = files[0]
    for name in names:
        found = _resolve_name(name)
        if found is not None:
            note = f"{path.name} is read as weights of {found.name}"
            return Resolved(
                found.kind, found.name, found.spec, (*found.notes, note), weights_path=path
            )
    message = (
        f"--model {path}: a checkpoint alone doesn't tell its architecture; "
        f"write --model NAME --weights {path}"
    )
    raise UsageError(message)


def _unknown(text: str) -> str:
    squashed = squash(text)
    for pattern, explanation in _NOT_IN_TIMM:
        if pattern.match(squashed):
            return f"unknown backbone {text!r}: {explanation}"
    declined = why_not_here(squashed)
    if declined is not None:
        return f"unknown backbone {text!r}: {declined}"
    names = dict.fromkeys((*specs(), *timm.list_models()))
    near = difflib.get_close_matches(normalise(text), names, n=3, cutoff=0.0)
    return (
        f"unknown backbone {text!r}; nearest: {', '.join(near)} "
        f"(deploykit list shows the names, module:factory takes your own model)"
    )
