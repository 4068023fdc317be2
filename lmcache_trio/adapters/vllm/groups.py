"""The KV groups of a model, from vLLM's `KVCacheConfig`, in the order of its block lists. vLLM is not imported here.

Refused by name, at start, because it would be wrong: context parallelism, whose blocks hold no consecutive tokens; a
cache of a kind that is not known here, or that drops tokens of which vLLM says nothing; states that vLLM does not keep
at the boundaries of its prefix cache. With more than one group also: a drafter's group, whose hits end a block earlier;
pipeline parallelism; a hit of which vLLM computes the last window again. The last three are right for no more than one
group of full attention, or could not be tried.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from lmcache_trio._core.keys import ChunkWish, chunk_tokens_for
from lmcache_trio.adapters import Group, Need
from lmcache_trio.adapters.scheduler.parts import HOLE
from lmcache_trio.errors import Misuse

__all__ = ["KVGroups", "find_groups", "specs_of", "token_bytes_of"]

_NULL = 0
"""vLLM's block for tokens of which it keeps nothing: they left the window, or lie before the state."""


@attrs.frozen
class KVGroups:
    """*ids* are vLLM's numbers of *groups*, *layers* the names of each one's layers. Scratch groups are left out.

    *block_tokens*: of which chunks are a multiple.
    """

    ids: tuple[int, ...]
    groups: tuple[Group, ...]
    layers: tuple[tuple[str, ...], ...]
    block_tokens: int

    @property
    def alone(self) -> bool:
        """Is there one group alone, which keeps the KV of all tokens?"""
        return len(self.groups) == 1 and self.groups[0].need is Need.EVERY

    @property
    def named(self) -> tuple[Group, ...]:
        """As the adapters take them: empty for one group that keeps the KV of all tokens."""
        return () if self.alone else self.groups

    def chunk_tokens_for(self, wish: ChunkWish) -> int | None:
        """The chunk's length that the engine states, the fewest whole blocks that reach *wish*; None: it states none.

        "auto": one block if there are states, because vLLM keeps them at a prompt's last block boundary, and only
        chunks of one block end there.
        """
        if wish != "auto":
            return chunk_tokens_for(wish, self.block_tokens)
        return self.block_tokens if any(group.need is Need.STATE for group in self.groups) else None

    def block_lists(self, block_ids: Sequence[Sequence[int]]) -> tuple[Sequence[int], ...]:
        """*block_ids* of all of vLLM's groups as the adapters take them: of these groups, with -1 for a hole."""
        return tuple(
            block_ids[i] if group.need is Need.EVERY else [HOLE if block == _NULL else block for block in block_ids[i]]
            for i, group in zip(self.ids, self.groups, strict=True)
        )

    def states(self, offered: Mapping[str, Iterable[tuple[int, int, int]]]) -> dict[str, list[tuple[int, int, int]]]:
        """(group, block, boundary in tokens) by request, of these groups, from vLLM's `boundary_state_offloads`."""
        return {
            request_id: [(self.ids.index(i), block, tokens) for i, block, tokens in found if i in self.ids]
            for request_id, found in offered.items()
        }

    def kept(self, kv_caches: Mapping[str, Any]) -> dict[str, Any]:
        """Those of *kv_caches* that are to be registered, by the name of the layer. `Misuse`: a layer is in no group,
        and shares the KV of no layer that is.
        """
        if self.alone:
            return dict(kv_caches)
        kept = {name: kv_caches[name] for names in self.layers for name in names if name in kv_caches}
        places = {_place(tensor) for tensor in kept.values()}
        for name, tensor in kv_caches.items():
            if name not in kept and _place(tensor) not in places:
                raise Misuse(f"layer {name!r} is in no KV group that can be cached")
        return kept


def find_groups(vllm_config: Any, kv_cache_config: Any) -> KVGroups:
    """The groups of this engine. `Misuse` names what cannot be cached."""
    parallel, found = vllm_config.parallel_config, kv_cache_config.kv_cache_groups
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise Misuse(f"{name} is {getattr(parallel, name)}: a rank's block has no consecutive tokens then; set 1")
    ids = tuple(kv_cache_config.prefix_cacheable_group_ids)
    groups = tuple(_group_of(found[i].kv_cache_spec) for i in ids)
    if not groups:
        raise Misuse("this model has no KV cache group of which a prefix can be cached")
    units = [group.block_tokens for group in groups if group.need is not Need.STATE]
    if len(groups) > 1 or not units:
        units.append(int(kv_cache_config.cache_hit_alignment_tokens or vllm_config.cache_config.block_size))
    if all(group.need is Need.LOCAL for group in groups):
        raise Misuse("this model has chunked local attention alone, which was not tried")
    layers = tuple(tuple(found[i].layer_names) for i in ids)
    made = KVGroups(ids, groups, layers, math.lcm(*units))
    if not made.alone or len(found) > 1:
        _check_several(vllm_config, found, ids)
    return made


def token_bytes_of(vllm_config: Any, kv_cache_config: Any, groups: KVGroups) -> int:
    """Bytes that one rank keeps per token, over all of *groups* but states; 0: they cannot be told.

    vLLM's scheduler knows no layer but those of the first pipeline stage, and one spec of each group. Hence what a
    block takes of vLLM's pool, which all groups share: the scheduler and each rank have the same number.
    """
    tensors, stages = kv_cache_config.kv_cache_tensors, int(vllm_config.parallel_config.pipeline_parallel_size)
    if not tensors:
        return 0
    block = int(tensors[0].size) // int(kv_cache_config.num_blocks)
    if stages > 1:  # stages differ in their number of layers
        group = kv_cache_config.kv_cache_groups[groups.ids[0]]
        pages = {int(spec.page_size_bytes) for spec in specs_of(group.kv_cache_spec)}
        page = pages.pop()
        if pages or block != page * len(group.layer_names):
            return 0  # and in their layers
        block = page * -(-int(vllm_config.model_config.get_total_num_hidden_layers()) // stages)
    return sum(block // group.block_tokens for group in groups.groups if group.need is not Need.STATE)


def _check_several(vllm_config: Any, found: Sequence[Any], ids: Sequence[int]) -> None:
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise Misuse(
            "pipeline_parallel_size is more than 1: a model with KV groups, sliding windows or states was not tried"
            " with it; set 1"
        )
    if drafters := [i for i in ids if found[i].is_eagle_group]:
        raise Misuse(
            f"KV cache group {drafters[0]} has layers of a drafter, whose hits end a block earlier than those of the"
            " model's own groups: leave out --speculative-config"
        )
    if len(ids) == 1 and len(found) > 1:
        names = _names([group.kv_cache_spec for group in found])
        raise Misuse(f"this model has scratch KV cache groups beside one that can be cached ({names})")
    for i, group in enumerate(found):
        if getattr(group, "host_resident", False):
            raise Misuse(f"KV cache group {i} lies in host memory (HiSparse), which cannot be moved")
        if any(getattr(spec, "prefix_replay_tokens", 0) for spec in specs_of(group.kv_cache_spec)):
            raise Misuse(f"of KV cache group {i} vLLM computes the last window of each hit again, which was not tried")


def _group_of(spec: Any) -> Group:
    specs = specs_of(spec)
    groups = {_group_of_one(one) for one in specs}
    if len(groups) != 1:
        raise Misuse(f"the layers of a KV cache group keep different tokens ({_names(specs)})")
    return groups.pop()


def _group_of_one(spec: Any) -> Group:
    kinds, block_tokens = {each.__name__ for each in type(spec).__mro__}, int(spec.block_size)
    if "MambaSpec" in kinds:
        if spec.mamba_cache_mode != "align" or spec.num_speculative_blocks:
            raise Misuse(
                f"this model keeps states, with mamba_cache_mode {spec.mamba_cache_mode!r} and"
                f" {spec.num_speculative_blocks} speculative blocks: states can be cached with --enable-prefix-caching"
                " (and in vLLM 0.32 --mamba-cache-mode align), without --speculative-config"
            )
        return Group(Need.STATE, 0, block_tokens)
    if "SlidingWindowSpec" in kinds:
        return Group(Need.WINDOW, int(spec.sliding_window) + int(spec.extra_retained_tokens), block_tokens)
    if "ChunkedLocalAttentionSpec" in kinds:
        return Group(Need.LOCAL, int(spec.attention_chunk_size), block_tokens)
    if "FullAttentionSpec" in kinds and "RSWASpec" not in kinds:
        return Group(Need.EVERY, 0, block_tokens)
    raise Misuse(
        f"this model's KV cache is a {type(spec).__name__}, which cannot be cached; full attention, sliding windows,"
        " chunked local attention and states can"
    )


def specs_of(spec: Any) -> list[Any]:
    """Those of the layers, where vLLM keeps several alike in one group."""
    return [*getattr(spec, "kv_cache_specs", {"": spec}).values()]


def _names(specs: Sequence[Any]) -> str:
    return ", ".join(sorted({type(one).__name__ for one in specs}))


def _place(tensor: Any) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)
