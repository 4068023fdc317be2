"""Moves whole messages of bytes between a server and its clients. It does not know what they mean.

A server listens at a well-known address, the *rendezvous*, where a client introduces itself with one request and gets
one reply. The reply names an address for this client alone, where the two hold one ordered, full-duplex *connection* (a
*pair*). The address chooses the carrier: unix-domain sockets for `unix://`, pynng for `tcp://`, one process for
`memory://`. Every function is called in the Trio loop. Other threads may call `Connection.send_nowait` alone.

A message may bring *descriptors* of open files along, over `unix://` and `memory://` alone: that of the arena to a
worker, and those of an engine's shared KV to the server. Over `unix://` the kernel tells each end the other's uid, and
each looks at it before it sends or believes a byte. A server admits the uids that `Access` names. A client speaks to a
server of its own uid, of root, or of a uid that it was told to trust.

Importing this imports no pynng: a process that forks may import it before, and open sockets after.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, Protocol

from lmcache_trio.config import PRIVATE, Access
from lmcache_trio.config.addresses import Address, MemoryAddress, UnixAddress, parse_address, parse_rendezvous

__all__ = [
    "MAX_DESCRIPTORS",
    "MAX_MESSAGE",
    "Connection",
    "Introduction",
    "PairListener",
    "Rendezvous",
    "Unfinished",
    "dial_pair",
    "introduce",
    "listen",
    "listen_pair",
    "wait_listening",
]

MAX_MESSAGE = 4 << 20
"""Bytes of the largest message. A peer that sends a larger one loses its connection, and no other peer notices."""
MAX_DESCRIPTORS = 253
"""Descriptors that one message may bring: as many as the kernel takes in one packet (SCM_MAX_FD)."""


class Connection(ABC):
    """One ordered, full-duplex stream of whole messages with one peer. One task at a time may receive."""

    unfinished: Unfinished | None = None
    """Bounds the unfinished messages of this connection and others; none by default."""
    fault: str = ""
    """The fault of the peer for which this end ended the connection, if it did."""

    @property
    @abstractmethod
    def peer_pid(self) -> int | None:
        """The peer's process id; None where it can't be seen (TCP, another pid namespace)."""

    @abstractmethod
    def open_pidfd(self) -> int | None:
        """A descriptor of the peer's process, the caller's to close; None where the kernel gives none."""

    @abstractmethod
    def send_nowait(self, message: bytes) -> None:
        """Accept *message* whole, or raise `trio.WouldBlock`; `Gone` when closed. Any thread may call this.

        `send` takes a large message in parts (over 64 KiB, on unix sockets); this may refuse it each time.
        """

    @abstractmethod
    async def send(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        """Accept *message*, after a wait for room (a peer that reads). `Gone` when closed. Cancelled, it sent nothing.

        The peer gets copies of *descriptors*, which stay the caller's. `Misuse` where the address carries none.
        """

    @abstractmethod
    def receive_nowait(self) -> bytes:
        """The next message, or `trio.WouldBlock`; `Gone` as `receive`."""

    @abstractmethod
    async def receive(self) -> bytes:
        """The next message. A cancelled wait loses none. `Gone` once the peer is gone and its messages were read."""

    @abstractmethod
    def take_descriptors(self) -> list[int]:
        """The descriptors that the message received last brought, from now on the caller's to close. Those that are not
        taken are closed when the next message is received.
        """

    @abstractmethod
    async def wait_closed(self) -> None:
        """Return when the peer is gone or `close` was called: by notification, not by polling."""

    @abstractmethod
    def close(self) -> None:
        """End it now; idempotent. Waiters get `Gone`. Messages that are still on their way may be lost: to have a last
        word heard, send it and wait, within bounds, for `wait_closed`.
        """


class Unfinished:
    """The messages of many connections whose last part has not come: *limit* bytes of them together.

    Beyond it, the connection that began its message first is ended. A living sender needs a few milliseconds for the
    largest message.
    """

    def __init__(self, limit: int) -> None:
        self.given_up = 0
        self._limit = limit
        self._total = 0
        self._parts: dict[Connection, int] = {}  # bytes; what was begun first comes first

    def add(self, connection: Connection, size: int) -> None:
        """*connection* received another *size* bytes. This may end it, or others."""
        self._parts[connection] = self._parts.get(connection, 0) + size
        self._total += size
        while self._total > self._limit:
            oldest = next(iter(self._parts))
            self.given_up += 1
            oldest.fault = f"it began a message and did not end it, while all together reached {self._limit} bytes"
            oldest.close()
            self.end(oldest)

    def end(self, connection: Connection) -> None:
        """It has no unfinished message any more. Idempotent."""
        self._total -= self._parts.pop(connection, 0)


class Introduction(ABC):
    """A client at the rendezvous, which waits for its answer."""

    hello: bytes
    peer_pid: int | None
    carries_descriptors: bool
    """Can a message bring descriptors here?"""
    is_owner: bool
    """Is it a process of this one's uid, or of root? Not if the kernel does not tell."""
    refusal: str = ""
    """Why this process may not connect, if so: then nothing in its hello is to be believed."""

    @abstractmethod
    def open_pidfd(self) -> int | None:
        """As `Connection.open_pidfd`."""

    @abstractmethod
    def reply(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        """Answer, once, before the next `accept`, with copies of *descriptors*. A client that is gone by now is not an
        error.
        """


class Rendezvous(ABC):
    """The server's well-known address. *counted* counts, as `turned_away`, clients that were dropped before HELLO."""

    address: str
    counted: Counter[str]

    @abstractmethod
    async def accept(self) -> Introduction:
        """The next client. The one before it is turned away if it was not answered. `Gone` when closed."""

    @abstractmethod
    async def wait_lost(self) -> None:
        """Return when `address` does not lead here any more, because the socket's file was removed or replaced."""

    @abstractmethod
    def close(self) -> None:
        """Stop listening and remove the socket file; idempotent."""


class PairListener(ABC):
    """An address for one client. The processes that may connect to the rendezvous may connect here, and no others."""

    address: str

    @abstractmethod
    async def accept(self, deadline: float = math.inf) -> Connection:
        """The connection, once the client came. `Unavailable`: not by *deadline* (Trio's clock). `Gone`: closed.

        The address is withdrawn when this returns or raises.
        """

    @abstractmethod
    def close(self) -> None:
        """Withdraw the address, if no client came; idempotent. A connection that was accepted lives on."""


class _Transport(Protocol):
    """One module per kind of address, which is called with addresses of that kind alone."""

    def listen(self, address: Any, access: Access) -> Rendezvous: ...
    def listen_pair(self, near: Any, access: Access) -> PairListener: ...
    async def dial_pair(self, address: Any, trusted: Collection[int]) -> Connection: ...
    async def introduce(
        self, address: Any, hello: bytes, trusted: Collection[int], descriptors: list[int] | None
    ) -> bytes: ...
    async def wait_listening(self, address: Any) -> None: ...


def listen(address: str, access: Access = PRIVATE) -> Rendezvous:
    """Listen at *address* (`unix:///absolute`, `tcp://127.0.0.1:PORT`) for the users that *access* names, by default
    this one and root. `ConfigError`: that is not possible, and why.
    """
    wanted = parse_rendezvous(address)
    return _transport(wanted).listen(wanted, access)


def listen_pair(near: str, access: Access = PRIVATE) -> PairListener:
    """Make a fresh address beside the rendezvous address *near*, and listen there for one client."""
    beside = parse_rendezvous(near)
    return _transport(beside).listen_pair(beside, access)


async def dial_pair(address: str, *, trusted: Collection[int] = ()) -> Connection:
    """Take up the connection at the *address* that the rendezvous named. `Unavailable`: no server listens there now."""
    wanted = parse_address(address)
    return await _transport(wanted).dial_pair(wanted, trusted)


async def introduce(
    address: str, hello: bytes, *, trusted: Collection[int] = (), descriptors: list[int] | None = None
) -> bytes:
    """Send *hello* to the rendezvous at *address* and return its reply. The descriptors that it brings are appended to
    *descriptors*, the caller's to close.

    The server must run as this process' uid, as root or as one of *trusted*: else `Unavailable`, and nothing is sent.
    `Unavailable` at once if no server listens, or it goes. `ConfigError`: another kind of program listens. The wait has
    no other bound: use a deadline. Cancelled, it leaves nothing behind.
    """
    wanted = parse_address(address)
    return await _transport(wanted).introduce(wanted, hello, trusted, descriptors)


async def wait_listening(address: str) -> None:
    """Wait until a server accepts at *address*, however long it takes."""
    wanted = parse_address(address)
    await _transport(wanted).wait_listening(wanted)


def _transport(address: Address) -> _Transport:
    if isinstance(address, UnixAddress):
        import lmcache_trio._transport.over_unix as over_unix

        return over_unix
    if isinstance(address, MemoryAddress):
        import lmcache_trio._transport.memory as in_memory

        return in_memory
    import lmcache_trio._transport.over_nng as over_nng

    return over_nng
