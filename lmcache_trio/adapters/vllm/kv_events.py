"""vLLM's KV events of what the server has in memory, of the medium CPU, and on tiers, of the medium STORAGE.

`events` decides what is told.
"""

# vLLM is not installed where this is type-checked: pyright: reportMissingImports=false

from collections.abc import Iterator
from typing import Any

import attrs
from vllm.distributed.kv_events import MEDIUM_CPU, MEDIUM_STORAGE, BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, maybe_convert_block_hash, to_event_extra_keys
from vllm.v1.kv_cache_interface import get_kv_cache_spec_kind, get_kv_cache_spec_sliding_window

from lmcache_trio.adapters.vllm.events import BlockEvents, BlocksStored
from lmcache_trio.adapters.vllm.groups import KVGroups

__all__ = ["KVEvents", "are_on"]


@attrs.frozen
class About:
    """What an event tells of a request. *extra_keys*: by block of *hash_tokens* tokens, None if there are none."""

    lora_id: int | None
    lora_name: str | None
    session_id: str | None
    extra_keys: list[Any] | None


def are_on(vllm_config: Any) -> bool:
    """Are vLLM's KV events enabled?"""
    events = vllm_config.kv_events_config
    return events is not None and bool(events.enable_kv_cache_events)


class KVEvents:
    """The events of one engine, in vLLM's words."""

    def __init__(self, cache: Any, groups: KVGroups, kv_cache_config: Any) -> None:
        self._hash_tokens = int(kv_cache_config.hash_block_size)
        self.blocks = BlockEvents(cache, groups.groups, self._hash_tokens, self._describe)
        self._ids = groups.ids
        specs = [kv_cache_config.kv_cache_groups[i].kv_cache_spec for i in groups.ids]
        self._kinds = [get_kv_cache_spec_kind(spec).value for spec in specs]
        self._windows = [get_kv_cache_spec_sliding_window(spec) for spec in specs]

    def take(self) -> Iterator[KVCacheEvent]:
        """The events since the last call, in order."""
        for event in self.blocks.take():
            medium = MEDIUM_STORAGE if event.on_tier else MEDIUM_CPU
            hashes = [maybe_convert_block_hash(each) for each in event.hashes]
            if not isinstance(event, BlocksStored):
                yield BlockRemoved(block_hashes=hashes, medium=medium, group_idx=self._ids[event.group])
                continue
            about: About = event.about
            keys = about.extra_keys
            if keys is not None:  # of the blocks of the part; a block's are those of its hashes
                step = event.block_tokens // self._hash_tokens
                keys = keys[len(keys) - len(hashes) * step :]
                keys = [next(filter(None, keys[i : i + step]), None) for i in range(0, len(keys), step)]
            yield BlockStored(
                block_hashes=hashes,
                parent_block_hash=None if event.parent is None else maybe_convert_block_hash(event.parent),
                token_ids=list(event.token_ids),
                block_size=event.block_tokens,
                lora_id=about.lora_id,
                medium=medium,
                lora_name=about.lora_name,
                extra_keys=to_event_extra_keys(keys),
                group_idx=self._ids[event.group],
                kv_cache_spec_kind=self._kinds[event.group],
                kv_cache_spec_sliding_window=self._windows[event.group],
                session_id=about.session_id,
            )

    def _describe(self, request: Any, first: int, end: int) -> About:
        lora, keys = request.lora_request, None
        if lora is not None or request.mm_features or request.cache_salt or request.prompt_embeds is not None:
            width = self._hash_tokens
            keys = [generate_block_hash_extra_keys(request, i, i + width, 0)[0] for i in range(first, end, width)]
        return About(
            lora.adapter_id if lora is not None else None,
            lora.name if lora is not None else None,
            getattr(request, "session_id", None),
            keys,
        )
