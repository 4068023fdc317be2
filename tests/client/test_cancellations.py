"""After a cancel at any checkpoint of any operation, what a server holds is as before and the connection still works.

Each operation is run again and again, cancelled one task step later each time, until it completes: every step that any
task takes meanwhile, the server's too, is a point at which the cancellation comes.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from lmcache_trio import Client, Config, Role, Server, open_client, open_server
from lmcache_trio._server.answers import answer_of
from lmcache_trio._transport import dial_pair, introduce, wait_listening
from lmcache_trio._wire.codec import decode, encode
from lmcache_trio._wire.messages import PROTOCOL_VERSION, AnswerState, Hello, Welcome
from lmcache_trio._wire.protocol import TAKE_UP
from lmcache_trio.errors import LMCacheTrioError
from lmcache_trio.testing.cancelling import cancelled_at

SHARD = 4096
STORED = [bytes([i]) * 32 for i in range(1, 4)]
NEW = [bytes([i]) * 32 for i in range(11, 14)]
TOKEN = b"t" * 16
CHUNKS = ("chunks_ready", "slots_ready", "bytes_ready", "bytes_free", "largest_hole")
"""What a store that was committed, and a reset, change for good."""
ENOUGH = 1000
"""Steps that no operation here needs."""


@attrs.frozen(eq=False)
class Rig:
    """A server, and an engine with something of everything in progress."""

    server: Server
    scheduler: Client
    worker: Client
    lease: bytes
    pin: bytes
    reservation: bytes


@asynccontextmanager
async def serving(address: str) -> AsyncIterator[Server]:
    config = Config(address=address, memory={"backend": "cpu", "size": 1 << 18}, grace=0.0)
    async with open_server(config) as server:
        yield server


@asynccontextmanager
async def engine(server: Server) -> AsyncIterator[tuple[Client, Client]]:
    async with (
        open_client(server.address, role=Role.SCHEDULER, engine="e") as scheduler,
        open_client(server.address, role=Role.WORKER, engine="e") as worker,
    ):
        await worker.register(b"f" * 32, SHARD, 16)
        while worker.taken < 1 << 18:
            await worker.ping()
        await scheduler.lookup(0, [])
        async with worker.storing(0, b"", STORED) as storing:
            assert len(storing.slots) == 3
        scheduler.end(0)
        await scheduler.ping()
        yield scheduler, worker


async def begin(server: Server, scheduler: Client, worker: Client) -> Rig:
    answer = await scheduler.lookup(1, STORED)
    assert answer.chunks == 3
    pinned = await worker.retrieve(answer.lease, 0, 3)
    await scheduler.lookup(2, [])
    await scheduler.lookup(3, [])
    reserved = await worker.reserve(2, b"", NEW[:2])
    return Rig(server, scheduler, worker, answer.lease, pinned.pin, reserved.reservation)


async def end(rig: Rig) -> None:
    """Of what `begin` began, whatever the operation left of it; both connections must still work."""
    rig.worker.done_nowait(rig.pin)
    rig.worker.abort_nowait(rig.reservation)
    for session in (1, 2, 3):
        rig.scheduler.end(session)
    for client in (rig.scheduler, rig.worker):
        assert await client.ping() == rig.server.boot
        assert not client._due
        assert not client._waiters
        assert not client._answers


def held(server: Server) -> dict[str, Any]:
    return {name: value for name, value in server.statistics()["held"].items() if name not in CHUNKS}


async def comes_back_to(server: Server, before: dict[str, Any]) -> None:
    """Once the server has had its turns, or has given up waiting for a client that did not take up its connection."""
    await trio.testing.wait_all_tasks_blocked()
    if held(server) != before:
        await trio.sleep(TAKE_UP + 1)  # the clock jumps there
        await trio.testing.wait_all_tasks_blocked()
    assert held(server) == before


async def _ping(rig: Rig) -> None:
    await rig.scheduler.ping()


async def _statistics(rig: Rig) -> None:
    await rig.worker.statistics()


async def _lookup(rig: Rig) -> None:
    await rig.scheduler.lookup(3, STORED)


async def _lookup_again(rig: Rig) -> None:
    await rig.scheduler.lookup(1, [], start=3)


async def _lookup_miss(rig: Rig) -> None:
    await rig.scheduler.lookup(3, NEW)


async def _lookup_in_a_tier(rig: Rig) -> None:
    """The answer is pushed, some turns after the reply."""

    def prefetch(client: Any, engine: Any, session: Any, message: Any, wanted: list[bytes]) -> None:
        async def answer() -> None:
            await trio.lowlevel.checkpoint()
            if session.answer(message.id, 0):
                client.send(answer_of(session, 0))

        client.start(answer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rig.server._parts.answers, "look_up", prefetch)
        answer = await rig.scheduler.lookup(3, NEW)
        assert (answer.state, answer.chunks) == (AnswerState.ANSWERED, 0)


async def _status(rig: Rig) -> None:
    await rig.scheduler.lookup_status(1)


async def _reset(rig: Rig) -> None:
    await rig.scheduler.reset()


async def _register(rig: Rig) -> None:
    await rig.worker.register(b"f" * 32, SHARD, 16)


async def _retrieve(rig: Rig) -> None:
    rig.worker.done_nowait((await rig.worker.retrieve(rig.lease, 1, 2)).pin)


async def _done(rig: Rig) -> None:
    await rig.worker.done(rig.pin)


async def _reserve(rig: Rig) -> None:
    rig.worker.abort_nowait((await rig.worker.reserve(3, STORED[2], NEW[2:])).reservation)


async def _commit(rig: Rig) -> None:
    await rig.worker.commit(rig.reservation)


async def _abort(rig: Rig) -> None:
    await rig.worker.abort(rig.reservation)


async def _copies_ended(rig: Rig) -> None:
    with contextlib.suppress(LMCacheTrioError):  # `open_client` keeps its token to itself: it is refused
        await rig.worker.copies_ended(TOKEN)


async def _storing(rig: Rig) -> None:
    async with rig.worker.storing(3, STORED[2], NEW[2:]) as storing:
        await trio.lowlevel.checkpoint()
        storing.slots[0][:] = bytes(SHARD)
        await trio.lowlevel.checkpoint()


async def _retrieving(rig: Rig) -> None:
    async with rig.worker.retrieving(rig.lease, 0, 3) as chunks:
        await trio.lowlevel.checkpoint()
        assert len(chunks) == 3


async def _observer(rig: Rig) -> None:
    async with open_client(rig.server.address) as client:
        await client.ping()


async def _scheduler(rig: Rig) -> None:
    async with open_client(rig.server.address, role=Role.SCHEDULER, engine="other") as client:
        await client.lookup(7, STORED)


async def _worker(rig: Rig) -> None:
    async with open_client(rig.server.address, role=Role.WORKER, engine="other") as client:
        await client.register(b"f" * 32, SHARD, 16)


async def _introduce_and_dial(rig: Rig) -> None:
    hello = Hello(PROTOCOL_VERSION, "by hand", os.urandom(16), Role.SCHEDULER, "other")
    welcome = decode(await introduce(rig.server.address, encode(hello)))
    assert isinstance(welcome, Welcome)
    (await dial_pair(welcome.address)).close()


async def _wait_closed(rig: Rig) -> None:
    with trio.move_on_after(0.001):
        await rig.scheduler.wait_closed()


async def _wait_listening(rig: Rig) -> None:
    await wait_listening(rig.server.address)


OPERATIONS: list[Callable[[Rig], Awaitable[None]]] = [
    *(_ping, _statistics, _lookup, _lookup_again, _lookup_miss, _lookup_in_a_tier, _status, _reset, _register),
    *(_retrieve, _done, _reserve, _commit, _abort, _copies_ended, _storing, _retrieving),
    *(_observer, _scheduler, _worker, _introduce_and_dial, _wait_closed, _wait_listening),
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__.strip("_"))
async def test_after_a_cancel_at_any_step_held_is_as_before_and_the_connection_works(
    operation: Callable[[Rig], Awaitable[None]], autojump_clock: trio.testing.MockClock
) -> None:
    async with serving("memory://server") as server, engine(server) as (scheduler, worker):
        await trio.testing.wait_all_tasks_blocked()
        before = held(server)
        assert await _cancel_everywhere(operation, server, scheduler, worker, before) > 0


async def _cancel_everywhere(
    operation: Callable[[Rig], Awaitable[None]],
    server: Server,
    scheduler: Client,
    worker: Client,
    before: dict[str, Any],
) -> int:
    """Cancel *operation* at each of its steps; each time what *server* holds comes back to *before*. How many steps?"""
    for steps in range(ENOUGH):
        rig = await begin(server, scheduler, worker)
        under_way = await cancelled_at(steps, lambda rig=rig: operation(rig))  # type: ignore[misc]
        await end(rig)
        await comes_back_to(server, before)
        await _store_anew(scheduler, worker)
        if not under_way:
            return steps
    raise AssertionError("it never completed")


async def _store_anew(scheduler: Client, worker: Client) -> None:
    """Nothing but what was committed is in the cache: begin again with what was stored at first."""
    behind = (await scheduler.lookup(9, [*STORED, *NEW[2:]])).chunks
    beside = (await scheduler.lookup(9, NEW)).chunks
    assert behind in (0, 3, 4)
    assert beside in (0, 2)
    if (behind, beside) != (3, 0):
        await scheduler.reset()
        scheduler.end(9)  # what began before a reset stores nothing any more
        await scheduler.lookup(9, [])
        async with worker.storing(9, b"", STORED):
            pass
    scheduler.end(9)
    await scheduler.ping()


@pytest.mark.parametrize("operation", [_ping, _lookup, _retrieve, _storing, _retrieving, _scheduler, _worker])
async def test_over_real_sockets_too(
    operation: Callable[[Rig], Awaitable[None]], tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(f"unix://{tmp_path}/s.sock") as server, engine(server) as (scheduler, worker):
        before = held(server)
        await _cancel_everywhere(operation, server, scheduler, worker, before)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["s.sock"]
