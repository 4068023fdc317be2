"""Does a model still compute with the weights that it began with? A cheap look, whenever a step is stored.

A change of the weights of a running engine needs a reset of its caches, because vLLM's own prefix cache would be wrong
too. If the reset is forgotten, the engine's KV must not get the names of other weights. PyTorch counts changes of a
tensor (`_version`), but vLLM's loaders write through `.data`, which is not counted; so contents are sampled as well.

Each look covers some other parameters: their identity, address and count of changes, and some of their values. It also
covers as many of the callables that modules keep, because a CPU's linear layers pack their weights into one, and leave
the parameter empty. So a change of all weights is noticed at once, and a change of a few within some looks. A small
change may be missed.

The watch keeps nothing alive: parameters may be freed while the engine sleeps. On a GPU the values are read on a stream
of their own, behind the work that was submitted when the step began, and beside its forward pass.
"""

import gc
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import attrs
import torch
from torch import nn

__all__ = ["WeightsWatch", "find_models", "submodule"]

SOME = 8
"""Parameters per look. On a busy CPU all of 320 took 0.9 ms, and each decode step may store; 8 of them take 0.3 ms."""
SAMPLES = 8
_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bits are compared, not values: a NaN differs from itself."""


def find_models(layers: Mapping[str, object]) -> list[nn.Module]:
    """The models of these layers, by name. vLLM gives a connector its attention layers, and nothing above them.

    It looks once through all objects of the garbage collector: 0.1 s for a million.
    """
    left = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Module)}
    found: list[nn.Module] = []
    if not left:
        return found
    for each in gc.get_objects():
        if not issubclass(type(each), nn.Module):  # isinstance would ask a proxy for its class
            continue
        mine = [name for name, layer in left.items() if submodule(each, name) is layer]
        if mine:
            found.append(each)
            for name in mine:
                del left[name]
            if not left:
                break
    return found


def submodule(module: nn.Module, name: str) -> nn.Module | None:
    """The module that *module* has under the path *name*. None: it has none. Nothing of the module's own is called."""
    for part in name.split("."):
        child = module.__dict__.get("_modules", {}).get(part)
        if child is None:
            return None
        module = child
    return module


@attrs.frozen
class _Parameter:
    """The place of a parameter, and how often it had been changed."""

    tensor: "weakref.ref[torch.Tensor]"
    address: int
    version: int

    def is_another(self) -> bool:
        tensor = self.tensor()
        return tensor is None or tensor.data_ptr() != self.address or tensor._version != self.version


@attrs.frozen
class _Kept:
    """A callable that a module kept under *name*."""

    module: "weakref.ref[nn.Module]"
    name: str
    identity: int

    def is_another(self) -> bool:
        module = self.module()
        return module is None or id(vars(module).get(self.name)) != self.identity


@attrs.frozen
class _Look:
    """The parameters and callables of one look. *values* are those at some places of the parameters."""

    parameters: list[_Parameter]
    kept: list[_Kept]
    values: list[int]


class WeightsWatch:
    """Compares the weights of *models* with what they were. *source* tells where they were loaded from."""

    def __init__(self, models: list[nn.Module], source: Callable[[], object]) -> None:
        self._models = [weakref.ref(model) for model in models]
        self._source = source
        self._turn = 0
        devices = {parameter.device for model in models for parameter in model.parameters() if parameter.is_cuda}
        self._stream = torch.cuda.Stream(devices.pop()) if devices else None  # type: ignore[no-untyped-call]
        self.take()

    def take(self) -> None:
        """The weights are right now: later looks compare with them."""
        self._loaded_from = self._source()
        self.begin()
        models = [model for model in (each() for each in self._models) if model is not None]
        parameters = {id(each): each for model in models for each in model.parameters() if _can_be_read(each)}
        tensors: list[torch.Tensor] = [*parameters.values()]
        kept = [
            _Kept(weakref.ref(module), name, id(value))
            for model in models
            for module in model.modules()
            for name, value in vars(module).items()
            if callable(value) and not isinstance(value, nn.Module | type)
        ]
        looks = max(1, len(tensors) // SOME)
        self._looks = [
            _Look(
                [_Parameter(weakref.ref(each), each.data_ptr(), each._version) for each in tensors[i::looks]],
                kept[i::looks],
                self._values(tensors[i::looks]),
            )
            for i in range(looks)
        ]

    def begin(self) -> None:
        """A step begins. The next look reads from a GPU behind the work that was submitted by now."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def changed(self) -> bool:
        """Does this look show other weights than `take` saw?"""
        self._turn = (self._turn + 1) % len(self._looks)
        look = self._looks[self._turn]
        if self._source() != self._loaded_from or any(each.is_another() for each in look.kept):
            return True
        if any(each.is_another() for each in look.parameters):
            return True
        return (
            self._values([tensor for each in look.parameters if (tensor := each.tensor()) is not None]) != look.values
        )

    def _values(self, tensors: list[torch.Tensor]) -> list[int]:
        samples: dict[torch.device, list[torch.Tensor]] = {}
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for tensor in tensors:
                if tensor.numel() and _is_dense(tensor):
                    samples.setdefault(tensor.device, []).append(_sample(tensor))
            return [value for some in samples.values() for value in torch.cat(some).tolist()]


def _can_be_read(tensor: torch.Tensor) -> bool:
    """Does the parameter have plain values in memory? One that is not loaded yet, or a sparse one, has none."""
    return (
        not isinstance(tensor, nn.UninitializedParameter)
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
        and not tensor.is_complex()
    )


def _is_dense(tensor: torch.Tensor) -> bool:
    """Do the parameter's values fill one range of memory, in any order? Those of a transposed one do."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return reach == tensor.numel() and min(tensor.stride(), default=1) > 0


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """At most 2 * SAMPLES values, spread evenly, as whole numbers."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    bits = flat.view(_WHOLE_NUMBERS[flat.element_size()])
    return bits[:: max(1, bits.numel() // SAMPLES)].to(torch.int64)
