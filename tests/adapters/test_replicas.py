"""Replicas: workers that hold the same bytes. One of them stores a chunk, and each of them loads it."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from lmcache_trio.adapters import PollingSchedulerAdapter, WorkerAdapter
from lmcache_trio.errors import Misuse
from lmcache_trio.testing.sides import BLOCK, CHUNK, ServerProcess, make_kv, same_blocks, shared_kv, wait_until

TOKENS = list(range(3 * CHUNK))
BLOCKS = list(range(len(TOKENS) // BLOCK))
INTO = list(range(20, 20 + len(BLOCKS)))
PATHS = ["shm", "device"]


class Engine:
    """A scheduler and two shards of two replicas each. Replicas hold the same bytes in BLOCKS."""

    def __init__(self, address: str, name: str, path: str) -> None:
        same: dict[str, Any] = {"engine_id": name, "block_tokens": BLOCK, "shards": 2, "replicas": 2}
        same["connect_timeout"] = 30.0
        self.scheduler = PollingSchedulerAdapter(address, identity=["a model"], **same)
        self.kv = [(shared_kv if path == "device" else make_kv)(rank // 2) for rank in range(4)]
        self.workers = [
            WorkerAdapter(address, shard=rank // 2, replica=rank % 2, reply_timeout=30.0, path=path, **same)  # type: ignore[arg-type]
            for rank in range(4)
        ]

    def register(self, *ranks: int) -> None:
        for rank in ranks:
            self.workers[rank].register_kv_caches(self.kv[rank])

    def store(self, request_id: str, *ranks: int) -> None:
        self.scheduler.extend(request_id, TOKENS)
        spec = self.scheduler.store_spec(request_id, 0, BLOCKS)
        for rank in ranks:
            self.workers[rank].store_now([spec])

    def hit(self, name: str) -> int | None:
        self.scheduler.maybe_submit_lookup_request(name, TOKENS)
        return self.scheduler.check_lookup_result(name)

    def close(self) -> None:
        for worker in self.workers:
            worker.shutdown()
        self.scheduler.shutdown()


@pytest.fixture(params=PATHS)
def engine(live_server: ServerProcess, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with ExitStack() as stack:
        made = Engine(live_server.address, "replicated", request.param)
        stack.callback(made.close)
        yield made


def test_the_server_holds_once_what_replicas_hold_alike_and_each_of_them_loads_it(
    engine: Engine, live_server: ServerProcess
) -> None:
    engine.register(0, 1, 2)
    assert not engine.scheduler.is_healthy()  # one replica could not load yet
    engine.register(3)
    wait_until(engine.scheduler.is_healthy)
    engine.store("r", 0, 1, 2, 3)
    stored = [worker.statistics().get("stored_chunks", 0) for worker in engine.workers]
    assert stored == [3, 0, 3, 0]
    assert live_server.statistics()["held"]["slots_ready"] == 3 * 2
    assert engine.hit("q") == len(TOKENS)
    spec = engine.scheduler.update_after_alloc("q", len(TOKENS), block_ids=INTO)
    assert spec is not None
    right = make_kv(0), make_kv(1)
    for rank, worker in enumerate(engine.workers):
        worker.retrieve_now([spec])
        assert worker.take_failed_blocks() == set()
        assert same_blocks(engine.kv[rank], INTO, right[rank // 2], BLOCKS)


def test_any_replica_may_be_the_one_that_stores(engine: Engine) -> None:
    engine.register(0, 1, 2, 3)
    wait_until(engine.scheduler.is_healthy)
    engine.store("r", 1, 3, 2, 0)
    assert [worker.statistics().get("stored_chunks", 0) for worker in engine.workers] == [0, 3, 0, 3]
    assert engine.hit("q") == len(TOKENS)


def test_an_engine_whose_replicas_differ_in_layout_has_no_cache(engine: Engine) -> None:
    engine.register(0, 1, 2, 3)
    wait_until(engine.scheduler.is_healthy)
    former = engine.kv[3]
    engine.kv[3] = dict(list(former.items())[:1])
    engine.register(3)
    wait_until(lambda: not engine.scheduler.is_healthy())
    assert engine.hit("q") == 0
    engine.kv[3] = former
    engine.register(3)
    wait_until(engine.scheduler.is_healthy)


def test_a_wrong_replica_is_named() -> None:
    for wrong in ({"replica": 2, "replicas": 2}, {"replica": -1}, {"replicas": 0}):
        with pytest.raises(Misuse, match="replica"):
            WorkerAdapter("unix:///nowhere", engine_id="e", block_tokens=BLOCK, **wrong)  # type: ignore[arg-type]
