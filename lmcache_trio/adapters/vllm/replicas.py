"""How many tensor-parallel ranks hold the same KV.

vLLM tells it for latent KV (`kv_tp_replicas`). Where a model has fewer KV heads than ranks, its projections replicate
the heads over consecutive ranks. The configuration says how many heads there are, and each worker looks whether the
layers of its model are made so.
"""

# vLLM is not installed where this is type-checked: pyright: reportMissingImports=false

from collections.abc import Iterable, Sequence
from typing import Any

from lmcache_trio.adapters.vllm.groups import specs_of
from lmcache_trio.adapters.vllm.weights import submodule

__all__ = ["are_replicated", "replicas_of"]


def replicas_of(vllm_config: Any, kv_cache_config: Any) -> int:
    """Consecutive ranks that hold the same KV; 1: none do, or it cannot be told."""
    from vllm.v1.kv_cache_interface import AttentionSpec

    told, parallel = int(kv_cache_config.kv_tp_replicas), vllm_config.parallel_config
    ranks = int(parallel.tensor_parallel_size)
    if told > 1 or ranks == 1 or getattr(parallel, "decode_context_parallel_size", 1) > 1:
        return told
    each = [one for group in kv_cache_config.kv_cache_groups for one in specs_of(group.kv_cache_spec)]
    heads = int(vllm_config.model_config.get_total_num_kv_heads())
    if any(not isinstance(one, AttentionSpec) or one.num_kv_heads != 1 for one in each) or heads < 1 or ranks % heads:
        return 1
    return ranks // heads


def are_replicated(models: Sequence[Any], layers: Iterable[str], replicas: int) -> bool:
    """Whether the projection beside each of *layers*, by name, replicates its KV heads over *replicas* ranks."""
    for layer in layers:
        where = layer.rpartition(".")[0]
        beside = [module for model in models if (module := submodule(model, where)) is not None]
        found = [getattr(child, "num_kv_head_replicas", 0) for module in beside for child in module.children()]
        projections = [count for count in found if count]
        if not projections or any(count % replicas for count in projections):
            return False
    return True
