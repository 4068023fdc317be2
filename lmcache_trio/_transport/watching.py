"""Waits until a server appears at a path, also while folders on the way there are missing, or until a socket is not at
its path any more. The kernel tells it; where it does not, there are rare looks.

inotify is called through ctypes, because the standard library does not have it. It tells of changes in this machine's
own file systems, but not of a mount over a folder.
"""

import ctypes
import errno
import os
import struct
from pathlib import Path

import trio

from lmcache_trio._transport import socket_files

__all__ = ["Watch", "wait_bound", "wait_lost"]

_UNWATCHED = 5.0
"""Seconds between two looks for a server where the kernel gives no watch (it gives a user 128 inotify instances), or no
descriptor to look with."""

_UNTOLD = 60.0
"""Seconds between two looks for changes that inotify does not tell, as of a socket whose folder was hidden."""

_CREATE, _MOVED_TO, _ONLYDIR = 0x100, 0x80, 0x01000000
_ATTRIB, _DELETE_SELF, _MOVE_SELF = 0x4, 0x400, 0x800
_HEADER = struct.Struct("iIII")  # watch, what, cookie, bytes of the name after it

_libc = ctypes.CDLL(None, use_errno=True)
_libc.inotify_init1.argtypes = [ctypes.c_int]
_libc.inotify_add_watch.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]


async def wait_bound(path: str) -> None:
    """Return when a living server, of whatever transport, has bound the socket at *path*."""
    await trio.lowlevel.checkpoint()
    while True:
        try:
            if await _appeared(path):
                return
        except OSError:
            await trio.sleep(_UNWATCHED)


async def wait_lost(path: str, file: tuple[int, int]) -> None:
    """Return when *path* does not lead to *file* (device, inode) any more: this bound socket, or a folder on the way,
    was removed, moved or replaced. Its link count and the folders' names are watched, so other files cost nothing. A
    change that the kernel does not tell (a mount over a folder, no watch left) is seen after `_UNTOLD` seconds at most.
    """
    while True:
        fd = -1
        try:
            fd = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
            for watched in (path, *map(str, Path(path).parents)):
                mask = _MOVE_SELF | (_ATTRIB | _DELETE_SELF if watched == path else _ONLYDIR)
                _libc.inotify_add_watch(fd, os.fsencode(watched), mask)  # one that it cannot read is left out
            if not _leads_to(path, file):
                return
            with trio.move_on_after(_UNTOLD):
                await trio.lowlevel.wait_readable(fd)
        except OSError:
            await trio.sleep(_UNTOLD)
        finally:
            if fd >= 0:
                os.close(fd)
        if not _leads_to(path, file):
            return


def _leads_to(path: str, file: tuple[int, int]) -> bool:
    try:
        there = os.lstat(path)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == file


async def _appeared(path: str) -> bool:
    """Whether a server listens at *path*. If none does, wait until the path has changed."""
    if socket_files.is_listening(path):
        return True
    watch = Watch(path)
    try:
        if socket_files.is_listening(path):  # it came before the watch
            return True
        await watch.wait()
    finally:
        watch.close()
    return False


class Watch:
    """Watches every folder on the way to *path* that exists. `OSError`: the kernel gives no (more) watches."""

    def __init__(self, path: str) -> None:
        self._fd = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        self._next: dict[int, bytes] = {}  # by watch: the name in its folder that leads on
        try:
            self._look(Path(os.path.realpath(path)))
        except BaseException:
            self.close()
            raise

    async def wait(self) -> None:
        """Return when a step of the path has appeared, or its folder went, since this was made."""
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            if self._told():
                return

    def close(self) -> None:
        os.close(self._fd)

    def _look(self, path: Path) -> None:
        """From the root on: the folder before a missing one tells when it appears."""
        hidden: OSError | None = None
        for folder, step in zip(reversed(path.parents), path.parts[1:], strict=True):
            try:
                found = _checked(_libc.inotify_add_watch(self._fd, os.fsencode(folder), _CREATE | _MOVED_TO | _ONLYDIR))
            except (FileNotFoundError, NotADirectoryError):
                break
            except PermissionError as exc:
                hidden = exc  # it does not matter if a folder after it can be watched
            else:
                hidden = None
                self._next[found] = os.fsencode(step)
        if hidden is not None:
            raise hidden

    def _told(self) -> bool:
        said = os.read(self._fd, 1 << 16)
        at = 0
        while at < len(said):
            watch, what, _, length = _HEADER.unpack_from(said, at)
            at += _HEADER.size + length
            name = said[at - length : at].rstrip(b"\0")
            if name == self._next.get(watch) or not what & (_CREATE | _MOVED_TO):
                return True  # other events: the folder went, or the queue was too short for all
        return False


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number or errno.EIO, os.strerror(number))
    return result
