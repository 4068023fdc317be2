"""The length of a hit, beside vLLM's own rule: `find_longest_cache_hit` of its cache coordinator, over the same parts.

vLLM's coordinator is the real one, made for the KV groups of each model; only its pool of blocks is ours, which has
the blocks of the parts that a test draws. Both are asked for at most one token less than the prompt has, because one
token has to be computed. In these the two differ, and here is why that is right:

- A part is there with all of its blocks or with none. With chunks of several blocks a prefix can end at a chunk's end
  alone. vLLM counts in chunks then too: its own unit of hits, `scheduler_block_size`, is set to one.
- vLLM's chunked local attention knows no unit but its block, so llama4 is drawn with chunks of one block.
- A drafter's groups end a block earlier in vLLM. They are refused by name beside other groups, and are not drawn.
- Groups with `extra_retained_tokens` need more of a window than a hit has to have in vLLM. That is a drafter's too.
- vLLM looks for states at finer boundaries than a block's end, if `prefix_match_unit` says so. No chunk ends there.
"""

import random
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import pytest

from lmcache_trio._core.groups import longest_hit
from lmcache_trio.adapters.vllm.groups import KVGroups, find_groups

pytestmark = pytest.mark.e2e

PROMPT_CHUNKS, EXAMPLES = 30, 500


@attrs.frozen
class Model:
    """*groups* in vLLM's order: (name of the spec, its tokens). *block* tokens of KV, *chunk* tokens of a chunk."""

    groups: Sequence[tuple[str, int]]
    block: int = 128
    chunk: int = 128


FULL, WINDOW, LOCAL, STATE = "FullAttentionSpec", "SlidingWindowSpec", "ChunkedLocalAttentionSpec", "MambaSpec"
MODELS: Mapping[str, Model] = {
    "gemma2": Model([(WINDOW, 512), (FULL, 0)]),
    "gemma3": Model([(WINDOW, 512), (WINDOW, 512), (FULL, 0)]),
    "gptoss": Model([(WINDOW, 128), (FULL, 0)]),
    "llama4": Model([(LOCAL, 1024), (LOCAL, 1024), (LOCAL, 1024), (FULL, 0)]),
    "mistral": Model([(WINDOW, 512)]),
    "qwen3next": Model([(STATE, 0), (STATE, 0), (STATE, 0), (FULL, 0)], block=544, chunk=544),
    "gemma3, chunks of two blocks": Model([(WINDOW, 512), (WINDOW, 512), (FULL, 0)], chunk=256),
    "gptoss, chunks of two blocks": Model([(WINDOW, 128), (FULL, 0)], chunk=256),
    "gptoss, chunks of eight blocks": Model([(WINDOW, 128), (FULL, 0)], block=32, chunk=256),
    "windows that end within a chunk": Model([(WINDOW, 300), (WINDOW, 1000), (FULL, 0)], block=64, chunk=256),
    "windows and states": Model([(WINDOW, 1024), (STATE, 0), (FULL, 0)], block=256, chunk=256),
    "windows alone": Model([(WINDOW, 512), (WINDOW, 4096)]),
}


class Pool:
    """vLLM's pool of blocks, with a block for each part that is there. Block hashes are its positions."""

    def __init__(self, model: Model, found: KVGroups, parts: Sequence[Sequence[bool]], block_class: Any) -> None:
        self.hash_block_size = model.block
        self.null_block, self._block = block_class(0), block_class(1)
        whole = model.chunk // model.block
        self._there = {
            (number, block)
            for number, group in enumerate(found.groups)
            for chunk, there in enumerate(parts[number])
            for block in range((chunk + 1) * whole - group.part_blocks(model.chunk), (chunk + 1) * whole)
            if there
        }

    def get_cached_block(self, block_hash: int, kv_cache_group_ids: list[int]) -> list[Any] | None:
        """The blocks with this hash; None unless there is one in each group."""
        if all((number, block_hash) in self._there for number in kv_cache_group_ids):
            return [self._block] * len(kv_cache_group_ids)
        return None


class Vllm:
    """vLLM's cache coordinator for *model*, and our groups of the same `KVCacheConfig`."""

    def __init__(self, model: Model) -> None:
        with warnings.catch_warnings(action="ignore"):  # importing vLLM warns of what torch deprecates
            import torch
            from vllm.v1.core.kv_cache_coordinator import get_kv_cache_coordinator
            from vllm.v1.core.kv_cache_utils import KVCacheBlock
            from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

        self.model, self._block_class = model, KVCacheBlock
        groups = [
            KVCacheGroupSpec([f"layer {i}"], _spec(name, tokens, model.block, torch.float32))
            for i, (name, tokens) in enumerate(model.groups)
        ]
        config = KVCacheConfig(8, [], groups, cache_hit_alignment_tokens=model.block)
        self.found = find_groups(_Configuration(), config)
        self._coordinator = get_kv_cache_coordinator(
            config,
            max_model_len=1 << 16,
            max_in_flight_tokens=2048,
            use_eagle=False,
            enable_caching=True,
            enable_kv_cache_events=False,
            dcp_world_size=1,
            pcp_world_size=1,
            scheduler_block_size=model.chunk,
            hash_block_size=model.block,
        )

    def longest(self, parts: Sequence[Sequence[bool]], tokens: int) -> int:
        """Tokens of the longest hit, of a prompt of *tokens*, by vLLM."""
        pool = Pool(self.model, self.found, parts, self._block_class)
        self._coordinator.block_pool = pool
        for manager in self._coordinator.single_type_managers:
            manager.block_pool = pool
        _, hit, _ = self._coordinator.find_longest_cache_hit(list(range(tokens // self.model.block)), tokens - 1)
        return int(hit)


@attrs.frozen
class _Parallel:
    pipeline_parallel_size: int = 1


@attrs.frozen
class _Configuration:
    """What `find_groups` reads of vLLM's configuration."""

    parallel_config: _Parallel = _Parallel()


def _spec(name: str, tokens: int, block: int, dtype: Any) -> Any:
    from vllm.v1 import kv_cache_interface

    if name == STATE:
        return kv_cache_interface.MambaSpec(block, shapes=((4, 128),), dtypes=(dtype,), mamba_cache_mode="align")
    more = {WINDOW: {"sliding_window": tokens}, LOCAL: {"attention_chunk_size": tokens}}.get(name, {})
    return getattr(kv_cache_interface, name)(block_size=block, num_kv_heads=4, head_size=32, dtype=dtype, **more)


def draw_parts(source: random.Random, groups: int) -> list[list[bool]]:
    """Which parts are there, by group: few of them, or all but few."""
    drawn = []
    for _ in range(groups):
        odd, most = set(source.sample(range(PROMPT_CHUNKS), source.randrange(6))), source.random() < 0.8
        drawn.append([(chunk in odd) != most for chunk in range(PROMPT_CHUNKS)])
    return drawn


@pytest.mark.parametrize("name", MODELS)
def test_a_hit_is_as_long_as_in_vllms_own_prefix_cache(name: str) -> None:
    model = MODELS[name]
    vllm = Vllm(model)
    groups, chunk = vllm.found.groups, model.chunk
    seen = set[int]()
    for seed in range(EXAMPLES):
        source = random.Random(seed)
        tokens, parts = source.randint(1, PROMPT_CHUNKS * chunk), draw_parts(source, len(groups))
        hit = longest_hit(partial(is_there, parts), groups, chunk, (tokens - 1) // chunk) * chunk
        assert hit == vllm.longest(parts, tokens), f"seed {seed}: a prompt of {tokens} tokens, {parts}"
        seen.add(hit)
    assert len(seen) > PROMPT_CHUNKS // 2, "the drawn parts tell little"


def is_there(parts: Sequence[Sequence[bool]], group: int, chunk: int) -> bool:
    return parts[group][chunk]
