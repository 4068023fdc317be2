"""The device transfer worker and an engine of two KV groups, whose layers lie in the same bytes."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from support.server import digests, say_hello
from support.transfer.rig import BLOCK_TOKENS, BLOCKS, CHUNK_TOKENS, LAYERS, PIECE, PlainMemory, settled

from lmcache_trio import Config, Server, open_server
from lmcache_trio._core.groups import Group, Need
from lmcache_trio._core.transfer.exports import DType, Export, TensorView
from lmcache_trio._wire.codec import POSITIONS
from lmcache_trio._wire.handles import descriptors_of, encode_export
from lmcache_trio._wire.messages import (
    Ack,
    Attach,
    ErrorKind,
    ErrorReply,
    Message,
    Release,
    RetrieveBlocks,
    Retrieved,
    Role,
    StoreBlocks,
    Stored,
)
from lmcache_trio.testing.fake_device import FakeDevice

GROUPS = (Group(Need.EVERY, 0, BLOCK_TOKENS), Group(Need.WINDOW, BLOCK_TOKENS + 1, BLOCK_TOKENS))
"""A window of one block and a token: of each chunk it keeps the last block."""
PART_BLOCKS = (CHUNK_TOKENS // BLOCK_TOKENS, 1)
PARTS = (PART_BLOCKS[0] * LAYERS * PIECE, PART_BLOCKS[1] * PIECE)


class Engine:
    """One worker with groups, its memory and its scheduler. The second group has the bytes of the first layer."""

    def __init__(self, server: Server, device: FakeDevice) -> None:
        self.server, self.device = server, device
        self.named, self.bytes = device.engine_memory(LAYERS * BLOCKS * PIECE)
        self.scheduler: Any = None
        self.worker: Any = None

    def export(self, groups: Sequence[int] = (0, 0, 1)) -> Export:
        starts = [*(i * BLOCKS * PIECE for i in range(LAYERS)), 0]
        views = [
            TensorView(0, start, DType.uint8, (BLOCKS, PIECE), (PIECE, 1), group)
            for start, group in zip(starts, groups, strict=True)
        ]
        return Export((self.named,), tuple(views), BLOCKS)

    async def start(self) -> None:
        said: dict[str, Any] = {"groups": GROUPS, "block_tokens": BLOCK_TOKENS}
        self.scheduler = await say_hello(self.server.address, Role.SCHEDULER, **said)
        self.worker = await say_hello(self.server.address, Role.WORKER, **said)
        assert await self.worker.register(shard_bytes=sum(PARTS), part_bytes=PARTS)
        assert isinstance(await self.attach(self.export()), Ack)

    async def attach(self, export: Export) -> Message:
        reply: Message = await self.worker.ask_with(descriptors_of(export), Attach, encode_export(export))
        return reply

    def fill(self) -> None:
        """Every block holds its number and its layer's."""
        for layer in range(LAYERS):
            for block in range(BLOCKS):
                at = (layer * BLOCKS + block) * PIECE
                self.bytes[at : at + PIECE] = bytes([layer * BLOCKS + block] * PIECE)

    def end_copies(self) -> None:
        for copy in list(self.device.running):
            copy.end()

    def block(self, block: int, group: int) -> list[int]:
        """The first byte of *block* in each layer of *group*."""
        return [self.bytes[(layer * BLOCKS + block) * PIECE] for layer in range(LAYERS if group == 0 else 1)]

    async def store(self, session: int, chain: Sequence[bytes], blocks: Sequence[int], group: int) -> Message:
        """The reply, as soon as the copy has ended."""
        packed = POSITIONS.pack(blocks)
        return await self.ended(StoreBlocks, session, b"", b"".join(chain), packed, b"", group)

    async def load(self, lease: bytes, start: int, count: int, blocks: Sequence[int], group: int) -> Message:
        """The reply, as soon as the copy has ended."""
        return await self.ended(RetrieveBlocks, lease, start, count, 0, POSITIONS.pack(blocks), b"", group)

    async def ended(self, cls: type[Message], *args: object) -> Message:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_when_settled)
            reply: Message = await self.worker.ask(cls, *args)
        return reply

    async def _end_when_settled(self) -> None:
        await settled()
        self.end_copies()


@asynccontextmanager
async def open_engine() -> AsyncIterator[Engine]:
    device = FakeDevice()
    config = Config(address="memory://transfer", chunk_tokens=CHUNK_TOKENS, grace=0.05)
    async with open_server(config, memory=PlainMemory(), device=device) as server:
        engine = Engine(server, device)
        await engine.start()
        engine.fill()
        yield engine
        engine.end_copies()
    assert device.broken_rules == []


async def test_each_group_stores_the_blocks_of_its_parts() -> None:
    async with open_engine() as engine:
        chain = digests(2)
        await engine.scheduler.lookup(1, chain)
        for group, blocks in ((0, [3, 5, 7, 9]), (1, [5, 9])):
            packed = POSITIONS.pack(blocks)
            await engine.worker.tell(StoreBlocks(1000 + group, 1, b"", b"".join(chain), packed, b"", group))
        await settled()
        # Stores of two groups are two copies, though their memory is one engine's.
        assert [(copy.copy.group, copy.copy.chunk_blocks) for copy in engine.device.running] == [(0, 2), (1, 1)]
        slots = [list(copy.copy.slots) for copy in engine.device.running]
        for group in (0, 1):
            engine.device.running[0].end()
            assert await engine.worker.reply(1000 + group) == Stored(1000 + group, 2, 2, {})
        memory = engine.device.memory
        assert memory is not None
        found = [[bytes(memory.view(slot, PARTS[group])) for slot in slots[group]] for group in (0, 1)]
        assert found[0] == [
            b"".join(bytes([number] * PIECE) for number in numbers) for numbers in ((3, 5, 19, 21), (7, 9, 23, 25))
        ]
        assert found[1] == [bytes([5] * PIECE), bytes([9] * PIECE)]


@pytest.mark.parametrize("groups", [(0, 0, 0), (0, 1, 1), (0, 1, 2), (1, 1, 0)])
async def test_memory_in_other_groups_than_those_of_the_engine_is_refused(groups: Sequence[int]) -> None:
    async with open_engine() as engine:
        reply = await engine.attach(engine.export(groups))
        assert isinstance(reply, ErrorReply)
        assert reply.kind is ErrorKind.MISUSE
        assert isinstance(await engine.attach(engine.export()), Ack)


async def test_blocks_that_are_not_those_of_a_part_are_refused() -> None:
    async with open_engine() as engine:
        chain = digests(2)
        await engine.scheduler.lookup(1, chain)
        for group, blocks in ((0, [3, 5]), (1, [3, 5, 7, 9]), (2, [3, 5])):
            reply = await engine.store(1, chain, blocks, group)
            assert isinstance(reply, ErrorReply)
            assert reply.kind is ErrorKind.MISUSE
        assert engine.server.statistics()["held"]["reservations"] == 0


async def test_a_load_fills_the_blocks_of_one_group_with_the_parts_that_the_hit_needs() -> None:
    async with open_engine() as engine:
        chain = digests(2)
        await engine.scheduler.lookup(1, chain)
        assert isinstance(await engine.store(1, chain, [3, 5, 7, 9], 0), Stored)
        assert isinstance(await engine.store(1, chain[1:], [9], 1), Stored)
        await engine.scheduler.end(1)
        await settled()
        before = engine.server.statistics()["held"]
        answer = await engine.scheduler.lookup(2, chain)
        assert answer.chunks == 2
        reply = await engine.load(answer.lease, 1, 1, [14], 1)
        assert isinstance(reply, Retrieved)
        assert reply.valid
        assert [engine.block(14, group) for group in (0, 1)] == [[9, BLOCKS + 14], [9]]
        reply = await engine.load(answer.lease, 0, 2, [10, 11, 12, 13], 0)
        assert isinstance(reply, Retrieved)
        assert reply.valid
        assert [engine.block(block, 0) for block in (10, 11, 12, 13)] == [[n, BLOCKS + n] for n in (3, 5, 7, 9)]
        for start, count, blocks in ((0, 1, [14]), (0, 2, [14, 15]), (1, 1, [14, 15])):
            wrong = await engine.load(answer.lease, start, count, blocks, 1)
            assert isinstance(wrong, ErrorReply)
            assert wrong.kind is ErrorKind.MISUSE
        await engine.scheduler.tell(Release(2))
        await engine.scheduler.end(2)
        await settled()
        assert engine.server.statistics()["held"] == before
