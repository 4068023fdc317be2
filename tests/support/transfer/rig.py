"""A server with a fake device, an engine of one worker, and that worker's memory: for the tests of device transfers."""

import fcntl
import os
import struct
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import trio
import trio.testing

from lmcache_trio import Server
from lmcache_trio._core.transfer.exports import DType, Export, TensorView
from lmcache_trio._wire.codec import POSITIONS, decode
from lmcache_trio._wire.handles import descriptors_of, encode_export
from lmcache_trio._wire.messages import Ack, Attach, Message, RetrieveBlocks, Role, StoreBlocks, Stored
from lmcache_trio.abc import Memory
from lmcache_trio.errors import Gone
from lmcache_trio.testing.fake_device import FakeDevice

BLOCKS, BLOCK_TOKENS, CHUNK_TOKENS, LAYERS, PIECE = 16, 16, 32, 2, 64
CHUNK_BLOCKS = CHUNK_TOKENS // BLOCK_TOKENS
BLOCK_BYTES = LAYERS * PIECE
SHARD_BYTES = BLOCK_BYTES * CHUNK_BLOCKS


class PlainMemory(Memory):
    """An arena that nobody maps: what is passed for it is an empty file of its length."""

    Config = dict

    def __init__(self) -> None:
        super().__init__({})
        self.bytes = bytearray(1 << 20)
        self._fd = os.memfd_create("plain", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self._fd)
        os.ftruncate(self._fd, self.size)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)

    @property
    def descriptor(self) -> int:
        return self._fd

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

    def __init__(
        self, server: Server, device: FakeDevice, connect: Callable[..., Any], engine: str = "engine", gpu: bool = False
    ) -> None:
        self.server, self.device, self._connect, self.engine = server, device, connect, engine
        make: Callable[[int], tuple[Any, bytearray]] = device.gpu_memory if gpu else device.engine_memory
        self.named, self.bytes = make(BLOCKS * BLOCK_BYTES)
        self.scheduler: Any = None
        self.worker: Any = None
        self.numbers = iter(range(1000, 1_000_000))
        self.before: dict[str, Any] = {}

    @property
    def export(self) -> Export:
        views = [TensorView(0, i * BLOCKS * PIECE, DType.uint8, (BLOCKS, PIECE), (PIECE, 1)) for i in range(LAYERS)]
        return Export((self.named,), tuple(views), BLOCKS)

    @property
    def counted(self) -> dict[str, Any]:
        return dict(self.server.statistics()["counted"])

    @property
    def held(self) -> dict[str, Any]:
        return dict(self.server.statistics()["held"])

    async def start(self) -> None:
        self.scheduler = await self._connect(self.server.address, Role.SCHEDULER, self.engine)
        await self.start_worker()

    async def start_worker(self, token: bytes = b"") -> None:
        self.worker = await self._connect(self.server.address, Role.WORKER, self.engine, token=token)
        assert await self.worker.register(shard_bytes=SHARD_BYTES)
        assert isinstance(await self.attach(self.export), Ack)

    async def attach(self, export: Export) -> Message:
        """Have the worker attach *export*; the reply."""
        reply: Message = await self.worker.ask_with(descriptors_of(export), Attach, encode_export(export))
        return reply

    def room(self, in_flight: int) -> None:
        """Bytes that may be with the device from now on."""
        transfer = self.server._parts.transfer
        assert transfer is not None
        transfer._queue._in_flight = in_flight

    async def observer(self) -> Any:
        return await self._connect(self.server.address, Role.OBSERVER, "")

    # --- engine memory ----------------------------------------------------------------------------------------------

    def write(self, block: int, content: bytes, layers: Sequence[int] = range(LAYERS)) -> None:
        for i in layers:
            at = (i * BLOCKS + block) * PIECE
            self.bytes[at : at + PIECE] = content[i * PIECE : (i + 1) * PIECE]

    def read(self, block: int, layers: Sequence[int] = range(LAYERS)) -> bytes:
        return b"".join(
            bytes(self.bytes[(i * BLOCKS + block) * PIECE : (i * BLOCKS + block + 1) * PIECE]) for i in layers
        )

    # --- requests, without waiting ----------------------------------------------------------------------------------

    async def store(
        self,
        session: int,
        digests: Sequence[bytes],
        blocks: Sequence[int],
        *,
        event: bytes = b"",
    ) -> int:
        number, packed = next(self.numbers), POSITIONS.pack(blocks)
        await self.worker.tell(StoreBlocks(number, session, b"", b"".join(digests), packed, event))
        await settled()
        return number

    async def load(
        self,
        session: int,
        digests: Sequence[bytes],
        blocks: Sequence[int],
        *,
        event: bytes = b"",
    ) -> int:
        answer = await self.scheduler.lookup(session, digests)
        number, count = next(self.numbers), answer.chunks
        packed = POSITIONS.pack(blocks[: count * CHUNK_BLOCKS])
        ask = RetrieveBlocks(number, answer.lease, 0, count, 0, packed, event)
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


Open = Callable[..., AbstractAsyncContextManager[Rig]]


async def settled() -> None:
    await trio.testing.wait_all_tasks_blocked()


def content(digest: bytes, place: int) -> bytes:
    return (digest + struct.pack("<Q", place)).ljust(BLOCK_BYTES, b"\x01")[:BLOCK_BYTES]


def fill(rig: Rig, digests: Sequence[bytes], blocks: Sequence[int], layers: Sequence[int] = range(LAYERS)) -> None:
    for i, block in enumerate(blocks):
        rig.write(block, content(digests[i // CHUNK_BLOCKS], i % CHUNK_BLOCKS), layers)
