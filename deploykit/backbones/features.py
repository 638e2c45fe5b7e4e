"""A backbone that gives feature maps instead of scores: what detectors and segmenters stand on.

timm's networks say themselves what their stages give (``forward_intermediates``, the protocol
behind timm's ``features_only``). A user's own module may give its maps as they are, one or several.
Of any other network the stages are listened to: its children, and the entries of its lists of
stages, that give one map (N, C, H, W).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploykit.errors import UsageError, one_line
from deploykit.graph.levels import join_levels
from deploykit.types import Backbone, FeatureLevel

__all__ = ["FeatureMaps", "gives_maps", "with_features"]

_Listener = Callable[[nn.Module, Any, Any], None]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a network's maps are read, and which of them (all if None)."""

    way: str
    indices: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()
    norm: bool = False

    def __call__(self, model: nn.Module, images: Tensor) -> list[Tensor]:
        if self.way == "intermediates":
            chosen = None if self.indices is None else list(self.indices)
            forward: Any = model.forward_intermediates
            maps = forward(
                images, indices=chosen, norm=self.norm, output_fmt="NCHW", intermediates_only=True
            )
            return list(maps)
        if self.way == "maps":
            found = model(images)
            maps = [found] if isinstance(found, Tensor) else list(found)
        else:
            maps = _listen(model, self.names, images)
        return maps if self.indices is None else [maps[index] for index in self.indices]


class FeatureMaps(nn.Module):
    """Images (N, 3, S, S) to the feature maps of ``model``, joined (N, total).

    Args:
        model: the network, changed in no way.
        read: gives the maps, a list of (N, C, H, W), from the network and the images.
    """

    wraps = "model"  # what capture takes off the layers' names

    def __init__(self, model: nn.Module, read: Reading) -> None:
        super().__init__()
        self.model = model
        self.read = read

    def forward(self, images: Tensor) -> Tensor:
        joined: Tensor = join_levels(self.read(self.model, images))
        return joined


def with_features(backbone: Backbone, features: bool | Sequence[int]) -> Backbone:
    """The backbone giving feature maps; layers that nothing reads then are gone.

    Args:
        features: True for the deepest map of each resolution, or which maps, by their numbers
            from the first.

    Raises:
        UsageError: the network gives no maps, or not those.
    """
    module, size = backbone.module, backbone.preprocessing.size
    image = torch.zeros(1, 3, size, size)
    reading = _reading(module, backbone.name, image)
    maps = _maps(reading, module, backbone.name, image)
    indices = _deepest(maps) if isinstance(features, bool) else _asked(features, maps, backbone)
    chosen = [maps[index] for index in indices]
    levels = tuple(_level(number, found, size) for number, found in enumerate(chosen))
    if reading.way == "intermediates":
        indices = _without_the_rest(module, indices, norm=reading.norm)
    wrapped = FeatureMaps(module, dataclasses.replace(reading, indices=tuple(indices)))
    return dataclasses.replace(backbone, module=wrapped.eval(), num_classes=0, levels=levels)


def gives_maps(output: object) -> bool:
    """Whether a module's output is one map (N, C, H, W) or a sequence of them."""
    maps = output if isinstance(output, list | tuple) else [output]
    return bool(maps) and all(_is_map(found) for found in maps)


def _is_map(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()


def _reading(module: nn.Module, name: str, image: Tensor) -> Reading:
    if hasattr(module, "forward_intermediates"):
        # SAM's image encoder is its transformer with the neck, which timm counts to the norm.
        neck = getattr(module, "neck", None)
        return Reading("intermediates", norm=neck is not None and not isinstance(neck, nn.Identity))
    seen: dict[str, Tensor] = {}
    stages = _stages(module)
    with torch.no_grad():
        try:
            output = _listened(module, stages, image, seen)
        except Exception as error:  # a network's refusals have no common type
            raise _fails(name, image, error) from error
    if gives_maps(output):
        return Reading("maps")
    found = tuple(stage for stage in seen if _is_square_map(seen[stage]))
    if not found:
        message = f"model {name} gives no feature maps: none of its stages gives one (N, C, H, W)"
        raise UsageError(f"{message}; leave features out, or give module:factory that returns maps")
    return Reading("stages", names=found)


def _stages(module: nn.Module) -> list[str]:
    """Names of children, and of the entries of lists among them, in the order they are made."""
    names = []
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            names += [f"{name}.{entry}" for entry, _ in child.named_children()]
        else:
            names.append(name)
    return names


def _is_square_map(value: object) -> bool:
    """Whether it is (N, C, H, W) of one place a side at least; (N, H, W, C) isn't taken for it."""
    return isinstance(value, Tensor) and _is_map(value) and 1 < value.shape[2] == value.shape[3]


def _listened(
    module: nn.Module, names: Sequence[str], images: Tensor, seen: dict[str, Tensor]
) -> Any:
    """Run the module, and write down what each of the named modules gives, as they run."""

    def listener(name: str) -> _Listener:
        def listen(_: nn.Module, __: Any, output: Any) -> None:
            seen[name] = output

        return listen

    handles = [module.get_submodule(name).register_forward_hook(listener(name)) for name in names]
    try:
        return module(images)
    finally:
        for handle in handles:
            handle.remove()


def _listen(module: nn.Module, names: Sequence[str], images: Tensor) -> list[Tensor]:
    seen: dict[str, Tensor] = {}
    _listened(module, names, images, seen)
    return [seen[name] for name in names]


def _maps(reading: Reading, module: nn.Module, name: str, image: Tensor) -> list[Tensor]:
    try:
        with torch.no_grad():
            maps = reading(module, image)
    except Exception as error:  # a network's refusals have no common type
        raise _fails(name, image, error) from error
    if not gives_maps(maps):
        raise UsageError(f"model {name} gives no feature maps (N, C, H, W); leave features out")
    return maps


def _fails(name: str, image: Tensor, error: Exception) -> UsageError:
    size = image.shape[-1]
    message = f"model {name} gives no feature maps of a {size}×{size} image"
    return UsageError(f"{message} ({one_line(error, 160)}); leave features out")


def _deepest(maps: Sequence[Tensor]) -> list[int]:
    """The last map of each resolution, in order."""
    last = {tuple(found.shape[2:]): index for index, found in enumerate(maps)}
    return sorted(last.values())


def _asked(features: Sequence[int], maps: Sequence[Tensor], backbone: Backbone) -> list[int]:
    beyond = [index for index in features if index >= len(maps)]
    if beyond:
        message = f"model.features: {backbone.name} has maps 0 to {len(maps) - 1}, not {beyond[0]}"
        raise UsageError(message)
    return list(features)


def _level(number: int, found: Tensor, size: int) -> FeatureLevel:
    _, channels, height, width = found.shape
    return FeatureLevel(
        name=f"features_{number}",
        channels=channels,
        height=height,
        width=width,
        stride=size / height,
    )


def _without_the_rest(module: nn.Module, indices: Sequence[int], *, norm: bool) -> list[int]:
    """Take off the head, and the blocks behind the last map; the maps' numbers from then on."""
    prune: Any = getattr(module, "prune_intermediate_layers", None)
    if prune is None:
        return list(indices)
    return list(prune(list(indices), prune_norm=not norm))
