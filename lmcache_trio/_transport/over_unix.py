"""The transport over unix-domain sockets: listeners, and the clients that come to them. `unix` has the connections.

    rendezvous: connect, HELLO, the answer, the end | pair: connect, and that is the connection

It starts no task. A client that has not sent its HELLO waits beside the listener, and keeps no other client waiting.
"""

import contextlib
import errno
import logging
import math
import os
import select
import socket
from collections import Counter
from collections.abc import Collection, Sequence

import trio

from lmcache_trio._transport import MAX_MESSAGE, Connection, Introduction, PairListener, Rendezvous, socket_files
from lmcache_trio._transport.unix import UnixLink
from lmcache_trio._transport.unix_sockets import Listener, inherited, open_epoll, open_socket
from lmcache_trio._transport.watching import wait_bound, wait_lost
from lmcache_trio.config import Access
from lmcache_trio.config.addresses import UnixAddress
from lmcache_trio.errors import ConfigError, Gone, Misuse, Unavailable

__all__ = ["dial_pair", "introduce", "listen", "listen_pair", "wait_listening"]

log = logging.getLogger("lmcache_trio.server")

_MAX_HELLO = 64 << 10
_MOST_SILENT = 64
"""Clients that may stand at the rendezvous without having sent HELLO. Beyond it, the oldest one is turned away. Our own
clients send it at once."""
_LOOKS = 16
"""Clients that are let in or heard in a row, before other tasks get their turn (about 1 ms)."""
_TURNED_AWAY = "a client was turned away: %s; allow the server more file descriptors (ulimit -n, LimitNOFILE=)"
_NO_DESCRIPTOR = 1.0
"""Seconds between two attempts to get a spare descriptor, while a rendezvous has none to refuse a client with. It also
tries after it gave a descriptor back."""


class _PairListener(PairListener):
    def __init__(self, near: UnixAddress, access: Access) -> None:
        path = socket_files.fresh_path(near.path)
        self.address = str(UnixAddress(path))
        self._access = access
        self._listener = Listener(path, access, aside=path, backlog=0)  # of one: a second is refused

    async def accept(self, deadline: float = math.inf) -> Connection:
        try:
            with trio.CancelScope(deadline=deadline):
                await trio.lowlevel.checkpoint()
                while not self._listener.closed:
                    if (came := self._listener.accept_nowait()) is not None:
                        link = UnixLink(came)
                        if _admitted(link, self._access):
                            return link
                        link.close()
                        continue
                    with contextlib.suppress(trio.ClosedResourceError):
                        await trio.lowlevel.wait_readable(self._listener.socket)
                raise Gone(f"{self.address} was withdrawn")
            raise Unavailable(f"nobody came to {self.address} in time")
        except OSError as exc:
            raise Unavailable(f"the client at {self.address} could not be let in: {exc.strerror}") from exc
        finally:
            self.close()

    def close(self) -> None:
        self._listener.close()


class _Introduction(Introduction):
    carries_descriptors = True

    def __init__(self, link: UnixLink, hello: bytes, access: Access) -> None:
        self.hello = hello
        self.peer_pid = link.peer_pid
        self.is_owner = link.peer_uid in (0, os.geteuid())
        self._link: UnixLink | None = link
        if not _admitted(link, access):
            self.refusal = (
                f"this process' uid {link.peer_uid} may not connect to the server, whose uid is {os.geteuid()}: run "
                "both as one user, or name the uid or a group of it in the server's [access] settings"
            )

    def open_pidfd(self) -> int | None:
        return None if self._link is None else self._link.open_pidfd()

    def reply(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        if self._link is None:
            raise Misuse("this introduction was answered, or another was accepted since")
        with contextlib.suppress(Gone, trio.WouldBlock):
            self._link.reply_nowait(message, descriptors)
        self.end()

    def end(self) -> None:
        """Let the client go. It can still read its answer."""
        if self._link is not None:
            self._link.close()
            self._link = None


class _Rendezvous(Rendezvous):
    def __init__(self, wanted: UnixAddress, access: Access) -> None:
        self.counted = Counter()
        self._access = access
        self.address = str(wanted)
        self._silent: dict[int, UnixLink] = {}  # by descriptor, in the order in which they came
        self._current: _Introduction | None = None
        self._look_again = math.inf  # when to look for a spare descriptor; until then no client is let in
        socket_files.claim(wanted)
        with contextlib.ExitStack() as opened:
            self._arrivals = opened.enter_context(open_epoll())
            self._spare = opened.enter_context(open_socket())
            aside = socket_files.fresh_path(wanted.path)
            self._listener = Listener(wanted.path, access, aside=aside, backlog=socket.SOMAXCONN)
            self._arrivals.register(self._listener.socket, select.EPOLLIN)
            opened.pop_all()
        inherited.add(self)

    async def accept(self) -> Introduction:
        self._turn_away()
        await trio.lowlevel.checkpoint_if_cancelled()
        while (introduction := self._take()) is None:
            with contextlib.suppress(trio.ClosedResourceError), trio.move_on_at(self._look_again):
                await trio.lowlevel.wait_readable(self._arrivals.fileno())
        self._current = introduction
        await trio.lowlevel.cancel_shielded_checkpoint()
        return introduction

    async def wait_lost(self) -> None:
        await wait_lost(self._listener.path, self._listener.file)

    def close(self) -> None:
        if not self._listener.closed:
            self._listener.close()
            with contextlib.suppress(RuntimeError):  # outside of a loop nobody waits
                trio.lowlevel.notify_closing(self._arrivals.fileno())
            self.forget()
            self._turn_away()
            while self._silent:
                self._silent.popitem()[1].close()

    def forget(self) -> None:
        self._arrivals.close()
        self._spare.close()
        inherited.discard(self)

    def _turn_away(self) -> None:
        if self._current is not None:
            self._current.end()
            self._current = None

    def _take(self) -> _Introduction | None:
        """The next client that sent HELLO, if one did. New clients are let in."""
        if self._listener.closed:
            raise Gone(f"{self.address} was closed")
        for fd, _ in self._arrivals.poll(0, _LOOKS):
            if fd in self._silent:
                introduction = self._hear(fd)
                if introduction is not None:
                    return introduction
            elif fd == self._listener.socket.fileno():
                self._let_in()
        if self._look_again < math.inf:
            self._listen_again()
        return None

    def _let_in(self) -> None:
        try:
            came = self._listener.accept_nowait()
            if came is not None:
                self._expect(UnixLink(came, _MAX_HELLO))
        except Unavailable as exc:  # no descriptor is left, and it had to go
            self._tell_turned_away(str(exc))
        except OSError as exc:
            self._tell_turned_away(exc.strerror)
            self._refuse()

    def _tell_turned_away(self, why: str | None) -> None:
        self.counted["turned_away"] += 1
        log.warning(_TURNED_AWAY, why)

    def _refuse(self) -> None:
        """Without a free descriptor refuse the next client with the spare one: it would wait, and this loop spin."""
        self._spare.close()
        with contextlib.suppress(OSError):
            self._listener.socket.accept()[0].close()
        self._arrivals.unregister(self._listener.socket)
        self._listen_again()

    def _listen_again(self) -> None:
        """Listen, if a spare descriptor can be had. If not, clients wait in the kernel's queue, which the epoll would
        report again and again.
        """
        try:
            self._spare = open_socket()
        except Unavailable:
            self._look_again = trio.current_time() + _NO_DESCRIPTOR
        else:
            self._arrivals.register(self._listener.socket, select.EPOLLIN)
            self._look_again = math.inf

    def _expect(self, link: UnixLink) -> None:
        fd = link.fileno()
        self._silent[fd] = link
        self._arrivals.register(fd, select.EPOLLIN)
        if len(self._silent) > _MOST_SILENT:
            self.counted["turned_away"] += 1
            self._part(next(iter(self._silent))).close()

    def _hear(self, fd: int) -> _Introduction | None:
        link = self._part(fd)
        try:
            hello = link.receive_nowait()
            if not link.ended:
                return _Introduction(link, hello, self._access)
        except trio.WouldBlock:
            self._expect(link)
            return None
        except Gone:
            pass
        link.close()  # it came and left, or sent something else
        return None

    def _part(self, fd: int) -> UnixLink:
        self._arrivals.unregister(fd)  # else a forked copy of a closed one would be reported for ever
        return self._silent.pop(fd)


def listen(address: UnixAddress, access: Access) -> Rendezvous:
    return _Rendezvous(address, access)


def listen_pair(near: UnixAddress, access: Access) -> PairListener:
    return _PairListener(near, access)


async def dial_pair(address: UnixAddress, trusted: Collection[int]) -> Connection:
    return await _connect(address, MAX_MESSAGE, trusted)


async def introduce(
    address: UnixAddress, hello: bytes, trusted: Collection[int], descriptors: list[int] | None
) -> bytes:
    link = await _connect(address, _MAX_HELLO, trusted)
    try:
        await link.send(hello)
        answer = await link.receive()
        if descriptors is not None:
            descriptors += link.take_descriptors()
        return answer
    except Gone as exc:
        raise Unavailable(f"the server at {address} ended before it answered") from exc
    finally:
        link.close()


async def wait_listening(address: UnixAddress) -> None:
    await wait_bound(address.path)


async def _connect(address: UnixAddress, limit: int, trusted: Collection[int]) -> UnixLink:
    await trio.lowlevel.checkpoint()
    sock = open_socket()
    try:
        sock.connect(address.path)
        link = UnixLink(sock, limit)
    except OSError as exc:
        sock.close()
        if exc.errno == errno.EPROTOTYPE:
            raise ConfigError("address", f"{address} is the socket of another program: name the server's") from exc
        if exc.errno in (errno.EACCES, errno.EPERM):
            raise socket_files.forbidden(address) from exc
        raise Unavailable(f"no server listens at {address}: {exc.strerror}") from exc
    if link.peer_uid not in (0, os.geteuid(), *trusted):
        link.close()
        raise socket_files.untrusted(address, link.peer_uid)
    return link


def _admitted(link: UnixLink, access: Access) -> bool:
    return access.admits(link.peer_uid, link.peer_groups())
