"""A worker whose KV the server moves: real processes, real shared memory, and deaths in the middle of a copy."""

import os
import select
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from lmcache_trio._wire.messages import Message, Withdraw
from lmcache_trio.adapters import WorkerAdapter
from lmcache_trio.client import Client, open_client
from lmcache_trio.testing.forks import engines, servers
from lmcache_trio.testing.sides import (
    CHUNK,
    ServerProcess,
    Side,
    make_kv,
    same_blocks,
    shared_kv,
    wait_until,
)

TOKENS = list(range(3 * CHUNK))
OTHERS = list(range(10_000, 10_000 + 3 * CHUNK))
FROM = [5, 9, 1, 33, 34, 35, 36, 60, 2, 7, 8, 3]
INTO = [11, 40, 12, 50, 13, 51, 14, 52, 20, 21, 22, 23]

MakeSide = Callable[..., Side]

SERVE = """
import sys, trio, attrs
from lmcache_trio import load_config, open_server
from lmcache_trio_backends.host_device import HostConfig, HostDevice

class Stopping(HostDevice):
    '''Stops in the middle of its copy number *at*, until a line comes.'''
    at, seen = int(sys.argv[1]), 0

    def _run(self, copy, memory, ticket):
        self.seen += 1
        if self.seen == self.at:
            first = type(ticket)()
            one = attrs.evolve(copy, slots=copy.slots[:1], blocks=copy.blocks[: copy.chunk_blocks])
            super()._run(one, memory, first)
            print("half", flush=True)
            sys.stdin.readline()
        super()._run(copy, memory, ticket)

async def main():
    async with open_server(load_config(sets=sys.argv[2:], environ={}), device=Stopping(HostConfig())):
        print("ready", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""

ENGINE = """
import sys
sys.path[:0] = [sys.argv[3]]
from test_worker_device_path import *
from lmcache_trio.testing import sides as sides_module
sides_module.engine_ids = iter(["an engine process"])
side = Side(sys.argv[1], shared_kv(1))
assert side.worker.path == "device", side.worker.path_reason
side.store("a", TOKENS, FROM)
if sys.argv[2] != "retrieve":
    side.scheduler.extend("b", OTHERS)
    spec = side.scheduler.store_spec("b", 0, FROM)
if sys.argv[2] == "store":
    side.worker.submit_store(spec)
else:
    side.lookup("b", TOKENS)
    side.worker.submit_retrieve(side.scheduler.update_after_alloc("b", 3 * CHUNK, block_ids=INTO))
sys.stdin.readline()
"""


class StoppingServer:
    """A server that stops in the middle of one copy."""

    def __init__(self, address: str, at: int) -> None:
        sets = [f"address={address}", "memory.size=4MiB", f"chunk_tokens={CHUNK}", "grace=0.1"]
        self.address = address
        self.process = servers.start(["-c", SERVE, str(at), *sets], stdin=True)
        self.wait_for("ready")
        wait_until(lambda: self.held["bytes_taken"] == self.held["bytes_size"])

    def wait_for(self, word: str) -> None:
        """It says *word* next, within a minute."""
        said, deadline = b"", time.monotonic() + 60
        assert self.process.stdout is not None
        while not said.endswith(b"\n"):
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self.process.stdout], [], [], left)[0], (
                f"it did not say {word!r} in time, but {said!r}"
            )
            some = os.read(self.process.stdout.fileno(), 1)
            assert some, f"it ended, and never said {word!r}"
            said += some
        assert said == f"{word}\n".encode()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    @property
    def held(self) -> dict[str, Any]:
        async def ask() -> dict[str, Any]:
            with trio.fail_after(60):
                async with open_client(self.address) as client:
                    found: dict[str, Any] = (await client.statistics())["held"]
                    return found

        return trio.run(ask)

    def close(self) -> None:
        self.process.kill()
        self.process.close()


@pytest.fixture
def stopping(tmp_path: Path) -> Iterator[Callable[[int], StoppingServer]]:
    made: list[StoppingServer] = []

    def make(at: int) -> StoppingServer:
        made.append(StoppingServer(f"unix://{tmp_path}/stop.ipc", at))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.mark.parametrize("shared_first", [True, False])
def test_engines_on_either_path_share_chunks(live_server: ServerProcess, sides: MakeSide, shared_first: bool) -> None:
    kvs = (shared_kv(1), make_kv()) if shared_first else (make_kv(1), shared_kv())
    one, other = (sides(live_server.address, kv) for kv in kvs)
    assert {one.worker.path, other.worker.path} == {"device", "shm"}
    one.store("r", TOKENS, FROM)
    assert other.lookup("q", TOKENS) == 3 * CHUNK
    assert other.load("q", 3 * CHUNK, INTO) == set()
    assert same_blocks(one.kv, FROM, other.kv, INTO)


def test_private_memory_takes_shm_by_itself_and_says_why(live_server: ServerProcess, sides: MakeSide) -> None:
    one = sides(live_server.address, make_kv(1))
    assert one.worker.path == "shm"
    assert "private cpu memory" in one.worker.path_reason


def test_a_server_without_a_device_leaves_the_copies_to_the_engine(tmp_path: Path, sides: MakeSide) -> None:
    server = ServerProcess(f"unix://{tmp_path}/n.ipc", "device.backend=none")
    server.start()
    try:
        one = sides(server.address, shared_kv(1))
        assert one.worker.path == "shm"
        assert "device.backend is none" in one.worker.path_reason
        one.store("r", TOKENS, FROM)
        assert one.lookup("q", TOKENS) == 3 * CHUNK
    finally:
        server.kill()


def test_a_server_whose_process_cannot_be_watched_is_lent_no_blocks(
    live_server: ServerProcess, sides: MakeSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Client, "open_pidfd", lambda self: None)
    one = sides(live_server.address, shared_kv(1))
    assert one.worker.path == "shm"
    assert "cannot be watched" in one.worker.path_reason
    one.store("r", TOKENS, FROM)
    assert one.lookup("q", TOKENS) == 3 * CHUNK


class OnTheDevice(WorkerAdapter):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, path="device", **kwargs)


class ByItself(WorkerAdapter):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, path="shm", **kwargs)


def test_the_path_that_was_asked_for_is_taken_or_none(live_server: ServerProcess, sides: MakeSide) -> None:
    one = sides(live_server.address, shared_kv(1), worker=ByItself)
    assert (one.worker.path, one.worker.path_reason) == ("shm", "it was asked for")
    other = sides(live_server.address, make_kv(1), worker=OnTheDevice)
    assert other.worker.path == "shm"
    other.store("r", TOKENS, FROM)
    assert other.worker.statistics() == {"running": 0, "dropped_unavailable": 3}


def test_a_server_killed_in_the_middle_of_a_copy_gives_the_blocks_back(
    stopping: Callable[[int], StoppingServer], sides: MakeSide
) -> None:
    server = stopping(2)
    one = sides(server.address, shared_kv(1))
    one.store("a", TOKENS, FROM)
    one.lookup("b", TOKENS)
    spec = one.scheduler.update_after_alloc("b", 3 * CHUNK, block_ids=INTO)
    assert spec is not None
    one.worker.submit_retrieve(spec)
    server.wait_for("half")
    assert one.worker.take_finished() == (set(), set())
    server.process.kill()
    found: set[str] = set()

    def ended() -> bool:
        found.update(one.worker.take_finished()[1])
        return bool(found)

    wait_until(ended)
    assert one.worker.take_failed_blocks() == set(INTO)


def noted(side: Side) -> list[Message]:
    """What *side*'s worker withdraws, from now on."""
    client, withdrawn = side.worker._link.client, list[Message]()
    assert client is not None
    notice = client.notice_nowait

    def say(message: Message) -> None:
        notice(message)
        if isinstance(message, Withdraw):
            withdrawn.append(message)

    client.notice_nowait = say  # type: ignore[method-assign]
    return withdrawn


def begin(side: Side, what: str, name: str, blocks: Sequence[int]) -> None:
    """A store of what only request *name* has, or a retrieve into *blocks*."""
    if what == "store":
        side.scheduler.extend(name, [ord(name), *OTHERS[1:]])
        side.worker.submit_store(side.scheduler.store_spec(name, 0, FROM))
    else:
        side.lookup(name, TOKENS)
        spec = side.scheduler.update_after_alloc(name, 3 * CHUNK, block_ids=blocks)
        assert spec is not None
        side.worker.submit_retrieve(spec)


@pytest.mark.parametrize(
    ("how", "names"),
    [("its reply is late", "b"), ("its connection is lost", "b"), ("its connection is lost", "bcd")],
)
@pytest.mark.parametrize("what", ["store", "retrieve"])
def test_blocks_are_not_given_back_while_the_server_may_touch_them(
    stopping: Callable[[int], StoppingServer], sides: MakeSide, what: str, how: str, names: str
) -> None:
    server = stopping(2)
    one = sides(server.address, shared_kv(1))
    one.worker._device._reply_timeout = 30 if how == "its connection is lost" else 0.05
    withdrawn = noted(one)
    one.store("a", TOKENS, FROM)
    before = server.held
    filled = {name: range(12 * i, 12 * (i + 1)) for i, name in enumerate(names)}
    for name, blocks in filled.items():
        begin(one, what, name, blocks)
    server.wait_for("half")
    if how == "its connection is lost":
        client = one.worker._link.client
        assert client is not None
        one.worker._link.call(client.ping, timeout=20)  # asked after them all
        one.worker._link.post(client._connection.close)
        wait_until(
            lambda: server.held["connections"] == before["connections"] - 1 + len(names)
        )  # less the worker, more who asks
    else:
        wait_until(lambda: bool(withdrawn))
        client = one.worker._link.client
        assert client is not None
        one.worker._link.call(client.ping, timeout=20)  # asked after the notice: the server has heard it
        wait_until(lambda: server.held["copies_running"] == 1)
    assert one.worker.take_finished() == (set(), set())
    assert one.worker.statistics()["running"] == len(names)
    server.go_on()
    found: set[str] = set()

    def ended() -> bool:
        for ids in one.worker.take_finished():
            found.update(ids)
        return len(found) == len(names)

    wait_until(ended)
    assert found == set(names)
    if what == "retrieve":
        failed = one.worker.take_failed_blocks()
        assert failed == {block for blocks in filled.values() for block in blocks}
    for name in names:
        one.scheduler.end_session(name)
    wait_until(lambda: one.worker.is_healthy() and server.held["copies_running"] == 0)
    wait_until(lambda: server.held["bytes_quarantined"] == server.held["bytes_writing"] == 0)


def test_a_shutdown_does_not_wait_for_ever_for_a_copy_that_does_not_end_and_gives_no_block_back(
    stopping: Callable[[int], StoppingServer], sides: MakeSide
) -> None:
    server = stopping(2)
    one = sides(server.address, shared_kv(1))
    one.store("a", TOKENS, FROM)
    assert one.lookup("b", TOKENS) == 3 * CHUNK
    spec = one.scheduler.update_after_alloc("b", 3 * CHUNK, block_ids=INTO)
    assert spec is not None
    one.worker.submit_retrieve(spec)
    server.wait_for("half")
    one.worker._reply_timeout = 0.05
    one.worker.shutdown()
    assert one.worker.take_finished() == (set(), set())
    assert server.held["copies_running"] == 1


@pytest.mark.parametrize("what", ["store", "retrieve"])
def test_an_engine_killed_in_the_middle_of_a_copy_leaves_nothing_half_written_and_nothing_held(
    stopping: Callable[[int], StoppingServer], sides: MakeSide, what: str
) -> None:
    server = stopping(2)
    before = server.held
    with engines.start(["-c", ENGINE, server.address, what, str(Path(__file__).parent)], stdin=True) as engine:
        try:
            server.wait_for("half")
        finally:
            engine.kill()
    wait_until(lambda: server.held["engines"] == 0)
    during = server.held
    assert (during["copies_running"], during["attached"]) == (1, 1)
    assert during["pins"] == 1 if what == "retrieve" else during["bytes_quarantined"] > 0
    survivor = sides(server.address, make_kv())
    assert survivor.lookup("b", OTHERS) == 0
    assert survivor.lookup("a", TOKENS) == 3 * CHUNK
    assert survivor.load("a", 3 * CHUNK, INTO) == set()
    assert same_blocks(make_kv(1), FROM, survivor.kv, INTO)
    survivor.close()
    wait_until(lambda: server.held["engines"] == 0)
    server.go_on()
    # What the dead engine had stored stays, and the bytes that it takes; nothing else does, once connections that were
    # closed (each question of this test is one) are taken down too
    stays = {"namespaces", "chunks_ready", "slots_ready", "bytes_ready", "bytes_free", "largest_hole"}

    def as_before() -> bool:
        after = server.held
        return {name for name in after if after[name] != before[name]} <= stays

    wait_until(as_before)
    assert server.held["chunks_ready"] == 3
