"""A synchronous engine with a cache beside it: it looks a prompt up, loads the hit, computes the rest and stores it."""

from collections.abc import Callable, Mapping, Sequence

import torch

from lmcache_trio.adapters import PollingSchedulerAdapter, WorkerAdapter

BLOCK_TOKENS = 16
Compute = Callable[[Sequence[int], int, Sequence[int]], None]
"""Computes the KV of a prompt from a token on, into the engine's blocks."""


class CachedEngine:
    """One engine process at one server. *kv*: the engine's paged KV, one tensor per layer."""

    def __init__(self, address: str, engine_id: str, kv: Mapping[str, torch.Tensor], compute: Compute) -> None:
        self.compute = compute
        self.scheduler = PollingSchedulerAdapter(
            address, engine_id=engine_id, identity=["my model", "revision 3"], block_tokens=BLOCK_TOKENS
        )
        self.worker = WorkerAdapter(address, engine_id=engine_id, block_tokens=BLOCK_TOKENS)
        self.worker.register_kv_caches(kv)

    def serve(self, request_id: str, tokens: Sequence[int], blocks: Sequence[int]) -> int:
        """Fill *blocks* with the KV of *tokens*. Returns how many leading tokens came from the cache."""
        # At least one token is left to compute: without it there are no logits.
        self.scheduler.maybe_submit_lookup_request(request_id, tokens, max_tokens=len(tokens) - 1)
        hit = self.scheduler.check_lookup_result(request_id)  # bounded by lookup_timeout; late is 0
        hit = self._load(request_id, hit, blocks)
        self.compute(tokens, hit, blocks)
        self._store(request_id, tokens, hit, blocks)
        self.scheduler.end_session(request_id)
        return hit

    def _load(self, request_id: str, hit: int, blocks: Sequence[int]) -> int:
        spec = self.scheduler.update_after_alloc(request_id, hit, block_ids=blocks[: hit // BLOCK_TOKENS])
        if spec is None:
            return 0
        self.worker.retrieve_now([spec])
        failed = self.worker.take_failed_blocks()  # a server that died in the middle, say: compute them instead
        return 0 if failed else hit

    def _store(self, request_id: str, tokens: Sequence[int], hit: int, blocks: Sequence[int]) -> None:
        chunk = self.scheduler.chunk_tokens
        first, full = hit // chunk, len(tokens) // chunk
        if full > first:
            self.scheduler.extend(request_id, tokens)
            width = self.scheduler.num_blocks_per_chunk()
            spec = self.scheduler.store_spec(request_id, first, blocks[first * width : full * width])
            self.worker.store_now([spec])  # `submit_store` does it in the background

    def close(self) -> None:
        """Leave the server."""
        self.worker.shutdown()
        self.scheduler.shutdown()
