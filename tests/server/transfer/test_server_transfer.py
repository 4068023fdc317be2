"""The device transfer worker over a fake device: its grants at each point of a copy, with any end meanwhile."""

import tempfile
from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from support.server import digests, say_hello
from support.transfer.rig import (
    BLOCKS,
    CHUNK_BLOCKS,
    CHUNK_TOKENS,
    PIECE,
    SHARD_BYTES,
    Open,
    PlainMemory,
    Rig,
    fill,
    settled,
)

from lmcache_trio import Config, Server, open_server
from lmcache_trio._wire.codec import POSITIONS
from lmcache_trio._wire.handles import descriptors_of, encode_export
from lmcache_trio._wire.messages import (
    Ack,
    Attach,
    ErrorKind,
    ErrorReply,
    LetGo,
    Release,
    Reset,
    RetrieveBlocks,
    Retrieved,
    Role,
    StoreBlocks,
    Stored,
    Withdraw,
)
from lmcache_trio.testing.fake_device import FakeDevice


async def test_kv_stored_from_blocks_comes_back_into_other_blocks(open_rig: Open) -> None:
    async with open_rig() as rig:
        chain = digests(3)
        fill(rig, chain, range(6))
        await rig.stored(1, chain, range(6))
        number = await rig.load(2, chain, [10, 11, 12, 13, 14, 15])
        rig.end_copies()
        assert await rig.worker.reply(number) == Retrieved(number, True)
        assert [rig.read(10 + i) for i in range(6)] == [rig.read(i) for i in range(6)]
        await rig.scheduler.end(2)
        await settled()
        assert {**rig.held, "chunks_ready": 0} == {**rig.before, **after_chunks(rig, 3)}


def after_chunks(rig: Rig, count: int) -> dict[str, Any]:
    """What `held` has more than before, when *count* chunks are READY."""
    now = rig.held
    assert now["chunks_ready"] == count
    changed = ("chunks_ready", "slots_ready", "bytes_ready", "bytes_free", "largest_hole")
    return {name: now[name] for name in changed if name != "chunks_ready"} | {"chunks_ready": 0}


# --- wrong requests are refused ---------------------------------------------------------------------------------------


async def test_a_wrong_export_is_an_error_reply_and_the_connection_lives(open_rig: Open) -> None:
    async with open_rig() as rig:
        good = encode_export(rig.export)
        taller = [attrs.evolve(view, shape=(BLOCKS, PIECE, 2), strides=(2 * PIECE, 2, 1)) for view in rig.export.layers]
        with pytest.raises(Exception, match="ends at byte"):
            attrs.evolve(rig.export, layers=tuple(taller))
        for wrong in (
            b"",
            good[:-1],
            good + b"\0",
            b"XTKV" + good[4:],
            encode_export(attrs.evolve(rig.export, layers=rig.export.layers[:1])),
        ):
            reply = await rig.worker.ask_with(descriptors_of(rig.export), Attach, wrong)
            assert isinstance(reply, ErrorReply)
            assert reply.kind is ErrorKind.MISUSE, reply
        with tempfile.TemporaryFile() as unknown:
            for descriptors in ([], [unknown.fileno()], 2 * descriptors_of(rig.export)):
                reply = await rig.worker.ask_with(descriptors, Attach, good)
                assert isinstance(reply, ErrorReply)
                assert reply.kind is ErrorKind.MISUSE, reply
        assert isinstance(await rig.attach(rig.export), Ack)


async def test_requests_that_do_not_fit_the_export_are_refused_before_anything_is_granted(open_rig: Open) -> None:
    async with open_rig() as rig:
        chain = digests(2)
        await rig.stored(1, chain, range(4))
        answer = await rig.scheduler.lookup(2, chain)
        before = rig.held
        packed = b"".join(chain)
        for cls, args in (
            (StoreBlocks, (2, b"", packed, POSITIONS.pack([0, 1, 2]))),
            (StoreBlocks, (2, b"", packed, POSITIONS.pack([0, 1, 2, BLOCKS]))),
            (StoreBlocks, (2, b"", b"", b"")),
            (RetrieveBlocks, (answer.lease, 0, 2, 0, POSITIONS.pack([0, 1, 2, 3, 4]))),
            (RetrieveBlocks, (answer.lease, 0, 2, 2, POSITIONS.pack([0, 1]))),
            (RetrieveBlocks, (answer.lease, 0, 2, 1, POSITIONS.pack([0, 1, 2, 3]))),
            (RetrieveBlocks, (answer.lease, 0, 2, 0, b"")),
            (RetrieveBlocks, (answer.lease, 0, 2, 0, POSITIONS.pack([2**32 - 1, 1, 2, 3]))),
            (RetrieveBlocks, (answer.lease, 1, 2, 0, POSITIONS.pack([0, 1, 2, 3]))),
        ):
            reply = await rig.worker.ask(cls, *args)
            assert isinstance(reply, ErrorReply), (cls, args, reply)
            assert reply.kind is ErrorKind.MISUSE
        assert rig.held == before
        assert rig.device.running == []


async def test_a_worker_without_memory_attached_is_told_so(open_rig: Open) -> None:
    async with open_rig() as rig:
        other = await say_hello(rig.server.address, Role.WORKER, "another engine")
        packed = encode_export(rig.export)
        for cls, args in ((Attach, (packed,)), (StoreBlocks, (1, b"", b"d" * 32, POSITIONS.pack([0, 1])))):
            reply = await other.ask_with(descriptors_of(rig.export), cls, *args)
            assert isinstance(reply, ErrorReply)
            assert reply.kind is ErrorKind.MISUSE


async def test_registering_anew_ends_the_attachment(open_rig: Open) -> None:
    async with open_rig() as rig:
        assert rig.held["attached"] == 1
        await rig.worker.register(shard_bytes=SHARD_BYTES)
        assert rig.held["attached"] == 0
        assert rig.device.attached == []


async def test_memory_that_is_opened_after_its_client_went_is_let_go(open_rig: Open) -> None:
    async with open_rig() as rig:
        rig.device.hold_attach()
        await rig.worker.tell(Attach(77, encode_export(rig.export)), descriptors_of(rig.export))
        await settled()
        rig.worker.connection.close()
        await settled()
        rig.device.may_attach.set()
        await settled()
        assert rig.device.attached == []
        assert rig.held["attached"] == 0


async def test_a_server_without_a_device_says_so() -> None:
    config = Config(address="memory://none", chunk_tokens=CHUNK_TOKENS, grace=0.05, device={"backend": "none"})
    async with open_server(config, memory=PlainMemory()) as server:
        worker = await say_hello(server.address, Role.WORKER)
        reply = await worker.ask(Attach, b"")
        assert isinstance(reply, ErrorReply)
        assert reply.kind is ErrorKind.UNAVAILABLE


# --- at each point of a copy ------------------------------------------------------------------------------------------

POINTS = ("queued", "started", "half", "moved")
"""Where the copy is when something ends."""


async def bring_to(rig: Rig, point: str) -> None:
    """The one copy that is running, or kept from running, to *point*."""
    if point == "queued":
        return
    (copy,) = rig.device.running
    copy.move({"started": 0, "half": copy.units // 2, "moved": copy.units}[point])


async def kept_queued(rig: Rig, chain: Sequence[bytes], point: str) -> None:
    """For the point "queued": fill the device, so that the next request has to wait."""
    if point == "queued":
        rig.room(1)
        await rig.scheduler.lookup(90, chain)
        await rig.store(90, chain, [14, 15])


async def end_request(rig: Rig, how: str, number: int, session: int) -> None:
    if how == "withdrawn":
        await rig.worker.tell(Withdraw(number))
    elif how == "its engine lost":
        rig.worker.connection.close()
    elif how == "its namespace reset":
        await rig.scheduler.get(Ack, Reset)
    elif how == "its lease released":
        await rig.scheduler.tell(Release(session))
    await settled()


@pytest.mark.parametrize("point", POINTS)
async def test_a_store_is_published_though_its_session_ended(open_rig: Open, point: str) -> None:
    async with open_rig() as rig:
        await kept_queued(rig, digests(1, "other"), point)
        chain = digests(2)
        await rig.scheduler.lookup(1, chain)
        fill(rig, chain, range(4))
        number = await rig.store(1, chain, range(4))
        await bring_to(rig, point)
        await rig.scheduler.end(1)
        await settled()
        while rig.device.running:
            rig.end_copies()
            await settled()
        assert [m for m in rig.said() if isinstance(m, Stored) and m.id == number] == [Stored(number, 2, 2)]
        assert (await rig.scheduler.lookup(2, chain)).chunks == 2


@pytest.mark.parametrize("how", ["withdrawn", "its engine lost", "its namespace reset"])
@pytest.mark.parametrize("point", POINTS)
async def test_a_store_that_ends_early_publishes_nothing_and_keeps_its_slots_until_its_copy_has_ended(
    open_rig: Open, point: str, how: str
) -> None:
    async with open_rig() as rig:
        await kept_queued(rig, digests(1, "other"), point)
        held, chain = rig.held, digests(2)
        await rig.scheduler.lookup(1, chain)
        fill(rig, chain, range(4))
        number = await rig.store(1, chain, range(4))
        await bring_to(rig, point)
        await end_request(rig, how, number, 1)
        assert (await rig.scheduler.lookup(2, chain)).chunks == 0
        if point == "queued" and how in ("withdrawn", "its engine lost"):
            assert rig.held["bytes_quarantined"] <= rig.before["bytes_quarantined"] + 4096, "nothing was being copied"
        elif point != "queued":
            assert rig.held["bytes_quarantined"] or rig.held["bytes_writing"], "the copy still writes there"
            assert not [m for m in rig.said() if getattr(m, "id", 0) == number], "the blocks are still being read"
        while rig.device.running:
            rig.end_copies()
            await settled()
        if point == "queued":
            assert rig.device.copies == 1, "what would be published by nobody is not copied"
        if how != "its engine lost":
            replies = [m for m in rig.said() if isinstance(m, Stored) and m.id == number]
            assert [(reply.copied, reply.published) for reply in replies] == [(0, 0)]
        assert (await rig.scheduler.lookup(3, chain)).chunks == 0
        for session in (1, 2, 3, 90):
            await rig.scheduler.end(session)
        await settled()
        now = rig.held
        for name in ("bytes_quarantined", "bytes_writing", "reservations", "reservations_ending", "pins"):
            assert now[name] == 0, name
        assert now["transfers_queued"] == now["copies_running"] == now["copy_bytes_running"] == 0
        assert now["attached"] == (0 if how == "its engine lost" else 1)
        assert held["connections"] - now["connections"] == (how == "its engine lost")


@pytest.mark.parametrize("how", ["withdrawn", "its engine lost", "its lease released", "its namespace reset"])
@pytest.mark.parametrize("point", POINTS)
async def test_a_load_that_ends_early_keeps_slots_and_blocks_until_its_copy_has_ended(
    open_rig: Open, point: str, how: str
) -> None:
    async with open_rig() as rig:
        chain = digests(2)
        fill(rig, chain, range(4))
        await rig.stored(1, chain, range(4))
        await kept_queued(rig, digests(1, "other"), point)
        number = await rig.load(2, chain, [8, 9, 10, 11])
        await bring_to(rig, point)
        await end_request(rig, how, number, 2)
        running = point != "queued"
        answered = [m for m in rig.said() if isinstance(m, Retrieved)]
        if running or how in ("its lease released", "its namespace reset"):
            assert answered == []
            assert rig.held["pins"] == 1, "the slots are still being read"
        else:
            assert rig.held["pins"] == 0
            assert answered == ([] if how == "its engine lost" else [Retrieved(number, False)])
        while rig.device.running:
            rig.end_copies()
            await settled()
        assert rig.held["pins"] == 0
        if how != "its engine lost":
            valid = how == "its lease released"
            answered += [m for m in rig.said() if isinstance(m, Retrieved)]
            assert answered == [Retrieved(number, valid)]
            if valid:
                assert [rig.read(8 + i) for i in range(4)] == [rig.read(i) for i in range(4)]


async def test_a_copy_that_fails_publishes_nothing_and_its_load_is_not_valid(open_rig: Open) -> None:
    async with open_rig() as rig:
        chain = digests(1)
        await rig.scheduler.lookup(1, chain)
        number = await rig.store(1, chain, [0, 1])
        rig.device.running[0].fail()
        assert await rig.worker.reply(number) == Stored(number, 0, 0, {"failed": 1})
        assert (await rig.scheduler.lookup(2, chain)).chunks == 0
        await rig.stored(3, chain, [0, 1])
        number = await rig.load(4, chain, [8, 9])
        rig.device.running[0].fail()
        assert await rig.worker.reply(number) == Retrieved(number, False)
        assert rig.held["pins"] == 0


async def test_a_chunk_that_another_shard_aborted_is_not_said_to_be_stored(open_rig: Open) -> None:
    async with open_rig() as rig:
        two = Rig(rig.server, rig.device, say_hello, "two ranks")
        two.scheduler = await say_hello(rig.server.address, Role.SCHEDULER, two.engine, shards=2)
        ranks = [await say_hello(rig.server.address, Role.WORKER, two.engine, i, 2) for i in range(2)]
        for rank in ranks:
            await rank.register(shard_bytes=SHARD_BYTES)
        for rank in ranks:
            assert isinstance(await rank.ask_with(descriptors_of(two.export), Attach, encode_export(two.export)), Ack)
        await two.scheduler.lookup(1, digests(2))
        numbers = []
        for two.worker, count in zip(ranks, (1, 2), strict=True):
            numbers.append(await two.store(1, digests(count), range(count * CHUNK_BLOCKS)))
        rig.device.running[0].fail()
        assert await ranks[0].reply(numbers[0]) == Stored(numbers[0], 0, 0, {"failed": 1})
        rig.end_copies()
        assert await ranks[1].reply(numbers[1]) == Stored(numbers[1], 1, 0, {"aborted": 1})


async def test_a_reservation_that_timed_out_under_its_copy_publishes_nothing(
    open_rig: Open, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_rig(reservation_timeout=1.0) as rig:
        chain = digests(1)
        await rig.scheduler.lookup(1, chain)
        number = await rig.store(1, chain, [0, 1])
        rig.device.running[0].move(1)
        await trio.sleep(2)
        assert rig.held["bytes_quarantined"] > 0
        rig.end_copies()
        await settled()
        assert rig.said() == [Stored(number, 0, 0, {"aborted": 1})]
        assert (await rig.scheduler.lookup(2, chain)).chunks == 0
        assert rig.held["bytes_quarantined"] == 0


async def test_a_worker_whose_copies_never_end_leaves_the_other_engines_room_and_is_named(
    open_rig: Open, caplog: Any, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_rig(reservation_timeout=10.0) as rig:
        chain = digests(200)
        await rig.scheduler.lookup(1, chain)
        await rig.store(1, chain, [0, 1] * 200)
        assert rig.counted["drops"]["share"] == 200 - 128
        other = await say_hello(rig.server.address, Role.SCHEDULER, "other")
        worker = await say_hello(rig.server.address, Role.WORKER, "other")
        await worker.register(shard_bytes=SHARD_BYTES)
        await other.lookup(1, digests(4, "more"))
        assert await worker.commit((await worker.reserve(1, digests(4, "more"))).reservation) == 4
        await trio.sleep(11)
        for setting in ("write_share", "reservation_timeout"):
            (line,) = [record.getMessage() for record in caplog.records if setting in record.getMessage()]
            assert "engine 'engine'" in line


async def test_a_worker_that_lost_its_connection_is_told_when_its_blocks_are_free(open_rig: Open) -> None:
    async with open_rig() as rig:
        chain = digests(1)
        await rig.stored(1, chain, [0, 1])
        await rig.load(2, chain, [8, 9])
        (copy,) = rig.device.running
        copy.move(1)
        asker = await rig.observer()
        await asker.tell(LetGo(5, rig.worker.token))
        await settled()
        assert rig.said(asker) == []
        assert rig.held["connections"] == 2, "the old connection is not listened to any more"
        copy.end()
        await settled()
        assert rig.said(asker) == [Ack(5)]
        await asker.tell(LetGo(6, rig.worker.token))
        await settled()
        assert rig.said(asker) == [Ack(6)]


async def test_the_server_drains_until_its_copies_have_ended() -> None:
    device = FakeDevice()
    config = Config(address="memory://drain", chunk_tokens=CHUNK_TOKENS, grace=60)
    done = trio.Event()

    async def serve(*, task_status: trio.TaskStatus[tuple[Server, trio.Event]]) -> None:
        leave = trio.Event()
        async with open_server(config, memory=PlainMemory(), device=device) as server:
            task_status.started((server, leave))
            await leave.wait()
        done.set()

    async with trio.open_nursery() as nursery:
        server, leave = await nursery.start(serve)
        rig = Rig(server, device, say_hello)
        await rig.start()
        chain = digests(1)
        await rig.scheduler.lookup(1, chain)
        number = await rig.store(1, chain, [0, 1])
        leave.set()
        await settled()
        assert not done.is_set()
        rig.end_copies()
        assert await rig.worker.reply(number) == Stored(number, 1, 1, {})
        with trio.fail_after(5):
            await done.wait()
    assert device.broken_rules == []
