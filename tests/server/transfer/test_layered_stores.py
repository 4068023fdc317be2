"""Stores that begin as layers finish: each layer is copied once its engine has written it, and all are committed."""

from collections.abc import Callable
from typing import Any

import pytest
import trio
from support.transfer.rig import LAYERS, PIECE, SHARD_BYTES, Open, Rig, fill, settled

from lmcache_trio._wire.codec import pack_offsets, pack_positions
from lmcache_trio._wire.messages import (
    Ack,
    ErrorKind,
    ErrorReply,
    LayersWritten,
    Reset,
    Retrieved,
    Role,
    StoreBlocks,
    Stored,
    Withdraw,
)

Digests = Callable[..., list[bytes]]


def layers_running(rig: Rig) -> list[tuple[int, int]]:
    return [copy.copy.layers for copy in rig.device.running]


async def test_the_first_layer_is_copied_before_the_next_is_written(open_rig: Open, digests: Digests) -> None:
    async with open_rig() as rig:
        chain = digests(2)
        await rig.scheduler.lookup(1, chain)
        number = await rig.store(1, chain, range(4), layered=True)
        assert rig.device.running == [], "nothing is written yet"
        fill(rig, chain, range(4))
        blocks = [rig.read(i) for i in range(4)]
        await rig.written(number, 1)
        assert layers_running(rig) == [(0, 1)]
        rig.end_copies()
        await settled()
        for block in range(4):  # it was copied: nothing looks at it again
            rig.bytes[block * PIECE : (block + 1) * PIECE] = bytes(PIECE)
        assert rig.said() == []
        assert (await rig.scheduler.lookup(2, chain)).chunks == 0, "half of a chunk is none"
        await rig.written(number, LAYERS)
        assert layers_running(rig) == [(1, LAYERS)]
        rig.end_copies()
        assert await rig.worker.reply(number) == Stored(number, 2, 2, {})
        number = await rig.load(3, chain, [8, 9, 10, 11])
        rig.end_copies()
        assert await rig.worker.reply(number) == Retrieved(number, True)
        assert [rig.read(8 + i) for i in range(4)] == blocks


async def test_layers_that_are_written_while_the_device_is_busy_are_one_copy(open_rig: Open, digests: Digests) -> None:
    async with open_rig() as rig:
        rig.room(1)
        await rig.scheduler.lookup(1, digests(1, "first"))
        await rig.scheduler.lookup(2, digests(1))
        await rig.store(1, digests(1, "first"), [0, 1])
        number = await rig.store(2, digests(1), [2, 3], layered=True)
        for layers in range(1, LAYERS + 1):
            await rig.written(number, layers)
        rig.room(1 << 20)
        rig.end_copies()
        await settled()
        assert layers_running(rig) == [(0, LAYERS)]
        rig.end_copies()
        await settled()
        assert Stored(number, 1, 1, {}) in rig.said()


async def test_an_engine_that_stops_in_the_middle_of_a_pass_keeps_no_other_from_the_device(
    open_rig: Open, digests: Digests, connect: Callable[..., Any]
) -> None:
    async with open_rig() as rig:
        rig.room(SHARD_BYTES)
        other = Rig(rig.server, rig.device, connect, "another engine")
        await other.start()
        await rig.scheduler.lookup(1, digests(1))
        number = await rig.store(1, digests(1), [0, 1], layered=True)
        await rig.written(number, 1)
        rig.end_copies()
        await settled()
        assert rig.held["copies_running"] == rig.held["transfers_queued"] == 0
        await other.stored(5, digests(1, "other"), [0, 1])
        await rig.stored(2, digests(1, "its own"), [4, 5])
        await rig.written(number, LAYERS)
        rig.end_copies()
        assert await rig.worker.reply(number) == Stored(number, 1, 1, {})


# --- at each point of a store ---------------------------------------------------------------------------------------

POINTS = ("nothing is written", "it is queued", "its first layer runs", "between two layers", "its last layer runs")


async def bring_to(rig: Rig, number: int, point: str) -> None:
    if point == "nothing is written":
        return
    await rig.written(number, 1)
    if point == "it is queued":
        return
    if point == "its first layer runs":
        rig.device.running[0].move(1)
        return
    rig.end_copies()
    await settled()
    if point == "its last layer runs":
        await rig.written(number, LAYERS)
        rig.device.running[0].move(1)


async def give_up(rig: Rig, number: int, how: str) -> None:
    if how == "withdrawn":
        await rig.worker.tell(Withdraw(number))
    elif how == "its engine lost":
        rig.worker.connection.close()
    elif how == "its namespace reset":
        await rig.scheduler.get(Ack, Reset)
    else:
        await trio.sleep(2)
    await settled()


@pytest.mark.parametrize("how", ["withdrawn", "its engine lost", "its namespace reset", "its reservation timed out"])
@pytest.mark.parametrize("point", POINTS)
async def test_a_layered_store_that_ends_early_publishes_nothing_and_leaves_nothing(
    open_rig: Open, digests: Digests, point: str, how: str, autojump_clock: Any
) -> None:
    async with open_rig(reservation_timeout=1.0) as rig:
        chain = digests(2)
        if point == "it is queued":
            rig.room(1)
            await rig.scheduler.lookup(90, digests(1, "other"))
            await rig.store(90, digests(1, "other"), [14, 15])
        await rig.scheduler.lookup(1, chain)
        number = await rig.store(1, chain, range(4), layered=True)
        await bring_to(rig, number, point)
        begun = point in ("its first layer runs", "its last layer runs")
        await give_up(rig, number, how)
        if begun:
            assert rig.held["bytes_quarantined"] or rig.held["bytes_writing"], "the copy still writes there"
            assert rig.said() == [], "the blocks are still being read"
        elif how in ("withdrawn", "its engine lost"):
            assert rig.held["bytes_quarantined"] <= 4096, "nothing was being copied"
        if how != "its engine lost":  # the engine goes on with its pass, and knows nothing of it
            await rig.written(number, LAYERS)
        while rig.device.running:
            rig.end_copies()
            await settled()
        if how != "its engine lost":
            assert [m for m in rig.said() if isinstance(m, Stored) and m.id == number] == [
                Stored(number, 0, 0, {"failed" if how == "withdrawn" else "aborted": 2})
            ]
        copies = {"it is queued": 1, "nothing is written": 0, "its last layer runs": 2}.get(point, 1)
        assert rig.device.copies == copies, "what would be published by nobody is not copied"
        assert (await rig.scheduler.lookup(2, chain)).chunks == 0
        for session in (1, 2, 90):
            await rig.scheduler.end(session)
        await settled()
        now = rig.held
        for name in ("bytes_quarantined", "bytes_writing", "reservations", "reservations_ending", "pins", "sessions"):
            assert now[name] == 0, name
        assert now["transfers_queued"] == now["copies_running"] == now["copy_bytes_running"] == 0
        assert now["attached"] == (0 if how == "its engine lost" else 1)


@pytest.mark.parametrize("point", POINTS)
async def test_a_layered_store_goes_on_after_the_end_of_its_session(
    open_rig: Open, digests: Digests, point: str
) -> None:
    async with open_rig() as rig:
        chain = digests(2)
        if point == "it is queued":
            rig.room(1)
            await rig.scheduler.lookup(90, digests(1, "other"))
            await rig.store(90, digests(1, "other"), [14, 15])
        await rig.scheduler.lookup(1, chain)
        number = await rig.store(1, chain, range(4), layered=True)
        await bring_to(rig, number, point)
        await rig.scheduler.end(1)
        await settled()
        await rig.written(number, LAYERS)
        while rig.device.running:
            rig.end_copies()
            await settled()
        assert [m for m in rig.said() if isinstance(m, Stored) and m.id == number] == [Stored(number, 2, 2)]
        assert (await rig.scheduler.lookup(2, chain)).chunks == 2


async def test_a_layer_whose_copy_fails_ends_its_store_at_once(open_rig: Open, digests: Digests) -> None:
    async with open_rig() as rig:
        await rig.scheduler.lookup(1, digests(1))
        number = await rig.store(1, digests(1), [0, 1], layered=True)
        await rig.written(number, 1)
        rig.device.running[0].fail()
        assert await rig.worker.reply(number) == Stored(number, 0, 0, {"failed": 1})
        await rig.written(number, LAYERS)
        assert rig.device.running == []
        assert rig.said() == []
        await rig.stored(2, digests(1), [0, 1])


# --- what a layer must follow ---------------------------------------------------------------------------------------


async def test_each_layer_follows_an_event_of_its_own(open_rig: Open, digests: Digests) -> None:
    async with open_rig(gpu=True) as rig:
        await rig.scheduler.lookup(1, digests(1))
        number = await rig.store(1, digests(1), [0, 1], layered=True)
        first, second = rig.device.event(), rig.device.event()
        await rig.written(number, 1, event=first)
        await rig.written(number, 2, event=second)
        assert rig.device.running == []
        rig.device.happened[first].set()
        await settled()
        assert layers_running(rig) == [(0, 1)]
        rig.end_copies()
        await settled()
        assert rig.device.running == []
        rig.device.happened[second].set()
        await settled()
        assert layers_running(rig) == [(1, 2)]
        rig.end_copies()
        assert await rig.worker.reply(number) == Stored(number, 1, 1, {})


@pytest.mark.parametrize("how", ["withdrawn", "its engine lost"])
async def test_a_layer_whose_event_never_comes_may_be_given_up(open_rig: Open, digests: Digests, how: str) -> None:
    async with open_rig(gpu=True) as rig:
        await rig.scheduler.lookup(1, digests(1))
        number = await rig.store(1, digests(1), [0, 1], layered=True)
        event = rig.device.event()
        await rig.written(number, 1, event=event)
        await give_up(rig, number, how)
        assert rig.said() == ([Stored(number, 0, 0, {"failed": 1})] if how == "withdrawn" else [])
        assert rig.held["bytes_quarantined"] == rig.held["bytes_writing"] == 0
        rig.device.happened[event].set()
        await settled()
        assert rig.device.running == []


async def test_an_event_that_is_not_known_fails_its_stores_and_no_other(open_rig: Open, digests: Digests) -> None:
    async with open_rig(gpu=True) as rig:
        numbers = []
        for session in (1, 2, 3):
            await rig.scheduler.lookup(session, digests(1, str(session)))
            numbers.append(await rig.store(session, digests(1, str(session)), [0, 1], layered=True))
        await rig.worker.tell(LayersWritten(pack_offsets(numbers[:2]), 1, b"?" * 64))
        await settled()
        assert rig.said() == [Stored(number, 0, 0, {"failed": 1}) for number in numbers[:2]]
        await rig.written(numbers[2], LAYERS)
        rig.end_copies()
        assert await rig.worker.reply(numbers[2]) == Stored(numbers[2], 1, 1, {})


async def test_stores_that_are_told_of_together_wait_for_one_event(open_rig: Open, digests: Digests) -> None:
    async with open_rig(gpu=True) as rig:
        numbers = []
        for session in (1, 2):
            await rig.scheduler.lookup(session, digests(1, str(session)))
            numbers.append(await rig.store(session, digests(1, str(session)), [0, 1], layered=True))
        event = rig.device.event()
        for _ in range(3):  # said again, it is not waited for again
            await rig.worker.tell(LayersWritten(pack_offsets(numbers), LAYERS, event))
        await settled()
        assert rig.device.happened[event].statistics().tasks_waiting == 1
        await rig.worker.tell(Withdraw(numbers[0]))
        await settled()
        assert rig.device.happened[event].statistics().tasks_waiting == 1, "the other still waits for it"
        rig.device.happened[event].set()
        await settled()
        rig.end_copies()
        await settled()
        assert rig.said() == [Stored(numbers[0], 0, 0, {"failed": 1}), Stored(numbers[1], 1, 1, {})]


# --- what is wrong --------------------------------------------------------------------------------------------------


async def test_a_layered_store_has_no_event_of_its_own(open_rig: Open, digests: Digests) -> None:
    async with open_rig(gpu=True) as rig:
        await rig.scheduler.lookup(1, digests(1))
        packed = pack_positions([0, 1])
        reply = await rig.worker.ask(StoreBlocks, 1, b"", digests(1)[0], packed, True, rig.device.event())
        assert isinstance(reply, ErrorReply)
        assert reply.kind is ErrorKind.MISUSE
        assert rig.held["bytes_writing"] == 0


@pytest.mark.parametrize("gpu", [False, True])
async def test_news_of_layers_that_fits_nothing_is_not_heeded(open_rig: Open, digests: Digests, gpu: bool) -> None:
    async with open_rig(gpu=gpu) as rig:
        fill(rig, digests(1), [0, 1])
        await rig.stored(1, digests(1), [0, 1])
        rig.room(1)
        load = await rig.load(2, digests(1), [8, 9], layered=True)
        await rig.scheduler.lookup(3, digests(1, "plain"))
        await rig.scheduler.lookup(4, digests(1, "layered"))
        plain = await rig.store(3, digests(1, "plain"), [2, 3])
        layered = await rig.store(4, digests(1, "layered"), [4, 5], layered=True)
        before = rig.held
        for number, layers, event in (
            (layered, LAYERS + 1, b""),
            (layered, 1, b"short"),
            (layered, 1, b"?" * 64 if not gpu else b"?" * 63),
            (layered, 0, b""),
            (load, 1, b""),
            (plain, 1, b""),
            (999_999, 1, b""),
        ):
            await rig.written(number, layers, event=event)
            assert rig.held == before
            assert rig.said() == []
        await rig.written(layered, LAYERS)
        while rig.device.running:
            rig.end_copies()
            await settled()
        said = rig.said()
        assert Retrieved(load, True) in said
        assert [m for m in said if isinstance(m, Stored)] == [Stored(plain, 1, 1, {}), Stored(layered, 1, 1, {})]


async def test_news_of_layers_from_a_worker_without_memory_attached_is_not_heeded(
    open_rig: Open, connect: Callable[..., Any]
) -> None:
    async with open_rig() as rig:
        other = await connect(rig.server.address, Role.WORKER, "another engine")
        await other.tell(LayersWritten(pack_offsets([1]), 1))
        await settled()
        assert rig.said(other) == []
        assert rig.counted["handler_bugs"] == 0
