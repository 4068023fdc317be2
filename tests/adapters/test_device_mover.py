"""How long a worker waits for the server that moves its KV, and when its blocks are its own again: with no server."""

import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from lmcache_trio._transport.conversation import Reply
from lmcache_trio._wire.messages import (
    PROTOCOL_VERSION,
    Ack,
    ArenaGrown,
    Hello,
    Message,
    RetrieveBlocks,
    Retrieved,
    Role,
    StoreBlocks,
    Stored,
    Withdraw,
)
from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.adapters.worker.device_mover import DeviceMover
from lmcache_trio.adapters.worker.jobs import Jobs, LoadJob, RegisteredKV, StoreJob
from lmcache_trio.errors import LMCacheTrioError, Misuse, ProtocolError, Unavailable

TIMEOUT = 5.0
DAY = 24 * 3600.0


class Server:
    """The server as a client object shows it: what was asked, and when; the test replies."""

    boot = b"b" * 16
    arena = object()
    lost = False
    chunk_tokens = 64

    def __init__(self) -> None:
        self.asked: dict[int, Callable[[Reply], None]] = {}
        self.said: list[Message] = []
        self.noticed: list[tuple[float, Message]] = []
        self._ids = iter(range(1, 1000))

    def new_id(self) -> int:
        return next(self._ids)

    def request_nowait(self, message: Any, on_reply: Callable[[Reply], None]) -> None:
        self.said.append(message)
        self.asked[message.id] = on_reply

    def notice_nowait(self, message: Message) -> None:
        self.noticed.append((trio.current_time(), message))
        if isinstance(message, Withdraw):
            self.asked.pop(message.request)(Stored(message.request, 0, 0, {"failed": 1}))


class Fence:
    def ipc_handle(self) -> bytes:
        return b"e" * 64


KV: Any = SimpleNamespace(groups=[SimpleNamespace(block_bytes=8)])


class World:
    """A mover with the jobs that it was given."""

    def __init__(self) -> None:
        hello = Hello(PROTOCOL_VERSION, "worker", b"t" * 16, Role.WORKER, "engine", 0, 1)
        registered = RegisteredKV(latest=KV, known=KV, chunk_tokens=64)
        self.mover = DeviceMover("memory://nowhere", hello, registered, TIMEOUT)
        self.jobs = Jobs(self.mover)

    def store(self, fence: Any = None) -> StoreJob:
        spec = StoreSpec("r", 1, b"", b"d" * 32, (0, 1), chunk_tokens=64)
        job = StoreJob(spec, np.arange(2), kv=KV, fence=fence, reported=True)
        self.jobs.begin(job)
        return job

    def load(self, fence: Any = None) -> LoadJob:
        spec = LoadSpec("r", 1, b"a lease", 0, 1, 0, (0, 1), chunk_tokens=64)
        job = LoadJob(spec, np.arange(2), kv=KV, fence=fence, reported=True)
        self.jobs.begin(job)
        return job


@pytest.fixture
def world() -> World:
    return World()


async def test_a_request_is_late_when_nothing_comes_of_any_not_when_it_waits_behind_others(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    server: Any = Server()
    copied: list[int] = []

    async def one(job: StoreJob) -> None:
        await world.jobs.run(server, job)
        copied.append(world.jobs.statistics()["stored_chunks"])  # by then, over all of them

    async with trio.open_nursery() as nursery:
        for job in [world.store() for _ in range(3)]:
            nursery.start_soon(one, job)
        for number in (1, 2):
            await trio.sleep(0.8 * TIMEOUT)
            server.asked.pop(number)(Stored(number, 1, 1, {}))
        await trio.sleep(0.8 * TIMEOUT)
        assert server.noticed == [], "the third waited for 2.4 times as long as nothing may come"
        world.mover._said(ArenaGrown(1))  # whatever the server says counts, too
        began = trio.current_time()
    assert copied == [1, 2, 2]
    assert world.jobs.statistics() == {"running": 0, "stored_chunks": 2, "dropped_failed": 1}
    assert server.noticed == [(began + TIMEOUT, Withdraw(3))]


class Silent(Server):
    """It lives, and answers nothing any more."""

    def notice_nowait(self, message: Message) -> None:
        self.noticed.append((trio.current_time(), message))


@pytest.mark.parametrize("what", ["store", "retrieve"])
async def test_what_a_living_server_says_nothing_of_is_waited_for_without_end_and_ends_with_its_process(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
    what: str,
) -> None:
    caplog.set_level(logging.INFO, "lmcache_trio")

    async def nobody_can_be_asked(address: str) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr("lmcache_trio.adapters.worker.device_mover.wait_server", nobody_can_be_asked)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    world.mover._pidfd = os.pidfd_open(process.pid)
    server: Any = Silent()
    over = trio.Event()

    async def move() -> None:
        await world.jobs.run(server, world.store() if what == "store" else world.load())
        over.set()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(move)
            await trio.sleep(DAY)
            assert [message for _, message in server.noticed] == [Withdraw(1)]
            assert not over.is_set(), "a copy may run"
            server.lost = True
            server.asked.pop(1)(Unavailable("the connection to the server is lost"))
            await trio.sleep(DAY)
            assert not over.is_set(), "its process may have a copy of it left"
            process.kill()
            await over.wait()
    finally:
        process.kill()
        process.communicate()
        world.mover.close()
    failed = [message for message in caplog.messages if "failed" in message]
    assert len(failed) == 1
    assert "the connection to the server is lost" in failed[0]
    assert world.jobs.take_failed_blocks() == (set() if what == "store" else {0, 1})
    assert world.jobs.statistics() == {"running": 0, "dropped_unavailable" if what == "store" else "failed_chunks": 1}


async def test_what_the_engine_submitted_goes_before_its_copies(world: World) -> None:
    server: Any = Server()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.jobs.run, server, world.store(Fence()))
        nursery.start_soon(world.jobs.run, server, world.load(Fence()))
        await trio.testing.wait_all_tasks_blocked()
        kinds = {type(message): message for message in server.said}
        assert kinds[StoreBlocks].event == kinds[RetrieveBlocks].event == b"e" * 64
        for message in server.said:
            stored = isinstance(message, StoreBlocks)
            server.asked[message.id](Stored(message.id, 1, 1, {}) if stored else Retrieved(message.id, True))


class Asker:
    boot = Server.boot

    def new_id(self) -> int:
        return 1

    async def request(self, message: Message, kind: type[Message]) -> Message:
        return Ack(1)


@pytest.mark.parametrize("error", [Misuse("it is stopping"), ProtocolError("another version"), Unavailable("no more")])
async def test_a_server_that_refuses_to_say_what_it_moves_is_asked_again_after_a_while_and_complained_of(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
    error: LMCacheTrioError,
) -> None:
    asked: list[float] = []

    @asynccontextmanager
    async def connect(address: str, hello: Hello, server_uids: Collection[int] | None) -> AsyncIterator[Asker]:
        await trio.lowlevel.checkpoint()
        asked.append(trio.current_time())
        if trio.current_time() < 60:
            raise error
        yield Asker()

    async def wait_server(address: str) -> None:
        await trio.lowlevel.checkpoint()

    async def wait_exit(done: trio.CancelScope) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr("lmcache_trio.adapters.worker.device_mover.connect", connect)
    monkeypatch.setattr("lmcache_trio.adapters.worker.device_mover.wait_server", wait_server)
    monkeypatch.setattr(world.mover, "_wait_exit", wait_exit)
    server: Any = Server()
    with caplog.at_level(logging.WARNING, "lmcache_trio"), trio.fail_after(1000):
        autojump_clock.jump(0)
        await world.mover._let_go(server)
    assert 60 <= trio.current_time() < 70
    assert len(asked) < 30, "it was asked without a pause"
    assert sum(str(error) in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("where", ["wait_server", "connect"])
@pytest.mark.parametrize(
    "error", [OSError(24, "Too many open files"), ExceptionGroup("two", [ValueError(), OSError()])]
)
async def test_what_nobody_thought_of_gives_no_blocks_back(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
    where: str,
    error: Exception,
) -> None:
    def fail(at: str) -> None:
        if at == where and trio.current_time() < 60:
            raise error

    @asynccontextmanager
    async def connect(address: str, hello: Hello, server_uids: Collection[int] | None) -> AsyncIterator[Asker]:
        await trio.lowlevel.checkpoint()
        fail("connect")
        yield Asker()

    async def wait_server(address: str) -> None:
        await trio.lowlevel.checkpoint()
        fail("wait_server")

    monkeypatch.setattr("lmcache_trio.adapters.worker.device_mover.connect", connect)
    monkeypatch.setattr("lmcache_trio.adapters.worker.device_mover.wait_server", wait_server)
    server: Any = Server()
    begun = trio.current_time()
    with trio.fail_after(1000):
        autojump_clock.jump(0)
        await world.mover._let_go(server)
    assert trio.current_time() - begun >= 50
    assert 1 < sum("could not be asked" in record.message for record in caplog.records) < 30
