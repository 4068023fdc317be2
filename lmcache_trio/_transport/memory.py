"""The transport inside one Trio loop: no threads, no descriptors, no files, so it works under a clock that jumps.

It is for tests of the users of a transport, and keeps the rules of the real ones: whole messages in order, a bounded
buffer each way, and an end that the other side sees after it has read all messages. `sever` is the abrupt end that a
killed process makes. Only the loop's own thread may call `send_nowait`.
"""

import itertools
import math
import os
from collections import deque
from collections.abc import Collection, Sequence

import trio

from lmcache_trio._transport import MAX_MESSAGE, Connection, Introduction, PairListener, Rendezvous
from lmcache_trio._transport.socket_files import in_use
from lmcache_trio.config import Access
from lmcache_trio.config.addresses import MemoryAddress
from lmcache_trio.errors import Gone, Misuse, Unavailable

__all__ = ["MemoryConnection", "connection_pair", "dial_pair", "introduce", "listen", "listen_pair", "wait_listening"]

_BUFFER = 128


class MemoryConnection(Connection):
    """One end; made by `connection_pair`."""

    def __init__(self, buffer: int, peer_pid: int | None) -> None:
        self._inbox: deque[tuple[bytes, list[int]]] = deque()
        self._descriptors: list[int] = []  # of the message received last, if nobody took them
        self._buffer = buffer
        self._peer_pid = peer_pid
        self._peer: MemoryConnection | None = None
        self._closed = False  # by us
        self._ended = trio.Event()  # by anyone
        self._receiver: trio.Event | None = None
        self._room = trio.Event()  # in the peer's inbox; replaced each time somebody waits for it
        self._sending = trio.Lock()

    @property
    def peer_pid(self) -> int | None:
        return self._peer_pid

    def open_pidfd(self) -> int | None:
        return _open_pidfd(self.peer_pid)

    def take_descriptors(self) -> list[int]:
        taken, self._descriptors = self._descriptors, []
        return taken

    def send_nowait(self, message: bytes) -> None:
        self._put(message, ())

    def _put(self, message: bytes, descriptors: Sequence[int]) -> None:
        peer = self._peer
        if peer is None:
            raise Gone("the connection has ended")
        if len(message) > MAX_MESSAGE:
            raise Misuse(f"a message of {len(message)} bytes is larger than {MAX_MESSAGE}: split it")
        if len(peer._inbox) >= peer._buffer:
            raise trio.WouldBlock
        peer._inbox.append((bytes(message), [os.dup(fd) for fd in descriptors]))
        if peer._receiver is not None:
            peer._receiver.set()

    async def send(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        async with self._sending:
            while True:
                self._room = trio.Event()
                try:
                    return self._put(message, descriptors)
                except trio.WouldBlock:
                    await self._room.wait()

    def receive_nowait(self) -> bytes:
        if self._closed:
            raise Gone("the connection was closed")
        if not self._inbox:
            if self._peer is None:
                raise Gone("the connection has ended")
            raise trio.WouldBlock
        _close_all(self._descriptors)
        message, self._descriptors = self._inbox.popleft()
        if self._peer is not None:
            self._peer._room.set()
        return message

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            try:
                return self.receive_nowait()
            except trio.WouldBlock:
                if self._receiver is not None:
                    raise trio.BusyResourceError("another task is receiving") from None
                self._receiver = trio.Event()
                try:
                    await self._receiver.wait()
                finally:
                    self._receiver = None

    async def wait_closed(self) -> None:
        await self._ended.wait()

    def close(self) -> None:
        self._closed = True
        peer, self._peer = self._peer, None
        self._drop()
        _close_all(self.take_descriptors())
        self._wake()
        if peer is not None:
            peer._peer = None
            peer._wake()

    def sever(self) -> None:
        """End it as a killed peer does: what is on its way is lost in both directions."""
        if self._peer is not None:
            self._peer._drop()
        self.close()

    def _drop(self) -> None:
        while self._inbox:
            _close_all(self._inbox.popleft()[1])

    def _wake(self) -> None:
        self._ended.set()
        self._room.set()
        if self._receiver is not None:
            self._receiver.set()


def connection_pair(*, buffer: int = _BUFFER, peer_pid: int | None = None) -> tuple[MemoryConnection, MemoryConnection]:
    """Two ends of one connection, *buffer* messages each way. Both see *peer_pid*; None: that of this process."""
    pid = os.getpid() if peer_pid is None else peer_pid
    one, other = MemoryConnection(buffer, pid), MemoryConnection(buffer, pid)
    one._peer, other._peer = other, one
    return one, other


class _World:
    """The listeners at `memory://` addresses in one run of a loop."""

    def __init__(self) -> None:
        self.rendezvous: dict[str, _Rendezvous] = {}
        self.pairs: dict[str, _PairListener] = {}
        self.numbers = itertools.count(1)
        self.changed = trio.Event()


_current: trio.lowlevel.RunVar[_World] = trio.lowlevel.RunVar("lmcache_trio memory transport")


def _world() -> _World:
    try:
        return _current.get()
    except LookupError:
        world = _World()
        _current.set(world)
        return world


class _Introduction(Introduction):
    carries_descriptors = True
    is_owner = True

    def __init__(self, hello: bytes) -> None:
        self.hello = hello
        self.peer_pid = os.getpid()
        self.answered = trio.Event()
        self.answer: bytes | None = None
        self.descriptors: list[int] = []
        self.withdrawn = False

    def open_pidfd(self) -> int | None:
        return _open_pidfd(self.peer_pid)

    def reply(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        if self.answered.is_set():
            raise Misuse("this introduction was answered, or another was accepted since")
        self.answer = message
        if not self.withdrawn:
            self.descriptors = [os.dup(fd) for fd in descriptors]
        self.answered.set()


class _Rendezvous(Rendezvous):
    def __init__(self, wanted: MemoryAddress) -> None:
        world = _world()
        self.address = str(wanted)
        if self.address in world.rendezvous:
            raise in_use(wanted)
        self._world = world
        self._waiting: deque[_Introduction] = deque()
        self._arrived = trio.Event()
        self._current: _Introduction | None = None
        self._closed = False
        world.rendezvous[self.address] = self
        world.changed.set()
        world.changed = trio.Event()

    def arrive(self, introduction: _Introduction) -> None:
        self._waiting.append(introduction)
        self._arrived.set()

    async def accept(self) -> Introduction:
        self._turn_away()
        await trio.lowlevel.checkpoint()
        while not self._closed:
            while self._waiting:
                self._current = self._waiting.popleft()
                if not self._current.withdrawn:
                    return self._current
            self._arrived = trio.Event()
            await self._arrived.wait()
        raise Gone(f"{self.address} was closed")

    async def wait_lost(self) -> None:
        await trio.sleep_forever()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            del self._world.rendezvous[self.address]
            self._arrived.set()
            self._turn_away()
            while self._waiting:
                self._waiting.popleft().answered.set()

    def _turn_away(self) -> None:
        if self._current is not None:
            self._current.answered.set()
            self._current = None


class _PairListener(PairListener):
    def __init__(self, near: MemoryAddress) -> None:
        self._world = _world()
        self.address = f"{near}.{next(self._world.numbers)}"
        self._world.pairs[self.address] = self
        self._connection: Connection | None = None
        self._done = trio.Event()

    def connect(self) -> Connection:
        ours, theirs = connection_pair()
        self._connection = ours
        del self._world.pairs[self.address]
        self._done.set()
        return theirs

    async def accept(self, deadline: float = math.inf) -> Connection:
        try:
            with trio.CancelScope(deadline=deadline):
                await self._done.wait()
            if self._connection is not None:
                connection, self._connection = self._connection, None
                return connection
            if self._done.is_set():
                raise Gone(f"{self.address} was withdrawn")
            raise Unavailable(f"nobody came to {self.address} in time")
        finally:
            self.close()

    def close(self) -> None:
        self._world.pairs.pop(self.address, None)
        self._done.set()
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def listen(address: MemoryAddress, access: Access) -> Rendezvous:
    return _Rendezvous(address)


def listen_pair(near: MemoryAddress, access: Access) -> PairListener:
    return _PairListener(near)


async def dial_pair(address: MemoryAddress, trusted: Collection[int]) -> Connection:
    await trio.lowlevel.checkpoint()
    listener = _world().pairs.get(str(address))
    if listener is None:
        raise Unavailable(f"no server listens at {address}")
    return listener.connect()


async def introduce(
    address: MemoryAddress, hello: bytes, trusted: Collection[int], descriptors: list[int] | None
) -> bytes:
    await trio.lowlevel.checkpoint()
    rendezvous = _world().rendezvous.get(str(address))
    if rendezvous is None:
        raise Unavailable(f"no server listens at {address}")
    introduction = _Introduction(hello)
    rendezvous.arrive(introduction)
    try:
        await introduction.answered.wait()
        if introduction.answer is None:
            raise Unavailable(f"the server at {address} ended before it answered")
        if descriptors is not None:
            descriptors += introduction.descriptors
            introduction.descriptors = []
        return introduction.answer
    finally:
        introduction.withdrawn = True
        _close_all(introduction.descriptors)


async def wait_listening(address: MemoryAddress) -> None:
    world = _world()
    await trio.lowlevel.checkpoint()
    while str(address) not in world.rendezvous:
        await world.changed.wait()


def _open_pidfd(pid: int | None) -> int | None:
    try:
        return os.pidfd_open(pid) if pid else None
    except OSError:
        return None


def _close_all(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)
