"""The device transfer worker over a fake device: who owns what, at each point of a copy, whatever ends meanwhile."""

import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_trio import Config, Server, open_server
from lmcache_trio._core.exports import DType, Export, TensorView
from lmcache_trio._wire.codec import decode, pack_positions
from lmcache_trio._wire.handles import encode_export
from lmcache_trio._wire.messages import (
    Ack,
    Attach,
    ErrorKind,
    ErrorReply,
    LayersDone,
    LetGo,
    Message,
    Release,
    Reset,
    RetrieveBlocks,
    Retrieved,
    Role,
    StoreBlocks,
    Stored,
    Withdraw,
)
from lmcache_trio.abc import Memory
from lmcache_trio.errors import Gone
from lmcache_trio.testing.fake_device import FakeDevice

BLOCKS, BLOCK_TOKENS, CHUNK_TOKENS, LAYERS, PIECE = 16, 16, 32, 2, 64
CHUNK_BLOCKS = CHUNK_TOKENS // BLOCK_TOKENS
BLOCK_BYTES = LAYERS * PIECE
SHARD_BYTES = BLOCK_BYTES * CHUNK_BLOCKS


class PlainMemory(Memory):
    """An arena that nobody else maps."""

    Config = dict

    def __init__(self) -> None:
        super().__init__({})
        self.bytes = bytearray(1 << 20)

    @property
    def path(self) -> str:
        return "/nowhere/plain.arena"

    @property
    def nonce(self) -> bytes:
        return b"n" * 16

    @property
    def size(self) -> int:
        return len(self.bytes)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        yield

    async def grow(self) -> int:
        return self.size

    def view(self, offset: int, length: int) -> memoryview:
        return memoryview(self.bytes)[offset : offset + length]

    def statistics(self) -> dict[str, int | str]:
        return {"bytes_taken": self.size, "bytes_size": self.size}


class Rig:
    """A server with a fake device, one engine of one worker, and that worker's memory."""

    def __init__(self, server: Server, device: FakeDevice, connect: Callable[..., Any]) -> None:
        self.server, self.device, self._connect = server, device, connect
        self.named, self.bytes = device.engine_memory(BLOCKS * BLOCK_BYTES)
        self.scheduler: Any = None
        self.worker: Any = None
        self.numbers = iter(range(1000, 1_000_000))
        self.before: dict[str, Any] = {}

    @property
    def export(self) -> Export:
        views = [TensorView(0, i * BLOCKS * PIECE, DType.uint8, (BLOCKS, PIECE), (PIECE, 1)) for i in range(LAYERS)]
        return Export((self.named,), tuple(views), BLOCKS)

    @property
    def held(self) -> dict[str, Any]:
        return dict(self.server.statistics()["held"])

    async def start(self) -> None:
        self.scheduler = await self._connect(self.server.address, Role.SCHEDULER)
        await self.start_worker()

    async def start_worker(self, token: bytes = b"") -> None:
        self.worker = await self._connect(self.server.address, Role.WORKER, token=token)
        assert await self.worker.register(shard_bytes=SHARD_BYTES)
        await self.worker.get(Ack, Attach, encode_export(self.export))

    def room(self, in_flight: int) -> None:
        """Bytes that may be with the device from now on."""
        transfer = self.server._state.transfer
        assert transfer is not None
        transfer._queue._in_flight = in_flight

    async def observer(self) -> Any:
        return await self._connect(self.server.address, Role.OBSERVER, "")

    # --- engine memory ----------------------------------------------------------------------------------------------

    def write(self, block: int, content: bytes) -> None:
        for i in range(LAYERS):
            at = (i * BLOCKS + block) * PIECE
            self.bytes[at : at + PIECE] = content[i * PIECE : (i + 1) * PIECE]

    def read(self, block: int) -> bytes:
        return b"".join(
            bytes(self.bytes[(i * BLOCKS + block) * PIECE : (i * BLOCKS + block + 1) * PIECE]) for i in range(LAYERS)
        )

    # --- requests, without waiting ----------------------------------------------------------------------------------

    async def store(self, session: int, digests: Sequence[bytes], blocks: Sequence[int]) -> int:
        number = next(self.numbers)
        await self.worker.tell(StoreBlocks(number, session, b"", b"".join(digests), pack_positions(blocks)))
        await settled()
        return number

    async def load(
        self, session: int, digests: Sequence[bytes], blocks: Sequence[int], *, layered: bool = False
    ) -> int:
        answer = await self.scheduler.lookup(session, digests)
        number, count = next(self.numbers), answer.chunks
        ask = RetrieveBlocks(number, answer.lease, 0, count, 0, pack_positions(blocks[: count * CHUNK_BLOCKS]), layered)
        await self.worker.tell(ask)
        await settled()
        return number

    async def stored(self, session: int, digests: Sequence[bytes], blocks: Sequence[int]) -> None:
        """A whole store, that worked."""
        await self.scheduler.lookup(session, digests)
        number = await self.store(session, digests, blocks)
        self.end_copies()
        reply = await self.worker.reply(number)
        assert reply == Stored(number, len(digests), len(digests), {})
        await self.scheduler.end(session)
        await settled()

    def end_copies(self) -> None:
        for copy in list(self.device.running):
            copy.end()

    def said(self, worker: Any = None) -> list[Message]:
        """What came and was not read yet."""
        found: list[Message] = []
        try:
            while True:
                found.append(decode((worker or self.worker).connection.receive_nowait()))
        except (trio.WouldBlock, Gone):
            return found


async def settled() -> None:
    await trio.testing.wait_all_tasks_blocked()


Open = Callable[..., Any]


@pytest.fixture
def open_rig(connect: Callable[..., Any]) -> Open:
    @asynccontextmanager
    async def opened(**more: Any) -> AsyncIterator[Rig]:
        device = FakeDevice()
        config = Config(address="memory://transfer", chunk_tokens=CHUNK_TOKENS, grace=0.05, **more)
        async with open_server(config, memory=PlainMemory(), device=device) as server:
            rig = Rig(server, device, connect)
            await rig.start()
            await settled()
            rig.before = rig.held
            yield rig
            for copy in list(device.running):
                copy.end()
        assert device.broken_rules == []

    return opened


def content(digest: bytes, place: int) -> bytes:
    return (digest + struct.pack("<Q", place)).ljust(BLOCK_BYTES, b"\x01")[:BLOCK_BYTES]


def fill(rig: Rig, digests: Sequence[bytes], blocks: Sequence[int]) -> None:
    for i, block in enumerate(blocks):
        rig.write(block, content(digests[i // CHUNK_BLOCKS], i % CHUNK_BLOCKS))


async def test_what_was_stored_from_blocks_comes_back_into_others(open_rig: Open, digests: Callable[..., Any]) -> None:
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


async def test_a_layered_load_tells_of_each_layer_once_it_is_there(open_rig: Open, digests: Callable[..., Any]) -> None:
    async with open_rig() as rig:
        chain = digests(2)
        fill(rig, chain, range(4))
        await rig.stored(1, chain, range(4))
        number = await rig.load(2, chain, [8, 9, 10, 11], layered=True)
        first, second = rig.device.running
        first.end()
        await settled()
        assert rig.said() == [LayersDone(number, 1)]
        assert [rig.read(8 + i)[:PIECE] for i in range(4)] == [rig.read(i)[:PIECE] for i in range(4)]
        second.end()
        await settled()
        assert rig.said() == [LayersDone(number, 2), Retrieved(number, True)]
        assert [rig.read(8 + i) for i in range(4)] == [rig.read(i) for i in range(4)]


# --- what is wrong is refused ---------------------------------------------------------------------------------------


async def test_a_wrong_export_is_an_error_reply_and_the_connection_lives(open_rig: Open) -> None:
    async with open_rig() as rig:
        good = encode_export(rig.export)
        taller = [attrs.evolve(view, shape=(BLOCKS, PIECE, 2), strides=(2 * PIECE, 2, 1)) for view in rig.export.layers]
        unknown = attrs.evolve(rig.named, nonce=b"another's nonce.")
        with pytest.raises(Exception, match="ends at byte"):
            attrs.evolve(rig.export, layers=tuple(taller))
        for wrong in (
            b"",
            good[:-1],
            good + b"\0",
            b"XTKV" + good[4:],
            encode_export(attrs.evolve(rig.export, layers=rig.export.layers[:1])),
            encode_export(attrs.evolve(rig.export, memory=(unknown,))),
        ):
            reply = await rig.worker.ask(Attach, wrong)
            assert isinstance(reply, ErrorReply)
            assert reply.kind is ErrorKind.MISUSE, reply
        await rig.worker.get(Ack, Attach, good)


async def test_requests_that_do_not_fit_the_export_are_refused_before_anything_is_granted(
    open_rig: Open, digests: Callable[..., Any]
) -> None:
    async with open_rig() as rig:
        chain = digests(2)
        await rig.stored(1, chain, range(4))
        answer = await rig.scheduler.lookup(2, chain)
        before = rig.held
        packed = b"".join(chain)
        for cls, args in (
            (StoreBlocks, (2, b"", packed, pack_positions([0, 1, 2]))),
            (StoreBlocks, (2, b"", packed, pack_positions([0, 1, 2, BLOCKS]))),
            (StoreBlocks, (2, b"", b"", b"")),
            (RetrieveBlocks, (answer.lease, 0, 2, 0, pack_positions([0, 1, 2, 3, 4]))),
            (RetrieveBlocks, (answer.lease, 0, 2, 2, pack_positions([0, 1]))),
            (RetrieveBlocks, (answer.lease, 0, 2, 1, pack_positions([0, 1, 2, 3]))),
            (RetrieveBlocks, (answer.lease, 0, 2, 0, b"")),
            (RetrieveBlocks, (answer.lease, 0, 2, 0, pack_positions([2**32 - 1, 1, 2, 3]))),
            (RetrieveBlocks, (answer.lease, 1, 2, 0, pack_positions([0, 1, 2, 3]))),
        ):
            reply = await rig.worker.ask(cls, *args)
            assert isinstance(reply, ErrorReply), (cls, args, reply)
            assert reply.kind is ErrorKind.MISUSE
        assert rig.held == before
        assert rig.device.running == []


async def test_a_worker_without_memory_attached_is_told_so(open_rig: Open, connect: Callable[..., Any]) -> None:
    async with open_rig() as rig:
        other = await connect(rig.server.address, Role.WORKER, "another engine")
        packed = encode_export(rig.export)
        for cls, args in ((Attach, (packed,)), (StoreBlocks, (1, b"", b"d" * 32, pack_positions([0, 1])))):
            reply = await other.ask(cls, *args)
            assert isinstance(reply, ErrorReply)
            assert reply.kind is ErrorKind.MISUSE


async def test_registering_anew_ends_what_was_attached(open_rig: Open) -> None:
    async with open_rig() as rig:
        assert rig.held["attached"] == 1
        await rig.worker.register(shard_bytes=SHARD_BYTES)
        assert rig.held["attached"] == 0
        assert rig.device.attached == []


async def test_memory_that_is_opened_after_its_client_went_is_let_go(open_rig: Open) -> None:
    async with open_rig() as rig:
        rig.device.hold_attach()
        await rig.worker.tell(Attach(77, encode_export(rig.export)))
        await settled()
        rig.worker.connection.close()
        await settled()
        rig.device.may_attach.set()
        await settled()
        assert rig.device.attached == []
        assert rig.held["attached"] == 0


async def test_a_server_without_a_device_says_so(connect: Callable[..., Any]) -> None:
    config = Config(address="memory://none", chunk_tokens=CHUNK_TOKENS, grace=0.05, device={"backend": "none"})
    async with open_server(config, memory=PlainMemory()) as server:
        worker = await connect(server.address, Role.WORKER)
        reply = await worker.ask(Attach, b"")
        assert isinstance(reply, ErrorReply)
        assert reply.kind is ErrorKind.UNAVAILABLE


# --- at each point of a copy ----------------------------------------------------------------------------------------

POINTS = ("queued", "started", "half", "moved")
"""Where the copy is when something ends."""


async def bring_to(rig: Rig, point: str) -> None:
    """The one copy that is running, or kept from running, to *point*."""
    if point == "queued":
        return
    (copy,) = rig.device.running
    copy.move({"started": 0, "half": copy.units // 2, "moved": copy.units}[point])


async def kept_queued(rig: Rig, chain: Sequence[bytes], point: str) -> None:
    """For the point "queued": fill the device, so that what comes next has to wait."""
    if point == "queued":
        rig.room(1)
        await rig.scheduler.lookup(90, chain)
        await rig.store(90, chain, [14, 15])


async def end_request(rig: Rig, how: str, number: int, session: int) -> None:
    if how == "withdrawn":
        await rig.worker.tell(Withdraw(number))
    elif how == "its engine lost":
        rig.worker.connection.close()
    elif how == "its session ended":
        await rig.scheduler.end(session)
    elif how == "its namespace reset":
        await rig.scheduler.get(Ack, Reset)
    elif how == "its lease released":
        await rig.scheduler.tell(Release(session))
    await settled()


@pytest.mark.parametrize("how", ["withdrawn", "its engine lost", "its session ended", "its namespace reset"])
@pytest.mark.parametrize("point", POINTS)
async def test_a_store_that_ends_early_publishes_nothing_and_keeps_its_slots_until_its_copy_has_ended(
    open_rig: Open, digests: Callable[..., Any], point: str, how: str
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
        if how != "its engine lost":
            replies = [m for m in rig.said() if isinstance(m, Stored) and m.id == number]
            assert [reply.published for reply in replies] in ([0], [])
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
    open_rig: Open, digests: Callable[..., Any], point: str, how: str
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


async def test_a_copy_that_fails_publishes_nothing_and_its_load_is_not_valid(
    open_rig: Open, digests: Callable[..., Any]
) -> None:
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


async def test_a_reservation_that_timed_out_under_its_copy_publishes_nothing(
    open_rig: Open, digests: Callable[..., Any], autojump_clock: Any
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
        assert rig.said() == [Stored(number, 1, 0, {})]
        assert (await rig.scheduler.lookup(2, chain)).chunks == 0
        assert rig.held["bytes_quarantined"] == 0


async def test_who_lost_its_connection_is_told_when_its_blocks_are_let_go(
    open_rig: Open, digests: Callable[..., Any]
) -> None:
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


async def test_the_server_drains_until_its_copies_have_ended(
    connect: Callable[..., Any], digests: Callable[..., Any]
) -> None:
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
        rig = Rig(server, device, connect)
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


# --- everything that could happen -----------------------------------------------------------------------------------


class World:
    """An engine that writes over its blocks as soon as they are its own again, and knows what must never be seen."""

    CHAINS = 3

    def __init__(self, rig: Rig, digests: Callable[..., list[bytes]]) -> None:
        self.rig = rig
        self.chains = [digests(2, f"chain {i}") for i in range(self.CHAINS)]
        self.lent: dict[int, tuple[Sequence[int], list[bytes] | None]] = {}  # by request: blocks, chain of a load
        self.free = list(range(BLOCKS))
        self.mine: dict[int, bytes] = {}
        self.session = 10
        self.scribbles = 0
        for block in list(self.free):
            self.scribble(block)

    def scribble(self, block: int) -> None:
        self.scribbles += 1
        self.mine[block] = struct.pack("<Q", self.scribbles).ljust(BLOCK_BYTES, b"\xff")
        self.rig.write(block, self.mine[block])

    def lend(self, count: int) -> list[int]:
        blocks, self.free = self.free[:count], self.free[count:]
        for block in blocks:
            del self.mine[block]
        return blocks

    async def store(self, which: int) -> None:
        if len(self.free) < 4:
            return
        self.session += 1
        chain, blocks = self.chains[which], self.lend(4)
        await self.rig.scheduler.lookup(self.session, chain)
        fill(self.rig, chain, blocks)
        self.lent[await self.rig.store(self.session, chain, blocks)] = (blocks, None)

    async def load(self, which: int, layered: bool) -> None:
        if len(self.free) < 4:
            return
        self.session += 1
        answer = await self.rig.scheduler.lookup(self.session, self.chains[which])
        if not answer.chunks:
            return
        blocks = self.lend(answer.chunks * CHUNK_BLOCKS)
        number = next(self.rig.numbers)
        ask = RetrieveBlocks(number, answer.lease, 0, answer.chunks, 0, pack_positions(blocks), layered)
        self.lent[number] = (blocks, self.chains[which])
        await self.rig.worker.tell(ask)

    def withdraw(self, choice: int) -> Withdraw | None:
        return Withdraw(sorted(self.lent)[choice % len(self.lent)]) if self.lent else None

    def copy(self, choice: int) -> Any:
        running = self.rig.device.running
        return running[choice % len(running)] if running else None

    async def lose_worker(self) -> None:
        """Blocks that were lent are the engine's again with the server's word for it, and not before."""
        old, token = self.rig.worker, self.rig.worker.token
        old.connection.close()
        asker = await self.rig.observer()
        await asker.tell(LetGo(1, token))
        await settled()
        while not (said := self.rig.said(asker)):
            self.check()
            self.rig.device.running[0].end()
            await settled()
        assert said == [Ack(1)]
        asker.connection.close()
        for blocks, _ in self.lent.values():
            self.give_back(blocks)
        self.lent.clear()
        await self.rig.start_worker()

    def hear(self) -> None:
        for message in self.rig.said():
            if isinstance(message, (Stored, Retrieved, ErrorReply)) and message.id in self.lent:
                blocks, chain = self.lent.pop(message.id)
                if isinstance(message, Retrieved) and message.valid:
                    assert chain is not None
                    for i, block in enumerate(blocks):
                        assert self.rig.read(block) == content(chain[i // CHUNK_BLOCKS], i % CHUNK_BLOCKS)
                self.give_back(blocks)

    def give_back(self, blocks: Sequence[int]) -> None:
        self.free += blocks
        for block in blocks:
            self.scribble(block)

    def check(self) -> None:
        assert self.rig.device.broken_rules == []
        for block, expected in self.mine.items():
            assert self.rig.read(block) == expected, f"block {block} was written to after it was given back"


STEPS = st.one_of(
    st.tuples(st.just("store"), st.integers(0, World.CHAINS - 1)),
    st.tuples(st.just("load"), st.integers(0, World.CHAINS - 1), st.booleans()),
    st.tuples(st.just("move"), st.integers(0, 5), st.integers(0, 9)),
    st.tuples(st.just("end"), st.integers(0, 5)),
    st.tuples(st.just("fail"), st.integers(0, 5)),
    st.tuples(st.just("withdraw"), st.integers(0, 5)),
    st.tuples(st.just("end session"), st.integers(0, 5)),
    st.tuples(st.just("reset")),
    st.tuples(st.just("lose")),
)


async def carry_out(world: World, step: tuple[Any, ...]) -> None:
    rig = world.rig
    match step:
        case ("store", which):
            await world.store(which)
        case ("load", which, layered):
            await world.load(which, layered)
        case ("move", choice, count) if (copy := world.copy(choice)) is not None:
            copy.move(count)
        case ("end", choice) if (copy := world.copy(choice)) is not None:
            copy.end()
        case ("fail", choice) if (copy := world.copy(choice)) is not None:
            copy.fail()
        case ("withdraw", choice) if (notice := world.withdraw(choice)) is not None:
            await rig.worker.tell(notice)
        case ("end session", back):
            await rig.scheduler.end(max(11, world.session - back))
        case ("reset",):
            await rig.scheduler.get(Ack, Reset)
        case ("lose",):
            await world.lose_worker()


@given(steps=st.lists(STEPS, max_size=40), room=st.sampled_from([1, 2 * SHARD_BYTES, 1 << 20]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_byte_moves_that_is_not_the_devices_and_nothing_half_copied_is_served(
    open_rig: Open, digests: Callable[..., Any], steps: list[tuple[Any, ...]], room: int
) -> None:
    async with open_rig() as rig:
        rig.room(room)
        world = World(rig, digests)
        for step in steps:
            await carry_out(world, step)
            await settled()
            world.hear()
            world.check()
        while rig.device.running:
            rig.device.running[0].end()
            await settled()
            world.hear()
            world.check()
        assert world.lent == {}, "a request was never answered"
        for session in range(11, world.session + 1):
            await rig.scheduler.end(session)
        await rig.scheduler.get(Ack, Reset)
        await settled()
        rig.said()
        held = rig.held
        held["bytes_free"] += held["bytes_stale"]  # what was reset is evicted when there is need of its room
        lazily = {"chunks_stale", "slots_stale", "bytes_stale", "largest_hole"}
        assert {name: held[name] for name in held if held[name] != rig.before[name] and name not in lazily} == {}
