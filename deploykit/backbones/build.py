"""From the recipe's model section to a backbone: built, loaded, and with its preprocessing."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.deploy_form import in_deploy_form
from deploykit.backbones.features import with_features
from deploykit.backbones.inserting import host_section, refuse_finished, with_inserted
from deploykit.backbones.onnx_file import build_onnx_file
from deploykit.backbones.registry import arch_of, own_builder
from deploykit.backbones.resolve import Resolved, resolve
from deploykit.backbones.structure_file import build_structure_file
from deploykit.backbones.weights import (
    Source,
    find_weights,
    infer_num_classes,
    load_strictly,
    make_testable,
    read_checkpoint,
    sha256_of,
)
from deploykit.errors import UsageError, one_line
from deploykit.recipe import ModelSection
from deploykit.types import Backbone, Preprocessing, WeightsOrigin

__all__ = ["build_backbone"]

_DEFAULT_CLASSES = 1000
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_INTERPOLATIONS = get_args(Preprocessing.model_fields["interpolation"].annotation)

# Packages whose networks don't want ImageNet's usual normalisation, by the module's root package.
_KNOWN_NORMALISATION = {
    "efficientnet_lite_pytorch": ((127 / 255,) * 3, (128 / 255,) * 3),
}


def build_backbone(model: ModelSection, seed: int) -> tuple[Backbone, list[str]]:
    """Build the backbone a recipe asks for, in eval mode, on the CPU, without gradients.

    Also returns notes: one line each on what was assumed, for the user. Weights nobody has are no
    error with ``auto``: the backbone is then untrained, made testable with ``seed``, and says so
    in ``weights``. The global random state is left as it was.

    Raises:
        UsageError: unknown name, unusable weights, a size or number of classes that doesn't fit.
    """
    resolved = resolve(model.name)
    notes = list(resolved.notes)
    if model.preprocessing is not None:
        _agree(model.preprocessing, model.img_size)
        model = model.model_copy(update={"img_size": model.preprocessing.size})
    if resolved.kind in ("onnx", "structure"):
        assert resolved.weights_path is not None
        refuse_finished(model, resolved.name)
        read = build_onnx_file if resolved.kind == "onnx" else build_structure_file
        backbone = read(resolved.weights_path, model, notes)
        _agree_on_features(model, backbone)
        return backbone, notes
    if resolved.weights_path is not None and model.weights == "auto":
        model = model.model_copy(update={"weights": str(resolved.weights_path)})
    build = {"timm": _build_timm, "own": _build_own, "factory": _build_factory}[resolved.kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build(resolved, host_section(model), seed, notes)
        if model.insert is not None:
            backbone = with_inserted(backbone, model, seed, notes)
        module, note = in_deploy_form(backbone)
    if note is not None:
        notes.append(note)
    backbone = dataclasses.replace(backbone, module=module)
    if model.gives_features:
        backbone = with_features(backbone, model.features)
    backbone.module.requires_grad_(False)
    backbone.module.train()  # leaving eval mode drops bias caches that hold old weights
    backbone.module.eval()
    return backbone, notes


def _agree_on_features(model: ModelSection, backbone: Backbone) -> None:
    """A finished network has its outputs; a recipe must know which, as much depends on it."""
    if model.gives_features and (not backbone.levels or model.features is not True):
        message = f"model.features: {backbone.name} is a finished network with outputs of its own"
        raise UsageError(f"{message}; leave features out")
    if backbone.levels and not model.gives_features:
        raise UsageError(
            f"{backbone.name} was saved with feature maps for outputs; give --features"
        )


def _build_timm(resolved: Resolved, model: ModelSection, seed: int, notes: list[str]) -> Backbone:
    timm_id = resolved.spec.timm_id
    assert timm_id is not None  # every timm spec has one
    config = timm.get_pretrained_cfg(timm_id)
    source, reason = find_weights(model.weights, timm_id, (timm_id, resolved.name))
    if model.weights != "random":
        _note_fallback(source, reason, notes)
    state = read_checkpoint(source.path) if source is not None and source.kind == "file" else None
    classes = model.num_classes
    if classes is None and state is not None:
        classes = infer_num_classes(state, config.classifier)
    if classes is None:
        classes = _DEFAULT_CLASSES
        if config.num_classes != _DEFAULT_CLASSES:
            what = f"{config.num_classes} outputs" if config.num_classes else "no classifier"
            notes.append(f"{timm_id} was published with {what}: built with {classes} classes")
    create = {"num_classes": classes}
    if source is not None and source.kind == "hub":
        create |= _hub_arguments(config, source.path)
    module = _create(timm_id, model.img_size, config, create)
    if state is not None and source is not None:
        notes += load_strictly(module, state, source.label)
    origin = _origin(model.weights, source, reason)
    head_is_new = bool(config.classifier) and config.num_classes != classes
    if source is not None and source.kind == "hub" and head_is_new:
        origin = WeightsOrigin(
            kind="untrained", source=f"{timm_id}, but with a new random classifier"
        )
        notes.append(f"the classifier of {timm_id} is random: no accuracy can be had from it")
    preprocessing = _timm_preprocessing(config, model, notes)
    _check_output(module, preprocessing.size, resolved.name, checked=model.img_size is not None)
    if source is None:
        make_testable(module, seed, preprocessing.size)
    return Backbone(
        name=resolved.name,
        module=module,
        preprocessing=preprocessing,
        weights=origin,
        num_classes=int(getattr(module, "num_classes", classes)),
        family=resolved.spec.family or arch_of(timm_id),
        paper=resolved.spec.paper_name,
    )


def _hub_arguments(config: Any, path: Path) -> dict[str, Any]:
    """Arguments that make timm load the downloaded file instead of looking for one itself."""
    overlay: dict[str, Any] = {"file": str(path)}
    if path.suffix == ".npz":
        overlay["custom_load"] = config.custom_load
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}


@contextlib.contextmanager
def _unfused_attention() -> Iterator[None]:
    """Build attention as matmul, softmax, matmul: fused, its inputs can't be quantised.

    timm's blocks read the switch once, when they are built.
    """
    fused, experimental = timm.layers.use_fused_attn(), timm.layers.use_fused_attn(True)
    timm.layers.set_fused_attn(False)
    try:
        yield
    finally:
        timm.layers.set_fused_attn(fused, experimental=experimental)


def _create(timm_id: str, img_size: int | None, config: Any, create: dict[str, Any]) -> nn.Module:
    """``timm.create_model``, with ``img_size`` where the architecture takes one."""
    size = img_size or (config.input_size[-1] if config.fixed_input_size else None)
    with _unfused_attention():
        try:
            return _create_sized(timm_id, size, create)
        except UsageError:
            raise
        except Exception as error:  # timm's builders refuse arguments in many ways
            asked = f" with img_size {img_size}" if img_size else ""
            message = f"model {timm_id} can't be built{asked}: {' '.join(str(error).split())}"
            raise UsageError(message[:400]) from error


def _create_sized(timm_id: str, size: int | None, create: dict[str, Any]) -> nn.Module:
    if size is not None:
        try:
            module: nn.Module = timm.create_model(timm_id, img_size=size, **create)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
        else:
            return module
    module = timm.create_model(timm_id, **create)
    return module


def _timm_preprocessing(config: Any, model: ModelSection, notes: list[str]) -> Preprocessing:
    if model.preprocessing is not None:
        return model.preprocessing
    data = timm.data.resolve_data_config(pretrained_cfg=config.to_dict())
    interpolation = data["interpolation"]
    if interpolation not in _INTERPOLATIONS:
        notes.append(f"interpolation {interpolation} is replaced by bicubic")
        interpolation = "bicubic"
    if data.get("crop_mode", "center") != "center":
        notes.append(
            f"published with images resized in mode {data['crop_mode']!r}; "
            f"here their centre is cut out, which can move the accuracy a little"
        )
    return Preprocessing(
        size=model.img_size or int(data["input_size"][-1]),
        crop_pct=float(data["crop_pct"]),
        interpolation=interpolation,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def _agree(preprocessing: Preprocessing, img_size: int | None) -> None:
    if img_size is not None and img_size != preprocessing.size:
        message = (
            f"img_size {img_size} and preprocessing.size {preprocessing.size} differ; give one"
        )
        raise UsageError(message)


def _build_own(resolved: Resolved, model: ModelSection, seed: int, notes: list[str]) -> Backbone:
    variant, builder = own_builder(resolved.name)
    size = model.img_size or variant.input
    source, reason = find_weights(model.weights, None, (resolved.name,))
    if model.weights != "random":
        _note_fallback(source, reason, notes)
    classes = model.num_classes or _DEFAULT_CLASSES
    state = read_checkpoint(source.path) if source is not None else None
    if state is not None and model.num_classes is None:
        classes = infer_num_classes(state, ("head", "classifier", "fc")) or classes
    module = builder(resolved.name, num_classes=classes, img_size=size)
    if state is not None and source is not None:
        notes += load_strictly(module, state, source.label)
    else:
        make_testable(module, seed, size)
    preprocessing = model.preprocessing or Preprocessing(
        size=size,
        crop_pct=variant.crop_pct,
        interpolation=variant.interpolation,
        mean=variant.mean,
        std=variant.std,
    )
    return Backbone(
        name=resolved.name,
        module=module,
        preprocessing=preprocessing,
        weights=_origin(model.weights, source, reason),
        num_classes=classes,
        family=resolved.spec.family,
        paper=resolved.spec.paper_name,
    )


def _build_factory(
    resolved: Resolved, model: ModelSection, seed: int, notes: list[str]
) -> Backbone:
    del seed  # the factory's weights stay as it made them
    name = resolved.name
    if model.weights == "hub":
        message = f"model {name}: a factory's weights aren't on the hub; give auto or a file"
        raise UsageError(message)
    with _cwd_on_path():
        factory = _import_factory(name)
        module = _call_factory(factory, name, model.num_classes)
    module.to("cpu").eval().requires_grad_(False)
    preprocessing = _factory_preprocessing(factory, module, name, model)
    if model.weights == "random":
        origin = WeightsOrigin(kind="random", source=f"{name}, as the factory made it")
    elif model.weights == "auto":
        origin = WeightsOrigin(kind="module", source=name)
    else:
        source, _ = find_weights(model.weights, None, (name,))
        assert source is not None  # a path is found or refused
        notes += load_strictly(module, read_checkpoint(source.path), source.label)
        origin = _origin(model.weights, source, "")
    classes = 0  # of a module that may give maps instead
    if not model.gives_features:
        classes = _check_output(module, preprocessing.size, name, checked=True)
    if model.num_classes is not None and classes not in (0, model.num_classes):
        message = f"model {name} has {classes} outputs, but num_classes is {model.num_classes}"
        raise UsageError(f"{message}; drop num_classes, or let the factory take it")
    return Backbone(
        name=name,
        module=module,
        preprocessing=preprocessing,
        weights=origin,
        num_classes=classes,
        family=type(module).__name__,
    )


@contextlib.contextmanager
def _cwd_on_path() -> Iterator[None]:
    """Let the user's own modules be imported, as ``python -m`` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def _import_factory(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # the user's module may fail in any way
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        message = f"model {name}: importing {module_name} failed ({what[:200]})"
        raise UsageError(f"{message}; run from the folder it is in") from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise UsageError(f"model {name}: {module_name} has no callable {attribute!r}")
    factory: Callable[..., Any] = found
    return factory


def _call_factory(factory: Callable[..., Any], name: str, num_classes: int | None) -> nn.Module:
    arguments: dict[str, int] = {}
    try:
        takes_classes = "num_classes" in inspect.signature(factory).parameters
    except (TypeError, ValueError):
        takes_classes = False
    if takes_classes and num_classes is not None:
        arguments["num_classes"] = num_classes
    try:
        with _unfused_attention():  # a factory may well build a timm model
            module = factory(**arguments)
    except Exception as error:  # the user's code may fail in any way
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UsageError(f"model {name}: the factory failed ({what[:300]})") from error
    if not isinstance(module, nn.Module):
        message = f"model {name}: wanted an nn.Module, got {type(module).__name__}"
        raise UsageError(f"{message}; name the function that builds it")
    return module


def _factory_preprocessing(
    factory: Callable[..., Any], module: nn.Module, name: str, model: ModelSection
) -> Preprocessing:
    if model.preprocessing is not None:
        return model.preprocessing
    given = getattr(module, "deploykit_preprocessing", None)
    if given is None:
        given = getattr(factory, "deploykit_preprocessing", None)
    root = type(module).__module__.split(".")[0]
    mean, std = _KNOWN_NORMALISATION.get(root, (_IMAGENET_MEAN, _IMAGENET_STD))
    defaults: dict[str, Any] = {"size": 224, "crop_pct": 0.875, "mean": mean, "std": std}
    if model.img_size is not None:
        defaults["size"] = model.img_size
    if given is None:
        return Preprocessing(**defaults)
    values = given.model_dump() if isinstance(given, Preprocessing) else given
    try:
        own = Preprocessing(**{**defaults, **values})
    except (TypeError, ValueError) as error:
        what = one_line(error, 200)
        message = f"model {name}: deploykit_preprocessing isn't usable ({what})"
        raise UsageError(f"{message}; keys: {', '.join(Preprocessing.model_fields)}") from error
    return own.model_copy(update={"size": model.img_size}) if model.img_size else own


def _check_output(module: nn.Module, size: int, name: str, *, checked: bool) -> int:
    """Run one blank image where ``checked``; the number of outputs, 0 if it wasn't run."""
    if not checked:
        return 0
    module.eval()
    try:
        with torch.no_grad():
            output = module(torch.zeros(1, 3, size, size))
    except Exception as error:  # a network's refusals have no common type
        what = one_line(error, 200)
        message = f"model {name} fails on a {size}×{size} image ({what}); give another img_size"
        raise UsageError(message) from error
    if not isinstance(output, Tensor) or output.ndim != 2 or not output.is_floating_point():
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(f"model {name}: wanted float scores (N, classes) from it, got {got}")
    return int(output.shape[1])


def _note_fallback(source: Source | None, reason: str, notes: list[str]) -> None:
    if source is None:
        notes.append(f"untrained: {reason}")
    elif reason:
        notes.append(f"{reason}: weights {source.label} are used")


def _origin(weights: str, source: Source | None, reason: str) -> WeightsOrigin:
    if source is not None:
        return WeightsOrigin(kind=source.kind, source=source.label, sha256=sha256_of(source.path))
    kind: Any = "random" if weights == "random" else "untrained"
    return WeightsOrigin(kind=kind, source=reason)
