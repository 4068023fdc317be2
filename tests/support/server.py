"""A server inside the test's own loop, and clients that speak to it in plain messages."""

import fcntl
import hashlib
import itertools
import mmap
import os
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

import attrs
import trio

from lmcache_trio import Config, Server, open_server
from lmcache_trio._transport import Connection, dial_pair, introduce
from lmcache_trio._wire.codec import decode, encode
from lmcache_trio._wire.messages import (
    PROTOCOL_VERSION,
    Answer,
    Commit,
    Committed,
    Ended,
    ErrorReply,
    Hello,
    Lookup,
    Message,
    NamespaceKnown,
    Refused,
    Register,
    Reserve,
    Reserved,
    Role,
    Welcome,
)
from lmcache_trio.abc import Memory, Tier
from lmcache_trio.errors import Gone

M = TypeVar("M", bound=Message)
SHARD = 64 << 10


@attrs.frozen
class HeapConfig:
    size: int = 4 << 20
    pieces: int = 1


class HeapMemory(Memory):
    """A memory that takes no thread to grow: for servers under a clock that jumps."""

    Config = HeapConfig

    def __init__(self, config: HeapConfig) -> None:
        super().__init__(config)
        self.taken = 0
        self._descriptor = -1
        self.bytes: mmap.mmap | None = None
        self.go_on = trio.Semaphore(1, max_value=1_000_000)

    @property
    def size(self) -> int:
        return int(self.config.size)

    @property
    def descriptor(self) -> int:
        return self._descriptor

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        self._descriptor = os.memfd_create("heap", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, self.size)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            yield
        finally:
            os.close(self.descriptor)

    async def grow(self) -> int:
        if self.taken < self.size:
            if self.config.pieces > 1:
                await self.go_on.acquire()
            self.taken += self.size // self.config.pieces
        return self.taken

    def view(self, offset: int, length: int) -> memoryview:
        if self.bytes is None:
            self.bytes = mmap.mmap(self.descriptor, self.size)
        return memoryview(self.bytes)[offset : offset + length]

    def statistics(self) -> dict[str, int | str]:
        return {"bytes_taken": self.taken, "bytes_size": self.size}


class Refusal(Exception):
    """The server said no at the rendezvous."""


class Peer:
    """One client, in messages. `ask` gives the reply; pushes are kept in `pushes`."""

    def __init__(self, welcome: Welcome, connection: Connection, token: bytes) -> None:
        self.welcome, self.connection, self.token = welcome, connection, token
        self.pushes: list[Message] = []
        self._ids = itertools.count(1)

    async def ask(self, cls: type[Message], *args: object, **kwargs: object) -> Message:
        """Make a *cls* with the next id, send it, and return its reply, whatever it is."""
        return await self.ask_with((), cls, *args, **kwargs)

    async def ask_with(
        self, descriptors: Sequence[int], cls: type[Message], *args: object, **kwargs: object
    ) -> Message:
        """As `ask`, with *descriptors*."""
        number = next(self._ids)
        made: Any = cls
        await self.connection.send(encode(made(number, *args, **kwargs)), descriptors)
        return await self.reply(number)

    async def reply(self, number: int) -> Message:
        with trio.fail_after(60):
            while True:
                message = decode(await self.connection.receive())
                if getattr(message, "id", 0) == number:
                    return message
                self.pushes.append(message)

    async def get(self, reply: type[M], cls: type[Message], *args: object, **kwargs: object) -> M:
        """`ask`, and the reply is a *reply*."""
        found = await self.ask(cls, *args, **kwargs)
        assert isinstance(found, reply), found
        return found

    async def tell(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        await self.connection.send(encode(message), descriptors)

    async def pushed(self, cls: type[M]) -> M:
        """The next push of *cls*, waiting for it."""
        with trio.fail_after(60):
            while True:
                for message in self.pushes:
                    if isinstance(message, cls):
                        self.pushes.remove(message)
                        return message
                self.pushes.append(decode(await self.connection.receive()))

    async def lookup(self, session: int, digests: Sequence[bytes], start: int = 0) -> Answer:
        return await self.get(Answer, Lookup, session, start, b"".join(digests), start + len(digests))

    async def reserve(self, session: int, digests: Sequence[bytes], parent: bytes = b"", group: int = 0) -> Reserved:
        return await self.get(Reserved, Reserve, session, parent, b"".join(digests), group)

    async def commit(self, reservation: bytes) -> int:
        return (await self.get(Committed, Commit, reservation)).published

    async def register(
        self, fingerprint: bytes = b"f" * 32, shard_bytes: int = SHARD, block_tokens: int = 16, **more: Any
    ) -> bytes:
        return (await self.get(NamespaceKnown, Register, fingerprint, shard_bytes, block_tokens, **more)).namespace

    async def end(self, session: int) -> None:
        await self.tell(Ended(session))

    async def gone(self) -> list[Message]:
        """Wait until the server ends the connection. Returns its messages until then."""
        said: list[Message] = []
        with trio.fail_after(60):
            while True:
                try:
                    said.append(decode(await self.connection.receive()))
                except Gone:
                    return said


async def say_hello(
    address: str, role: Role, engine: str = "engine", shard: int = 0, shards: int = 1, token: bytes = b"", **more: Any
) -> Peer:
    token = token or secrets.token_bytes(16)
    hello = Hello(PROTOCOL_VERSION, "test", token, role, engine, shard, shards, **more)
    reply = decode(await introduce(address, encode(hello)))
    if isinstance(reply, Refused):
        raise Refusal(reply.reason)
    assert isinstance(reply, Welcome)
    return Peer(reply, await dial_pair(reply.address), token)


@attrs.frozen
class Rig:
    """A server, and ways to reach it."""

    server: Server
    memory: Any

    def held(self, *names: str) -> dict[str, Any]:
        held = self.server.statistics()["held"]
        return {name: held[name] for name in names} if names else held

    def counted(self) -> dict[str, Any]:
        return dict(self.server.statistics()["counted"])

    async def scheduler(self, engine: str = "engine", shards: int = 1, token: bytes = b"", **more: Any) -> Peer:
        return await say_hello(self.server.address, Role.SCHEDULER, engine, 0, shards, token, **more)

    async def worker(
        self, engine: str = "engine", shard: int = 0, shards: int = 1, token: bytes = b"", **more: Any
    ) -> Peer:
        return await say_hello(self.server.address, Role.WORKER, engine, shard, shards, token, **more)

    async def observer(self) -> Peer:
        return await say_hello(self.server.address, Role.OBSERVER, "")

    async def engine(self, name: str = "engine") -> tuple[Peer, Peer]:
        """A scheduler and its one worker, registered."""
        scheduler, worker = await self.scheduler(name), await self.worker(name)
        assert await worker.register()
        return scheduler, worker

    async def stored(self, scheduler: Peer, worker: Peer, session: int, digests: Sequence[bytes]) -> None:
        await scheduler.lookup(session, digests)
        made = await worker.reserve(session, digests)
        assert await worker.commit(made.reservation) == len(digests)
        await scheduler.end(session)

    async def until(self, **wanted: object) -> None:
        """Wait until `held` has these values; the server runs in this loop, so giving it turns is enough."""
        with trio.fail_after(60):
            while self.held(*wanted) != wanted:
                await trio.lowlevel.checkpoint()


def digests(length: int, name: str = "chunk") -> list[bytes]:
    return [hashlib.sha256(f"{name} {i}".encode()).digest() for i in range(length)]


Opener = Callable[..., AbstractAsyncContextManager[Rig]]


@asynccontextmanager
async def open_rig(
    memory: HeapConfig | None = None, tiers: Sequence[Tier] | None = None, **settings: Any
) -> AsyncIterator[Rig]:
    config = Config(**{"address": "memory://server", "grace": 0.05, **settings})
    heap = HeapMemory(memory or HeapConfig())
    async with open_server(config, memory=heap, tiers=tiers) as server:
        yield Rig(server, heap)


def error_of(message: Message) -> ErrorReply:
    """*message*, which is an error reply."""
    assert isinstance(message, ErrorReply), message
    return message
