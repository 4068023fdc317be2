"""Plain unix-domain sockets under Trio, one message per packet. `over_unix` makes a transport of them.

SOCK_SEQPACKET keeps messages apart and in order, reports that the peer has closed, and takes a packet whole or not at
all. So any thread sends with one system call, and no other thread is woken for it. The byte before each packet is its
kind:

    WHOLE: a message | FIRST, MORE …, LAST: the parts of a message that is larger than a packet

A WHOLE packet may come between parts: it is delivered, and the parts are joined after it. FIRST drops the parts before
it, because their sender gave up half-way. Descriptors come with the packet that completes a message, WHOLE or LAST. Any
other packet ends the connection of its sender.

The kernel remembers which process connected and which listened (SO_PEERCRED). Since Linux 6.5 it gives a descriptor of
that process (SO_PEERPIDFD), also from another pid namespace, where the pid reads 0.
"""

import array
import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Sequence

import trio

from lmcache_trio._transport import MAX_DESCRIPTORS, MAX_MESSAGE, Connection
from lmcache_trio._transport.unix_sockets import inherited, open_epoll
from lmcache_trio.errors import Gone, Misuse
from lmcache_trio.threads import Lock

__all__ = ["PACKET", "UnixLink"]

PACKET = 64 << 10
"""Bytes of a message in one packet. The kernel takes packets up to its send buffer, 208 KiB by default, and counts 68
KiB for one of these. Engines' requests take 1 to 20 KiB."""
_SEND_BUFFER = 208 << 10
"""Bytes that an unprivileged process may ask for everywhere. The kernel doubles them: 6 of the largest packets, or 550
small ones, before a sender has to wait."""
_PARTS = 16
"""Parts of messages taken in a row before other tasks get their turn: more than a send buffer holds, 0.3 ms."""

_WHOLE, _FIRST, _MORE, _LAST = range(4)
_WHOLE_BYTE = bytes([_WHOLE])
_QUIETLY = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_DESCRIPTORS = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
_SO_PEERGROUPS, _SO_PEERPIDFD = 59, 77  # of <asm-generic/socket.h>; the second since Linux 6.5
_MOST_GROUPS = 256
"""Groups of a peer that are looked at: Python asks the kernel for no more bytes."""
_room: trio.lowlevel.RunVar[memoryview] = trio.lowlevel.RunVar("lmcache_trio packet buffer")


class UnixLink(Connection):
    """One end. Owns *sock*, connected and non-blocking, from now on; messages of up to *limit* bytes come and go."""

    def __init__(self, sock: socket.socket, limit: int = MAX_MESSAGE) -> None:
        try:
            self._end = open_epoll()  # readable once the peer is gone; the socket itself is when something came, too
        except BaseException:
            sock.close()
            raise
        self._end.register(sock, select.EPOLLRDHUP)
        self._socket = sock
        self._fd = sock.fileno()
        self._limit = limit
        self._send = sock.send
        self._receive_into = sock.recvmsg_into
        self._room = _receive_buffer()
        self._rooms = [self._room]
        self._descriptors: list[int] = []  # of the message received last, if nobody took them
        self._closed = False
        self._empty = False  # when we last looked
        self._parts: list[bytes] | None = None
        self._lock = Lock()  # else a send could meet a descriptor that was closed, and is another's by now
        self._sending = trio.Lock()
        self._watching = trio.Lock()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        pid, self.peer_uid, self.peer_gid = struct.unpack(
            "iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        self._peer_pid: int | None = pid or None
        inherited.add(self)

    @property
    def peer_pid(self) -> int | None:
        return self._peer_pid

    def peer_groups(self) -> set[int]:
        """The peer's groups, the supplementary ones too if they are 256 at most."""
        try:
            found = self._socket.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS * 4)
        except OSError:
            return {self.peer_gid}
        return {self.peer_gid, *struct.unpack(f"{len(found) // 4}I", found)}

    def open_pidfd(self) -> int | None:
        try:
            fd = struct.unpack("i", self._socket.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))[0]
            return int(fd)
        except OSError as exc:
            if exc.errno != errno.ENOPROTOOPT or not self._peer_pid:
                return None  # it has exited; or this kernel gives a pidfd of visible processes only
        try:
            return os.pidfd_open(self._peer_pid)
        except OSError:
            return None

    @property
    def ended(self) -> bool:
        """Whether the peer is gone, though messages of it may still be there; or this end is closed."""
        return self._closed or bool(self._end.poll(0))

    def fileno(self) -> int:
        return self._fd

    def send_nowait(self, message: bytes) -> None:
        size = len(message)
        if size > PACKET:
            self._check_size(size)
            raise trio.WouldBlock  # it takes several packets, which must be accepted together
        self._put(_WHOLE_BYTE + message)

    async def send(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        self._check_size(len(message))
        if len(descriptors) > MAX_DESCRIPTORS:
            raise Misuse(f"{len(descriptors)} descriptors are more than {MAX_DESCRIPTORS}, which one message may bring")
        async with self._sending:  # a checkpoint; and parts of two messages must not mix
            if len(message) <= PACKET:
                return await self._put_soon(_WHOLE_BYTE + message, descriptors)
            parts, last = memoryview(message), (len(message) - 1) // PACKET
            for i in range(last + 1):
                kind = _LAST if i == last else _MORE if i else _FIRST
                packet = b"".join((bytes([kind]), parts[i * PACKET : (i + 1) * PACKET]))
                await self._put_soon(packet, descriptors if i == last else ())

    def reply_nowait(self, message: bytes, descriptors: Sequence[int]) -> None:
        """As `send_nowait`, with *descriptors*."""
        self._put(_WHOLE_BYTE + message, descriptors)

    def take_descriptors(self) -> list[int]:
        taken, self._descriptors = self._descriptors, []
        return taken

    def receive_nowait(self) -> bytes:
        message = self._take()
        if message is None:
            raise trio.WouldBlock
        return message

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint_if_cancelled()
        message = None if self._empty else self._take()
        if message is not None:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return message
        while message is None:
            if not self._closed:
                with contextlib.suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_readable(self._fd)
            message = self._take()
        return message

    async def wait_closed(self) -> None:
        async with self._watching:  # one descriptor takes one waiter
            if not self._closed:
                with contextlib.suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_readable(self._end.fileno())

    def close(self) -> None:
        if self._closed:
            return
        with contextlib.suppress(RuntimeError):  # outside of a loop nobody waits
            trio.lowlevel.notify_closing(self._fd)
            trio.lowlevel.notify_closing(self._end.fileno())
        with contextlib.suppress(OSError):  # also where a child has the socket that was forked without our knowing
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._close_descriptors()

    def forget(self) -> None:
        self._lock = Lock()  # a thread that is not there may have held the other
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        self._closed = True
        self._drop_parts()
        _close_all(self.take_descriptors())
        self._socket.close()
        self._end.close()
        inherited.discard(self)

    def _check_size(self, size: int) -> None:
        if size > self._limit:
            raise Misuse(f"a message of {size} bytes is larger than {self._limit}: split it")

    def _put(self, packet: bytes, descriptors: Sequence[int] = ()) -> None:
        with self._lock:
            if self._closed:
                raise Gone("the connection was closed")
            try:
                if descriptors:
                    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
                    self._socket.sendmsg([packet], [rights], _QUIETLY)
                else:
                    self._send(packet, _QUIETLY)
            except BlockingIOError:
                raise trio.WouldBlock from None
            except OSError as exc:  # a packet is missing now, so the connection ends for the peer, too
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
                raise Gone(f"the connection has ended: {exc.strerror}") from exc

    async def _put_soon(self, packet: bytes, descriptors: Sequence[int] = ()) -> None:
        while True:
            try:
                return self._put(packet, descriptors)
            except trio.WouldBlock:
                with contextlib.suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_writable(self._fd)

    def _take(self) -> bytes | None:
        """The next message, if it is there or its last part is."""
        for _ in range(_PARTS):
            if self._closed:
                raise Gone("the connection was closed")
            try:
                size, ancillary, flags, _ = self._receive_into(self._rooms, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                self._empty = True
                return None
            except ConnectionResetError:
                continue  # told once, if the peer had left something unread; its messages are still there
            except OSError as exc:
                raise Gone(f"the connection has ended: {exc.strerror}") from exc
            self._empty = False
            if ancillary or self._descriptors:
                _close_all(self._descriptors)
                self._descriptors = _descriptors_in(ancillary)
                if flags & socket.MSG_CTRUNC:  # this process has no descriptor left: the message comes without any
                    _close_all(self.take_descriptors())
            if not size:
                raise Gone("the connection has ended")
            kind, content = self._room[0], bytes(self._room[1:size])
            if len(content) > PACKET or kind > _LAST:
                raise self._refused("a packet of an unknown kind or length")
            if kind == _WHOLE:
                return content
            message = self._joined(kind, content)
            if message is not None:
                return message
            if self._descriptors:
                raise self._refused("a part of a message that brings descriptors")
        return None

    def _joined(self, kind: int, content: bytes) -> bytes | None:
        """The message that the part *content* completes, if it completes one."""
        if kind == _FIRST:
            self._drop_parts()
            self._parts = []
        if self._parts is None or not content:
            raise self._refused("a part of no message")
        self._parts.append(content)
        if len(self._parts) > -(-self._limit // PACKET):
            raise self._refused(f"a message of more than {self._limit} bytes")
        if kind != _LAST:
            if self.unfinished is not None:
                self.unfinished.add(self, len(content))
            return None
        message = b"".join(self._parts)
        self._drop_parts()
        if len(message) > self._limit:
            raise self._refused(f"a message of {len(message)} bytes")
        return message

    def _drop_parts(self) -> None:
        self._parts = None
        if self.unfinished is not None:
            self.unfinished.end(self)

    def _refused(self, what: str) -> Gone:
        self.fault = f"{what} came"
        self.close()
        return Gone(f"the connection was ended, because {what} came")


def _receive_buffer() -> memoryview:
    """Where a packet is put before it becomes a message: one buffer per loop, since receiving never waits half-way."""
    try:
        return _room.get()
    except LookupError:
        _room.set(memoryview(bytearray(PACKET + 2)))  # one byte more than our packets take shows a longer one
        return _room.get()


def _descriptors_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return found.tolist()


def _close_all(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)
