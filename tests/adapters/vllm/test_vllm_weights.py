"""Other weights in a running model are noticed, however they were put there, and the same ones never are."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lmcache_trio.adapters.vllm.weights import SOME, WeightsWatch, find_models


class Model(nn.Module):
    """Layers as vLLM nests them, and one that keeps its weights in a callable, as on a CPU."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)) for _ in range(layers))
        self.packed = nn.Linear(16, 16)
        self.pack(self.packed.weight.detach().clone())

    def pack(self, weight: torch.Tensor) -> None:
        self.packed.compute = lambda hidden: hidden @ weight  # type: ignore[assignment]
        self.packed.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        found: torch.Tensor = self.packed.compute(hidden)  # type: ignore[operator]
        return found


def write_through_data(model: Model) -> None:
    """As vLLM's loaders do, which PyTorch does not count."""
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data + 1)


def write_in_place(model: Model) -> None:
    with torch.no_grad():
        model.get_parameter("layers.2.0.weight")[0, 0] += 1


def put_others_in_place(model: Model) -> None:
    model.get_submodule("layers.3.1").weight = nn.Parameter(torch.ones(16))


def give_other_memory(model: Model) -> None:
    model.embed.weight.data = model.embed.weight.data.clone()


def pack_anew(model: Model) -> None:
    model.pack(torch.ones(16, 16))


@pytest.mark.parametrize(
    "change", [write_through_data, write_in_place, put_others_in_place, give_other_memory, pack_anew]
)
def test_other_weights_are_noticed_until_they_are_taken_for_the_right_ones(change: Callable[[Model], None]) -> None:
    model = Model()
    watch = WeightsWatch([model], lambda: "here")
    change(model)
    assert seen(watch, model)
    watch.take()
    assert not seen(watch, model)


def seen(watch: WeightsWatch, model: Model) -> bool:
    """In one of as many looks as it takes to see all of the model."""
    return any(watch.changed() for _ in range(len(list(model.parameters())) // SOME + 1))


def test_one_tensor_written_through_its_data_is_noticed_within_some_looks() -> None:
    model = Model(layers=3 * SOME)
    watch = WeightsWatch([model], lambda: "here")
    model.get_parameter("layers.7.0.weight").data.add_(1)
    assert seen(watch, model)


def test_other_weights_everywhere_are_noticed_at_the_first_look() -> None:
    model = Model(layers=3 * SOME)
    for _ in range(3):
        watch = WeightsWatch([model], lambda: "here")
        assert not watch.changed()
        write_through_data(model)
        assert watch.changed()


def test_a_model_that_computes_keeps_its_weights() -> None:
    model = Model()
    watch = WeightsWatch([model], lambda: "here")
    for _ in range(20):
        model(torch.arange(8))
        assert not watch.changed()


def test_weights_from_another_place_are_others() -> None:
    place = ["here"]
    watch = WeightsWatch([Model()], lambda: place[0])
    place[0] = "there"
    assert watch.changed()


def test_nan_is_no_change() -> None:
    model = Model()
    model.embed.weight.data.fill_(float("nan"))
    watch = WeightsWatch([model], lambda: "here")
    assert not watch.changed()


def test_a_model_is_found_by_its_layers_and_not_kept_alive() -> None:
    model, drafter = Model(), Model(layers=6)
    layers: dict[str, object] = {name: model.get_submodule(name) for name in ("layers.0.0", "layers.3.0")}
    assert find_models(layers) == [model]
    layers["layers.5.0"] = drafter.get_submodule("layers.5.0")
    assert {id(each) for each in find_models(layers)} == {id(model), id(drafter)}
    assert find_models({}) == []
    watch = WeightsWatch([model], lambda: "here")
    del model, layers
    assert watch.changed(), "nobody has these weights any more"


def holding(tensor: torch.Tensor) -> nn.Module:
    model = nn.Module()
    model.register_parameter("plain", nn.Parameter(torch.zeros(100)))
    odd = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    model.register_parameter("odd", odd)
    return model


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(100, device="meta"),
        torch.zeros(10, 10).to_sparse(),
        torch.zeros(100, dtype=torch.complex128),
        torch.zeros(0),
        torch.tensor(1.0),
        torch.zeros(1, 4).expand(10, 4),
        nn.UninitializedParameter(),
    ],
    ids=["meta", "sparse", "complex", "empty", "scalar", "expanded", "not loaded"],
)
def test_a_parameter_without_plain_values_ends_nothing_and_the_others_are_seen(tensor: torch.Tensor) -> None:
    model = holding(tensor)
    watch = WeightsWatch([model], lambda: 0)
    assert not watch.changed()
    model.get_parameter("plain").data.add_(1)
    assert watch.changed()


def test_a_transposed_parameter_is_seen() -> None:
    """Kernels of float8 keep their weights so."""
    model = holding(torch.zeros(10, 20).t())
    watch = WeightsWatch([model], lambda: 0)
    assert not watch.changed()
    model.get_parameter("odd").data.add_(1)
    assert watch.changed()
