"""The transport over `tcp://`, carried by NNG: REQ0/REP0 at the rendezvous, one PAIR0 socket per client.

PAIR0 alone is full duplex and ordered, and holds a sender back: REQ0 cannot push, and raw, PUB and BUS sockets drop
silently. File descriptors drive NNG's sockets here. Non-blocking calls and `wait_readable` on them cost 40 % of the CPU
of NNG's asynchronous calls. A cancelled call leaks nothing, and an open socket in a daemon thread does not abort the
interpreter at its exit. NNG calls back on threads of its own, under a lock: a callback only notes the event and calls
`run_sync_soon`.

This is the only module that imports pynng, and its undocumented `lib` and `ffi`: hence the pin of its minor version.
"""

import atexit
import contextlib
import math
import os
import socket
import struct
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pynng
import trio
from pynng import ffi, lib

from lmcache_trio._transport import MAX_MESSAGE, Connection, Introduction, PairListener, Rendezvous, socket_files
from lmcache_trio.config import Access
from lmcache_trio.config.addresses import TcpAddress
from lmcache_trio.errors import ConfigError, Gone, LMCacheTrioError, Misuse, Unavailable
from lmcache_trio.threads import Lock

__all__ = ["dial_pair", "introduce", "listen", "listen_pair", "wait_listening"]

_MAX_HELLO = 64 << 10
_HANDSHAKE = 5.0
"""Seconds that an NNG listener has to shake hands, which its own threads do (in 1 ms). NNG itself has no limit."""
_BUFFER = 128
"""Messages that NNG holds for each direction of a socket before a sender has to wait."""
_RECONNECT_MS = (100, 1000)

_NONBLOCK = lib.NNG_FLAG_NONBLOCK
_EAGAIN, _ECLOSED = lib.NNG_EAGAIN, lib.NNG_ECLOSED
_nng_send, _nng_recv, _unpack = lib.nng_send, lib.nng_recv, ffi.unpack
_allocate = ffi.new_allocator(should_clear_after_alloc=False)
_buffer: trio.lowlevel.RunVar[Any] = trio.lowlevel.RunVar("lmcache_trio receive buffer")
_exiting = False
_used = False
_forked = False
"""Is this a forked child of a process that had used NNG? A call into NNG would abort it."""
_open_sockets: "weakref.WeakSet[_Socket]" = weakref.WeakSet()
_pynng_sockets: "weakref.WeakSet[pynng.Socket]" = weakref.WeakSet()
"""Closed ones too: their callbacks form circles, and the collector closes them once more, in a child as well."""


class _Socket:
    """An NNG socket that is closed once, in the loop, with its waiters woken; and never in a forked child."""

    def __init__(self, opener: Callable[..., Any], limit: int) -> None:
        global _used
        if _forked:
            raise Misuse(
                "tcp:// cannot be used in a process that was forked from one that used it: use unix://, or start the "
                "process anew (multiprocessing's spawn)"
            )
        self.token = trio.lowlevel.current_trio_token()
        self._lock = Lock()  # at the interpreter's end two threads close, and NNG aborts if both end one dialer
        self.closed = _exiting
        self.gone = False  # the only peer is gone, or this was closed: nothing can be sent
        if _exiting:
            raise Unavailable("no socket can be opened while the interpreter ends")
        _used = True
        try:
            self.sock = opener(
                recv_max_size=limit,
                reconnect_time_min=_RECONNECT_MS[0],
                reconnect_time_max=_RECONNECT_MS[1],
            )
            if opener is pynng.Pair0:
                self.sock.recv_buffer_size = self.sock.send_buffer_size = _BUFFER
            if opener is pynng.Req0:  # else a slow server gets the request again after a minute
                pynng.exceptions.check_err(lib.nng_socket_set_ms(self.sock.socket, b"req:resend-time", -1))
            self.nng = self.sock.socket
            self.recv_fd: int = self.sock.recv_fd
            self.send_fd: int = self.sock.send_fd
        except pynng.NNGException as exc:
            raise Unavailable(f"no socket could be opened: {exc}") from exc
        _open_sockets.add(self)
        _pynng_sockets.add(self.sock)

    def listen(self, address: TcpAddress) -> str:
        """Listen; returns the address with the port that was really taken."""
        listener, port = ffi.new("nng_listener *"), ffi.new("int *")
        _check(lib.nng_listener_create(listener, self.nng, str(address).encode()), address)
        _check(lib.nng_listener_start(listener[0], 0), address)
        _check(lib.nng_listener_get_int(listener[0], b"tcp-bound-port", port), address)
        return str(TcpAddress(address.host, port[0]))

    def take_request(self) -> bytes | None:
        """REP0: the next request, if one came. The one before it is dropped if it was not answered."""
        held = ffi.new("nng_msg **")
        code = lib.nng_recvmsg(self.nng, held, _NONBLOCK)
        if code == _EAGAIN:
            return None
        if code:
            raise _ended(code)
        try:
            return bytes(ffi.buffer(lib.nng_msg_body(held[0]), lib.nng_msg_len(held[0])))
        finally:
            lib.nng_msg_free(held[0])

    def answer(self, message: bytes) -> None:
        """REP0: answer the request that was taken last. A client that is gone by now is not an error."""
        if not self.closed:
            _nng_send(self.nng, message, len(message), _NONBLOCK)

    def soon(self, fn: Callable[[], object]) -> None:
        """From any thread: have the loop call *fn*, unless it has ended."""
        with contextlib.suppress(trio.RunFinishedError):
            self.token.run_sync_soon(fn)

    def wake(self) -> None:
        """Wake the tasks that wait for the descriptors, which NNG would not. They look again, and see why."""
        with contextlib.suppress(RuntimeError):  # outside of a loop nobody waits
            trio.lowlevel.notify_closing(self.recv_fd)
            trio.lowlevel.notify_closing(self.send_fd)

    def close(self) -> None:
        if not self.closed:
            self.wake()
            self.abandon()

    def abandon(self) -> None:
        """Close without waking anybody: at the interpreter's end, when the loop may run in another thread."""
        with self._lock:
            if not self.closed:
                self.closed = self.gone = True
                self.sock.close()

    def end_dialling(self, dialer: Any) -> None:
        with self._lock:
            if not self.closed:
                lib.nng_dialer_close(dialer.dialer)


class NngLink(Connection):
    """A socket with one peer for its life: PAIR0 on both sides, and REQ0 while a client introduces itself."""

    def __init__(self, *, introducing: bool = False) -> None:
        self._socket = _Socket(pynng.Req0 if introducing else pynng.Pair0, MAX_MESSAGE)
        self._nng = self._socket.nng
        self._size = ffi.new("size_t *")
        self._room = _receive_buffer()
        self._pipe: int | None = None
        self._dialer: Any = None
        self._sending = trio.Lock()
        self.connected = trio.Event()
        self._ended = trio.Event()
        sock = self._socket.sock
        sock.add_pre_pipe_connect_cb(self._admit)
        sock.add_post_pipe_connect_cb(self._on_connected)
        sock.add_post_pipe_remove_cb(self._on_removed)

    @property
    def peer_pid(self) -> None:
        return None  # TCP does not tell

    def open_pidfd(self) -> None:
        return None

    def listen(self, address: TcpAddress) -> str:
        return self._socket.listen(address)

    async def dial(self, address: TcpAddress) -> None:
        """Connect, however long it takes; NNG tries again by itself."""
        try:
            self._dialer = self._socket.sock.dial(str(address), block=False)
        except pynng.NNGException as exc:
            raise Unavailable(f"{address}: {exc}") from exc
        await self.connected.wait()

    def send_nowait(self, message: bytes) -> None:
        if self._socket.gone:
            raise Gone("the connection has ended")
        if len(message) > MAX_MESSAGE:
            raise Misuse(f"a message of {len(message)} bytes is larger than {MAX_MESSAGE}: split it")
        code = _nng_send(self._nng, message, len(message), _NONBLOCK)
        if code:
            raise trio.WouldBlock if code == _EAGAIN else _ended(code)

    async def send(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        if descriptors:
            raise Misuse("descriptors travel over unix:// alone")
        async with self._sending:  # a checkpoint; and one descriptor takes one waiter
            while True:
                try:
                    return self.send_nowait(message)
                except trio.WouldBlock:
                    with contextlib.suppress(trio.ClosedResourceError):
                        await trio.lowlevel.wait_readable(self._socket.send_fd)

    def receive_nowait(self) -> bytes:
        if self._socket.closed:
            raise Gone("the connection was closed")
        gone = self._socket.gone  # looked at first: what arrived before the end is in the queue by then
        size = self._size
        size[0] = MAX_MESSAGE
        code = _nng_recv(self._nng, self._room, size, _NONBLOCK)
        if code == 0:
            message: bytes = _unpack(self._room, size[0])
            return message
        if code != _EAGAIN or gone:
            raise _ended(code)
        raise trio.WouldBlock

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            try:
                return self.receive_nowait()
            except trio.WouldBlock:
                with contextlib.suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_readable(self._socket.recv_fd)

    def take_descriptors(self) -> list[int]:
        return []

    async def wait_closed(self) -> None:
        await self._ended.wait()

    def close(self) -> None:
        self._socket.close()
        self._ended.set()

    # On NNG's threads:

    def _admit(self, pipe: Any) -> None:
        if self._pipe is not None:
            pipe.close()
            return
        self._pipe = pipe.id

    def _on_connected(self, pipe: Any) -> None:
        if pipe.id == self._pipe:
            self._socket.soon(self.connected.set)

    def _on_removed(self, pipe: Any) -> None:
        if pipe.id == self._pipe:
            self._socket.soon(self._peer_gone)

    def _peer_gone(self) -> None:
        self._socket.gone = True
        self.connected.set()
        if not self._socket.closed:
            if self._dialer is not None:  # else NNG would go on dialling a server that has forgotten this client
                self._socket.end_dialling(self._dialer)
            self._socket.wake()
        self._ended.set()


class _PairListener(PairListener):
    def __init__(self, near: TcpAddress) -> None:
        self._link: NngLink | None = NngLink()
        self._connected = self._link.connected
        try:
            self.address = self._link.listen(TcpAddress(near.host, 0))
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
        if self._link is not None:
            self._link.close()
            self._link = None
            self._connected.set()


class _Introduction(Introduction):
    carries_descriptors = False
    is_owner = False
    peer_pid = None

    def __init__(self, rendezvous: "_Rendezvous", hello: bytes) -> None:
        self.hello = hello
        self._rendezvous = rendezvous

    def open_pidfd(self) -> None:
        return None

    def reply(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        if descriptors:
            raise Misuse("descriptors travel over unix:// alone")
        self._rendezvous.answer(self, message)


class _Rendezvous(Rendezvous):
    def __init__(self, wanted: TcpAddress) -> None:
        self._socket = _Socket(pynng.Rep0, _MAX_HELLO)
        self._current: _Introduction | None = None
        try:
            self.address = self._socket.listen(wanted)
        except BaseException:
            self._socket.close()
            raise

    async def accept(self) -> Introduction:
        self._current = None
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._socket.closed:
            hello = self._socket.take_request()
            if hello is not None:
                self._current = _Introduction(self, hello)
                return self._current
            with contextlib.suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_readable(self._socket.recv_fd)
        raise Gone(f"{self.address} was closed")

    def answer(self, introduction: _Introduction, message: bytes) -> None:
        if introduction is not self._current:
            raise Misuse("this introduction was answered, or another was accepted since")
        self._current = None
        self._socket.answer(message)

    async def wait_lost(self) -> None:
        await trio.sleep_forever()  # a port stays this server's

    def close(self) -> None:
        self._socket.close()


def listen(address: TcpAddress, access: Access) -> Rendezvous:
    return _Rendezvous(address)


def listen_pair(near: TcpAddress, access: Access) -> PairListener:
    return _PairListener(near)


async def dial_pair(address: TcpAddress, trusted: Collection[int]) -> Connection:
    await _refuse_unless_listening(address)
    link = NngLink()
    try:
        await link.dial(address)
    except BaseException:
        link.close()
        raise
    return link


async def introduce(
    address: TcpAddress, hello: bytes, trusted: Collection[int], descriptors: list[int] | None
) -> bytes:
    await _refuse_unless_listening(address)
    link = NngLink(introducing=True)
    try:
        with trio.move_on_after(_HANDSHAKE) as handshake:
            await link.dial(address)
        if handshake.cancelled_caught:
            raise Unavailable(f"what listens at {address} does not speak NNG's protocol")
        await link.send(hello)
        return await link.receive()
    except Gone as exc:
        raise Unavailable(f"the server at {address} ended before it answered") from exc
    finally:
        link.close()


async def wait_listening(address: TcpAddress) -> None:
    try:
        link = NngLink(introducing=True)
        try:
            await link.dial(address)
        finally:
            link.close()
    except OSError as exc:
        raise Unavailable(f"nothing could be dialled to wait for a server at {address}: {exc.strerror}") from exc


async def _refuse_unless_listening(address: TcpAddress) -> None:
    """`Unavailable` at once if no server listens: NNG itself would go on trying in silence."""
    try:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        with trio.socket.socket(family, socket.SOCK_STREAM) as probe:
            # It is closed by a reset: NNG's listener pauses for 100 ms after a peer that just hangs up.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await probe.connect((address.host, address.port))
    except OSError as exc:
        raise Unavailable(f"no server listens at {address}: {exc.strerror}") from exc


def _receive_buffer() -> Any:
    """Where NNG puts a message before it becomes bytes: one buffer per loop, since receiving never waits half-way."""
    try:
        return _buffer.get()
    except LookupError:
        _buffer.set(_allocate("char[]", MAX_MESSAGE))
        return _buffer.get()


def _ended(code: int) -> LMCacheTrioError:
    reason = "it has ended" if code in (_EAGAIN, _ECLOSED) else ffi.string(lib.nng_strerror(code)).decode()
    return Gone(f"the connection: {reason}")


def _check(code: int, address: TcpAddress) -> None:
    if code == lib.NNG_EADDRINUSE:
        raise socket_files.in_use(address)
    if code:
        raise ConfigError("address", f"{address}: {ffi.string(lib.nng_strerror(code)).decode()}")


def _after_fork_in_child() -> None:
    global _forked
    _forked = _used
    for inherited in list(_open_sockets):
        inherited.closed = inherited.gone = True
    for sock in list(_pynng_sockets):
        sock.__dict__.pop("_socket", None)  # without it pynng's finalizer calls nothing


def _at_exit() -> None:
    global _exiting
    _exiting = True
    for left in list(_open_sockets):
        left.abandon()


os.register_at_fork(after_in_child=_after_fork_in_child)
# pynng's own hook (nng_fini) frees what NNG's reaper may still be working on: a process that ended within milliseconds
# of closing a socket in mid-handshake, as with a stopped server, aborted one time in five. The kernel frees it as well.
atexit.unregister(pynng.nng._pynng_atexit)
atexit.register(_at_exit)
