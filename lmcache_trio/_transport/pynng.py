"""NNG's sockets under Trio, driven by file descriptors; `over_nng` makes a transport of them.

Non-blocking calls and `wait_readable` on NNG's descriptors cost 40 % of the CPU of its asynchronous calls, a cancelled
one leaks nothing, and an open socket in a daemon thread does not abort the interpreter at its exit. The only module
that imports pynng, and its undocumented `lib` and `ffi`; that is why the minor version is pinned.

NNG calls back on threads of its own, under a lock: a callback here only notes and calls `run_sync_soon`.
"""

import atexit
import contextlib
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pynng
import trio
from pynng import ffi, lib

from lmcache_trio._transport import MAX_MESSAGE, Connection, socket_files
from lmcache_trio.config.addresses import IpcAddress, TcpAddress
from lmcache_trio.errors import ConfigError, Gone, LMCacheTrioError, Misuse, Unavailable

__all__ = ["NngAddress", "NngLink", "NngSocket", "open_pidfd"]

NngAddress = IpcAddress | TcpAddress

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
_open_sockets: "weakref.WeakSet[NngSocket]" = weakref.WeakSet()


class NngSocket:
    """An NNG socket that knows how to be closed: once, in the loop, its waiters woken; never in a forked child."""

    def __init__(self, opener: Callable[..., Any], limit: int) -> None:
        global _used
        if _forked:
            raise Misuse(
                "ipc:// and tcp:// cannot be used in a process that was forked from one that used them: use unix://, "
                "or start the process anew (multiprocessing's spawn)"
            )
        self.token = trio.lowlevel.current_trio_token()
        self.closed = _exiting
        self.gone = False  # the only peer is no more, or this was closed: nothing can be sent
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

    @classmethod
    def rendezvous(cls, limit: int) -> "NngSocket":
        """A REP0 socket for requests of *limit* bytes at most."""
        return cls(pynng.Rep0, limit)

    def listen(self, address: NngAddress) -> str:
        """Listen, privately; returns the address with the port that was really taken."""
        listener = ffi.new("nng_listener *")
        _check(lib.nng_listener_create(listener, self.nng, str(address).encode()), address)
        if isinstance(address, IpcAddress):
            # Set between bind and listen, so that there is no moment at which another user could connect.
            _check(lib.nng_listener_set_int(listener[0], b"ipc:permissions", 0o600), address)
        _check(lib.nng_listener_start(listener[0], 0), address)
        if isinstance(address, TcpAddress) and address.port == 0:
            port = ffi.new("int *")
            _check(lib.nng_listener_get_int(listener[0], b"tcp-bound-port", port), address)
            return str(TcpAddress(address.host, port[0]))
        return str(address)

    def take_introduction(self) -> tuple[bytes, int | None] | None:
        """REP0: the next request and its sender's process id, if there is one; what was not answered is dropped."""
        held = ffi.new("nng_msg **")
        code = lib.nng_recvmsg(self.nng, held, _NONBLOCK)
        if code == _EAGAIN:
            return None
        if code:
            raise _ended(code)
        try:
            hello = bytes(ffi.buffer(lib.nng_msg_body(held[0]), lib.nng_msg_len(held[0])))
            return hello, _told(lib.nng_msg_get_pipe(held[0]), b"ipc:peer-pid") or None
        finally:
            lib.nng_msg_free(held[0])

    def answer(self, message: bytes) -> None:
        """REP0: answer what was taken last. Fails only when that client is gone, which is no error."""
        if not self.closed:
            _nng_send(self.nng, message, len(message), _NONBLOCK)

    def soon(self, fn: Callable[[], object]) -> None:
        """From any thread: call *fn* in the loop, if there is one still."""
        with contextlib.suppress(trio.RunFinishedError):
            self.token.run_sync_soon(fn)

    def wake(self) -> None:
        """Wake who waits for the descriptors; they look again and see why. NNG itself never would."""
        with contextlib.suppress(RuntimeError):  # outside of a loop nobody waits
            trio.lowlevel.notify_closing(self.recv_fd)
            trio.lowlevel.notify_closing(self.send_fd)

    def close(self) -> None:
        if not self.closed:
            self.closed = self.gone = True
            self.wake()
            self.sock.close()

    def forget(self) -> None:
        """In a forked child: a call into NNG would abort it, even the one that pynng makes when the object goes."""
        self.closed = self.gone = True
        self.sock.__dict__.pop("_socket", None)

    def abandon(self) -> None:
        """At the interpreter's end, while the loop's thread may still run: it must not call NNG once that is gone."""
        if not self.closed:
            self.closed = self.gone = True
            self.sock.close()


class NngLink(Connection):
    """A socket with one peer for its life: PAIR0 on both sides, and REQ0 while a client introduces itself."""

    def __init__(self, *, introducing: bool = False) -> None:
        self._socket = NngSocket(pynng.Req0 if introducing else pynng.Pair0, MAX_MESSAGE)
        self._nng = self._socket.nng
        self._size = ffi.new("size_t *")
        self._room = _receive_buffer()
        self._pipe: int | None = None
        self._peer_pid: int | None = None
        self.peer_uid: int | None = None
        """None over TCP, which does not tell."""
        self._dialer: Any = None
        self._sending = trio.Lock()
        self.connected = trio.Event()
        self._ended = trio.Event()
        sock = self._socket.sock
        sock.add_pre_pipe_connect_cb(self._admit)
        sock.add_post_pipe_connect_cb(self._on_connected)
        sock.add_post_pipe_remove_cb(self._on_removed)

    @property
    def peer_pid(self) -> int | None:
        return self._peer_pid

    def open_pidfd(self) -> int | None:
        return open_pidfd(self._peer_pid)

    def listen(self, address: NngAddress) -> str:
        return self._socket.listen(address)

    async def dial(self, address: NngAddress) -> None:
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
        message = self._take()
        if message is None:
            raise trio.WouldBlock
        return message

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint_if_cancelled()
        message = self._take()
        if message is not None:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return message
        while message is None:
            with contextlib.suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_readable(self._socket.recv_fd)
            message = self._take()
        return message

    def take_descriptors(self) -> list[int]:
        return []

    async def wait_closed(self) -> None:
        await self._ended.wait()

    def close(self) -> None:
        self._socket.close()
        self._ended.set()

    def _take(self) -> bytes | None:
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
        return None

    # On NNG's threads:

    def _admit(self, pipe: Any) -> None:
        if self._pipe is not None:
            pipe.close()
            return
        self._pipe = pipe.id
        self._peer_pid = _told(pipe.pipe, b"ipc:peer-pid") or None
        self.peer_uid = _told(pipe.pipe, b"ipc:peer-uid")

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
            if self._dialer is not None:  # else it goes on trying to reach a server that has forgotten us
                lib.nng_dialer_close(self._dialer.dialer)
            self._socket.wake()
        self._ended.set()


def _receive_buffer() -> Any:
    """Where NNG puts a message before it becomes bytes: one buffer a loop, since receiving never waits half-way."""
    try:
        return _buffer.get()
    except LookupError:
        _buffer.set(_allocate("char[]", MAX_MESSAGE))
        return _buffer.get()


def _told(pipe: Any, option: bytes) -> int | None:
    """What NNG knows of the process at the other end of *pipe*."""
    found = ffi.new("uint64_t *")
    return None if lib.nng_pipe_get_uint64(pipe, option, found) else int(found[0])


def open_pidfd(pid: int | None) -> int | None:
    """A descriptor of the process *pid*, if it is seen here."""
    try:
        return os.pidfd_open(pid) if pid else None
    except OSError:
        return None


def _ended(code: int) -> LMCacheTrioError:
    reason = "it has ended" if code in (_EAGAIN, _ECLOSED) else ffi.string(lib.nng_strerror(code)).decode()
    return Gone(f"the connection: {reason}")


def _check(code: int, address: NngAddress) -> None:
    if code == lib.NNG_EADDRINUSE:
        raise socket_files.in_use(address)
    if code:
        raise ConfigError("address", f"{address}: {ffi.string(lib.nng_strerror(code)).decode()}")


def _after_fork_in_child() -> None:
    global _forked
    _forked = _used
    for inherited in list(_open_sockets):
        inherited.forget()


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
