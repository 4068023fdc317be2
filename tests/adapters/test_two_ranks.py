"""Two ranks of one engine: a chunk is what both computed in one session, or nothing."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from lmcache_trio.adapters import PollingSchedulerAdapter, WorkerAdapter
from lmcache_trio.testing.sides import BLOCK, CHUNK, ServerProcess, make_kv, same_blocks, wait_until

TOKENS = list(range(3 * CHUNK))
BLOCKS = list(range(len(TOKENS) // BLOCK))
INTO = list(range(20, 20 + len(BLOCKS)))


class Engine:
    """A scheduler and two workers, whose KV is made of *seed* and their rank."""

    def __init__(self, address: str, name: str, seed: int) -> None:
        same: dict[str, Any] = {"engine_id": name, "block_tokens": BLOCK, "shards": 2, "connect_timeout": 30.0}
        self.scheduler = PollingSchedulerAdapter(address, identity=["a model"], **same)
        self.workers = [WorkerAdapter(address, shard=rank, reply_timeout=30.0, **same) for rank in range(2)]
        self.kv = [make_kv(seed + rank) for rank in range(2)]
        for worker, kv in zip(self.workers, self.kv, strict=True):
            worker.register_kv_caches(kv)
        wait_until(self.scheduler.is_healthy)

    def store(self, *ranks: int) -> None:
        """*ranks* store what they have in BLOCKS, for the session that the request "r" has now."""
        self.scheduler.extend("r", TOKENS)
        spec = self.scheduler.store_spec("r", 0, BLOCKS)
        for rank in ranks:
            self.workers[rank].store_now([spec])

    def hit(self, name: str) -> int | None:
        """How many tokens the request *name* may load."""
        self.scheduler.maybe_submit_lookup_request(name, TOKENS)
        return self.scheduler.check_lookup_result(name)

    def close(self) -> None:
        for worker in self.workers:
            worker.shutdown()
        self.scheduler.shutdown()


@pytest.fixture
def engines(live_server: ServerProcess) -> Iterator[list[Engine]]:
    with ExitStack() as stack:
        made = [Engine(live_server.address, name, seed) for name, seed in (("one", 1), ("another", 7))]
        for engine in made:
            stack.callback(engine.close)
        yield made


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_what_a_rank_stored_of_a_step_that_failed_on_the_other_is_never_served(
    engines: list[Engine], order: tuple[int, int]
) -> None:
    engine, reader = engines
    right = [{name: tensor.clone() for name, tensor in kv.items()} for kv in engine.kv]
    for tensor in engine.kv[1].values():
        tensor.copy_(torch.randn(tensor.shape))  # rank 1 computes from what rank 0 could not load
    engine.store(1)
    engine.scheduler.end_session("r")  # rank 0 has said so
    for name, tensor in engine.kv[1].items():
        tensor.copy_(right[1][name])
    engine.store(order[0])
    assert engine.hit("p") == 0
    engine.store(order[1])
    if order == (1, 0):  # rank 1 had stored its shard, and nobody knew yet that rank 0 would not store the other one
        assert reader.hit("early") == 0
        engine.scheduler.end_session("r")
        engine.store(*order)
    assert reader.hit("q") == len(TOKENS)
    spec = reader.scheduler.update_after_alloc("q", len(TOKENS), block_ids=INTO)
    assert spec is not None
    for rank, worker in enumerate(reader.workers):
        worker.retrieve_now([spec])
        assert worker.take_failed_blocks() == set()
        assert same_blocks(reader.kv[rank], INTO, right[rank], BLOCKS)
