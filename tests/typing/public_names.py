"""What type checkers say of the public names: checked by `nox -s typing`, never run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, assert_type

import torch

from lmcache_trio import (
    Client,
    Config,
    ConfigError,
    Misuse,
    Role,
    Server,
    chain_digests,
    load_config,
    open_client,
    open_server,
    seed_of,
)
from lmcache_trio.abc import Load, Record, Tier
from lmcache_trio.adapters import LoadSpec, PollingSchedulerAdapter, SchedulerAdapter, StoreSpec, WorkerAdapter
from lmcache_trio.threads import Portal, offload


async def the_library() -> None:
    config = load_config(Path("lmcache-trio.toml"), ["memory.size=1GiB"])
    assert_type(config, Config)
    async with open_server(config) as server:
        assert_type(server, Server)
        assert_type(server.address, str)
        async with open_client(server.address, role=Role.WORKER, engine="model") as client:
            assert_type(client, Client)
            assert_type(await client.statistics(), dict[str, Any])
            digests = chain_digests(seed_of("model"), range(512), client.chunk_tokens)
            assert_type(digests, list[bytes])
            answer = await client.lookup(1, digests)
            assert_type(answer.chunks, int)
            async with client.retrieving(answer.lease, 0, answer.chunks) as slots:
                assert_type(slots, list[memoryview])
            async with client.storing(1, b"", digests) as storing:
                assert_type(storing.slots, dict[int, memoryview])


def a_scheduler(adapter: SchedulerAdapter) -> None:
    adapter.maybe_submit_lookup_request("request", [1, 2, 3], max_tokens=2)
    assert_type(adapter.check_lookup_result("request"), int | None)
    assert_type(adapter.update_after_alloc("request", 256, block_ids=range(16)), LoadSpec | None)
    assert_type(adapter.store_spec("request", 0, range(16)), StoreSpec)
    lists = [range(16), [-1, -1, 7, 8]]
    assert_type(adapter.loads_after_alloc("request", 256, blocks=lists), tuple[LoadSpec, ...])
    assert_type(adapter.store_specs("request", 0, 1, lists), tuple[StoreSpec, ...])
    assert_type(adapter.state_spec("request", 1, 256, 3), StoreSpec | None)
    assert_type(adapter.reset_cache(), bool)


def a_polling_scheduler_is_a_scheduler(adapter: PollingSchedulerAdapter) -> None:
    a_scheduler(adapter)


def a_worker(adapter: WorkerAdapter, tensors: dict[str, torch.Tensor], stores: Sequence[StoreSpec]) -> None:
    adapter.register_kv_caches(tensors)
    for spec in stores:
        adapter.submit_store(spec)
    assert_type(adapter.take_finished(), tuple[set[str], set[str]])
    assert_type(adapter.take_failed_blocks(), set[int])
    assert_type(adapter.take_failed_requests(), set[str])


async def a_tier(tier: Tier, load: Load, record: Record) -> None:
    assert_type(await tier.load([load]), Sequence[bool])
    assert_type(await tier.store([record]), Sequence[bool])


async def threads(portal: Portal) -> None:
    assert_type(await offload(len, "abc"), int)
    assert_type(portal.alive, bool)


def errors() -> None:
    error: Misuse = ConfigError("memory.size", "is wrong")
    print(error)
