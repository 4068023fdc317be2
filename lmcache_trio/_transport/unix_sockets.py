"""The descriptors and files behind `unix://`: sockets, listeners with their files, and their end in a forked child."""

import contextlib
import os
import select
import socket
import weakref
from typing import Protocol

import trio

from lmcache_trio._transport import socket_files
from lmcache_trio.config import Access
from lmcache_trio.config.addresses import UnixAddress
from lmcache_trio.errors import ConfigError, Unavailable

__all__ = ["Listener", "OwnsDescriptors", "inherited", "open_epoll", "open_socket"]


class OwnsDescriptors(Protocol):
    """An owner of descriptors, which a forked child inherits."""

    def forget(self) -> None:
        """In the child: close its copies. The peer, the parent's loop and the socket's file must not notice."""


inherited: "weakref.WeakSet[OwnsDescriptors]" = weakref.WeakSet()
"""The owners to tell in a forked child."""


class Listener:
    """A listening socket and its file, whose mode lets in the users that *access* names.

    The socket is made at *aside* and linked to *path* once it listens. `ConfigError`: its file cannot be made.
    """

    def __init__(self, path: str, access: Access, *, aside: str, backlog: int) -> None:
        self.path = path
        self.closed = False
        self.socket = open_socket()
        try:
            os.fchmod(self.socket.fileno(), 0o600)  # the file is made with it, whatever the umask lets through
            self.socket.bind(aside)
            if access.gid is not None:
                os.chown(aside, -1, access.gid)
            if access.socket_mode != 0o600:
                os.chmod(aside, access.socket_mode)
            made = os.lstat(aside)
            self.file = made.st_dev, made.st_ino
            self.socket.listen(backlog)
            if aside != path:
                try:
                    os.link(aside, path)  # which replaces nothing
                finally:
                    socket_files.withdraw(aside)
        except FileExistsError as exc:
            self.socket.close()
            raise socket_files.in_use(UnixAddress(path)) from exc
        except OSError as exc:
            self.socket.close()
            raise ConfigError("address", f"{path}: {exc.strerror}") from exc
        inherited.add(self)

    def accept_nowait(self) -> socket.socket | None:
        """The next client's socket, non-blocking, if one came. `OSError`: no descriptor is left for it."""
        try:
            came, _ = self.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        came.setblocking(False)
        return came

    def close(self) -> None:
        if self.closed:
            return
        with contextlib.suppress(RuntimeError):  # outside of a loop nobody waits
            trio.lowlevel.notify_closing(self.socket)
        with contextlib.suppress(OSError):
            there = os.lstat(self.path)
            if (there.st_dev, there.st_ino) == self.file:  # else it is another server's by now
                os.unlink(self.path)
        self.forget()

    def forget(self) -> None:
        self.closed = True
        self.socket.close()
        inherited.discard(self)


def open_socket() -> socket.socket:
    """A new socket, non-blocking and not inherited by other programs. `Unavailable`: it could not be opened."""
    kind = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    try:
        return socket.socket(socket.AF_UNIX, kind)
    except OSError as exc:
        raise Unavailable(f"no socket could be opened: {exc.strerror}") from exc


def open_epoll() -> select.epoll:
    """An epoll: several descriptors that are waited for as one. `Unavailable`: it could not be opened."""
    try:
        return select.epoll()
    except OSError as exc:
        raise Unavailable(f"no descriptor could be opened: {exc.strerror}") from exc


def _after_fork_in_child() -> None:
    for each in list(inherited):
        each.forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
