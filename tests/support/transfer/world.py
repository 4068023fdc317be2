"""An engine that writes over its blocks as soon as they are its own again, and knows what must never be seen.

It is the model of the state machine in `test_transfer_life`: what it believes, it believes of what it said and heard,
and of what the fake device runs; it shares nothing with the server's own bookkeeping.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from lmcache_trio._wire.codec import POSITIONS
from lmcache_trio._wire.messages import (
    Ack,
    LetGo,
    Message,
    Reset,
    RetrieveBlocks,
    Retrieved,
    Role,
    Stored,
    Withdraw,
)
from lmcache_trio.testing.fake_device import FakeCopy
from support.transfer.rig import (
    BLOCK_BYTES,
    BLOCKS,
    CHUNK_BLOCKS,
    SHARD_BYTES,
    Rig,
    content,
    fill,
    settled,
)

CHUNKS = 2
"""Of each chain."""
LENT = CHUNKS * CHUNK_BLOCKS


@attrs.define(eq=False)
class Request:
    """A store or a load that was asked for and not answered. *spoilt*: it must come to nothing."""

    number: int
    which: int
    blocks: list[int]
    session: int
    loads: bool
    spoilt: bool = False


@attrs.define(eq=False)
class Pending:
    """An event that has not happened: *request* may begin then."""

    event: bytes
    request: Request


@attrs.define(eq=False)
class Owed:
    """What a lost connection had asked for: its blocks come back with the answer to *asker*."""

    asker: Any
    requests: list[Request]
    attached: object


class World:
    """One engine with one worker. *chains*: what it stores and loads."""

    def __init__(self, rig: Rig, chains: Sequence[list[bytes]]) -> None:
        self.rig = rig
        self.chains = chains
        self.there: set[int] = set()  # chains that a lookup must find
        self.lent: dict[int, Request] = {}  # by request
        self.owed: list[Owed] = []
        self.pending: list[Pending] = []
        self.free = list(range(BLOCKS))
        self.mine: dict[int, bytes] = {}  # what must stand in a block
        self.session = 10
        self.scribbles = 0
        for block in self.free:
            self.scribble(block)

    # --- blocks -----------------------------------------------------------------------------------------------------

    def scribble(self, block: int) -> None:
        self.scribbles += 1
        self.mine[block] = struct.pack("<Q", self.scribbles).ljust(BLOCK_BYTES, b"\xff")
        self.rig.write(block, self.mine[block])

    def lend(self) -> list[int]:
        """Those that came back last, so that a copy that still runs would be noticed."""
        blocks, self.free = self.free[-LENT:], self.free[:-LENT]
        return blocks

    def give_back(self, request: Request) -> None:
        running = {block for copy in self.rig.device.running for block in copy.copy.blocks}
        assert not running & set(request.blocks), "blocks were given back under a copy"
        self.pending = [each for each in self.pending if each.request is not request]
        self.free += request.blocks
        for block in request.blocks:
            self.scribble(block)

    # --- what the engine says ---------------------------------------------------------------------------------------

    async def lookup(self, which: int) -> Any:
        self.session += 1
        answer = await self.rig.scheduler.lookup(self.session, self.chains[which])
        assert answer.chunks == (CHUNKS if which in self.there else 0)
        return answer

    def event(self, request: Request, follows: bool) -> bytes:
        """What *request* follows, if anything; else its blocks are written now."""
        if follows:
            self.pending.append(Pending(self.rig.device.event(), request))
            return self.pending[-1].event
        self.write(request)
        return b""

    def write(self, request: Request) -> None:
        """What an event stands for: the engine has written a store's blocks, or does not use a load's any more."""
        for block in request.blocks:
            self.mine.pop(block, None)
        if not request.loads:
            fill(self.rig, self.chains[request.which], request.blocks)

    async def store(self, which: int, follows: bool) -> None:
        await self.lookup(which)
        request = Request(0, which, self.lend(), self.session, loads=False)
        event = self.event(request, follows)
        request.number = await self.rig.store(self.session, self.chains[which], request.blocks, event=event)
        self.lent[request.number] = request

    async def load(self, which: int, follows: bool) -> None:
        answer = await self.lookup(which)
        if answer.chunks:
            request = Request(next(self.rig.numbers), which, self.lend(), self.session, loads=True)
            event, blocks = self.event(request, follows), POSITIONS.pack(request.blocks)
            ask = RetrieveBlocks(request.number, answer.lease, 0, CHUNKS, 0, blocks, event)
            self.lent[request.number] = request
            await self.rig.worker.tell(ask)

    def happen(self, pending: Pending) -> None:
        self.pending.remove(pending)
        self.write(pending.request)
        self.rig.device.happened[pending.event].set()

    async def withdraw(self, request: Request) -> None:
        request.spoilt = True
        await self.rig.worker.tell(Withdraw(request.number))

    async def end_session(self, request: Request) -> None:
        """A lease that ends leaves a pin as it is, and a store that was submitted is finished."""
        await self.rig.scheduler.end(request.session)

    async def reset(self) -> None:
        self.spoil(lambda request: True)
        self.there.clear()
        await self.rig.scheduler.get(Ack, Reset)

    def spoil(self, which: Callable[[Request], bool]) -> None:
        for request in filter(which, self.lent.values()):
            request.spoilt = True

    async def lose_scheduler(self) -> None:
        self.rig.scheduler.connection.close()
        await settled()
        self.rig.scheduler = await self.rig._connect(self.rig.server.address, Role.SCHEDULER, self.rig.engine)

    async def lose_worker(self) -> None:
        """Another connection takes over; what the old one was lent is the server's until it says otherwise."""
        old, attached = self.rig.worker, self.rig.device.attached[-1]
        old.connection.close()
        await settled()
        asker = await self.rig.observer()
        self.owed.append(Owed(asker, list(self.lent.values()), attached))
        self.lent.clear()
        await asker.tell(LetGo(1, old.token))
        await self.rig.start_worker()

    async def attach_anew(self) -> None:
        self.spoil(lambda request: True)
        assert await self.rig.worker.register(shard_bytes=SHARD_BYTES)
        assert isinstance(await self.rig.attach(self.rig.export), Ack)

    # --- what it hears ----------------------------------------------------------------------------------------------

    def hear(self) -> None:
        worker = self.rig.worker
        said, worker.pushes = [*worker.pushes, *self.rig.said()], []
        for message in said:
            if (number := getattr(message, "id", 0)) in self.lent:
                self.answered(self.lent.pop(number), message)
        for owed in list(self.owed):
            if self.rig.said(owed.asker) == [Ack(1)]:
                self.owed.remove(owed)
                assert owed.attached not in self.rig.device.attached, "a copy may still run there"
                owed.asker.connection.close()
                for request in owed.requests:
                    self.give_back(request)

    def answered(self, request: Request, message: Message) -> None:
        if request.loads:
            assert isinstance(message, Retrieved), message
            assert message.valid is not request.spoilt
            if message.valid:
                self.compare(request)
        else:
            assert isinstance(message, Stored), message
            if message.copied:
                assert not request.spoilt, "a late store was published"
                assert (message.copied, message.published, message.dropped) == (CHUNKS, CHUNKS, {})
                self.there.add(request.which)
            else:
                assert message.published == 0
                assert request.spoilt or set(message.dropped) <= {"present", "writing"}, message
        self.give_back(request)

    def compare(self, request: Request) -> None:
        chain = self.chains[request.which]
        for i, block in enumerate(request.blocks):
            expected = content(chain[i // CHUNK_BLOCKS], i % CHUNK_BLOCKS)
            assert self.rig.read(block) == expected, "something else was loaded than was stored"

    # --- what must hold at any time ---------------------------------------------------------------------------------

    def requests(self) -> list[Request]:
        return [*self.lent.values(), *(request for owed in self.owed for request in owed.requests)]

    def of(self, copy: FakeCopy) -> list[Request]:
        return [request for request in self.requests() if set(request.blocks) & set(copy.copy.blocks)]

    def check_memory(self) -> None:
        for block, expected in self.mine.items():
            assert self.rig.read(block) == expected, f"block {block} was written to while it was the engine's"

    def check_owned(self) -> None:
        """What a copy that runs reads or writes is nobody else's."""
        holes = self.rig.server._parts.index.arena.holes()
        lent = {block for request in self.requests() for block in request.blocks}
        written: set[int] = set()
        for copy in self.rig.device.running:
            assert set(copy.copy.blocks) <= lent, "a copy runs in blocks that are the engine's"
            assert copy.copy.attached in self.rig.device.attached
            for slot in copy.copy.slots:
                assert not any(first <= slot < first + length for first, length in holes), "its slot was given back"
                if copy.copy.direction.value == "store":
                    assert slot not in written, "two copies write to one place"
                    written.add(slot)

    def check_bounds(self, room: int) -> None:
        sizes = [len(copy.copy.blocks) * BLOCK_BYTES for copy in self.rig.device.running]
        assert len(sizes) <= 1 or sum(sizes) <= room
        held = self.rig.held
        assert (held["copies_running"], held["copy_bytes_running"]) == (len(sizes), sum(sizes))
        assert held["transfers_queued"] <= len(self.requests())
