"""A client's mapping of the arena: the way of the KV's bytes, beside the messages.

The server passes the arena as the descriptor of an anonymous file, which must be sealed against shrinking: a page that
went away under a copy would kill this process (SIGBUS). Memory is faulted in ahead of use, in a thread and with the GIL
released, because a first touch costs far more than the copy. Nothing in the arena is a flag, a counter or a lock:
messages alone say when which bytes may be touched.

`ctypes` maps it, because Python's `mmap` holds the GIL while it populates (3 s per GiB). The mapping goes with its last
view, so a view never points at unmapped memory.
"""

import ctypes
import fcntl
import mmap
import os
import weakref
from typing import Any

import numpy as np
import trio

from lmcache_trio._wire.codec import OFFSETS
from lmcache_trio._wire.messages import Pinned, Reserved
from lmcache_trio.errors import ProtocolError, Unavailable
from lmcache_trio.host_memory import enter_pages
from lmcache_trio.threads import offload

__all__ = ["ArenaMap"]

_PIECE = 64 << 20
"""Bytes faulted in by one call: 15 ms at 4 GB/s, the longest that closing waits for it."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class ArenaMap:
    """The *size* bytes of the arena behind *fd*, which stays the caller's, mapped for reading and writing.

    `ProtocolError`: the server passed a descriptor of something else. `Unavailable`: the arena cannot be mapped here.
    """

    def __init__(self, fd: int, size: int) -> None:
        try:
            sealed, length = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK, os.fstat(fd).st_size
        except OSError as exc:
            raise ProtocolError(f"what the server passed for its arena is no anonymous file: {exc.strerror}") from exc
        if not sealed or not 0 < size <= length:
            raise ProtocolError(f"the server passed an arena of {length} bytes, not a sealed one of {size}")
        address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise Unavailable(f"the arena of {size} bytes cannot be mapped: {os.strerror(ctypes.get_errno())}")
        # a subclass, because only that can be referred to weakly
        kind: Any = type("_Mapping", (ctypes.c_ubyte * size,), {})
        mapping = kind.from_address(address)
        unmap = weakref.finalize(mapping, _libc.munmap, address, size)
        unmap.atexit = False  # a copy may still run in a thread then; the kernel unmaps
        self._address = address
        self._bytes = np.frombuffer(mapping, dtype=np.uint8).data
        self.size = size
        self.populated = 0
        """Leading bytes whose pages are in this process' tables already."""

    def slots(self, named: Reserved | Pinned) -> list[memoryview]:
        """The slots that *named* names, in its order, each as long as the server said. `ProtocolError` as in `view`.
        Any thread may call this.
        """
        return [self.view(offset, named.slot_bytes) for offset in OFFSETS.unpack(named.offsets)]

    def view(self, offset: int, length: int) -> memoryview:
        """The *length* bytes of a slot that the server named. `ProtocolError` if they lie outside of the arena."""
        end = offset + length
        if offset < 0 or length < 0 or end > self.size:
            raise ProtocolError(f"slot [{offset}, {end}) lies outside of the arena, which has {self.size} bytes")
        return self._bytes[offset:end]

    async def populate(self, taken: int) -> None:
        """Fault in the bytes up to *taken*, one piece per call, so that closing need not wait for all of them."""
        taken = min(taken, self.size)
        while self.populated < taken:
            length = min(_PIECE, taken - self.populated)
            await offload(self._populate, self.populated, length)
            self.populated += length
            await trio.lowlevel.checkpoint()

    def _populate(self, start: int, length: int) -> None:
        head = start % mmap.PAGESIZE
        if enter_pages(self._address + start - head, length + head):
            return
        view = self.view(start, length)
        np.frombuffer(view, dtype=np.uint8)[:: mmap.PAGESIZE].max()
