"""Which ranks hold the same KV heads, as the layers of a worker's model say."""

from torch import nn

from lmcache_trio.adapters.vllm.replicas import are_replicated


class Projection(nn.Module):
    def __init__(self, replicas: int) -> None:
        super().__init__()
        self.num_kv_head_replicas: int = replicas


class Attention(nn.Module):
    """An attention layer of vLLM's beside its projection."""

    def __init__(self, replicas: int | None) -> None:
        super().__init__()
        self.attn = nn.Identity()
        self.qkv_proj = nn.Identity() if replicas is None else Projection(replicas)


def model(*replicas: int | None) -> nn.Module:
    layers = nn.ModuleList([Attention(each) for each in replicas])
    return nn.ModuleDict({"layers": layers, "vision": nn.ModuleList([Attention(1)])})


def test_every_layer_that_keeps_kv_must_say_so() -> None:
    names = ["layers.0.attn", "layers.1.attn"]
    assert are_replicated([model(2, 2)], names, 2)
    assert are_replicated([model(4, 2)], names, 2)
    assert not are_replicated([model(2, 1)], names, 2)
    assert not are_replicated([model(2, None)], names, 2)
    assert not are_replicated([model(2, 3)], names, 2)
    assert not are_replicated([], names, 2)
    assert not are_replicated([model(2)], names, 2)


def test_a_layer_is_looked_for_in_each_model() -> None:
    drafter = nn.ModuleDict({"drafter": Attention(2)})
    assert are_replicated([model(2), drafter], ["layers.0.attn", "drafter.attn"], 2)
