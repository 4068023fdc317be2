"""Whether a model still computes with the weights that it began with: a cheap look, whenever a step is stored.

Whoever changes the weights of a running engine resets its caches, or vLLM's own prefix cache would be wrong too. Where
that is forgotten, what the engine computes must not get the names of what its files say. PyTorch counts changes of a
tensor (`_version`), but vLLM's loaders write through `.data`, which is not counted; so contents are sampled as well.

A look covers what every parameter is (identity, address, count of changes), the callables that modules keep (a CPU's
linear layers pack their weights into one and leave the parameter empty), and SAMPLES values of each of SOME parameters,
others in each look. So a change of all weights is noticed at once, one of few within some looks. It is no promise.

Nothing is kept alive: what is looked at may be freed while the engine sleeps. 0.3 ms for 300 parameters, on a CPU.
"""

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import nn

__all__ = ["WeightsWatch", "find_models"]

SOME = 16
SAMPLES = 8
_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bits are compared, not values: a NaN differs from itself."""


def find_models(layers: Mapping[str, object]) -> list[nn.Module]:
    """The models whose layers these are by name. vLLM hands a connector its attention layers, and nothing above them.

    Looks through everything that the garbage collector knows: once, 0.1 s for a million objects.
    """
    left = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Module)}
    found: list[nn.Module] = []
    if not left:
        return found
    for each in gc.get_objects():
        if not issubclass(type(each), nn.Module):  # isinstance would ask a proxy for its class
            continue
        mine = [name for name, layer in left.items() if _submodule(each, name) is layer]
        if mine:
            found.append(each)
            for name in mine:
                del left[name]
            if not left:
                break
    return found


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        child = module.__dict__.get("_modules", {}).get(part)
        if child is None:
            return None
        module = child
    return module


@attrs.frozen
class _Parameter:
    """One parameter as it was: where it is, how often it was changed, and what stood at some places of it."""

    tensor: "weakref.ref[torch.Tensor]"
    address: int
    version: int
    sample: tuple[int, ...]


@attrs.frozen
class _Kept:
    """A callable that a module keeps under *name*."""

    module: "weakref.ref[nn.Module]"
    name: str
    identity: int


class WeightsWatch:
    """What the weights of *models* are now. *source* tells where they were loaded from."""

    def __init__(self, models: list[nn.Module], source: Callable[[], object]) -> None:
        self._models = [weakref.ref(model) for model in models]
        self._source = source
        self._turn = 0
        self.take()

    def take(self) -> None:
        """The weights are what they should be: from now on they are compared with these."""
        self._loaded_from = self._source()
        self._parameters: list[_Parameter] = []
        self._kept: list[_Kept] = []
        seen: set[int] = set()
        for model in (each() for each in self._models):
            if model is None:
                continue
            for tensor in model.parameters():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    self._parameters.append(
                        _Parameter(weakref.ref(tensor), _address(tensor), tensor._version, _sample(tensor))
                    )
            for module in model.modules():
                self._kept += [
                    _Kept(weakref.ref(module), name, id(value))
                    for name, value in vars(module).items()
                    if _counts(value)
                ]

    def changed(self) -> bool:
        """Are they others than those that were taken?"""
        if self._source() != self._loaded_from:
            return True
        for was in self._parameters:
            tensor = was.tensor()
            if tensor is None or _address(tensor) != was.address or tensor._version != was.version:
                return True
        for kept in self._kept:
            module = kept.module()
            if module is None or id(vars(module).get(kept.name)) != kept.identity:
                return True
        return any(_sample(was.tensor()) != was.sample for was in self._next())

    def _next(self) -> list[_Parameter]:
        """Some that lie evenly among all, others each time."""
        apart = max(1, len(self._parameters) // SOME)
        self._turn = (self._turn + 1) % apart
        return self._parameters[self._turn :: apart]


def _counts(value: Any) -> bool:
    return callable(value) and not isinstance(value, nn.Module | type)


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor without memory of its own
        return 0


def _sample(tensor: torch.Tensor | None) -> tuple[int, ...]:
    if tensor is None or not tensor.numel() or not tensor.is_contiguous() or _address(tensor) == 0:
        return ()
    flat = tensor.detach().view(-1)
    bits = flat.view(_WHOLE_NUMBERS[flat.element_size()]) if flat.element_size() in _WHOLE_NUMBERS else None
    if bits is None:
        return ()
    apart = max(1, bits.numel() // SAMPLES)
    return tuple(bits[::apart].tolist())
