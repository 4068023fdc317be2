"""The transport over NNG: REQ0/REP0 at the rendezvous, one PAIR0 socket a client.

PAIR0, because it alone is full duplex, ordered and holds a sender back: REQ0 can't push, and raw, PUB and BUS sockets
drop silently. Knows nothing of NNG's C interface: that is `pynng`'s.
"""

import contextlib
import math
import os
import socket
import struct
from collections.abc import Collection, Sequence

import trio

from lmcache_trio._transport import Connection, Introduction, PairListener, Rendezvous, socket_files
from lmcache_trio._transport.pynng import NngAddress, NngLink, NngSocket, open_pidfd
from lmcache_trio._transport.watching import wait_bound, wait_lost
from lmcache_trio.config import Access
from lmcache_trio.config.addresses import IpcAddress, TcpAddress, UnixAddress
from lmcache_trio.errors import Gone, Misuse, Unavailable

__all__ = ["dial_pair", "introduce", "listen", "listen_pair", "wait_listening"]

_MAX_HELLO = 64 << 10
_HANDSHAKE = 5.0
"""Seconds that an NNG listener has to shake hands, which its own threads do (in 1 ms). NNG would try for ever."""


class _PairListener(PairListener):
    def __init__(self, near: NngAddress) -> None:
        self._path: str | None = None
        address: NngAddress
        if isinstance(near, IpcAddress):
            self._path = socket_files.fresh_path(near.path)
            address = IpcAddress(self._path)
        else:
            address = TcpAddress(near.host, 0)
        self._link: NngLink | None = NngLink()
        self._connected = self._link.connected
        try:
            self.address = self._link.listen(address)
        except BaseException:
            self.close()
            raise

    async def accept(self, deadline: float = math.inf) -> Connection:
        try:
            with trio.CancelScope(deadline=deadline) as scope:
                await self._connected.wait()
            link, self._link = self._link, None
            if link is not None and not scope.cancelled_caught:
                return link
            if link is None:
                raise Gone(f"{self.address} was withdrawn")
            link.close()
            raise Unavailable(f"nobody came to {self.address} in time")
        finally:
            self.close()

    def close(self) -> None:
        if self._path is not None:
            socket_files.withdraw(self._path)
            self._path = None
        if self._link is not None:
            self._link.close()
            self._link = None
            self._connected.set()


class _Introduction(Introduction):
    carries_descriptors = False

    def __init__(self, rendezvous: "_Rendezvous", hello: bytes, peer_pid: int | None) -> None:
        self.hello = hello
        self.peer_pid = peer_pid
        self._rendezvous = rendezvous

    def open_pidfd(self) -> int | None:
        return open_pidfd(self.peer_pid)

    def reply(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        if descriptors:
            raise Misuse("descriptors travel over unix:// alone")
        self._rendezvous.answer(self, message)


class _Rendezvous(Rendezvous):
    def __init__(self, wanted: NngAddress) -> None:
        self._path: str | None = None
        if isinstance(wanted, IpcAddress):
            socket_files.claim(wanted)
        self._socket = NngSocket.rendezvous(_MAX_HELLO)
        self._current: _Introduction | None = None
        try:
            self.address = self._socket.listen(wanted)
        except BaseException:
            self._socket.close()
            raise
        if isinstance(wanted, IpcAddress):
            self._path = wanted.path
            made = os.lstat(wanted.path)
            self._file = made.st_dev, made.st_ino

    async def accept(self) -> Introduction:
        self._current = None
        await trio.lowlevel.checkpoint_if_cancelled()
        while (introduction := self._take()) is None:
            with contextlib.suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_readable(self._socket.recv_fd)
        self._current = introduction
        return introduction

    def answer(self, introduction: _Introduction, message: bytes) -> None:
        if introduction is not self._current:
            raise Misuse("this introduction was answered, or another was accepted since")
        self._current = None
        self._socket.answer(message)

    async def wait_lost(self) -> None:
        if self._path is None:
            await trio.sleep_forever()
        else:
            await wait_lost(self._path, self._file)

    def close(self) -> None:
        self._socket.close()  # removes the socket file

    def _take(self) -> _Introduction | None:
        if self._socket.closed:
            raise Gone(f"{self.address} was closed")
        taken = self._socket.take_introduction()
        return None if taken is None else _Introduction(self, *taken)


def listen(address: NngAddress, access: Access) -> Rendezvous:
    return _Rendezvous(address)


def listen_pair(near: NngAddress, access: Access) -> PairListener:
    return _PairListener(near)


async def dial_pair(address: NngAddress, trusted: Collection[int]) -> Connection:
    await _refuse_unless_listening(address)
    link = NngLink()
    try:
        await link.dial(address)
        _check_trusted(address, link, trusted)
    except BaseException:
        link.close()
        raise
    return link


async def introduce(
    address: NngAddress, hello: bytes, trusted: Collection[int], descriptors: list[int] | None
) -> bytes:
    await _refuse_unless_listening(address)
    _refuse_packets(address)
    link = NngLink(introducing=True)
    try:
        with trio.move_on_after(_HANDSHAKE) as handshake:
            await link.dial(address)
        if handshake.cancelled_caught:
            raise Unavailable(f"what listens at {address} does not speak NNG's protocol")
        _check_trusted(address, link, trusted)
        await link.send(hello)
        return await link.receive()
    except Gone as exc:
        raise Unavailable(f"the server at {address} ended before it answered") from exc
    finally:
        link.close()


def _check_trusted(address: NngAddress, link: NngLink, trusted: Collection[int]) -> None:
    if link.peer_uid is not None and link.peer_uid not in (0, os.geteuid(), *trusted):
        raise socket_files.untrusted(address, link.peer_uid)


async def wait_listening(address: NngAddress) -> None:
    while True:
        patience = math.inf
        if isinstance(address, IpcAddress):
            await wait_bound(address.path)
            _refuse_packets(address)
            patience = _HANDSHAKE  # it may go before it shakes hands, and another kind of server come in its place
        with trio.move_on_after(patience):
            return await _shake_hands(address)


async def _shake_hands(address: NngAddress) -> None:
    """However long it takes."""
    try:
        link = NngLink(introducing=True)
        try:
            await link.dial(address)
        finally:
            link.close()
    except OSError as exc:
        raise Unavailable(f"nothing could be dialled to wait for a server at {address}: {exc.strerror}") from exc


def _refuse_packets(address: NngAddress) -> None:
    """`ConfigError` where a server of our own transport's listens: NNG would go on trying in silence."""
    try:
        if not isinstance(address, IpcAddress) or not socket_files.takes_packets(address.path):
            return
    except OSError as exc:
        raise Unavailable(f"no socket could be opened: {exc.strerror}") from exc
    raise socket_files.wrong_scheme(address, UnixAddress(address.path))


async def _refuse_unless_listening(address: NngAddress) -> None:
    """Tell at once that nobody is there: NNG itself would go on trying in silence."""
    try:
        if isinstance(address, IpcAddress):
            await trio.lowlevel.checkpoint()
            if socket_files.is_forbidden(address.path):
                raise socket_files.forbidden(address)
            if not socket_files.is_listening(address.path):
                raise Unavailable(f"no server listens at {address}")
            return
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        with trio.socket.socket(family, socket.SOCK_STREAM) as probe:
            # Left with a reset: NNG's listener pauses for 100 ms after a peer that just hangs up.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await probe.connect((address.host, address.port))
    except OSError as exc:
        raise Unavailable(f"no server listens at {address}: {exc.strerror}") from exc
