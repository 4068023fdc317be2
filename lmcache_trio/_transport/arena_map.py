"""A client's mapping of the arena: the way bulk bytes take, beside the messages.

Maps the whole size at once, though the file still grows: what lies beyond its end is never touched. Memory is faulted
in ahead of use, in a thread and with the GIL released, because a first touch costs far more than the copy. Nothing here
is a flag, a counter or a lock: which bytes may be touched when is said by messages alone.

`ctypes` instead of `mmap`: Python's refuses to map beyond the end of the file, and holds the GIL while it populates
(3 s a GiB). The mapping goes when its last view does, so that a view can never point at unmapped memory.
"""

import ctypes
import mmap
import os
import stat
import weakref
from typing import Any

import numpy as np
import trio

from lmcache_trio.errors import ProtocolError, Unavailable
from lmcache_trio.threads import offload

__all__ = ["ArenaMap"]

_POPULATE_WRITE = 23  # Linux 5.14; older kernels say EINVAL
_PIECE = 64 << 20
"""Bytes faulted in by one call: 15 ms at 4 GB/s, the longest that closing waits for it."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class ArenaMap:
    """The arena, mapped for reading and writing. Make one with `open`."""

    def __init__(self, fd: int, size: int) -> None:
        address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        kind: Any = type(
            "_Mapping", (ctypes.c_ubyte * size,), {}
        )  # a subclass, because only that can be referred to weakly
        mapping = kind.from_address(address)
        unmap = weakref.finalize(mapping, _libc.munmap, address, size)
        unmap.atexit = False  # a copy may still run in a thread then; the kernel unmaps
        self._address = address
        self._bytes = np.frombuffer(mapping, dtype=np.uint8).data
        self._fd = os.dup(fd)
        weakref.finalize(self, os.close, self._fd)
        self._end = 0
        self.size = size
        self.populated = 0
        """Leading bytes whose pages are in this process' tables already."""

    @classmethod
    def open(cls, path: str, size: int, nonce: bytes) -> "ArenaMap":
        """Map the file at *path*, if it is the server's. `Unavailable` says why it isn't, and what to share."""
        share = "share the server's /dev/shm with this process (docker: --ipc=host, or --ipc=container:NAME)"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as exc:
            raise Unavailable(f"the arena {path} cannot be opened ({exc.strerror}): {share}") from exc
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode) or os.pread(fd, len(nonce), 0) != nonce or not nonce:
                raise Unavailable(f"the arena {path} is another server's file of the same name: {share}")
            return cls(fd, size)
        except OSError as exc:
            raise Unavailable(f"the arena {path} cannot be mapped ({exc.strerror})") from exc
        finally:
            os.close(fd)

    def view(self, offset: int, length: int) -> memoryview:
        """The *length* bytes of a slot that the server named. `ProtocolError` if they lie outside of the file."""
        end = offset + length
        if offset < 0 or length < 0 or end > self._end:
            self._end = min(self.size, os.fstat(self._fd).st_size)  # it only grows: ask again when it seems too short
            if offset < 0 or length < 0 or end > self._end:
                raise ProtocolError(f"slot [{offset}, {end}) lies outside of the arena, which has {self._end} bytes")
        return self._bytes[offset:end]

    async def populate(self, taken: int) -> None:
        """Fault in what is missing up to *taken*, one piece a call, so that closing need not wait for all of it."""
        taken = min(taken, self.size)
        while self.populated < taken:
            length = min(_PIECE, taken - self.populated)
            await offload(self._populate, self.populated, length)
            self.populated += length
            await trio.lowlevel.checkpoint()

    def _populate(self, start: int, length: int) -> None:
        head = start % mmap.PAGESIZE
        if _libc.madvise(self._address + start - head, length + head, _POPULATE_WRITE) == 0:
            return
        view = self.view(start, length)
        np.frombuffer(view, dtype=np.uint8)[:: mmap.PAGESIZE].max()
