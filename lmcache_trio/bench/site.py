"""One engine at one server: its scheduler's and its worker's side, over paged KV in private or in shared memory."""

import os
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import xxhash

from lmcache_trio._wire.messages import Message
from lmcache_trio.adapters import PollingSchedulerAdapter, WorkerAdapter
from lmcache_trio.adapters.shared_kv import shared_tensor
from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.adapters.worker.adapter import Path
from lmcache_trio.bench.settings import ROTATION, BenchSettings
from lmcache_trio.client import Client
from lmcache_trio.errors import Unavailable
from lmcache_trio.threads import Handoff

__all__ = ["Site", "private_kv", "shared_kv"]

_ARENA_SECONDS = 120.0
"""For a server to take its arena: 4 GB/s where memory is free."""


class Site:
    """An engine whose KV is *kv* and is moved by *path*; `Unavailable` says why it can't be by that."""

    def __init__(
        self, settings: BenchSettings, address: str, run: str, kv: Mapping[str, torch.Tensor], path: Path
    ) -> None:
        engine = f"bench {run} {os.getpid()} {path}"
        self.kv = kv
        self.stored: dict[str, list[int]] = {}
        """What the last store left in memory, for a retrieve."""
        self.stored_hash = 0
        """Of the bytes of the last of them."""
        self.copied_at = 0.0
        """When the last copy ended, before its commit: the moment from which a writeback counts."""
        self.scheduler = PollingSchedulerAdapter(
            address,
            engine_id=engine,
            identity=["lmcache-trio bench", run],
            block_tokens=settings.kv.block_tokens,
            chunk_tokens=settings.kv.chunk_tokens,
            lookup_timeout=30.0,
        )
        self.worker = WorkerAdapter(
            address,
            engine_id=engine,
            block_tokens=settings.kv.block_tokens,
            chunk_tokens=settings.kv.chunk_tokens,
            path=path,
            probe=self._note_copied,
        )
        try:
            self._set_up(address, path)
        except Unavailable:
            self.close()
            raise

    def _note_copied(self, point: str, spec: StoreSpec | LoadSpec) -> None:
        if point == "before commit":
            self.copied_at = time.perf_counter()

    def _set_up(self, address: str, path: Path) -> None:
        if self.scheduler._link.client is None or self.worker._link.client is None:
            raise Unavailable(f"no server answers at {address}")
        self._warm_arena(self.worker._link.client)
        self.worker.register_kv_caches(self.kv)
        self.scheduler._link.call(self.client.ping, timeout=10)  # news of the namespace came before its reply
        if self.worker.path != path:
            raise Unavailable(f"its KV took the path {self.worker.path!r}: {self.worker.path_reason}")
        if not self.scheduler.is_healthy():
            raise Unavailable("the server did not take this engine's layout; its log says why")

    @property
    def client(self) -> Client:
        """The scheduler's connection: what an adapter's lookups go through."""
        client = self.scheduler._link.client
        if client is None:
            raise Unavailable("the server is gone")
        return client

    @staticmethod
    def _warm_arena(client: Client) -> None:
        """Wait until the server has its arena, and put all of it into this process' page tables."""
        if client.arena is None:
            raise Unavailable(f"this client got no arena: {client.arena_note}")
        grown: Handoff[bool] = Handoff()

        def look(message: Message) -> None:
            if client.taken >= client.arena_size:
                grown.set(True)

        client.on_push = look
        if client.taken < client.arena_size and grown.wait(_ARENA_SECONDS) is None:
            raise Unavailable(f"the server took {client.taken} of {client.arena_size} bytes of its arena, and no more")
        client.arena._populate(0, client.arena_size)

    def store_specs(self, prompts: Mapping[str, list[int]], blocks: Callable[[int], list[int]]) -> list[StoreSpec]:
        for request_id, tokens in prompts.items():
            self.scheduler.extend(request_id, tokens)
        return [self.scheduler.store_spec(request_id, 0, blocks(i)) for i, request_id in enumerate(prompts)]

    def load_specs(self, prompts: Mapping[str, list[int]], blocks: Callable[[int], list[int]]) -> list[LoadSpec]:
        """Look *prompts* up: all must be there."""
        specs = []
        for i, (request_id, tokens) in enumerate(prompts.items()):
            self.lookup(request_id, tokens)
            spec = self.scheduler.update_after_alloc(request_id, len(tokens), block_ids=blocks(i))
            assert spec is not None
            specs.append(spec)
        return specs

    def lookup(self, request_id: str, tokens: list[int]) -> None:
        self.scheduler.maybe_submit_lookup_request(request_id, tokens)
        found = self.scheduler.check_lookup_result(request_id)
        if found != len(tokens):
            raise Unavailable(f"{found} of {len(tokens)} tokens were found: something was evicted or dropped")

    def end(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.scheduler.end_session(request_id)
        self.scheduler._link.call(self.client.ping, timeout=30)  # in order: they have ended now

    def hash_of(self, blocks: Sequence[int]) -> int:
        """Of the bytes of *blocks*, in all layers."""
        found = xxhash.xxh3_64()
        index = torch.tensor(blocks)
        for tensor in self.kv.values():
            found.update(tensor[:, index].view(torch.uint8).flatten().numpy().data)
        return found.intdigest()

    def count_stored(self) -> int:
        return self.worker.statistics().get("stored_chunks", 0)

    def close(self) -> None:
        self.worker.shutdown()
        self.scheduler.shutdown()


def private_kv(settings: BenchSettings) -> dict[str, torch.Tensor]:
    """As most engines make it: an allocation a layer."""
    size = _layer_bytes(settings)
    return _filled(settings, [torch.empty(size, dtype=torch.uint8) for _ in range(settings.kv.layers)])


def shared_kv(settings: BenchSettings) -> dict[str, torch.Tensor]:
    """The same in one piece of memory that the server can open. `Unavailable`: there is not so much."""
    size, layers = _layer_bytes(settings), settings.kv.layers
    whole = shared_tensor(layers * size)
    return _filled(settings, [whole[i * size : (i + 1) * size] for i in range(layers)])


def _layer_bytes(settings: BenchSettings) -> int:
    return ROTATION * settings.operation_bytes // settings.kv.layers


def _filled(settings: BenchSettings, layers: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each of *layers* as (2, blocks, block tokens, heads, head dim). No two blocks are alike."""
    kv = settings.kv
    blocks = ROTATION * settings.operation_tokens // kv.block_tokens
    shape = (2, blocks, kv.block_tokens, kv.kv_heads, kv.head_dim)
    made = {}
    for i, layer in enumerate(layers):
        flat = layer.numpy()
        words = flat[: flat.size // 4 * 4].view(np.uint32)
        words[:] = np.arange(i * words.size, (i + 1) * words.size, dtype=np.uint64).astype(np.uint32)
        made[f"layers.{i}"] = layer.view(getattr(torch, kv.torch_dtype)).view(shape)
    return made
