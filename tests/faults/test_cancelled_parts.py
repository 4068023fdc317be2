"""Cancelled at any step: a server, an accept, a call in a thread, the mapping of the arena, a host's call."""

import contextlib
import fcntl
import math
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from lmcache_trio import Config, Role, Server, open_client, open_server
from lmcache_trio._transport import dial_pair, introduce, listen, listen_pair
from lmcache_trio._transport.arena_map import ArenaMap
from lmcache_trio.errors import Unavailable
from lmcache_trio.testing.cancelling import cancelled_at
from lmcache_trio.threads import Portal, offload_owned

STORED = [bytes([i]) * 32 for i in range(1, 4)]
ENOUGH = 1000
"""Steps that nothing here needs."""


@asynccontextmanager
async def serving(address: str) -> AsyncIterator[Server]:
    config = Config(address=address, memory={"backend": "cpu", "size": 1 << 18}, grace=0.0)
    async with open_server(config) as server:
        yield server


def held_descriptors(scheme: str) -> int:
    """How many descriptors this process has.

    Over TCP without those of connections: NNG may lose one that a listener was just accepting as it was closed, none to
    three of them in each round here. Each socket of NNG's has others too, so that one left open would be seen.
    """
    kinds = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            kinds.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum(scheme != "tcp" or not kind.startswith("socket:") for kind in kinds)


@pytest.mark.parametrize("scheme", ["unix", "tcp"])
async def test_a_server_cancelled_at_any_step_leaves_no_file_and_its_address_free(scheme: str, tmp_path: Path) -> None:
    address = await free_address(scheme, tmp_path)

    async def serve_one() -> None:
        async with serving(address):
            with contextlib.suppress(Unavailable):
                if scheme == "tcp":
                    async with open_client(address) as observer:
                        await observer.ping()
                else:
                    async with open_client(address, role=Role.SCHEDULER, engine="e") as scheduler:
                        await scheduler.lookup(1, STORED)

    await serve_one()
    descriptors = held_descriptors(scheme)
    for steps in range(ENOUGH):
        under_way = await cancelled_at(steps, serve_one)
        assert list(tmp_path.iterdir()) == []
        if not under_way:
            break
    assert steps > 10
    with trio.fail_after(60):  # NNG closes in threads of its own
        while held_descriptors(scheme) > descriptors:
            await trio.lowlevel.checkpoint()
    async with serving(address) as server, open_client(address) as client:
        assert await client.ping() == server.boot


@pytest.mark.parametrize("scheme", ["memory", "unix", "tcp"])
async def test_an_accept_cancelled_at_any_step_loses_no_client_and_leaves_no_address(
    scheme: str, tmp_path: Path
) -> None:
    front = listen(
        {"memory": "memory://front", "tcp": "tcp://127.0.0.1:0"}.get(scheme, f"unix://{tmp_path}/front.sock")
    )
    for steps in range(ENOUGH):
        listener = listen_pair(front.address)

        async def meet(listener: Any = listener) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_dial_and_close, listener.address)
                (await listener.accept()).close()

        under_way = await cancelled_at(steps, meet)
        listener.close()
        with pytest.raises(Unavailable):
            await dial_pair(listener.address)
        if not under_way:
            break
    assert steps > 0
    for steps in range(ENOUGH):
        replied: list[bool] = []

        async def accept(replied: list[bool] = replied) -> None:
            introduction = await front.accept()
            introduction.reply(introduction.hello)
            replied.append(True)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_introduce, front.address)
            under_way = await cancelled_at(steps, accept)
            if not replied:
                await accept()  # who came meanwhile is still there
        if not under_way:
            break
    assert steps > 0
    front.close()
    assert list(tmp_path.iterdir()) == []


async def free_address(scheme: str, folder: Path) -> str:
    """One that a server can listen at again and again."""
    if scheme == "unix":
        return f"unix://{folder}/s.sock"
    async with serving("tcp://127.0.0.1:0") as server:
        return server.address


async def _dial_and_close(address: str) -> None:
    (await dial_pair(address)).close()


async def _introduce(address: str) -> None:
    assert await introduce(address, b"hello") == b"hello"


async def test_an_owned_call_cancelled_at_any_step_hands_back_once_when_it_truly_ended() -> None:
    limiter = trio.CapacityLimiter(1)
    for steps in range(ENOUGH):
        running: list[bool] = []
        handed_back: list[list[bool]] = []
        back = trio.Event()

        def work(running: list[bool] = running) -> None:
            running.append(True)
            running.append(False)

        def on_return(running: list[bool] = running, to: Any = handed_back, back: trio.Event = back) -> None:
            to.append(list(running))
            back.set()

        under_way = await cancelled_at(
            steps,
            lambda work=work, on_return=on_return: offload_owned(work, limiter=limiter, on_return=on_return),  # type: ignore[misc]
        )
        with trio.fail_after(60):
            await back.wait()
        assert handed_back in ([[]], [[True, False]])
        assert limiter.borrowed_tokens == 0
        if not under_way:
            break
    assert handed_back == [[True, False]]


async def test_populating_an_arena_may_be_cancelled_at_any_step_and_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lmcache_trio._transport.arena_map._PIECE", 8192)
    fd = os.memfd_create("arena", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 20)
    os.pwrite(fd, b"a", 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    for steps in range(ENOUGH):
        arena = ArenaMap(fd, 1 << 20)
        under_way = await cancelled_at(steps, lambda arena=arena: arena.populate(1 << 16))  # type: ignore[misc]
        assert arena.populated % 8192 == 0
        await arena.populate(1 << 16)
        assert arena.populated == 1 << 16
        assert bytes(arena.view(0, 1)) == b"a"
        if not under_way:
            break
    os.close(fd)
    assert steps > 8


@pytest.fixture
def portal() -> Iterator[Portal]:
    made = Portal("cancellations")
    made.start(_until_stopped, timeout=60)
    yield made
    assert made.stop(60)


async def _until_stopped(*, task_status: trio.TaskStatus[None]) -> None:
    task_status.started()
    await trio.sleep_forever()


@pytest.mark.parametrize("checkpoint", [*range(6), math.inf])
def test_a_hosts_call_given_up_at_any_checkpoint_is_cancelled_there_and_the_portal_goes_on(
    portal: Portal, checkpoint: float
) -> None:
    ended: list[str] = []

    async def call() -> str:
        try:
            for at in range(5):
                if at == checkpoint:
                    await trio.sleep_forever()
                await trio.lowlevel.checkpoint()
            if checkpoint == 5:
                await trio.sleep_forever()
        except trio.Cancelled:
            ended.append("cancelled")
            raise
        ended.append("done")
        return "value"

    if checkpoint is math.inf:
        assert portal.call(call, timeout=60) == "value"
    else:
        with pytest.raises(Unavailable, match="did not answer"):
            portal.call(call, timeout=0.02)
    assert portal.call(_nothing, timeout=60) is None
    assert portal.call(_nothing, timeout=60) is None  # what was cancelled has had its turn
    assert ended in ([["cancelled"], []] if checkpoint is not math.inf else [["done"]])
    assert not portal._pending


async def _nothing() -> None:
    await trio.testing.wait_all_tasks_blocked()
