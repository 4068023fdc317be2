"""Engines of several ranks, each a real worker's adapter in a process of its own: one rank's fault is the chunk's."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.faults import shard_process

from lmcache_trio.adapters import PollingSchedulerAdapter
from lmcache_trio.testing.forks import engines
from lmcache_trio.testing.sides import CHUNK, ServerProcess, wait_until

TOKENS = list(range(2 * CHUNK))
FROM = list(range(8))
INTO = list(range(20, 28))


class Rank:
    """The test's end of one rank's process."""

    def __init__(self, address: str, *arguments: object) -> None:
        self.process = engines.start([shard_process.__file__, address, *map(str, arguments)], stdin=True)

    def hear(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())[0]

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def ask(self, *words: object) -> Any:
        self.tell(*words)
        return self.hear()

    def kill(self) -> None:
        self.process.kill()
        self.process.close()


class Ranks:
    """A scheduler's adapter, and the ranks of its engine."""

    def __init__(self, address: str, engine: str, shards: int, seed: int, stack: ExitStack, heads: Any = None) -> None:
        self.scheduler = PollingSchedulerAdapter(
            address, engine_id=engine, identity=["m"], block_tokens=16, shards=shards, lookup_timeout=60.0
        )
        stack.callback(self.scheduler.shutdown)
        heads = heads or [2] * shards
        self._begin: Callable[[int], Rank] = lambda i: Rank(address, engine, i, shards, seed and seed + i, heads[i])
        self.ranks: list[Rank] = []
        self._stack = stack

    def begin(self, *shards: int) -> None:
        """Start these ranks together, and wait until they have registered."""
        begun = [self._begin(shard) for shard in shards]
        for rank in begun:
            self._stack.callback(rank.kill)
        assert [rank.hear() for rank in begun] == ["ready"] * len(begun)
        self.ranks += begun

    def lookup(self, request: str) -> int:
        self.scheduler.maybe_submit_lookup_request(request, TOKENS)
        return self.scheduler.check_lookup_result(request)

    def store_words(self, request: str) -> list[object]:
        self.scheduler.extend(request, TOKENS)
        spec = self.scheduler.store_spec(request, 0, FROM)
        return ["store", request, spec.session, spec.parent.hex(), spec.digests.hex(), FROM]

    def load(self, request: str) -> list[list[int]]:
        spec = self.scheduler.update_after_alloc(request, len(TOKENS), block_ids=INTO)
        assert spec is not None
        words = ["load", request, spec.session, spec.lease.hex(), spec.start, spec.count, spec.skip_blocks, INTO]
        return [rank.ask(*words) for rank in self.ranks]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    server = ServerProcess(f"unix://{tmp_path}/s.sock", "memory.size=8MiB")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_lookups_miss_until_all_ranks_are_there_and_a_chunk_is_ready_when_all_committed(
    server: ServerProcess, stack: ExitStack
) -> None:
    one = Ranks(server.address, "one", 3, 1, stack)
    one.begin(0, 1)
    assert one.lookup("early") == 0
    assert not one.scheduler.is_healthy()
    assert one.ranks[0].ask(*one.store_words("early"))["dropped_no_namespace"] == 2
    one.begin(2)
    wait_until(one.scheduler.is_healthy)
    words = one.store_words("r")
    for rank in one.ranks:
        assert one.lookup(f"before {rank.process.pid}") == 0
        assert rank.ask(*words)["stored_chunks"] == 2
    assert one.lookup("after") == 2 * CHUNK
    other = Ranks(server.address, "other", 3, 0, stack)
    other.begin(0, 1, 2)
    wait_until(other.scheduler.is_healthy)
    assert other.lookup("q") == 2 * CHUNK
    assert other.load("q") == [[], [], []]
    mine = [rank.ask("sum", FROM) for rank in one.ranks]
    assert mine == [rank.ask("sum", INTO) for rank in other.ranks]
    assert len({tuple(sums) for sums in mine}) == 3  # each rank has bytes of its own


@pytest.mark.parametrize("fault", ["fail", "stop"])
def test_one_rank_that_fails_or_is_killed_in_mid_store_fails_the_chunk_for_its_engine(
    server: ServerProcess, stack: ExitStack, fault: str
) -> None:
    one = Ranks(server.address, "one", 2, 1, stack)
    one.begin(0, 1)
    wait_until(one.scheduler.is_healthy)
    good, bad = one.ranks
    assert bad.ask("fault", fault) == "as you wish"
    words = one.store_words("r")
    if fault == "fail":
        assert good.ask(*words)["stored_chunks"] == 2
        assert bad.ask(*words)["dropped_unavailable"] == 2
    else:
        assert bad.ask(*words) == "half copied"
        bad.kill()
        wait_until(lambda: server.held["slots_writing"] == 0)
        good.ask(*words)
    assert one.lookup("q") == 0
    wait_until(lambda: server.held["slots_quarantined"] == server.held["lost_writers"] == 0)
    if fault == "stop":
        one.ranks.pop()
        one.begin(1)
        wait_until(one.scheduler.is_healthy)
    else:
        bad.ask("fault", "")
    again = one.store_words("again")
    for rank in one.ranks:
        rank.ask(*again)
    assert one.lookup("p") == 2 * CHUNK
    assert one.load("p") == [[], []]
    assert [rank.ask("sum", FROM) for rank in one.ranks] == [rank.ask("sum", INTO) for rank in one.ranks]


def test_ranks_of_unequal_layout_make_a_namespace_of_their_own(server: ServerProcess, stack: ExitStack) -> None:
    one = Ranks(server.address, "one", 2, 1, stack, heads=[2, 3])
    other = Ranks(server.address, "other", 2, 0, stack, heads=[3, 2])
    one.begin(0, 1)
    wait_until(one.scheduler.is_healthy)
    words = one.store_words("r")
    for rank in one.ranks:
        assert rank.ask(*words)["stored_chunks"] == 2
    assert one.lookup("q") == 2 * CHUNK
    assert one.load("q") == [[], []]
    assert [rank.ask("sum", FROM) for rank in one.ranks] == [rank.ask("sum", INTO) for rank in one.ranks]
    other.begin(0, 1)
    wait_until(other.scheduler.is_healthy)
    assert other.lookup("q") == 0
