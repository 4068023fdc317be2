"""The slab files: preallocated bytes, read and written in place. Every method here blocks, and runs in a thread.

The slabs are one sequence of bytes: slab i holds [i * slab_size, (i + 1) * slab_size). All slabs but the last have one
size, and an extent may cross from one to the next. `fallocate` takes a slab's blocks at once, so a full disk fails
there, and not when a chunk is written. This module knows no chunks; it keeps open files and nothing else.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from lmcache_trio.errors import ConfigError
from lmcache_trio_backends.disk.home import Home, slab_name
from lmcache_trio_backends.disk.records import ALIGNMENT, Lost

__all__ = ["NO_SPACE", "Slabs", "fallocate", "probe", "set_aside"]

_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_CANT_ALLOCATE = "can't set space aside (fallocate); use ext4, XFS or tmpfs"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk, the user's quota, or the largest file that a process may write (RLIMIT_FSIZE) is full."""
LEAST_GROWTH = 1 << 20
"""The least bytes that a slab grows by when the disk has less than a whole slab: smaller steps make many holes."""
_KEEP_SIZE = 1
"""FALLOC_FL_KEEP_SIZE: set bytes aside behind the end of the file, and leave its size as it is."""
_BOUNCE = 1 << 20


class Slabs:
    """The files `lmcache-trio-slab-00000` and on in *home*, up to *capacity* bytes in all. Is a `ByteIO`."""

    def __init__(self, home: Home, *, slab_size: int, capacity: int, direct: bool) -> None:
        self._home = home
        self.slab_size = slab_size
        self.capacity = capacity
        self._flags = os.O_RDWR | (os.O_DIRECT if direct else 0)
        self._direct = direct
        self._fds: list[int] = []
        self.taken = 0
        self.lost: list[Lost] = []
        """The parts that `open` found missing before the last slab, in order."""
        self.damage: list[str] = []
        """The same for the log: which slab, and how much of it is gone."""

    def open(self) -> None:
        """Open the slabs, cut to the capacity. A missing part costs the chunks in it, and no others.

        The last slab may be short: a kill left it half made, and the next `grow` finishes it. Any other slab is made
        whole again. If the disk has no space for that now, the missing bytes stay unused until the next opening.
        """
        there = dict(self._home.slabs())
        for index in [index for index in there if index * self.slab_size >= self.capacity]:
            self._home.remove_file(there.pop(index))
        last = max(there, default=-1)
        for index in range(last + 1):
            start = index * self.slab_size
            length = min(self.slab_size, self.capacity - start)
            fd = self._home.open_file(slab_name(index), self._flags | os.O_CREAT)
            self._fds.append(fd)
            size = os.fstat(fd).st_size
            if size > length:
                os.ftruncate(fd, length)
            whole = min(size, length) // ALIGNMENT * ALIGNMENT
            self.taken = start + whole
            if whole < length and index < last:
                self._mend(fd, whole, length)
                what = f"has {size} bytes of {length}" if index in there else "is gone"
                self.damage.append(f"{slab_name(index)} {what}")
                self.taken = start + length

    def _mend(self, fd: int, whole: int, length: int) -> None:
        usable = True
        try:
            fallocate(fd, whole, length - whole)
        except OSError as exc:
            if exc.errno not in NO_SPACE:
                raise
            os.ftruncate(fd, whole)
            usable = False
        start = (len(self._fds) - 1) * self.slab_size
        self.lost.append(Lost(start + whole, start + length, usable))

    def remove(self) -> int:
        """Delete all slabs, because no index names their bytes any more. Returns how many there were."""
        self.close()
        self.taken = 0
        names = [name for _, name in self._home.slabs()]
        for name in names:
            self._home.remove_file(name)
        return len(names)

    def grow(self, spare: int) -> int:
        """Take the next slab, or the rest of the last, or as much as the disk has, less *spare* bytes.

        Returns all bytes taken so far. The same number again: the tier has its capacity, or the disk has no more now.
        """
        if self.taken >= self.capacity:
            return self.taken
        index = self.taken // self.slab_size
        start = index * self.slab_size
        have = self.taken - start
        length = min(self.slab_size, self.capacity - start) - have
        least = min(length, LEAST_GROWTH)
        disk = self._home.file_system()
        if disk.f_blocks:  # some file systems give none
            length = min(length, (disk.f_bavail * disk.f_frsize - spare) // ALIGNMENT * ALIGNMENT)
        if length < least:
            return self.taken
        if index == len(self._fds):
            try:
                self._fds.append(self._home.open_file(slab_name(index), self._flags | os.O_CREAT))
            except OSError as exc:
                if exc.errno not in NO_SPACE:  # a disk can be out of files (inodes) before it is out of bytes
                    raise
                return self.taken
            self._home.flush_names()  # or a power failure removes a file whose bytes were flushed
        while length >= least:  # only an attempt shows a quota, or a limit on a file's size
            try:
                fallocate(self._fds[index], have, length)
            except OSError as exc:
                os.ftruncate(self._fds[index], have)  # give back the attempt's blocks
                if exc.errno in _NO_FALLOCATE:
                    raise ConfigError("path", f"the file system of {str(self._home.path)!r} {_CANT_ALLOCATE}") from exc
                if exc.errno not in NO_SPACE:
                    raise
                length = length // 2 // ALIGNMENT * ALIGNMENT
            else:
                self.taken += length
                break
        return self.taken

    def read(self, offset: int, view: memoryview) -> int:
        """Fill *view* from *offset*; fewer bytes if the files are shorter than they should be."""
        done = 0
        for fd, place, part in self._parts(offset, view):
            got = _read_direct(fd, place, part) if self._direct else _read(fd, place, part)
            done += got
            if got < len(part):
                break
        return done

    def write(self, offset: int, view: memoryview) -> None:
        """Write all of *view* at *offset*. O_DIRECT fills the rest up to the next 4 KiB boundary with zeros."""
        for fd, place, part in self._parts(offset, view):
            if self._direct:
                _write_direct(fd, place, part)
            else:
                done = 0
                while done < len(part):
                    done += os.pwritev(fd, [part[done:]], place + done)

    def flush(self) -> None:
        """Bring all written bytes to the disk itself."""
        for fd in self._fds:
            os.fdatasync(fd)

    def close(self) -> None:
        """Idempotent."""
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)

    def _parts(self, offset: int, view: memoryview) -> Iterator[tuple[int, int, memoryview]]:
        """(file, place in it, bytes) for each slab that *view* lies in, up to the first slab that does not exist."""
        at = 0
        while at < len(view):
            index, place = divmod(offset + at, self.slab_size)
            if index >= len(self._fds):
                return
            size = min(len(view) - at, self.slab_size - place)
            yield self._fds[index], place, view[at : at + size]
            at += size


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)  # a 64-bit off_t


def fallocate(fd: int, offset: int, length: int, mode: int = 0) -> None:
    """fallocate(2) itself, without the GIL. OSError if the file system has none.

    `os.posix_fallocate` would then write a byte into each block. That is slow, and promises nothing on a file system
    that writes each version of a block elsewhere.
    """
    while _libc.fallocate(fd, mode, offset, length):
        if (number := ctypes.get_errno()) != errno.EINTR:
            raise OSError(number, os.strerror(number))


def set_aside(path: Path, length: int) -> bool:
    """Set *length* bytes of *path* aside behind its end, for SQLite to grow into. False: the disk has no space now."""
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fallocate(fd, 0, length, _KEEP_SIZE)
    except OSError as exc:
        if exc.errno not in NO_SPACE:
            raise
        return False
    finally:
        os.close(fd)
    return True


def probe(home: Home, *, direct: bool) -> None:
    """Try fallocate, and O_DIRECT if *direct*. ConfigError if the file system has none."""
    name = "lmcache-trio-probe"
    try:
        fd = home.open_file(name, os.O_RDWR | os.O_CREAT)
    except OSError as exc:
        if exc.errno not in NO_SPACE:
            raise
        return  # the next opening tries again
    try:
        fallocate(fd, 0, ALIGNMENT)
        if direct:
            os.close(fd)
            fd = -1
            fd = home.open_file(name, os.O_RDWR | os.O_DIRECT)
            _write_direct(fd, 0, memoryview(bytes(ALIGNMENT)))
    except OSError as exc:
        if exc.errno in NO_SPACE:
            return  # it can, but the disk is full now
        if exc.errno not in _NO_FALLOCATE:
            raise
        if not direct:
            raise ConfigError("path", f"the file system of {str(home.path)!r} {_CANT_ALLOCATE}") from exc
        problem = f"the file system of {str(home.path)!r} takes no O_DIRECT; set it to false, or use ext4 or XFS"
        raise ConfigError("direct", problem) from exc
    finally:
        if fd >= 0:
            os.close(fd)
        home.remove_file(name)


def _read(fd: int, place: int, view: memoryview) -> int:
    done = 0
    while done < len(view) and (got := os.preadv(fd, [view[done:]], place + done)):
        done += got
    return done


def _is_aligned(view: memoryview) -> bool:
    import numpy as np  # costs a fifth of a server's start, and only O_DIRECT needs it

    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0]) % ALIGNMENT == 0


def _straight(view: memoryview) -> int:
    """Bytes of *view* that O_DIRECT may move without a copy: its whole pages, if it begins on a page."""
    return len(view) // ALIGNMENT * ALIGNMENT if len(view) >= ALIGNMENT and _is_aligned(view) else 0


def _read_direct(fd: int, place: int, view: memoryview) -> int:
    """Read whole pages straight into *view*, and the rest through a buffer of whole pages."""
    whole = _straight(view)
    done = 0
    while done < whole:
        got = os.preadv(fd, [view[done:whole]], place + done) // ALIGNMENT * ALIGNMENT
        if not got:
            return done
        done += got
    while done < len(view):
        size = min(_BOUNCE, len(view) - done)
        with mmap.mmap(-1, -(-size // ALIGNMENT) * ALIGNMENT) as pages:  # anonymous memory begins on a page
            got = min(size, os.preadv(fd, [pages], place + done))
            view[done : done + got] = pages[:got]
        done += got
        if got < size:
            break
    return done


def _write_direct(fd: int, place: int, view: memoryview) -> None:
    whole = _straight(view)
    done = 0
    while done < whole:
        done += _whole_pages(os.pwritev(fd, [view[done:whole]], place + done))
    while done < len(view):
        size = min(_BOUNCE, len(view) - done)
        with mmap.mmap(-1, -(-size // ALIGNMENT) * ALIGNMENT) as pages:
            pages[:size] = bytes(view[done : done + size])
            if _whole_pages(os.pwritev(fd, [pages], place + done)) < size:
                raise OSError(errno.EIO, f"a direct write of {size} bytes was cut short")
        done += size


def _whole_pages(written: int) -> int:
    if written < ALIGNMENT or written % ALIGNMENT:
        raise OSError(errno.EIO, f"a direct write ended after {written} bytes")
    return written
