"""Device transfers when something is wrong: with the device, with a client, or with the order of its messages."""

from typing import Any

import attrs
import pytest
import trio
import trio.testing
from support.server import digests, say_hello
from support.transfer.rig import BLOCKS, PIECE, SHARD_BYTES, Open, Rig, fill, settled

from lmcache_trio._core.transfer.exports import Export, TensorView
from lmcache_trio._wire.codec import POSITIONS
from lmcache_trio._wire.handles import descriptors_of, encode_export
from lmcache_trio._wire.messages import (
    Ack,
    Attach,
    ErrorKind,
    ErrorReply,
    LetGo,
    NamespaceKnown,
    Register,
    Reset,
    Retrieved,
    StoreBlocks,
    Stored,
    Withdraw,
)
from lmcache_trio.abc import ArenaDevice, Attached, Copy, Ticket
from lmcache_trio.testing.fake_device import FakeCopy, FakeDevice


class BuggyDevice(FakeDevice):
    """A device with the bugs that a test asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.start_fails = self.loses = self.detach_fails = False

    def start(self, copy: Copy) -> Ticket:
        if self.start_fails:
            raise KeyError("a bug in start")
        return super().start(copy)

    async def wait_ended(self, ticket: Ticket) -> None:
        if self.loses:
            assert isinstance(ticket, FakeCopy)
            self.running.remove(ticket)
            raise RuntimeError("a bug in wait_ended")
        await super().wait_ended(ticket)

    def detach(self, attached: Any) -> None:
        if self.detach_fails:
            raise OSError("a bug in detach")
        super().detach(attached)


# --- Attach and Register, in any order --------------------------------------------------------------------------------


def shorter(export: Export) -> Export:
    """Of the same memory: chunks of half the length."""
    views = tuple(
        TensorView(0, view.offset, view.dtype, (BLOCKS, PIECE // 2), (PIECE, 1))  # a stride with room between
        for view in export.layers
    )
    return attrs.evolve(export, layers=views)


async def test_memory_that_was_being_opened_for_a_former_layout_is_let_go(open_rig: Open) -> None:
    """Its chunks would be longer than their slots: a copy would write over its neighbours'."""
    async with open_rig() as rig:
        rig.device.hold_attach()
        await rig.worker.tell(Attach(77, encode_export(rig.export)), descriptors_of(rig.export))
        await settled()
        await rig.worker.get(NamespaceKnown, Register, b"g" * 32, SHARD_BYTES // 2, 16)
        rig.device.may_attach.set()
        reply = await rig.worker.reply(77)
        assert isinstance(reply, ErrorReply)
        assert reply.kind is ErrorKind.UNAVAILABLE
        assert rig.device.attached == []
        assert rig.held["attached"] == 0
        refused = await rig.worker.ask(StoreBlocks, 1, b"", b"".join(digests(1)), POSITIONS.pack([0, 1]))
        assert isinstance(refused, ErrorReply)
        assert isinstance(await rig.attach(shorter(rig.export)), Ack)


async def test_each_of_two_attaches_at_once_gets_its_reply_and_the_later_one_holds(open_rig: Open) -> None:
    async with open_rig() as rig:
        rig.device.hold_attach()
        for number in (77, 78):
            await rig.worker.tell(Attach(number, encode_export(rig.export)), descriptors_of(rig.export))
        await settled()
        rig.device.may_attach.set()
        await settled()
        said = {getattr(message, "id", 0): message for message in rig.said()}
        assert isinstance(said[77], ErrorReply)
        assert said[78] == Ack(78)
        assert len(rig.device.attached) == rig.held["attached"] == 1


class SlowDevice(FakeDevice):
    """Its `attach` is in a thread, which no cancellation interrupts."""

    async def attach(self, export: Export, *args: Any) -> Attached:
        with trio.CancelScope(shield=True):
            await self.may_attach.wait()
        await trio.lowlevel.checkpoint_if_cancelled()
        return await super().attach(export, *args)


async def test_a_flood_of_attaches_is_refused_by_the_name_of_the_limit(open_rig: Open) -> None:
    async with open_rig(SlowDevice()) as rig:
        before = rig.held["tasks"]
        rig.device.hold_attach()
        for number in range(100, 200):
            await rig.worker.tell(Attach(number, encode_export(rig.export)), descriptors_of(rig.export))
        await settled()
        replies: list[Any] = rig.said()
        assert {reply.id: reply.kind for reply in replies} == dict.fromkeys(range(102, 200), ErrorKind.MISUSE)
        assert all("limits.attaches" in reply.message for reply in replies)
        assert (rig.held["attaching"], rig.held["tasks"]) == (2, before + 2)
        assert rig.server.statistics()["counted"]["limits"]["attaches"] == 98
        rig.worker.connection.close()
        await settled()
        rig.device.may_attach.set()
        await settled()
        assert (rig.held["attaching"], rig.held["attached"], rig.device.attached) == (0, 0, [])


async def test_the_opening_of_memory_ends_with_its_lost_client(open_rig: Open) -> None:
    async with open_rig() as rig:
        rig.device.hold_attach()
        await rig.worker.tell(Attach(77, encode_export(rig.export)), descriptors_of(rig.export))
        await settled()
        assert rig.held["attaching"] == 1
        rig.worker.connection.close()
        await settled()  # and `may_attach` was not set
        assert (rig.held["attaching"], rig.held["attached"], rig.device.attached) == (0, 0, [])


# --- bugs in the device -----------------------------------------------------------------------------------------------


async def test_a_bug_in_starting_a_copy_costs_that_copy(open_rig: Open) -> None:
    device = BuggyDevice()
    async with open_rig(device) as rig:
        await rig.scheduler.lookup(1, digests(1))
        device.start_fails = True
        number = await rig.store(1, digests(1), [0, 1])
        assert rig.said() == [Stored(number, 0, 0, {"failed": 1})]
        assert rig.counted["device_bugs"] == 1
        assert rig.held["bytes_quarantined"] == rig.held["bytes_writing"] == 0
        device.start_fails = False
        await rig.stored(2, digests(1), [0, 1])


async def test_a_bug_in_the_devices_detach_costs_no_client_anything(open_rig: Open) -> None:
    device = BuggyDevice()
    async with open_rig(device) as rig:
        device.detach_fails = True
        rig.worker.connection.close()
        await settled()
        assert (rig.counted["device_bugs"], rig.held["attached"]) == (1, 0)
        device.detach_fails = False
        await rig.start_worker()
        await rig.stored(2, digests(1), [0, 1])


async def test_a_copy_whose_end_is_lost_keeps_all_that_it_owns_and_no_other_client_waiting(open_rig: Open) -> None:
    device = BuggyDevice()
    async with open_rig(device) as rig:
        rig.room(SHARD_BYTES)
        other = Rig(rig.server, device, say_hello, "another engine")
        await other.start()
        chain = digests(1)
        await rig.scheduler.lookup(1, chain)
        device.loses = True
        lost = await rig.store(1, chain, [0, 1])
        device.loses = False
        said = rig.said()
        assert [m for m in said if isinstance(m, (Stored, ErrorReply))] == [], "its blocks may still be being read"
        assert [m.namespace for m in said if isinstance(m, NamespaceKnown)] == [b""], "nothing more is offered to it"
        assert (rig.held["attached"], rig.held["copy_bytes_running"], rig.counted["device_bugs"]) == (2, 0, 1)
        await other.stored(5, digests(1, "other"), [0, 1])
        reply = await rig.worker.ask(StoreBlocks, 1, b"", b"".join(digests(2)), POSITIONS.pack([4, 5, 6, 7]))
        assert isinstance(reply, ErrorReply)
        assert reply.kind is ErrorKind.UNAVAILABLE
        await rig.worker.tell(Withdraw(lost))
        asker = await rig.observer()
        await asker.tell(LetGo(5, rig.worker.token))
        await rig.scheduler.end(1)
        await settled()
        assert rig.said(asker) == []
        assert rig.held["bytes_quarantined"] > 0, "its slot is not used again"
        assert rig.held["attached"] == 2, "its memory is not let go of"


async def test_blocks_that_wait_behind_a_lost_copy_are_given_back_and_those_beside_it_at_their_end(
    open_rig: Open,
) -> None:
    device = BuggyDevice()
    async with open_rig(device) as rig:
        rig.room(2 * SHARD_BYTES)
        for session in (1, 2, 3):
            await rig.scheduler.lookup(session, digests(1, str(session)))
        running = await rig.store(1, digests(1, "1"), [0, 1])
        device.loses = True
        lost = await rig.store(2, digests(1, "2"), [2, 3])
        device.loses = False
        queued = await rig.store(3, digests(1, "3"), [4, 5])
        assert [m.id for m in rig.said() if isinstance(m, ErrorReply)] == [queued]
        device.running[0].end()
        await settled()
        assert [m.id for m in rig.said() if isinstance(m, (Stored, ErrorReply))] == [running]
        assert lost not in (running, queued)
        assert rig.held["attached"] == 1


# --- too much, and in vain --------------------------------------------------------------------------------------------


async def test_no_client_queues_more_than_some(open_rig: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_trio._server.transfer.attachments.MAX_WORKS", 3)
    async with open_rig() as rig:
        chains = [[bytes([i]) * 32] for i in range(5)]
        for session, chain in enumerate(chains, 1):
            await rig.scheduler.lookup(session, chain)
        numbers = [await rig.store(i + 1, chains[i], [2 * i, 2 * i + 1]) for i in range(3)]
        before = rig.held
        refused = await rig.worker.ask(StoreBlocks, 4, b"", b"".join(chains[3]), POSITIONS.pack([6, 7]))
        assert isinstance(refused, ErrorReply)
        assert refused.kind is ErrorKind.UNAVAILABLE
        assert rig.held == before, "nothing was reserved for it"
        rig.end_copies()
        await settled()
        assert sorted(m.id for m in rig.said() if isinstance(m, Stored)) == numbers
        await rig.stored(5, chains[4], [8, 9])


@pytest.mark.parametrize("how", ["its namespace reset", "its reservation timed out"])
async def test_a_store_that_would_publish_nothing_is_not_copied(
    open_rig: Open, how: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_rig(reservation_timeout=1.0) as rig:
        rig.room(1)
        await rig.scheduler.lookup(1, digests(1, "first"))
        await rig.scheduler.lookup(2, digests(2))
        await rig.store(1, digests(1, "first"), [0, 1])
        number = await rig.store(2, digests(2), [2, 3, 4, 5])
        if how == "its namespace reset":
            await rig.scheduler.get(Ack, Reset)
        else:
            await trio.sleep(2)
        await settled()
        rig.end_copies()
        await settled()
        assert rig.device.running == []
        assert rig.device.copies == 1
        assert Stored(number, 0, 0, {"aborted": 2}) in rig.said()
        assert rig.held["bytes_quarantined"] == rig.held["bytes_writing"] == 0


async def test_a_load_that_would_not_be_valid_is_not_copied(open_rig: Open) -> None:
    async with open_rig() as rig:
        await rig.stored(1, digests(1), [0, 1])
        await rig.stored(2, digests(1, "other"), [0, 1])
        rig.room(1)
        first = await rig.load(3, digests(1), [8, 9])
        second = await rig.load(4, digests(1, "other"), [10, 11])
        await rig.scheduler.get(Ack, Reset)
        rig.end_copies()
        await settled()
        assert [m for m in rig.said() if isinstance(m, Retrieved)] == [
            Retrieved(first, False),
            Retrieved(second, False),
        ]
        assert rig.device.copies == 3
        assert rig.held["pins"] == 0


# --- the event before a copy ------------------------------------------------------------------------------------------


async def test_a_store_waits_for_its_event_and_keeps_no_other_from_the_device(open_rig: Open) -> None:
    async with open_rig(gpu=True) as rig:
        rig.room(SHARD_BYTES)
        event = rig.device.event()
        for session in (1, 2):
            await rig.scheduler.lookup(session, digests(1, str(session)))
        fill(rig, digests(1, "1"), [0, 1])
        first = await rig.store(1, digests(1, "1"), [0, 1], event=event)
        assert rig.device.running == []
        second = await rig.store(2, digests(1, "2"), [2, 3])
        rig.end_copies()
        await settled()
        assert rig.said() == [Stored(second, 1, 1, {})]
        rig.device.happened[event].set()
        await settled()
        rig.end_copies()
        await settled()
        assert rig.said() == [Stored(first, 1, 1, {})]


async def test_a_load_waits_for_its_event(open_rig: Open) -> None:
    async with open_rig(gpu=True) as rig:
        fill(rig, digests(1), [0, 1])
        await rig.stored(1, digests(1), [0, 1])
        event = rig.device.event()
        number = await rig.load(2, digests(1), [8, 9], event=event)
        assert rig.device.running == []
        rig.device.happened[event].set()
        await settled()
        rig.end_copies()
        await settled()
        assert rig.said() == [Retrieved(number, True)]
        assert rig.read(8) == rig.read(0)


@pytest.mark.parametrize("how", ["withdrawn", "its engine lost", "its event unknown"])
async def test_a_request_whose_event_never_comes_may_end_nevertheless(open_rig: Open, how: str) -> None:
    async with open_rig(gpu=True) as rig:
        await rig.scheduler.lookup(1, digests(1))
        event = b"?" * 64 if how == "its event unknown" else rig.device.event()
        number = await rig.store(1, digests(1), [0, 1], event=event)
        if how == "withdrawn":
            await rig.worker.tell(Withdraw(number))
        elif how == "its engine lost":
            rig.worker.connection.close()
        await settled()
        if how != "its engine lost":
            assert rig.said() == [Stored(number, 0, 0, {"failed": 1})]
        assert rig.held["attached"] == (0 if how == "its engine lost" else 1)
        assert rig.held["bytes_quarantined"] == rig.held["bytes_writing"] == 0
        if how != "its event unknown":
            rig.device.happened[event].set()
            await settled()
        assert rig.device.running == []


@pytest.mark.parametrize(("gpu", "event"), [(False, b"e" * 64), (True, b"e" * 63), (True, b"e")])
async def test_an_event_is_one_and_memory_of_the_host_knows_none(open_rig: Open, gpu: bool, event: bytes) -> None:
    async with open_rig(gpu=gpu) as rig:
        await rig.scheduler.lookup(1, digests(1))
        packed = POSITIONS.pack([0, 1])
        reply = await rig.worker.ask(StoreBlocks, 1, b"", b"".join(digests(1)), packed, event)
        assert isinstance(reply, ErrorReply)
        assert reply.kind is ErrorKind.MISUSE
        assert rig.device.running == []


async def test_memory_of_a_gpu_is_not_opened_by_a_device_that_could_not_wait_for_it(open_rig: Open) -> None:
    async with open_rig(gpu=True) as rig:
        transfer = rig.server._parts.transfer
        assert transfer is not None
        transfer.takes_events = False  # as with a device that is not an EventDevice
        reply = await rig.attach(rig.export)
        assert isinstance(reply, ErrorReply)
        assert reply.kind is ErrorKind.UNAVAILABLE
        assert "copy through the arena" in reply.message


# --- the arena grows --------------------------------------------------------------------------------------------------


class ArenaFake(FakeDevice, ArenaDevice):
    """Notes how often it was told of growth, and fails as asked."""

    def __init__(self) -> None:
        super().__init__()
        self.told = 0
        self.go = trio.Event()
        self.fault: Exception | None = None

    async def arena_grew(self) -> None:
        self.told += 1
        await self.go.wait()
        if self.fault is not None:
            raise self.fault


async def test_a_device_is_told_that_the_arena_grew_while_something_is_attached(open_rig: Open) -> None:
    device = ArenaFake()
    async with open_rig(device) as rig:
        transfer = rig.server._parts.transfer
        assert transfer is not None
        for _ in range(3):
            transfer.arena_grew()
        await settled()
        transfer.arena_grew()
        await settled()
        assert device.told == 1, "once, until it has dealt with it"
        device.go.set()
        await settled()
        assert device.told == 2, "and once more for all that grew meanwhile"
        device.fault = RuntimeError("a bug in arena_grew")
        transfer.arena_grew()
        await settled()
        assert (device.told, rig.counted["device_bugs"]) == (3, 1)
        transfer.arena_grew()
        await settled()
        assert device.told == 4
        await rig.stored(1, digests(1), [0, 1])
        rig.worker.connection.close()
        await settled()
        transfer.arena_grew()
        await settled()
        assert device.told == 4, "nobody needs it"
