"""The `host` device: engines whose KV lies in shared CPU memory. Copies run in one thread, in order, without the GIL.

An engine's memory is an anonymous file (memfd) of its own process. It is opened by descriptor, under the process id
that the kernel told of the connection's peer, never by a path that the peer names; and it is taken only when it cannot
be made shorter (sealed), since touching a page that is gone would kill the server (SIGBUS).

Measured, 32 KiB blocks scattered, one thread, as a share of memcpy: `np.take(out=, mode="clip")` 0.98; with the default
mode the result is buffered, 0.74; assignment by index 1.0; one memcpy a block 0.68, which is left for blocks that do
not lie densely. This needs no torch.
"""

import ctypes
import fcntl
import mmap
import os
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import trio

from lmcache_trio.abc import ArenaDevice, Attached, Copy, Direction, Export, Memory, SharedMemory, Ticket
from lmcache_trio.errors import Misuse, Unavailable
from lmcache_trio.threads import DedicatedThread, offload

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    _Bytes = npt.NDArray[np.uint8]

__all__ = ["HostConfig", "HostDevice"]

_POPULATE_WRITE = 23  # Linux 5.14; older kernels say EINVAL, and pages come one by one, with the first copy
_HEAD = 4096
"""Slots begin behind the arena's first page."""
_PIECE = 64 << 20
"""Bytes whose pages are entered by one call: about 10 ms, the longest that a cancellation waits for it."""


@attrs.frozen
class HostConfig:
    """The `host` device has no settings."""


class _Opened(Attached):
    """The engine's memory, mapped: for each layer its pieces' blocks, one row a block."""

    def __init__(self, export: Export, maps: "Sequence[_Bytes]") -> None:
        super().__init__(export)
        self.rows = [[_rows(maps[piece.allocation], piece, export) for piece in layer] for layer in export.pieces]

    def close(self) -> None:
        self.rows = []  # the mappings go with their last view


class _HostTicket(Ticket):
    def __init__(self) -> None:
        self.ended = trio.Event()
        self.error: Exception | None = None


class HostDevice(ArenaDevice):
    """Moves blocks of shared memory. It needs numpy, which is imported when the first engine is attached."""

    Config = HostConfig

    def __init__(self, config: HostConfig) -> None:
        super().__init__(config)
        self._memory: Memory | None = None
        self._thread: DedicatedThread | None = None
        self._attached: set[_Opened] = set()
        self._limiter = trio.CapacityLimiter(1)
        self._populating = trio.Lock()
        self._copies = 0
        self._bytes = 0
        self._populated = _HEAD  # bytes of the arena

    @asynccontextmanager
    async def open(self, memory: Memory) -> AsyncIterator[None]:
        self._memory, self._thread = memory, DedicatedThread("lmcache-trio host device")
        self._populated = _HEAD
        try:
            yield
        finally:
            self._thread.close()
            for opened in list(self._attached):
                self.detach(opened)
            self._memory = self._thread = None

    async def attach(self, export: Export, pid: int) -> Attached:
        if self._thread is None:
            raise Unavailable("the host device is not open")
        maps = []
        for memory in export.memory:
            if not isinstance(memory, SharedMemory):
                raise Unavailable("the host device opens shared host memory alone")
            mapped = await offload(_map, memory, pid, limiter=self._limiter)
            for start in range(0, memory.size, _PIECE):
                await offload(_populate, mapped, start, min(_PIECE, memory.size - start), limiter=self._limiter)
            maps.append(mapped)
        await self._populate_arena()
        opened = _Opened(export, maps)
        self._attached.add(opened)
        return opened

    async def arena_grew(self) -> None:
        if self._attached:
            await self._populate_arena()

    async def _populate_arena(self) -> None:
        """Only a server that moves an engine's KV needs the arena's pages in its own table; then it needs them all."""
        async with self._populating:
            memory = self._memory
            while memory is not None and (left := int(memory.statistics()["bytes_taken"]) - self._populated) > 0:
                length = min(left, _PIECE)
                await offload(_populate_view, memory.view(self._populated, length), limiter=self._limiter)
                self._populated += length

    def start(self, copy: Copy) -> Ticket:
        if self._thread is None or self._memory is None:
            raise Unavailable("the host device is not open")
        ticket = _HostTicket()
        self._thread.post(self._run, copy, self._memory, ticket, on_return=ticket.ended.set)
        return ticket

    async def wait_ended(self, ticket: Ticket) -> None:
        if not isinstance(ticket, _HostTicket):
            raise Misuse("this ticket is another device's")
        await ticket.ended.wait()
        if ticket.error is not None:
            raise Unavailable(f"a copy failed: {ticket.error!r}") from ticket.error

    def detach(self, attached: Attached) -> None:
        if isinstance(attached, _Opened) and attached in self._attached:
            self._attached.remove(attached)
            attached.close()

    def statistics(self) -> dict[str, int | str]:
        return {"attached": len(self._attached), "copies": self._copies, "bytes_copied": self._bytes}

    def _run(self, copy: Copy, memory: Memory, ticket: _HostTicket) -> None:
        """In the thread."""
        try:
            self._bytes += copy_blocks(copy, memory)
            self._copies += 1
        except Exception as exc:  # noqa: BLE001  (told to whoever waits for it)
            ticket.error = exc


def copy_blocks(copy: Copy, memory: Memory) -> int:
    """Carry out *copy*, of an `Attached` of this module. Returns the bytes moved. In a thread."""
    import numpy as np

    attached = copy.attached
    assert isinstance(attached, _Opened)
    count, (first, end) = copy.chunk_blocks, copy.layers
    before = count * sum(piece.length for layer in attached.export.pieces[:first] for piece in layer)
    length = count * sum(piece.length for layer in attached.export.pieces[first:end] for piece in layer)
    every = np.asarray(copy.blocks, dtype=np.int64).reshape(len(copy.slots), count)
    slots = [np.frombuffer(memory.view(offset + before, length), dtype=np.uint8) for offset in copy.slots]
    at = moved = 0
    for layer in attached.rows[first:end]:
        for rows in layer:
            size = count * rows.shape[1]
            for blocks, slot in zip(every, slots, strict=True):
                part = slot[at : at + size].reshape(count, rows.shape[1])
                if copy.direction is Direction.STORE:
                    _gather(rows, blocks, part)
                else:
                    _scatter(part, rows, blocks)
            at += size
            moved += size * len(slots)
    return moved


def _gather(rows: "_Bytes", blocks: "npt.NDArray[np.int64]", part: "_Bytes") -> None:
    import numpy as np

    if rows.flags.c_contiguous:  # else take() would first make a copy of everything that is there
        np.take(rows, blocks, axis=0, out=part, mode="clip")
    else:
        for i, block in enumerate(blocks.tolist()):
            part[i] = rows[block]


def _scatter(part: "_Bytes", rows: "_Bytes", blocks: "npt.NDArray[np.int64]") -> None:
    if blocks.min() < 0:  # some are not to be written
        wanted = blocks >= 0
        rows[blocks[wanted]] = part[wanted]
    else:
        rows[blocks] = part


def _rows(mapped: "_Bytes", piece: Any, export: Export) -> "_Bytes":
    import numpy as np

    flat = mapped[piece.offset :]
    return np.lib.stride_tricks.as_strided(flat, (export.num_blocks, piece.length), (piece.stride, 1))


def _map(memory: SharedMemory, pid: int) -> "_Bytes":
    """Map what the process *pid* has behind the descriptor, if it is what it says. In a thread."""
    import numpy as np

    path = f"/proc/{pid}/fd/{memory.descriptor}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as exc:
        raise Unavailable(f"the engine's memory ({path}) cannot be opened: {exc.strerror}") from exc
    try:
        _check(memory, fd)
        return np.frombuffer(mmap.mmap(fd, memory.size), dtype=np.uint8)
    except (OSError, ValueError) as exc:
        raise Unavailable(f"the engine's memory ({path}) cannot be mapped: {exc}") from exc
    finally:
        os.close(fd)


def _check(memory: SharedMemory, fd: int) -> None:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_ino != memory.inode or os.pread(fd, 16, 0) != memory.nonce:
        raise Misuse(f"descriptor {memory.descriptor} is not the memory that was exported")
    if found.st_size < memory.size:
        raise Misuse(f"the memory behind descriptor {memory.descriptor} has {found.st_size} bytes, not {memory.size}")
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError:
        sealed = 0
    if not sealed or found.st_blocks * 512 < memory.size:
        raise Misuse("the memory could vanish under a copy: allocate it whole, and seal it against shrinking")


def _populate(mapped: "_Bytes", start: int, length: int) -> None:
    """Enter the pages into this process' table, which is slower than a copy. In a thread, without the GIL."""
    _libc.madvise(ctypes.c_void_p(mapped.ctypes.data + start), ctypes.c_size_t(length), _POPULATE_WRITE)


def _populate_view(view: memoryview) -> None:
    import numpy as np

    _populate(np.frombuffer(view, dtype=np.uint8), 0, len(view))


_libc = ctypes.CDLL(None, use_errno=True)
