"""Adapters whose connection is lost while the server lives, or whose server dies in the middle of a registration."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from lmcache_trio.adapters import LoadSpec, StoreSpec, WorkerAdapter
from lmcache_trio.client import Client
from lmcache_trio.testing.forks import engines
from lmcache_trio.testing.sides import BLOCK, CHUNK, ServerProcess, Side, make_kv, same_blocks, wait_until
from lmcache_trio.threads import Handoff

TOKENS = list(range(3 * CHUNK))
FROM = list(range(12))
INTO = list(range(30, 42))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    server = ServerProcess(f"unix://{tmp_path}/s.sock")
    server.start()
    yield server
    server.kill()


def lose_connection(adapter: WorkerAdapter) -> Client:
    """The pipe closes under it, as when the network does it; the server lives on."""
    client = adapter._link.client
    assert client is not None
    adapter._link.post(client._connection.close)
    return client


class HeldUp:
    """A probe: the next copy stops half-way until it is let go."""

    def __init__(self) -> None:
        self.holding = False

    def hold(self) -> None:
        self.arrived: Handoff[bool] = Handoff()
        self.let_go: Handoff[bool] = Handoff()
        self.holding = True

    def __call__(self, point: str, spec: StoreSpec | LoadSpec) -> None:
        if point == "half copied" and self.holding:
            self.holding = False
            self.arrived.set(True)
            assert self.let_go.wait(60)


def test_a_worker_that_lost_its_connection_says_when_its_copies_ended_and_registers_again_by_itself(
    server: ServerProcess,
) -> None:
    held_up = HeldUp()
    one = Side(server.address, make_kv(1), probe=held_up, lookup_timeout=60.0)
    try:
        wait_until(one.scheduler.is_healthy)
        held_up.hold()
        one.scheduler.extend("r", TOKENS)
        one.worker.submit_store(one.scheduler.store_spec("r", 0, FROM))
        assert held_up.arrived.wait(60)
        assert server.held["slots_writing"] == 3
        former = lose_connection(one.worker)
        wait_until(lambda: server.held["lost_writers"] == 1)
        held = server.held  # the copy goes on: its slots are nobody's, and the engine has no namespace
        assert (held["slots_quarantined"], held["slots_writing"], held["reservations"]) == (3, 0, 0)
        wait_until(lambda: not one.scheduler.is_healthy())
        assert one.lookup("meanwhile", TOKENS) == 0
        held_up.let_go.set(True)
        wait_until(lambda: one.worker._link.client not in (None, former))
        wait_until(lambda: server.held["slots_quarantined"] == server.held["lost_writers"] == 0)
        wait_until(one.scheduler.is_healthy)
        assert one.worker.take_finished()[0] == {"r"}
        assert one.lookup("q", TOKENS) == 0
        one.check_round_trip("r", TOKENS, FROM, INTO)
    finally:
        one.close()


def test_a_retrieve_whose_connection_is_lost_gives_failed_blocks_and_its_pin_ends(server: ServerProcess) -> None:
    held_up = HeldUp()
    one = Side(server.address, make_kv(1), probe=held_up, lookup_timeout=60.0)
    try:
        one.store("r", TOKENS, FROM)
        assert one.lookup("q", TOKENS) == 3 * CHUNK
        spec = one.scheduler.update_after_alloc("q", 3 * CHUNK, block_ids=INTO)
        assert spec is not None
        held_up.hold()
        one.worker.submit_retrieve(spec)
        assert held_up.arrived.wait(60)
        assert server.held["pins"] == 1
        lose_connection(one.worker)
        wait_until(lambda: server.held["pins"] == 0)
        assert one.worker.take_finished() == (set(), set())  # not before its copy ended: the blocks are still written
        held_up.let_go.set(True)
        wait_until(lambda: one.worker.take_finished()[1] == {"q"})
        assert one.worker.take_failed_blocks() == set(INTO)
        wait_until(lambda: one.scheduler.is_healthy() and one.worker.is_healthy())
        one.scheduler.mark_failed("q", 0)
        assert one.lookup("again", TOKENS) == 3 * CHUNK
        assert one.load("again", 3 * CHUNK, INTO) == set()
    finally:
        one.close()


class KillsAtRegister(WorkerAdapter):
    """Once, while its Register is on its way."""

    server: ServerProcess | None = None

    async def _register(self, client: Client, seconds: float) -> None:
        server, self.server = self.server, None
        if server is None:
            return await super()._register(client, seconds)
        server.pause()

        async def kill() -> None:
            while not client._waiters:
                await trio.lowlevel.checkpoint()
            server.kill()

        trio.lowlevel.spawn_system_task(kill)
        await super()._register(client, seconds)


def test_a_server_killed_while_a_worker_registers_is_registered_with_when_it_is_back(server: ServerProcess) -> None:
    worker = KillsAtRegister(server.address, engine_id="e", block_tokens=BLOCK, connect_timeout=60.0)
    try:
        worker.server = server
        worker.register_kv_caches(make_kv(1))  # raises nothing
        assert not worker.is_healthy()
        server.start()
        wait_until(lambda: server.held["namespaces"] == 1)
        wait_until(worker.is_healthy)
    finally:
        worker.shutdown()


STORES = """
import sys
from lmcache_trio.testing.forks import engines
from lmcache_trio.testing.sides import Side, make_kv
side = Side(sys.argv[1], make_kv(1))
side.store("r", list(range(192)), list(range(12)))
assert side.worker.statistics()["stored_chunks"] == 3
side.close()
"""


def test_what_the_adapters_of_one_process_stored_another_process_loads_byte_for_byte(server: ServerProcess) -> None:
    with engines.start(["-c", STORES, server.address], stdout=False) as other:
        assert other.wait(100) == 0
    one = Side(server.address, make_kv(), lookup_timeout=60.0)
    try:
        wait_until(one.scheduler.is_healthy)
        assert one.lookup("q", TOKENS) == 3 * CHUNK
        assert one.load("q", 3 * CHUNK, INTO) == set()
        assert same_blocks(one.kv, INTO, make_kv(1), FROM)
    finally:
        one.close()
